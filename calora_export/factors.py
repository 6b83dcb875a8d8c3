"""Adapter files that hold only what is their own: cores between matrices that a package has once, for all adapters.

    y += up · core · down · x        down [r, in] and up [out, c] shared, core [c, r], or [r] for a diagonal

Compress then Serve (arXiv 2407.00066) and MTL-LoRA (arXiv 2410.09437) share both between adapters, ShareLoRA
(arXiv 2406.10785) one or both between the layers of one adapter. The slots take rows: `up · core` is multiplied once,
when a session opens the adapter. Such a file is the same for every target: a safetensors file with the tensors and
`layout`, its JSON.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np
from msgspec import Struct
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from calora_export.adapters import Adapter, Opened, SiteRows
from calora_export.errors import PackageError, mismatch

SUFFIX = ".factors"
LAYOUT = "layout"
DTYPES = {"fp32": np.dtype(np.float32), "fp16": np.dtype(np.float16)}
HELD = {**DTYPES, "int8": DTYPES["fp32"]}
"""Of slots → of the factors of their rows: what is rounded to int8 is the product."""

Tensors = Mapping[str, np.ndarray]


class Site(Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """Names of tensors: of the file or of the basis. The scale is in core, or in up where there is no core."""

    down: str
    up: str
    core: str | None = None


class Layout(Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """basis: the package's file of what adapters share, if this one shares anything."""

    sites: dict[str, Site]
    basis: str | None = None


@dataclass(frozen=True)
class Factored:
    """An adapter as factors. tensors: its own, fp32; what they lack is in the basis."""

    id: str
    layout: Layout
    tensors: Tensors

    def rows(self, basis: Tensors, fingerprint: str | None = None) -> Adapter:
        """Multiplied out, as the slots take it."""
        sites = {site: self._site(names, basis) for site, names in self.layout.sites.items()}
        rank = max((len(rows.down) for rows in sites.values()), default=0)
        padded = {site: _padded(rows, rank) for site, rows in sites.items()}
        return Adapter(self.id, fingerprint, rank, np.zeros(rank, bool), padded)

    def _site(self, names: Site, basis: Tensors) -> SiteRows:
        def held(name: str) -> np.ndarray:
            tensor = self.tensors[name] if name in self.tensors else basis[name]
            return tensor.astype(np.float32, copy=False)

        down, up = held(names.down), held(names.up)
        if names.core is None:
            return SiteRows(down, up)
        core = held(names.core)
        if core.ndim == 1:
            return SiteRows(down, up * core)
        # Rounded once: whatever the order of the additions, every runtime has the same rows.
        return SiteRows(down, (up.astype(np.float64) @ core.astype(np.float64)).astype(np.float32))


def _padded(rows: SiteRows, rank: int) -> SiteRows:
    more = rank - len(rows.down)
    if not more:
        return rows
    return SiteRows(np.pad(rows.down, ((0, more), (0, 0))), np.pad(rows.up, ((0, 0), (0, more))))


def basis_file(name: str) -> str:
    """Where a package has the basis that a bundle calls so."""
    return f"shared/{name}.safetensors"


def of(opened: Opened, basis_file: str | None) -> Factored | None:
    """An adapter of a bundle as factors; None where rows are as small, or where it is more than one matrix per site.

    basis_file: where the package holds what it shares with others; None: nowhere, so that it needs rows of its own.
    """
    branches = opened.branches
    alike = {(branch.role, branch.act) for branch in branches} == {("lora", "identity")}
    plain = alike and len({branch.site for branch in branches}) == len(branches)
    bases = {branch.basis for branch in branches}
    if plain and bases == {None} and any(branch.down_at or branch.up_at for branch in branches):
        return _tied(opened)
    if not plain or len(bases) > 1 or None in bases or basis_file is None:
        return None
    sites, tensors = {}, {}
    for branch in branches:
        site = Site(f"{branch.site}.down", f"{branch.site}.up", f"{branch.site}.core")
        sites[branch.site] = site
        tensors[f"{branch.site}.core"] = opened.tensors.float32(branch.core) * np.float32(branch.scale)
    return Factored(opened.id, Layout(sites, basis_file), tensors)


