"""Which target holds which stored weight how: found by asking the recipes, not by a table that could go stale."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import ml_dtypes
import numpy as np
from msgspec import Struct

from calora_export import recipe as recipes
from calora_export.compression import NF4, DenseWeight, PackedWeight, form, quantize_symmetric
from calora_export.errors import UnsupportedError

Outcome = Literal["exact", "re-represented", "refused"]

SITE = "model.layers.0.mlp.up_proj"
ROWS, COLUMNS = 4, 256


class Cell(Struct, frozen=True):
    """What a recipe does with weights that a bundle stores in a scheme. note: what is lost, or what to do instead."""

    scheme: str
    target: str
    recipe: str
    outcome: Outcome
    held_as: str
    note: str


def matrix() -> list[Cell]:
    """Every scheme that a bundle can hold × every recipe that ships."""
    return [
        _cell(scheme, weight, name, recipe)
        for name, recipe in recipes.catalogue().items()
        for scheme, weight in samples().items()
    ]


def samples() -> dict[str, DenseWeight | PackedWeight]:
    """A weight [4, 256] of every scheme; scales as quantisers save them: bf16, of GPTQ and AWQ fp16, of NF4 fp32."""
    dense = np.geomspace(0.01, 1, ROWS * COLUMNS, dtype=np.float32).reshape(ROWS, COLUMNS)  # no two groups alike
    dense[:, 1::2] *= -1
    order = np.random.default_rng(0).permutation(COLUMNS)

    def packed(bits: int, group: int, scales: type[np.generic] = ml_dtypes.bfloat16) -> PackedWeight:
        return quantize_symmetric(dense, bits, group, scales)

    def shifted(weight: PackedWeight) -> PackedWeight:
        return replace(weight, zero=(np.arange(weight.scale.size) % 13 - 6).astype(np.int8).reshape(weight.scale.shape))

    nf4 = packed(4, 64, np.float32)
    return {
        "fp32, fp16, bf16": DenseWeight(dense),
        "int8, rows": packed(8, COLUMNS),
        "int8, rows, W8A8": replace(packed(8, COLUMNS), activations="int8_absmax"),
        "int8, rows, zero points": shifted(packed(8, COLUMNS)),
        "int8, groups": packed(8, 32),
        "int8, groups, zero points": shifted(packed(8, 128, np.float16)),
        "int4, rows": packed(4, COLUMNS),
        "int4, groups": packed(4, 32),
        "int4, groups, fp16 scales": packed(4, 128, np.float16),
        "int4, groups of 16": packed(4, 16),
        "int4, groups, zero points": shifted(packed(4, 128, np.float16)),
        "int4, groups, act-order": replace(packed(4, 128, np.float16), order=order),
        "nf4, blocks of 64": replace(nf4, q=(nf4.q.astype(np.int16) + 8).astype(np.int8), codebook=NF4),
    }


def _reason(line: str) -> str:
    """Of an error's line what its reader does not know: not the module, and not the weight's form."""
    what, _, hint = line.removeprefix(f"{SITE}: ").partition(" (")
    return hint.removesuffix(")") if what.startswith("weight: ") else f"{what} ({hint}"


def _cell(scheme: str, weight: DenseWeight | PackedWeight, name: str, recipe: recipes.Recipe) -> Cell:
    try:
        made = recipes.represent(recipe, SITE, weight)
    except UnsupportedError as error:
        return Cell(scheme, recipe.target, name, "refused", "–", _reason(str(error)))
    held = form(made.weight) if isinstance(made.weight, PackedWeight) else recipe.rule(SITE).scheme
    if made.exact:
        return Cell(scheme, recipe.target, name, "exact", held, "–")
    return Cell(scheme, recipe.target, name, "re-represented", held, recipes.kept(weight, made.weight))
