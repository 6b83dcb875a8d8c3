"""The weights of a base as a recipe holds them, and a note of each one that is not as the bundle has it."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from calora_export import calibration, compression, sparsity
from calora_export import recipe as recipes
from calora_export.bundle import Bundle
from calora_export.compression import DenseWeight, PackedWeight
from calora_export.package import Represented
from calora_export.recipe import Recipe
from calora_export.sparsity import Pruned


@dataclass
class Weights:
    """Called with a module's name, gives its weight; `represented` grows by those that are not as stored, `pruned` by
    those with zeros to leave out."""

    bundle: Bundle
    recipe: Recipe
    represented: dict[str, Represented] = field(default_factory=dict)
    pruned: dict[str, Pruned] = field(default_factory=dict)

    def __call__(self, module: str) -> DenseWeight | PackedWeight:
        stored = self.bundle.weight(module)
        importance = self._moments.get(module) if self._calibrated(module, stored) else None
        made = recipes.represent(self.recipe, module, stored, importance)
        if not made.exact:
            original = stored.dequantize()
            held = f"{compression.form(made.weight)}{' calibrated' if importance is not None else ''}"
            forms = compression.form(stored), held
            kept = compression.sqnr(original, made.weight.dequantize())
            self.represented[module] = Represented(module, *forms, round(kept, 2))
        if found := sparsity.measure(stored, made.weight, self.recipe):
            self.pruned[module] = found
        return made.weight

    @cached_property
    def _moments(self) -> dict[str, np.ndarray]:
        return calibration.second_moments(self.bundle)

    def _calibrated(self, module: str, stored: DenseWeight | PackedWeight) -> bool:
        rule = self.recipe.rule(module)
        return isinstance(stored, DenseWeight) and rule.calibration == "eval" and rule.scheme.startswith("int")

    def check(self) -> None:
        """Refuse what the recipe cannot hold before anything slow: one packed weight of each form that the base has."""
        if any(rule.calibration == "eval" for rule in self.recipe.precision):
            calibration.require_prompts(self.bundle)
        first: dict[tuple[object, ...], str] = {}
        for module, stored in self.bundle.weights.formats.items():
            if stored.bits is not None:
                key = stored.scheme, stored.group_size, stored.symmetric, self.recipe.rule(module)
                first.setdefault(key, module)
        for module in first.values():
            recipes.represent(self.recipe, module, self.bundle.weight(module))