def _tied(opened: Opened) -> Factored:
    """Matrices that several sites share, once: they are of one branch, and so of one scale."""
    sites, tensors = {}, {}
    for branch in opened.branches:
        down, up = opened.matrices(branch)
        names = Site(f"{branch.down_at or branch.site}.down", f"{branch.up_at or branch.site}.up")
        tensors[names.down], tensors[names.up] = down, up * np.float32(branch.scale)
        sites[branch.site] = names
    return Factored(opened.id, Layout(sites), tensors)


# ── files ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def write(adapter: Factored, dtype: str, key: str, fingerprint: str, path: Path) -> None:
    """Write an adapter file; key: what the fingerprint of its base is called. The same adapter gives the same bytes."""
    arrays = {name: np.ascontiguousarray(tensor.astype(HELD[dtype])) for name, tensor in adapter.tensors.items()}
    # A tensor, not metadata: the order of several entries there would vary.
    layout = np.frombuffer(msgspec.json.encode(adapter.layout, order="deterministic"), np.uint8)
    path.write_bytes(save({**arrays, LAYOUT: layout}, metadata={key: fingerprint}))


def write_basis(basis: Tensors, dtype: str, path: Path) -> None:
    path.write_bytes(basis_bytes(basis, dtype))


def basis_bytes(basis: Tensors, dtype: str) -> bytes:
    return save({name: np.ascontiguousarray(tensor.astype(HELD[dtype])) for name, tensor in basis.items()})


def read(path: Path, key: str) -> tuple[Factored, str]:
    """An adapter file, mapped, and the fingerprint of its base; PackageError for anything else."""
    tensors, metadata = read_tensors(path)
    if LAYOUT not in tensors or key not in metadata:
        raise PackageError(mismatch(path.name, LAYOUT if key in metadata else key, "a tensor of cores", "nothing"))
    try:
        layout = msgspec.json.decode(tensors.pop(LAYOUT).tobytes(), type=Layout)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise PackageError(f"{path.name}: {LAYOUT}: {error}") from None
    return Factored(path.name.removesuffix(SUFFIX), layout, tensors), metadata[key]


def read_tensors(path: Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    try:
        with safe_open(path, "np") as file:
            names = list(file.keys())
            return {name: file.get_tensor(name) for name in names}, file.metadata() or {}
    except (OSError, SafetensorError) as error:
        raise PackageError(f"{path.name}: not a safetensors file: {str(error).splitlines()[0]}") from error


def check(adapter: Factored, basis: Tensors, linears: Mapping[str, tuple[int, int]], file: str) -> None:
    """PackageError unless every site has a slot and its factors fit together and into it."""
    for site, names in adapter.layout.sites.items():
        if site not in linears:
            raise PackageError(mismatch(file, site, "a site with a slot", "another one"))
        shapes: dict[str, tuple[int, ...]] = {}
        for name in filter(None, (names.down, names.core, names.up)):
            tensor = adapter.tensors.get(name, basis.get(name))
            if tensor is None or tensor.dtype not in DTYPES.values():
                raise PackageError(mismatch(file, name, "a float tensor", "none" if tensor is None else tensor.dtype))
            shapes[name] = tensor.shape
        rows, columns = linears[site]
        r, c = (*shapes[names.down], 0)[0], (*shapes[names.up], 0, 0)[1]
        wanted: dict[str, list[tuple[int, ...]]] = {names.down: [(r, columns)], names.up: [(rows, c)]}
        if names.core is not None:
            wanted[names.core] = [(c, r), *([(r,)] if c == r else [])]
        elif c != r:
            wanted[names.up] = [(rows, r)]
        for name, allowed in wanted.items():
            if shapes[name] not in allowed:
                raise PackageError(mismatch(file, name, list(allowed[0]), list(shapes[name])))
