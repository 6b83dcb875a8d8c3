"""What adapters add to linears that share an input: by operators of ONNX Runtime, or as one operator of ours."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np
import onnx_ir as ir

from calora_export.package import SlotTensor, groups_of
from calora_export.recipe import Recipe
from calora_export.targets._onnx_builder import CONTRIB, OURS, Builder

DTYPES = {"fp32": ir.DataType.FLOAT, "fp16": ir.DataType.FLOAT16, "int8": ir.DataType.INT8}
RECOVERY, ROWS, SCALES = "recovery", "rows", "scales"
MOST = 3  # slots that an operator of ours takes


@dataclass(frozen=True)
class Group:
    """Linears of x. members: those with slots, by index and site. ys: what each linear makes, or one value that has all
    of them as columns, each with a slot. gates: of each token [B, S, R], where they are not folded into `up`."""

    x: ir.Value
    ys: Sequence[ir.Value]
    members: Sequence[tuple[int, str]]
    gates: ir.Value | None

    @property
    def together(self) -> bool:
        return len(self.ys) == 1


def declare_input(
    build: Builder, recipe: Recipe, name: str, shape: Sequence[int | str], dtype: ir.DataType = ir.DataType.FLOAT
) -> ir.Value:
    """An input that adapter files fill: of rank 0 without one, or required where there is no adapter API."""
    value = build.declare(name, name, dtype, shape)
    if recipe.adapter_inputs == "optional":
        sizes = [size if isinstance(size, int) else 0 for size in shape]
        build.default(value, np.zeros(sizes, dtype.numpy()))
    return value


class StockSlots:
    """Operators of the runtime; every matrix of an adapter is an input."""

    def __init__(self, build: Builder, recipe: Recipe, tensors: Sequence[SlotTensor]) -> None:
        self._build, self._recipe = build, recipe
        self._tensors = {slot.site: slot for slot in tensors}

    def add(self, group: Group) -> Sequence[ir.Value]:
        """ys, with what the slots add to them."""
        deltas = self._deltas(group)
        if group.together and len(deltas) > 1:
            delta = self._build.emit("Concat", *deltas.values(), axis=-1)
            return [self._build.emit("Add", group.ys[0], delta)]
        return [self._build.emit("Add", y, deltas[i]) if i in deltas else y for i, y in enumerate(group.ys)]

    def _deltas(self, group: Group) -> dict[int, ir.Value]:
        """By member: one `down` for the group, the rows' non-linearity, one `up` each."""
        slots, emit = [self._tensors[site] for _, site in group.members], self._build.emit
        count = len(slots)
        down = self._rows(slots[0].down, ["rank" if count == 1 else f"rank_{count}", slots[0].inputs])
        h = emit("FusedMatMul", group.x, down, domain=CONTRIB, transB=1)
        if RECOVERY in self._build.inputs:
            h = emit("Where", self._recovery(count), emit("Gelu", h), h)
        parts = [h] if count == 1 else self._split(h, count)
        if group.gates is not None:
            parts = [emit("Mul", part, group.gates) for part in parts]
        ups = [self._rows(slot.up, ["rank", slot.outputs]) for slot in slots]
        indices = [i for i, _ in group.members]
        return {i: emit("MatMul", part, up) for i, part, up in zip(indices, parts, ups, strict=True)}

    def _rows(self, name: str, shape: Sequence[int | str]) -> ir.Value:
        rows = declare_input(self._build, self._recipe, name, shape, DTYPES[self._recipe.adapters])
        return rows if rows.dtype == ir.DataType.FLOAT else self._build.emit("Cast", rows, to=int(ir.DataType.FLOAT))

    def _recovery(self, count: int) -> ir.Value:
        def make() -> ir.Value:
            mask = self._build.emit("Cast", self._build.inputs[RECOVERY], to=int(ir.DataType.BOOL))
            return mask if count == 1 else self._build.emit("Concat", *[mask] * count, axis=0)

        return self._build.once((RECOVERY, count), make)

    def _split(self, h: ir.Value, count: int) -> Sequence[ir.Value]:
        """Each site's rows; num_outputs alone would refuse to split rank 0."""

        def sizes() -> ir.Value:
            total = self._build.emit("Shape", h, start=-1)
            rank = self._build.emit("Div", total, self._build.integers([count]))
            return self._build.emit("Concat", *[rank] * count, axis=0)

        return self._build.emit_many("Split", h, self._build.once(("ranks", count), sizes), outputs=count, axis=-1)


@dataclass(frozen=True)
class _Place:
    """Where the matrices of a group lie among all: behind so many columns (`offset`) and so many matrices (`first`)."""

    width: int
    matrices: int
    offset: int
    first: int
    outs: tuple[int, ...]


def _places(tensors: Sequence[SlotTensor]) -> dict[str, _Place]:
    """By the first site of each group."""
    width, offset, first = sum(slot.inputs + slot.outputs for slot in tensors), 0, 0
    places: dict[str, _Place] = {}
    for group in groups_of(tensors):
        outs = tuple(slot.outputs for slot in group)
        places[group[0].site] = _Place(width, 2 * len(tensors), offset, first, outs)
        offset += sum(slot.inputs + slot.outputs for slot in group)
        first += 2 * len(group)
    return places


class OurSlots:
    """One operator a group (targets/onnx/runner/kernels.h); an adapter is one input, since a runtime takes more time at
    every token to be given hundreds than to read them."""

    def __init__(self, build: Builder, recipe: Recipe, tensors: Sequence[SlotTensor]) -> None:
        self._build, self._places = build, _places(tensors)
        if tensors:
            declare_input(build, recipe, ROWS, [ROWS], DTYPES[recipe.adapters])
        if tensors and recipe.adapters == "int8":
            declare_input(build, recipe, SCALES, [SCALES])

    def add(self, group: Group) -> Sequence[ir.Value]:
        """ys, with what the slots add to them."""
        outputs = 1 if group.together else len(group.members)
        sums = self._emit("Slot", group, outputs=outputs)
        if group.together:
            return sums
        changed = {i: made for (i, _), made in zip(group.members, sums, strict=True)}
        return [changed.get(i, y) for i, y in enumerate(group.ys)]

    def gated_unit(self, group: Group) -> ir.Value:
        """silu(left half) · right half of that."""
        return self._emit("SlotGlu", group, outputs=2)[0]

    def norm(self, group: Group, skip: ir.Value, weight: ir.Value, eps: float) -> Sequence[ir.Value]:
        """The RMS norm of that and the residual, and their sum."""
        epsilon = self._build.constant(f"epsilon_{eps!r}", np.array([eps], np.float32))
        return self._emit("SlotNorm", group, *[None] * (MOST - 1), skip, weight, epsilon, outputs=2)

    def _emit(self, op: str, group: Group, *more: ir.Value | None, outputs: int) -> Sequence[ir.Value]:
        inputs = self._build.inputs
        adapter = [inputs[ROWS], inputs.get(SCALES), inputs.get(RECOVERY)]
        ys = group.ys if group.together else [group.ys[i] for i, _ in group.members]
        place = asdict(self._places[group.members[0][1]])
        return self._build.emit_many(
            op, group.x, *adapter, group.gates, *ys, *more, outputs=outputs, domain=OURS, **place
        )
