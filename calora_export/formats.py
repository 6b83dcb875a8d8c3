"""Which target holds which stored weight how: found by asking the recipes, not by a table that could go stale."""

from __future__ import annotations

from typing import Literal

import numpy as np
from msgspec import Struct

from calora_export import recipe as recipes
from calora_export.compression import DenseWeight, PackedWeight, quantize_symmetric

Outcome = Literal["exact", "re-represented", "refused"]


class Cell(Struct, frozen=True):
    """What a recipe does with weights that a bundle stores in a scheme."""

    scheme: str
    target: str
    recipe: str
    outcome: Outcome
    held_as: str


def matrix() -> list[Cell]:
    """Every scheme that a bundle can hold × every recipe that ships."""
    return [
        _cell(scheme, weight, name, recipe)
        for name, recipe in recipes.catalogue().items()
        for scheme, weight in _stored().items()
    ]


def _stored() -> dict[str, DenseWeight | PackedWeight]:
    dense = np.geomspace(0.01, 1, 4 * 64, dtype=np.float32).reshape(4, 64)  # no two groups alike
    packed = {
        f"int{bits}, {form}": quantize_symmetric(dense, bits, group)
        for bits in (8, 4)
        for form, group in (("rows", 64), ("groups of 32", 32))
    }
    exact = quantize_symmetric(dense, 4, 32, scales=np.float16)
    return {"fp32, fp16, bf16": DenseWeight(dense), **packed, "int4, fp16 scales": exact}


def _cell(scheme: str, weight: DenseWeight | PackedWeight, name: str, recipe: recipes.Recipe) -> Cell:
    made = recipes.represent(recipe, "model.layers.0.mlp.up_proj", weight)
    held = f"int{made.weight.bits}" if isinstance(made.weight, PackedWeight) else "fp32"
    return Cell(scheme, recipe.target, name, "exact" if made.exact else "re-represented", held)
