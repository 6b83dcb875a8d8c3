"""An adapter as rows of the slot contract, and mixes of several as their rows side by side.

    y = base(x) + up · (gate ⊙ act_rows(down · x))        act = exact GELU on recovery rows, else identity

A branch's scale (alpha / r, arXiv 2307.07705) is folded into `up`: a gate of 1 is the trained adapter.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import numpy as np

from calora_export import adapter_format
from calora_export.adapter_format import SiteBranch
from calora_export.bundle import Bundle, router_scopes
from calora_export.compression import PackedWeight, quantize_symmetric
from calora_export.errors import BundleError, FingerprintError, UnsupportedError, mismatch
from calora_export.manifest import FILE, read_manifest
from calora_export.sites import natural_key
from calora_export.tensors import TensorIndex

Linears = Mapping[str, tuple[int, int]]
Bases = Mapping[str, TensorIndex]
Kind = Literal["rows", "scales", "routed"]


@dataclass(frozen=True)
class SiteRows:
    """The rows at one site: `down` float32 [R, in], `up` float32 [out, R] with the scale folded in."""

    down: np.ndarray
    up: np.ndarray


@dataclass(frozen=True)
class TokenRouter:
    """weight fp32 [E, features], bias fp32 [2, E]: softmax(weight x + bias[0]) + bias[1] weighs the experts."""

    weight: np.ndarray
    bias: np.ndarray


@dataclass(frozen=True)
class Adapter:
    """`recovery` bool [R]: the GELU rows, the same at every site; `fingerprint`: its base's, if known.

    experts int [R]: of which expert each row is, -1 for none; None: all of none. routers: module → what weighs the
    experts for each token, for the sites below it. scales: site → fp32 [in] and [out], what multiplies the layer's
    input and output.
    """

    id: str
    fingerprint: str | None
    rank: int
    recovery: np.ndarray
    sites: dict[str, SiteRows]
    experts: np.ndarray | None = None
    routers: Mapping[str, TokenRouter] = field(default_factory=dict)
    scales: Mapping[str, tuple[np.ndarray, np.ndarray]] = field(default_factory=dict)

    @property
    def kind(self) -> Kind:
        return "scales" if self.scales else "routed" if self.routers else "rows"

    def experts_of_rows(self) -> np.ndarray:
        """int [R], -1 where a row is of no expert."""
        return np.full(self.rank, -1) if self.experts is None else self.experts


def int8_rows(matrix: np.ndarray) -> PackedWeight:
    """Each row of a matrix float32 [R, n] as int8 and a float32 scale, absmax / 127."""
    return quantize_symmetric(matrix, 8, matrix.shape[1], np.float32)


def in_int8(adapter: Adapter) -> Adapter:
    """The adapter as files with int8 rows hold it: `down` and the transpose of `up` rounded, row by row."""
    sites = {
        site: SiteRows(int8_rows(rows.down).dequantize(), int8_rows(rows.up.T).dequantize().T)
        for site, rows in adapter.sites.items()
    }
    return replace(adapter, sites=sites)


def load_adapter(bundle: Bundle, identifier: str) -> Adapter:
    """The rows of a bundle's adapter; BundleError when there is none of that id."""
    return opened(bundle, identifier).rows()


def opened(bundle: Bundle, identifier: str) -> Opened:
    """A bundle's adapter, nothing of it read yet; BundleError when there is none of that id."""
    index = [adapter.id for adapter in bundle.manifest.adapters].index(bundle.adapter(identifier).id)
    spec, label = bundle.manifest.adapters[index], f"adapters/{identifier}"
    directory = bundle.adapter_dir(identifier)
    linears = bundle.adaptable
    config = adapter_format.read_config(directory, label)
    branches = adapter_format.declared_branches(spec.branches, config, linears, f"adapters[{index}]", label)
    tensors = adapter_format.open_weights(directory, label)
    scopes = router_scopes(spec, linears, f"adapters[{index}]")
    weights = spec.expert_weights
    return Opened(identifier, spec.base_fingerprint, branches, tensors, linears, bundle.bases, scopes, weights)


