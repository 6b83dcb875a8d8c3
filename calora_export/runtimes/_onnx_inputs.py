"""Which inputs of an ONNX graph take an adapter's rows, and which of its matrices each holds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from msgspec import UNSET

from calora_export.adapters import Adapter, int8_rows
from calora_export.package import Slots

DTYPES = {"fp32": np.dtype(np.float32), "fp16": np.dtype(np.float16), "int8": np.dtype(np.int8)}
SCALES = "scales"

Arrays = Mapping[str, np.ndarray]
Key = tuple[str, str]  # of a matrix: site and `down` or `up`, or their scales


@dataclass(frozen=True)
class Matrix:
    """[R, width]. gated: takes the gates of a mix."""

    key: Key
    width: int
    gated: bool = False


@dataclass(frozen=True)
class Input:
    """Matrices of one dtype, each below the one before: [matrices · R, width], or flat [R · all widths]."""

    name: str
    dtype: str
    matrices: tuple[Matrix, ...]
    flat: bool = False

    @property
    def width(self) -> int:
        return sum(matrix.width for matrix in self.matrices)

    def shape(self, rank: int) -> list[int]:
        return [rank * self.width] if self.flat else [len(self.matrices) * rank, self.matrices[0].width]


def inputs(slots: Slots) -> list[Input]:
    """Those whose size grows with the rank R."""
    scaled = slots.dtype == "int8"
    made: list[Input] = []
    for group in slots.groups():
        downs = tuple(Matrix((slot.site, "down"), slot.inputs) for slot in group)
        made.append(Input(group[0].down, slots.dtype, downs))
        ups = [Matrix((slot.site, "up"), slot.outputs, gated=not scaled) for slot in group]
        made += [Input(slot.up, slots.dtype, (up,)) for slot, up in zip(group, ups, strict=True)]
    if slots.rows is not UNSET:
        rows = tuple(matrix for each in made for matrix in each.matrices)
        made = [Input(slots.rows, slots.dtype, rows, flat=True)]
        scales = tuple(Matrix(_scale(matrix.key), 1, gated=matrix.key[1] == "up") for matrix in rows)
        made += [Input(SCALES, "fp32", scales, flat=True)] if scaled else []
    if slots.recovery is not None:
        made.append(Input(slots.recovery, "fp32", (Matrix(("", "recovery"), 1),), flat=True))
    return made


def _scale(key: Key) -> Key:
    return key[0], f"{key[1]} scale"


def arrange(adapter: Adapter, slots: Slots) -> dict[str, np.ndarray]:
    """Input → array; zeros for a site that the adapter lacks."""
    held = {("", "recovery"): adapter.recovery.astype(np.float32)}
    for slot in slots.tensors:
        rows = adapter.sites.get(slot.site)
        down = np.zeros((adapter.rank, slot.inputs)) if rows is None else rows.down
        up = np.zeros((adapter.rank, slot.outputs)) if rows is None else rows.up.T
        for key, matrix in (((slot.site, "down"), down), ((slot.site, "up"), up)):
            if slots.dtype == "int8":
                packed = int8_rows(np.ascontiguousarray(matrix, np.float32))
                held |= {key: packed.q, _scale(key): packed.scale}
            else:
                held[key] = matrix.astype(DTYPES[slots.dtype])
    return {
        each.name: np.concatenate([held[matrix.key].ravel() for matrix in each.matrices]).reshape(
            each.shape(adapter.rank)
        )
        for each in inputs(slots)
    }


def blended(parts: Sequence[tuple[Arrays, float]], slots: Slots) -> dict[str, np.ndarray]:
    """Several adapters' arrays as one: rows side by side in every matrix, gates folded into `up` or its scales."""
    made: dict[str, np.ndarray] = {}
    for each in inputs(slots):
        ranks = [arrays[each.name].size // each.width for arrays, _ in parts]
        pieces, column = [], 0
        for matrix in each.matrices:
            for (arrays, gate), rank in zip(parts, ranks, strict=True):
                piece = arrays[each.name].ravel()[rank * column : rank * (column + matrix.width)]
                pieces.append((piece * np.float32(gate)).astype(piece.dtype) if matrix.gated else piece)
            column += matrix.width
        made[each.name] = np.concatenate(pieces).reshape(each.shape(sum(ranks)))
    return made
