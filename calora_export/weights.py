"""The weights of a base as a recipe holds them, and a note of each one that is not as the bundle has it."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from calora_export import recipe as recipes
from calora_export.bundle import Bundle
from calora_export.compression import DenseWeight, PackedWeight
from calora_export.package import Represented
from calora_export.recipe import Recipe


@dataclass
class Weights:
    """Called with a module's name, gives its weight; `represented` grows by those that are not as stored."""

    bundle: Bundle
    recipe: Recipe
    represented: dict[str, Represented] = field(default_factory=dict)

    def __call__(self, module: str) -> DenseWeight | PackedWeight:
        stored = self.bundle.weight(module)
        made = recipes.represent(self.recipe, module, stored)
        if not made.exact:
            original = stored.dequantize()
            noise = float(np.square(original - made.weight.dequantize()).sum())
            sqnr = 10 * np.log10(max(float(np.square(original).sum()), 1e-30) / max(noise, 1e-30))
            forms = _form(stored), _form(made.weight)
            self.represented[module] = Represented(module, *forms, round(float(sqnr), 2))
        return made.weight


def _form(weight: DenseWeight | PackedWeight) -> str:
    if isinstance(weight, DenseWeight):
        return "float"
    if weight.codebook is not None:
        return f"nf{weight.bits}/{weight.group_size}"
    kind = "int" if weight.zero is None else "uint"
    return f"{kind}{weight.bits}/{weight.group_size if weight.scale.shape[1] > 1 else 0}"
