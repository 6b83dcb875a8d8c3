"""The weights of a base as a recipe holds them, and a note of each one that is not as the bundle has it."""

from __future__ import annotations

from dataclasses import dataclass, field

from calora_export import compression
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
            forms = compression.form(stored), compression.form(made.weight)
            kept = compression.sqnr(original, made.weight.dequantize())
            self.represented[module] = Represented(module, *forms, round(kept, 2))
        return made.weight

    def check(self) -> None:
        """Refuse what the recipe cannot hold before anything slow: one packed weight of each form that the base has."""
        first: dict[tuple[object, ...], str] = {}
        for module, stored in self.bundle.weights.formats.items():
            if stored.bits is not None:
                key = stored.scheme, stored.group_size, stored.symmetric, self.recipe.rule(module)
                first.setdefault(key, module)
        for module in first.values():
            recipes.represent(self.recipe, module, self.bundle.weight(module))
