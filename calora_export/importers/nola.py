"""NOLA (arXiv 2310.02556): A and B as a base plus a few coefficients times random matrices that a seed brings back.

    A = weight + Σ_b c_b U_b(seed) / √n        U_b uniform in [-1, 1), drawn on the device that trained it

PEFT's directory, with lora_A.{weight, coefficients, seed} and the same for lora_B. A GPU's generator draws other
numbers than a CPU's: only what was trained on a CPU can be made here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import typer

from calora_export import adapter_format
from calora_export.errors import UnsupportedError, mismatch
from calora_export.importers import Imported, _checkpoint, _lowrank
from calora_export.importers._checkpoint import Checkpoint
from calora_export.importers._draft import directory_ids, draft
from calora_export.importers._lowrank import LowRank, Pair
from calora_export.importers._options import Adapters, Base, Name, Out

TrainedOn = Annotated[
    Literal["cpu", "cuda"], typer.Option(help="The device that drew the random matrices.", show_default=False)
]

MARKER = ".lora_"
_PARTS = {f"{matrix}.{part}" for matrix in "AB" for part in ("weight", "coefficients", "seed")}
_FILES = ("adapter_model.safetensors", "adapter_model.bin")


def run(base: Base, adapters: Adapters, out: Out, trained_on: TrainedOn, name: Name = None) -> Imported:
    """NOLA adapters, as PEFT directories: A and B are made from their seeds and stored as plain LoRA.

    BundleError in one line; UnsupportedError for random matrices that a GPU drew.
    """
    if trained_on != "cpu":
        expected = "cpu, whose numbers can be drawn again"
        hint = "there, store weight + Σ c·U/√n as lora_A and lora_B, and use import peft"
        raise UnsupportedError(mismatch("nola", "--trained-on", expected, trained_on, hint))
    ids = directory_ids(adapters)
    with draft(base, out, name, "nola") as made:
        for identifier, source in zip(ids, adapters, strict=True):
            adapter = LowRank(_read(source, made.linears))
            made.add(identifier, _lowrank.write(adapter, made.adapter_dir(identifier), made.linears))
    return Imported(out, tuple(ids))


def _read(source: Path, linears: Mapping[str, tuple[int, int]]) -> dict[str, Pair]:
    config = adapter_format.read_config(source, str(source))
    file = next((source / name for name in _FILES if (source / name).is_file()), source / _FILES[0])
    state = _checkpoint.read(file, "base_model.model.")
    pairs: dict[str, Pair] = {}
    if not any(key.endswith(".coefficients") for key in state.tensors):
        raise state.wrong("tensors", "lora_A.coefficients and lora_A.seed", "none", "import peft takes plain LoRA")
    for site, parts in state.sites(MARKER).items():
        rows, columns = state.site_shape(site, linears, f"{site}{MARKER}A.weight")
        state.require(site, MARKER, parts, _PARTS)
        r = config.rank_at(site)
        down, up = (_matrix(state, f"{site}{MARKER}{m}", shape) for m, shape in (("A", (r, columns)), ("B", (rows, r))))
        pairs[site] = Pair(down, up, config.scale(config.alpha_at(site), r))
    return pairs


def _matrix(state: Checkpoint, key: str, shape: tuple[int, int]) -> np.ndarray:
    import torch

    weight = state.take(f"{key}.weight", shape)
    n = (*state.shape(f"{key}.coefficients"), 0)[0]
    coefficients = state.take(f"{key}.coefficients", (n,))
    kind = state.tensors[f"{key}.coefficients"].dtype  # the generator's numbers depend on it
    generator = torch.Generator().manual_seed(state.integer(f"{key}.seed"))
    drawn = torch.zeros(n, *shape, dtype=kind).uniform_(-1.0, 1.0, generator=generator) * (1.0 / math.sqrt(n))
    return weight + np.tensordot(coefficients, drawn.float().numpy(), axes=1)
