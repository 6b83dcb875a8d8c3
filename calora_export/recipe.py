"""What to make of a bundle: a recipe says what, never how. One TOML file per intent, in recipes/."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal, NoReturn

import msgspec
import numpy as np
from msgspec import UNSET, Meta, UnsetType

from calora_export import holding, resources
from calora_export.compression import (
    DenseWeight,
    PackedWeight,
    describe,
    form,
    quantize_calibrated,
    quantize_symmetric,
    sqnr,
)
from calora_export.errors import RecipeError, UnsupportedError, mismatch

Weight = DenseWeight | PackedWeight


class Rule(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How to hold the weights of some modules. The first rule whose pattern matches a module's name wins; a `*` in it
    stands for any text.

    fp32 and fp16 hold every weight dense. int4 and int8 keep packed weights as the bundle has them, as far as the
    target's kernels do (`holding`), and quantise dense ones (symmetric, round to nearest) in groups, or rows where
    group_size is 0. lossy: a packed weight that no kernel of the target reads as it is, refused, or held as the nearest
    that one reads. calibration: `eval` chooses scales by what layers read of the bundle's own prompts (`calibration`).
    The package and the report say what is not exactly as the bundle has it.
    """

    modules: str
    scheme: Literal["fp32", "fp16", "int8", "int4"]
    group_size: Annotated[int, Meta(ge=0)] = 32
    lossy: Literal["refuse", "allow"] = "refuse"
    calibration: Literal["none", "eval"] | UnsetType = UNSET


