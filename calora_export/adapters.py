"""An adapter as rows of the slot contract, and mixes of several as their rows side by side.

    y = base(x) + up · (gate ⊙ act_rows(down · x))        act = exact GELU on recovery rows, else identity

A branch's scale (alpha / r, arXiv 2307.07705) is folded into `up`: a gate of 1 is the trained adapter.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from calora_export import adapter_format
from calora_export.adapter_format import SiteBranch
from calora_export.bundle import Bundle
from calora_export.errors import BundleError, FingerprintError, mismatch
from calora_export.manifest import FILE, read_manifest
from calora_export.sites import natural_key
from calora_export.tensors import TensorIndex

Linears = Mapping[str, tuple[int, int]]
Bases = Mapping[str, TensorIndex]


@dataclass(frozen=True)
class SiteRows:
    """The rows at one site: `down` float32 [R, in], `up` float32 [out, R] with the scale folded in."""

    down: np.ndarray
    up: np.ndarray


@dataclass(frozen=True)
class Adapter:
    """`recovery` bool [R]: the GELU rows, the same at every site; `fingerprint`: its base's, if known."""

    id: str
    fingerprint: str | None
    rank: int
    recovery: np.ndarray
    sites: dict[str, SiteRows]


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
    return Opened(identifier, spec.base_fingerprint, branches, tensors, linears, bundle.bases)


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
    bundle = path.resolve().parent.parent
    if (bundle / FILE).is_file():
        for index, spec in enumerate(read_manifest(bundle).adapters):
            if spec.id == identifier:
                fingerprint = spec.base_fingerprint
                key = f"adapters[{index}]"
                branches = adapter_format.declared_branches(spec.branches, config, linears, key, label)
                named = sorted({branch.basis for branch in branches if branch.basis is not None})
                bases = {name: adapter_format.open_basis(bundle, name) for name in named}
    if branches is None:
        branches = adapter_format.stored_branches(tensors, config)
    adapter_format.check_tensors(tensors, branches, linears, bases)
    return Opened(identifier, fingerprint, branches, tensors, linears, bases)


@dataclass(frozen=True)
class Opened:
    """An adapter's files, its branches by site, and what it shares with other adapters."""

    id: str
    fingerprint: str | None
    branches: Sequence[SiteBranch]
    tensors: TensorIndex
    linears: Linears
    bases: Bases

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
        return self._rows_of("identity") + self._rows_of("gelu")

    def _rows_of(self, act: str) -> int:
        sites = self._by_site().values()
        return max((sum(branch.r for branch in own if branch.act == act) for own in sites), default=0)

    def _by_site(self) -> dict[str, list[SiteBranch]]:
        by_site: dict[str, list[SiteBranch]] = {}
        for branch in self.branches:
            by_site.setdefault(branch.site, []).append(branch)
        return by_site

    def rows(self) -> Adapter:
        """Identity rows first, then GELU rows; a site with fewer rows of a kind is padded with zeros."""
        by_site, rank = self._by_site(), self.rank
        identity = self._rows_of("identity")
        sites: dict[str, SiteRows] = {}
        for site, own in by_site.items():
            rows = _zeros(self.linears[site], rank)
            start = {"identity": 0, "gelu": identity}
            for branch in own:
                at = slice(start[branch.act], start[branch.act] + branch.r)
                rows.down[at], up = self.matrices(branch)
                rows.up[:, at] = up * np.float32(branch.scale)
                start[branch.act] = at.stop
            sites[site] = rows
        return Adapter(self.id, self.fingerprint, rank, np.arange(rank) >= identity, sites)


def load_adapter_dir(path: Path, linears: Linears) -> Adapter:
    """The rows of `open_adapter_dir`."""
    return open_adapter_dir(path, linears).rows()


def mix(adapters: Sequence[tuple[Adapter, float]]) -> Adapter:
    """Several adapters with weights as one: rows side by side, each `up` times its weight; the ranks add up.

    Sites that an adapter lacks are zero in its rows. FingerprintError when the adapters' bases differ.
    """
    if not adapters:
        return Adapter("none", None, 0, np.zeros(0, bool), {})
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
    return Adapter(name, _common_fingerprint([adapter for adapter, _ in adapters]), rank, recovery, sites)


def _common_fingerprint(adapters: Sequence[Adapter]) -> str | None:
    known = {adapter.fingerprint: adapter.id for adapter in adapters if adapter.fingerprint is not None}
    if len(known) > 1:
        (first, first_id), (second, second_id) = list(known.items())[:2]
        raise FingerprintError(mismatch(second_id, "base_fingerprint", f"{first} as {first_id} has", second))
    return next(iter(known), None)


def _zeros(shape: tuple[int, int], rank: int) -> SiteRows:
    rows, columns = shape
    return SiteRows(np.zeros((rank, columns), np.float32), np.zeros((rows, rank), np.float32))
