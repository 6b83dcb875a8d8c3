"""Compress then Serve (arXiv 2407.00066): many LoRAs in one basis; each is materialised as plain LoRA, exactly.

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
from calora_export.importers._lowrank import LowRank, Pair
from calora_export.importers._options import Base, Checkpoint, Name, Out
from calora_export.manifest import check_id

Scale = Annotated[float, typer.Option(help="What multiplies U Σ Vᵀ: alpha / r, where B A alone was compressed.")]

_SIGMA = ".sigma."


def run(base: Base, checkpoint: Checkpoint, out: Out, scale: Scale = 1.0, name: Name = None) -> Imported:
    """LoRAs in a joint basis U, V with one Σ each: every one becomes a plain LoRA.

    BundleError in one line.
    """
    with draft(base, out, name, "lots") as made:
        state = _checkpoint.read(checkpoint)
        sites = _sites(state)
        ids = sorted({identifier for found in sites.values() for identifier in found})
        for identifier in ids:
            check_id(identifier, str(checkpoint), "sigma")
            own = [site for site, found in sites.items() if identifier in found]
            lora = {site: _pair(state, site, identifier, made.linears, scale) for site in own}
            made.add(identifier, _lowrank.write(LowRank(lora), made.adapter_dir(identifier), made.linears))
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


def _pair(state: StateDict, site: str, identifier: str, linears: Mapping[str, tuple[int, int]], scale: float) -> Pair:
    rows, columns = state.site_shape(site, linears, f"{site}.U")
    c = (*state.shape(f"{site}.U"), 0, 0)[1]
    u, v = state.take(f"{site}.U", (rows, c)), state.take(f"{site}.V", (columns, c))
    key = f"{site}{_SIGMA}{identifier}"
    diagonal = len(state.shape(key)) == 1
    sigma = state.take(key, (c,) if diagonal else (c, c))
    return Pair(np.ascontiguousarray(v.T), u * sigma if diagonal else u @ sigma, scale)
