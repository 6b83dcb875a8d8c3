"""FLoRA (batched, arXiv 2312.05677): an adapter that multiplies the base's weight, W ∘ (B A).

    Y = φ(A ∘ ((B ∘ X) W))        rank 1: a scale per input and one per output

A higher rank is a sum of r such products, r passes through the base's layer: refused. The authors publish no file
format; taken is a state dict `<site>.flora_A` [r, out], `<site>.flora_B` [in, r].
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from calora_export.errors import UnsupportedError, mismatch
from calora_export.importers import Imported, _checkpoint, _lowrank
from calora_export.importers._checkpoint import Checkpoint as StateDict
from calora_export.importers._draft import Draft, adapter_id, draft
from calora_export.importers._lowrank import LowRank
from calora_export.importers._options import Base, Name, Out

Sources = Annotated[list[Path], typer.Argument(help="FLoRA state dicts, one per adapter.", show_default=False)]

MARKER = ".flora_"


def run(base: Base, checkpoints: Sources, out: Out, name: Name = None) -> Imported:
    """FLoRA adapters of rank 1: what multiplies each layer's input and output. Higher ranks are refused.

    BundleError or UnsupportedError in one line.
    """
    ids: list[str] = []
    for checkpoint in checkpoints:
        ids.append(adapter_id(checkpoint, ids))
    with draft(base, out, name, "flora") as made:
        for identifier, checkpoint in zip(ids, checkpoints, strict=True):
            scales = _scales(_checkpoint.read(checkpoint), made)
            branches = _lowrank.write(LowRank({}, scales=scales), made.adapter_dir(identifier), made.linears)
            made.add(identifier, branches)
    return Imported(out, tuple(ids))


def _scales(state: StateDict, made: Draft) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Site → scales of its input [in] and output [out]."""
    found: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    for site, parts in state.sites(MARKER).items():
        rows, columns = state.site_shape(site, made.linears, f"{site}{MARKER}A")
        state.require(site, MARKER, parts, {"A", "B"})
        r = (*state.shape(f"{site}{MARKER}A"), 0)[0]
        if r > 1:
            hint = "a higher rank is that many passes through the base; train rank 1, or LoRA"
            raise UnsupportedError(mismatch(state.file, f"{site}{MARKER}A", "rank 1", f"rank {r}", hint))
        after, before = state.take(f"{site}{MARKER}A", (1, rows))[0], state.take(f"{site}{MARKER}B", (columns, 1))[:, 0]
        found[site] = before, after
    return found
