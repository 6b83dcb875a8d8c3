"""Compress then Serve (arXiv 2407.00066): many LoRAs in one basis, which the bundle has once; each is its cores.

    B_i A_i ≈ U Σ_i Vᵀ        U [out, c], V [in, c] shared; Σ_i [c, c], or its diagonal [c], per adapter

The authors publish no file format. Taken is a state dict `<site>.U`, `<site>.V`, `<site>.sigma.<adapter>`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated

import numpy as np
import typer

from calora_export.importers import Imported, _checkpoint, _lowrank
from calora_export.importers._checkpoint import Checkpoint as StateDict
from calora_export.importers._draft import draft
from calora_export.importers._lowrank import Core
from calora_export.importers._options import Base, Checkpoint, Name, Out, require_positive
from calora_export.manifest import check_id

Scale = Annotated[float, typer.Option(help="What multiplies U Σ Vᵀ: alpha / r, where B A alone was compressed.")]

BASIS = "joint"
_SIGMA = ".sigma."


def run(base: Base, checkpoint: Checkpoint, out: Out, scale: Scale = 1.0, name: Name = None) -> Imported:
    """Compress then Serve: LoRAs in a joint basis U, V with one Σ each; the basis is stored once, an adapter is its Σ.

    BundleError in one line.
    """
    require_positive("--scale", scale)
    with draft(base, out, name, "lots") as made:
        state = _checkpoint.read(checkpoint)
        sites = _sites(state)
        basis: dict[str, np.ndarray] = {}
        for site in sites:
            basis |= _basis(state, site, made.linears)
        _lowrank.write_basis(basis, made.path, BASIS)
        ids = sorted({identifier for found in sites.values() for identifier in found})
        for identifier in ids:
            check_id(identifier, str(checkpoint), "sigma")
            own = [site for site, found in sites.items() if identifier in found]
            cores = {site: Core(_sigma(state, site, identifier), scale) for site in own}
            branches = _lowrank.write_cores(cores, BASIS, made.adapter_dir(identifier), made.linears)
            made.add(identifier, branches)
    return Imported(out, tuple(ids))


def _sites(state: StateDict) -> dict[str, set[str]]:
    """Site → the adapters that have a Σ there."""
    found: dict[str, set[str]] = {}
    for key in state.tensors:
        site, marker, identifier = key.partition(_SIGMA)
        if marker:
            found.setdefault(site, set()).add(identifier)
        elif not key.endswith((".U", ".V")):
            raise state.wrong(key, "<site>.U, <site>.V or <site>.sigma.<adapter>", "another key")
    for key in state.tensors:
        if _SIGMA not in key and key[:-2] not in found:
            raise state.wrong(f"{key[:-2]}{_SIGMA}…", "a tensor", "nothing")
    if not found:
        raise state.wrong("tensors", f"<site>{_SIGMA}<adapter>", "none")
    return found


def _basis(state: StateDict, site: str, linears: Mapping[str, tuple[int, int]]) -> dict[str, np.ndarray]:
    rows, columns = state.site_shape(site, linears, f"{site}.U")
    c = (*state.shape(f"{site}.U"), 0, 0)[1]
    return {f"{site}.up": state.take(f"{site}.U", (rows, c)), f"{site}.down": state.take(f"{site}.V", (columns, c)).T}


def _sigma(state: StateDict, site: str, identifier: str) -> np.ndarray:
    key, c = f"{site}{_SIGMA}{identifier}", state.shape(f"{site}.U")[1]
    return state.take(key, (c,) if len(state.shape(key)) == 1 else (c, c))
