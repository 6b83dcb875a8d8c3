"""The zeros of pruned weights, and what they take where they are stored."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import numpy as np
from msgspec import UNSET, UnsetType

from calora_export.compression import DenseWeight, PackedWeight, fewest_bits, nonzero
from calora_export.package import Zeros
from calora_export.recipe import Recipe


@dataclass(frozen=True)
class Pruned:
    """One pruned weight: how many numbers it has and how many are 0; bits: what these take in a package."""

    numbers: int
    zeros: int
    bits: int


def pays(zeros: int, numbers: int, bits: int) -> bool:
    """Whether a mask and the numbers that are not 0 take less than all numbers of so many bits."""
    return zeros * bits > numbers


def measure(stored: DenseWeight | PackedWeight, held: DenseWeight | PackedWeight, recipe: Recipe) -> Pruned | None:
    """Of a weight as a bundle stores it and a recipe holds it; None for one that is not pruned."""
    bits = 8 * stored.values.itemsize if isinstance(stored, DenseWeight) else stored.bits
    if not pays(_zeros(stored), stored.shape[0] * stored.shape[1], bits):
        return None
    zeros, numbers, bits = _zeros(held), held.shape[0] * held.shape[1], _bits(held, recipe.target)
    sparse = recipe.zeros == "sparse" and pays(zeros, numbers, bits)
    return Pruned(numbers, zeros, numbers if sparse else zeros * bits)


def total(pruned: Collection[Pruned], recipe: Recipe) -> Zeros | UnsetType:
    """What package.json says of them; nothing where no weight is pruned."""
    if not pruned:
        return UNSET
    return Zeros(
        weights=len(pruned),
        numbers=sum(weight.numbers for weight in pruned),
        zeros=sum(weight.zeros for weight in pruned),
        stored="dense" if recipe.zeros is UNSET else recipe.zeros,
        bytes=sum(weight.bits for weight in pruned) // 8,
    )


def _zeros(weight: DenseWeight | PackedWeight) -> int:
    held = (weight.values,) if isinstance(weight, DenseWeight) else (weight.q, weight.zero, weight.codebook)
    kept = nonzero(*held)
    return kept.size - int(np.count_nonzero(kept))


def _bits(weight: DenseWeight | PackedWeight, target: str) -> int:
    """Of one number in a target's files."""
    if isinstance(weight, DenseWeight):
        return 16 if target == "coreml" else 32
    if target == "torch":
        return 8
    return weight.bits if weight.codebook is not None else fewest_bits(weight.q, weight.zero)