class Tolerance(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a parity row must reach. max_abs is on logits, kl_max in nats, sqnr_db in dB."""

    max_abs: float
    kl_max: float
    top1_agreement: float
    sqnr_db: float
    effect_ratio: tuple[float, float] = (0.9, 1.1)


class Parity(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Tolerances against the bundle as trained and against the same model with the target's changes.

    quantised takes the place of source when the recipe quantised weights that the bundle holds as floats: what that
    costs is the recipe's choice, so it is reported and bounded coarsely, while target still judges the lowering.
    """

    source: Tolerance
    target: Tolerance
    quantised: Tolerance | None = None
    task_points: float = 0.5
    gates_max_abs: float = 1e-4


class Recipe(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One way to lower a bundle.

    context is in positions; chunk is the longest prefill at once where a target must know, rank_budget the highest rank
    of a mix. logits: of the `last` position or `all` of them. activations: what a packed base reads, `float` as it is,
    or rounded to int8 inside the kernel per block of the weight's group size or per token (`ops.round_activations`).
    adapters: the dtype of adapter files; int8 rows, each with a scale, need an operator of ours. adapter_inputs:
    `optional` where the runtime has an adapter API, `required` where it has none (browsers), `functions` where each
    adapter becomes a function of the model (Neural Engine: no mixes, none added later). lengths: how many tokens a call
    may take where a compiler needs to know, 1 among them;
    empty: any up to chunk. kernels: whose operators a program calls: `stock`, those of the plain runtime; `calora`,
    also ours for the slots, which an app links or loads, and in ExecuTorch its LLM framework's for attention.
    joint_basis: compress plain LoRAs into a basis of that many columns per site, which the package holds once
    (`joint_basis`). zeros: `sparse` stores what is not 0 and a mask, of weights that this makes smaller.
    """

    target: str
    description: str
    precision: tuple[Rule, ...]
    parity: Parity
    context: Annotated[int, Meta(ge=64)] = 2048  # validation feeds 64
    chunk: Annotated[int, Meta(ge=1)] = 256
    rank_budget: Annotated[int, Meta(ge=1)] = 256
    logits: Literal["last", "all"] = "last"
    activations: Literal["float", "int8_block", "int8_token"] = "float"
    adapters: Literal["fp32", "fp16", "int8"] = "fp32"
    adapter_inputs: Literal["optional", "required", "functions"] = "optional"
    lengths: tuple[Annotated[int, Meta(ge=1)], ...] = ()
    kernels: Literal["stock", "calora"] = "stock"
    joint_basis: Annotated[int, Meta(ge=1)] | UnsetType = UNSET
    zeros: Literal["dense", "sparse"] | UnsetType = UNSET

    def __post_init__(self) -> None:
        if self.zeros == "sparse" and self.target != "coreml":
            raise ValueError(f"expected dense for {self.target}, only coreml has a sparse form - at `$.zeros`")
        if self.adapters == "int8" and (self.target, self.kernels) != ("onnx", "calora"):
            found = f"int8 for {self.target} with {self.kernels} kernels"
            raise ValueError(f"expected fp32 or fp16, found {found}: only ours for onnx read it - at `$.adapters`")

    def rule(self, module: str) -> Rule:
        """The first rule that matches, or an error that names the module."""
        for rule in self.precision:
            if re.fullmatch(".*".join(re.escape(part) for part in rule.modules.split("*")), module):
                return rule
        raise RecipeError(mismatch("recipe", "precision", f"a rule that matches {module}", "none"))


@dataclass(frozen=True)
class Representation:
    """A weight as a target will hold it, and whether that is what the bundle holds."""

    weight: Weight
    exact: bool


def represent(recipe: Recipe, module: str, weight: Weight, importance: np.ndarray | None = None) -> Representation:
    """Apply the recipe's rule to one weight as stored. importance [in]: of each input feature, for a calibration."""
    rule = recipe.rule(module)
    if rule.scheme in ("fp32", "fp16"):
        dense = weight.dequantize() if isinstance(weight, PackedWeight) else weight.values
        made = Representation(DenseWeight(dense), True) if rule.scheme == "fp32" else _half(module, dense)
        return replace(made, weight=replace(made.weight, activations=weight.activations))
    if isinstance(weight, PackedWeight):
        held = holding.hold(recipe.target, module, weight)
        exact = held is weight or (_equal(held, weight) and held.activations == weight.activations)
        if not exact and rule.lossy == "refuse":
            _refuse(recipe.target, module, weight, held)
        return Representation(held, exact)
    columns = weight.values.shape[1]
    group = rule.group_size or columns
    if columns % group:
        raise UnsupportedError(
            mismatch(module, "input features", f"a multiple of the recipe's group_size {group}", columns)
        )
    bits = {"int4": 4, "int8": 8}[rule.scheme]
    values = weight.values.astype("float32")
    if importance is None:
        quantised = quantize_symmetric(values, bits, group)
    else:
        quantised = quantize_calibrated(values, bits, group, importance)
    return Representation(holding.hold(recipe.target, module, quantised), False)


def _half(module: str, dense: np.ndarray) -> Representation:
    with np.errstate(over="ignore"):
        half = dense.astype(np.float16)
    if not np.isfinite(half).all():
        largest = float(np.abs(dense.astype(np.float32)).max())
        raise UnsupportedError(mismatch(module, "weight", "at most 65504, which fp16 holds", largest))
    return Representation(DenseWeight(half), bool((half.astype(np.float32) == dense.astype(np.float32)).all()))


def _refuse(target: str, module: str, weight: PackedWeight, held: PackedWeight) -> NoReturn:
    hint = f'use {holding.EXACT[target]}, or lossy = "allow", which keeps {kept(weight, held)} as {form(held)}'
    raise UnsupportedError(mismatch(module, "weight", f"what a kernel of {target} reads", describe(weight), hint))


def kept(weight: Weight, held: Weight) -> str:
    """What holding a weight otherwise keeps of it; all where only x is rounded otherwise."""
    decibel = sqnr(weight.dequantize(), held.dequantize())
    return f"{decibel:.1f} dB" if decibel < 200 else "all weights"


def _equal(a: PackedWeight, b: PackedWeight) -> bool:
    return bool((a.dequantize() == b.dequantize()).all())


def load(name: str) -> Recipe:
    """A recipe by its name or by the path of its file."""
    known = resources.recipes()
    path = known.get(name) or Path(name)
    if not path.is_file():
        raise RecipeError(mismatch("--recipe", name, f"a file or one of {', '.join(sorted(known))}", "neither"))
    try:
        return msgspec.toml.decode(path.read_bytes(), type=Recipe)
    except (msgspec.ValidationError, msgspec.DecodeError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path.name}: {error}") from error


def catalogue() -> Mapping[str, Recipe]:
    """Every recipe that ships with the tool, by name."""
    return {name: load(name) for name in sorted(resources.recipes())}