def open_adapter_dir(path: Path, linears: Linears) -> Opened:
    """An adapter directory, checked, its id being the directory's name.

    Inside a bundle that lists it, the bundle says branches and fingerprint. Else it is plain PEFT, with
    CA-LoRA's lora_a1 / lora_a2 as recovery, and the fingerprint is None. `linears`: the base's, as (out, in).
    """
    identifier, label = path.resolve().name, str(path)
    if not path.is_dir():
        raise BundleError(mismatch(path, "adapter", "a directory", "a file" if path.exists() else "nothing"))
    config = adapter_format.read_config(path, label)
    tensors = adapter_format.open_weights(path, label)
    fingerprint = None
    branches = None
    bases: Bases = {}
    scopes: tuple[str, ...] = ()
    weights = None
    bundle = path.resolve().parent.parent
    if (bundle / FILE).is_file():
        for index, spec in enumerate(read_manifest(bundle).adapters):
            if spec.id == identifier:
                fingerprint = spec.base_fingerprint
                key = f"adapters[{index}]"
                branches = adapter_format.declared_branches(spec.branches, config, linears, key, label)
                named = sorted({branch.basis for branch in branches if branch.basis is not None})
                bases = {name: adapter_format.open_basis(bundle, name) for name in named}
                scopes, weights = router_scopes(spec, linears, key), spec.expert_weights
    if branches is None:
        branches = adapter_format.stored_branches(tensors, config)
    adapter_format.check_tensors(tensors, branches, linears, bases, scopes)
    return Opened(identifier, fingerprint, branches, tensors, linears, bases, scopes, weights)


