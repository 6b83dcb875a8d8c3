"""MultiLoRA (arXiv 2311.11501): n parallel LoRAs whose outputs are scaled row by row; exact as one of rank n · r.

    ΔW = (alpha / r) · Σ_i diag(γ_i) B_i A_i

The state dict of the implementation that MTL-LoRA's authors compare with has, per adapted layer, lora_A [n, r, in],
lora_B [n, out, r] and lora_scaling [n, out].
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import typer

from calora_export.importers import Imported, _checkpoint, _lowrank
from calora_export.importers._draft import adapter_id, draft
from calora_export.importers._lowrank import LowRank, Pair
from calora_export.importers._options import Alpha, Base, Name, Out, require_positive

Checkpoints = Annotated[
    list[Path], typer.Argument(help="State dicts: .pt, .pth, .bin or .safetensors.", show_default=False)
]

MARKER = ".lora_"


def run(base: Base, checkpoints: Checkpoints, out: Out, alpha: Alpha, name: Name = None) -> Imported:
    """MultiLoRA checkpoints: one adapter each, its id the file's name without suffix.

    BundleError in one line.
    """
    require_positive("--alpha", alpha)
    ids: list[str] = []
    for path in checkpoints:
        ids.append(adapter_id(path, ids))
    with draft(base, out, name, "multilora") as made:
        for identifier, path in zip(ids, checkpoints, strict=True):
            adapter = LowRank(_read(path, made.linears, alpha))
            made.add(identifier, _lowrank.write(adapter, made.adapter_dir(identifier), made.linears))
    return Imported(out, tuple(ids))


def _read(path: Path, linears: Mapping[str, tuple[int, int]], alpha: float) -> dict[str, Pair]:
    state = _checkpoint.read(path, "module.")
    pairs: dict[str, Pair] = {}
    for site, parts in state.sites(MARKER).items():
        key = f"{site}{MARKER}"
        rows, columns = state.site_shape(site, linears, f"{key}A")
        state.require(site, MARKER, parts, ("A", "B", "scaling"))
        n, r = (*state.shape(f"{key}A"), 0, 0)[:2]
        a, b = state.take(f"{key}A", (n, r, columns)), state.take(f"{key}B", (n, rows, r))
        gamma = state.take(f"{key}scaling", (n, rows))
        up = (gamma[:, :, None] * b).transpose(1, 0, 2).reshape(rows, n * r)
        pairs[site] = Pair(a.reshape(n * r, columns), up, alpha / r)
    return pairs
