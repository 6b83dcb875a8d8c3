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
    index = [adapter.id for adapter in bundle.manifest.adapters].index(bundle.adapter(identifier).id)
    spec, label = bundle.manifest.adapters[index], f"adapters/{identifier}"
    directory = bundle.adapter_dir(identifier)
    linears = bundle.adaptable
    config = adapter_format.read_config(directory, label)
    branches = adapter_format.declared_branches(spec.branches, config, linears, f"adapters[{index}]", label)
    tensors = adapter_format.open_weights(directory, label)
    return _assemble(identifier, spec.base_fingerprint, branches, tensors, linears)


def load_adapter_dir(path: Path, linears: Linears) -> Adapter:
    """The rows of an adapter directory, its id being the directory's name.

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
    bundle = path.resolve().parent.parent
    if (bundle / FILE).is_file():
        for index, spec in enumerate(read_manifest(bundle).adapters):
            if spec.id == identifier:
                fingerprint = spec.base_fingerprint
                key = f"adapters[{index}]"
                branches = adapter_format.declared_branches(spec.branches, config, linears, key, label)
    if branches is None:
        branches = adapter_format.stored_branches(tensors, config)
    adapter_format.check_tensors(tensors, branches, linears)
    return _assemble(identifier, fingerprint, branches, tensors, linears)


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


def _assemble(
    identifier: str,
    fingerprint: str | None,
    branches: Sequence[SiteBranch],
    tensors: TensorIndex,
    linears: Linears,
) -> Adapter:
    """Identity rows first, then GELU rows; a site with fewer rows of a kind is padded with zeros."""
    by_site: dict[str, list[SiteBranch]] = {}
    for branch in branches:
        by_site.setdefault(branch.site, []).append(branch)
    identity = max((_rows_of(site, "identity") for site in by_site.values()), default=0)
    rank = identity + max((_rows_of(site, "gelu") for site in by_site.values()), default=0)
    sites: dict[str, SiteRows] = {}
    for site, own in by_site.items():
        rows = _zeros(linears[site], rank)
        start = {"identity": 0, "gelu": identity}
        for branch in own:
            at = slice(start[branch.act], start[branch.act] + branch.r)
            rows.down[at] = tensors.float32(branch.down)
            rows.up[:, at] = tensors.float32(branch.up) * np.float32(branch.scale)
            start[branch.act] = at.stop
        sites[site] = rows
    return Adapter(identifier, fingerprint, rank, np.arange(rank) >= identity, sites)


def _rows_of(branches: Sequence[SiteBranch], act: str) -> int:
    return sum(branch.r for branch in branches if branch.act == act)


def _zeros(shape: tuple[int, int], rank: int) -> SiteRows:
    rows, columns = shape
    return SiteRows(np.zeros((rank, columns), np.float32), np.zeros((rows, rank), np.float32))