@dataclass(frozen=True)
class Opened:
    """An adapter's files, its branches by site, and what it shares with other adapters. scopes: the modules whose input
    weighs its experts for each token; expert_weights: what weighs them instead."""

    id: str
    fingerprint: str | None
    branches: Sequence[SiteBranch]
    tensors: TensorIndex
    linears: Linears
    bases: Bases
    scopes: tuple[str, ...] = ()
    expert_weights: tuple[float, ...] | None = None

    def matrices(self, branch: SiteBranch) -> tuple[np.ndarray, np.ndarray]:
        """down fp32 [r, in] and up fp32 [out, r] of a branch, its scale not in them."""
        if branch.basis is None:
            return self.tensors.float32(branch.down), self.tensors.float32(branch.up)
        basis, core = self.bases[branch.basis], self.tensors.float32(branch.core)
        up = basis.float32(f"{branch.site}.up")
        return basis.float32(f"{branch.site}.down"), up * core if core.ndim == 1 else up @ core

    @property
    def rank(self) -> int:
        """Rows at a site: of the most that any has of each kind."""
        return self._layout().rank

    def _layout(self) -> _Layout:
        experts = next((branch.experts for branch in self.branches if branch.experts), 0)
        identity, expert, gelu = (self._most(kind) for kind in ("identity", "expert", "gelu"))
        alone = all(branch.role == "scale" for branch in self.branches)  # runtimes take no adapter without rows
        return _Layout(max(identity, int(alone)), expert, experts, gelu)

    def _most(self, kind: str) -> int:
        sites = self._by_site().values()
        return max((sum(branch.r for branch in own if _kind(branch) == kind) for own in sites), default=0)

    def _by_site(self) -> dict[str, list[SiteBranch]]:
        by_site: dict[str, list[SiteBranch]] = {}
        for branch in self.branches:
            if branch.role != "scale":
                by_site.setdefault(branch.site, []).append(branch)
        return by_site

    def rows(self) -> Adapter:
        """Identity rows first, then each expert's, then GELU rows; a site with fewer rows of a kind is padded with
        zeros."""
        layout = self._layout()
        sites: dict[str, SiteRows] = {}
        for site, own in self._by_site().items():
            rows = _zeros(self.linears[site], layout.rank)
            start = {"identity": 0, "expert": 0, "gelu": 0}
            for branch in own:
                kind = _kind(branch)
                for expert, (down, up) in enumerate(self._pairs(branch)):
                    at = layout.start(kind, expert) + start[kind]
                    rows.down[at : at + branch.r] = down
                    rows.up[:, at : at + branch.r] = up * np.float32(branch.scale)
                start[kind] += branch.r
            sites[site] = rows
        index = np.arange(layout.rank)
        recovery = index >= layout.start("gelu", 0)
        if not self.scopes:
            return Adapter(self.id, self.fingerprint, layout.rank, recovery, sites, scales=self._scales())
        weighed = (index >= layout.identity) & ~recovery
        owners = np.where(weighed, (index - layout.identity) // max(layout.expert, 1), -1)
        routers = {scope: self._router(scope) for scope in self.scopes}
        return Adapter(self.id, self.fingerprint, layout.rank, recovery, sites, owners, routers, self._scales())

    def _pairs(self, branch: SiteBranch) -> list[tuple[np.ndarray, np.ndarray]]:
        """One pair, or one for each expert, with its weight if that does not change."""
        down, up = self.matrices(branch)
        if branch.experts is None:
            return [(down, up)]
        weights = self.expert_weights or (1.0,) * branch.experts
        return [(down[e], up[e] * np.float32(weight)) for e, weight in enumerate(weights)]

    def _router(self, scope: str) -> TokenRouter:
        return TokenRouter(*(self.tensors.float32(name) for name in adapter_format.router_tensors(scope)))

    def _scales(self) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        return {branch.site: self.matrices(branch) for branch in self.branches if branch.role == "scale"}


@dataclass(frozen=True)
class _Layout:
    """How many rows of each kind there are at a site: `expert` of each of `experts`."""

    identity: int
    expert: int
    experts: int
    gelu: int

    @property
    def rank(self) -> int:
        return self.start("gelu", 0) + self.gelu

    def start(self, kind: str, expert: int) -> int:
        if kind == "identity":
            return 0
        return self.identity + self.expert * (self.experts if kind == "gelu" else expert)


def _kind(branch: SiteBranch) -> str:
    return "expert" if branch.role == "expert" else branch.act


def load_adapter_dir(path: Path, linears: Linears) -> Adapter:
    """The rows of `open_adapter_dir`."""
    return open_adapter_dir(path, linears).rows()


def mix(adapters: Sequence[tuple[Adapter, float]]) -> Adapter:
    """Several adapters with weights as one: rows side by side, each `up` times its weight; the ranks add up.

    Sites that an adapter lacks are zero in its rows. FingerprintError when the adapters' bases differ, UnsupportedError
    for adapters that `require_mixable` refuses.
    """
    if not adapters:
        return Adapter("none", None, 0, np.zeros(0, bool), {})
    require_mixable({adapter.id: adapter.kind for adapter, _ in adapters}, {a.id: weight for a, weight in adapters})
    shapes = {
        site: (rows.up.shape[0], rows.down.shape[1]) for adapter, _ in adapters for site, rows in adapter.sites.items()
    }
    rank = sum(adapter.rank for adapter, _ in adapters)
    sites = {site: _zeros(shapes[site], rank) for site in sorted(shapes, key=natural_key)}
    start = 0
    for adapter, weight in adapters:
        rows = slice(start, start + adapter.rank)
        for site, own in adapter.sites.items():
            sites[site].down[rows] = own.down
            sites[site].up[:, rows] = own.up * np.float32(weight)
        start = rows.stop
    recovery = np.concatenate([adapter.recovery for adapter, _ in adapters])
    name = "+".join(adapter.id for adapter, _ in adapters)
    fingerprint = _common_fingerprint([adapter for adapter, _ in adapters])
    experts = np.concatenate([adapter.experts_of_rows() for adapter, _ in adapters])
    routers = {scope: router for adapter, _ in adapters for scope, router in adapter.routers.items()}
    scales = {site: pair for adapter, _ in adapters for site, pair in adapter.scales.items()}
    return Adapter(name, fingerprint, rank, recovery, sites, experts, routers, scales)


def require_mixable(kinds: Mapping[str, Kind], weights: Mapping[str, float]) -> None:
    """UnsupportedError for what no formula says: scales that are not alone and whole, experts of two routers."""
    for name, kind in kinds.items():
        if kind == "scales" and (len(kinds) > 1 or weights[name] != 1.0):
            found = ", ".join(f"{other}={weights[other]:g}" for other in kinds)
            raise UnsupportedError(mismatch("mix", name, "it alone at weight 1, since it multiplies layers", found))
    routed = [name for name, kind in kinds.items() if kind == "routed"]
    if len(routed) > 1:
        expected = "one adapter that weighs its experts by token"
        raise UnsupportedError(mismatch("mix", routed[1], expected, " and ".join(routed)))


def _common_fingerprint(adapters: Sequence[Adapter]) -> str | None:
    known = {adapter.fingerprint: adapter.id for adapter in adapters if adapter.fingerprint is not None}
    if len(known) > 1:
        (first, first_id), (second, second_id) = list(known.items())[:2]
        raise FingerprintError(mismatch(second_id, "base_fingerprint", f"{first} as {first_id} has", second))
    return next(iter(known), None)


def _zeros(shape: tuple[int, int], rank: int) -> SiteRows:
    rows, columns = shape
    return SiteRows(np.zeros((rank, columns), np.float32), np.zeros((rows, rank), np.float32))
