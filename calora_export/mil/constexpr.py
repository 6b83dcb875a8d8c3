"""The operators that decode compressed weights. They see the stored arrays and run once.

Sources: the documentation of coremltools' operators of iOS 16 and iOS 18 (constexpr_*).
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from calora_export.mil.kernels import FLOATS, Builder, Given, Kernel, half
from calora_export.mil.weights import unpack


def _decoder(decode: Callable[[Given], torch.Tensor | tuple[torch.Tensor, ...]], *parameters: str) -> Builder:
    """A kernel of no run-time input: all parameters are constants, read when the weight is first used."""

    def build(given: Given) -> Kernel:
        given.present(*parameters)
        return Kernel((), lambda: decode(given), exact=True)

    return build


def _typed(value: torch.Tensor, dtype: str) -> torch.Tensor:
    return half(value) if dtype == "float16" else value


def _float(array: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.array(array, dtype=np.float32))


def _stretched(value: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """Each element of `value` repeated along every axis until the tensor has this shape."""
    for axis, (have, want) in enumerate(zip(value.shape, shape, strict=True)):
        if have not in (1, want):
            value = value.repeat_interleave(want // have, axis)
    return value.expand(shape)


def _shift_scale(data: torch.Tensor, scale: torch.Tensor, offset: torch.Tensor | None) -> torch.Tensor:
    """scale · (data − offset), one scale for each block; `data` is overwritten.

    A block of the last axis is a dimension of its own, so that a group of 32 needs no scale of 32 times its size.
    """
    blocks = [have // count for have, count in zip(data.shape, scale.shape, strict=True)]
    split = [size for count, block in zip(scale.shape, blocks, strict=True) for size in (count, block)]
    spread = [size for count in scale.shape for size in (count, 1)]
    view = data.view(split)
    if offset is not None:
        view -= offset.reshape(spread)
    view *= scale.reshape(spread)
    return data


def blockwise_shift_scale(given: Given) -> torch.Tensor:
    """iOS 18: integers (or floats) with one scale, and perhaps one offset, per block."""
    offset = _float(given.constant("offset")) if given.has("offset") else None
    dense = _shift_scale(_float(given.constant("data")), _float(given.constant("scale")), offset)
    return _typed(dense, given.outputs[0])


def affine_dequantize(given: Given) -> torch.Tensor:
    """iOS 16: one scale and zero point for the tensor, or one for each index of `axis`."""
    data = _float(given.constant("quantized_data"))
    shape = [1] * data.dim()
    shape[given.value("axis", 0)] = -1

    def spread(name: str) -> torch.Tensor:
        value = _float(given.constant(name))
        return value.reshape(shape) if value.dim() else value

    return _typed((data - spread("zero_point")) * spread("scale"), given.outputs[0])


def cast(given: Given) -> torch.Tensor:
    """The same numbers in another type."""
    return _typed(_float(given.constant("source_val")), given.outputs[0])


def _look_up(indices: np.ndarray, table: np.ndarray, axis: int) -> torch.Tensor:
    """The table is [blocks of each axis of the indices …, palette, vector]; vectors lie along `axis` of the result."""
    *blocks, palette, vector = table.shape
    flat = torch.from_numpy(np.array(table, dtype=np.float32)).reshape(-1, vector)
    base = _stretched(torch.arange(0, len(flat), palette, dtype=torch.int32).reshape(blocks), indices.shape)
    rows = torch.from_numpy(indices.astype(np.int32)) + base
    found = flat.index_select(0, rows.reshape(-1)).reshape(*indices.shape, vector)
    if vector == 1:
        return found.squeeze(-1)
    axis %= indices.ndim
    return found.movedim(-1, axis + 1).flatten(axis, axis + 1)


def lut_to_dense(given: Given) -> torch.Tensor:
    """Indices into tables: iOS 18's form with a table per block, or iOS 16's with one table and packed indices."""
    table = given.constant("lut")
    shape = given.ints("shape")
    if shape is None:
        return _as(_look_up(given.constant("indices"), table, given.value("vector_axis", 0)), given.outputs[0])
    bits = int(table.size).bit_length() - 1
    indices = unpack(given.constant("indices"), bits, int(np.prod(shape))).reshape(shape)
    return _as(_look_up(indices, table.reshape(*[1] * len(shape), -1, 1), 0), given.outputs[0])


def _as(value: torch.Tensor, dtype: str) -> torch.Tensor:
    return value if dtype in FLOATS else value.to(torch.int32)


def _scattered(mask: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Values at the mask's ones, in row-major order; zeros elsewhere."""
    dense = np.zeros(mask.shape, dtype=values.dtype)
    dense[mask != 0] = values
    return dense


def sparse_to_dense(given: Given) -> torch.Tensor:
    """Values at the ones of a mask: iOS 18's mask has the result's shape, iOS 16's is packed bits and a shape."""
    mask = given.constant("mask")
    shape = given.ints("shape")
    if shape is not None:
        mask = unpack(mask, 1, int(np.prod(shape))).reshape(shape)
    return _as(_float(_scattered(mask, given.constant("nonzero_data"))), given.outputs[0])


def lut_to_sparse(given: Given) -> tuple[torch.Tensor, torch.Tensor]:
    """The table's values at the mask's ones, and the mask of the result."""
    mask = given.constant("indices_mask")
    table = given.constant("lut")
    axis = given.value("vector_axis", 0)
    dense = _look_up(_scattered(mask, given.constant("indices_nonzero_data")), table, axis)
    wide = torch.from_numpy(np.repeat(mask, table.shape[-1], axis).astype(np.int32))
    return wide, _as(dense[wide != 0], given.outputs[1])


def sparse_blockwise_shift_scale(given: Given) -> tuple[torch.Tensor, torch.Tensor]:
    """The mask, and scale · (data − offset) at its ones."""
    mask = given.constant("data_mask")
    offset = _float(given.constant("offset")) if given.has("offset") else None
    dense = _shift_scale(
        _float(_scattered(mask, given.constant("nonzero_data"))), _float(given.constant("scale")), offset
    )
    ones = torch.from_numpy(mask.astype(np.int32))
    return ones, _typed(dense[ones != 0], given.outputs[1])


BUILDERS: dict[str, Builder] = {
    "constexpr_affine_dequantize": _decoder(affine_dequantize, "quantized_data", "scale", "zero_point", "axis"),
    "constexpr_blockwise_shift_scale": _decoder(blockwise_shift_scale, "data", "scale", "offset"),
    "constexpr_cast": _decoder(cast, "source_val", "output_dtype"),
    "constexpr_lut_to_dense": _decoder(lut_to_dense, "indices", "lut", "vector_axis", "shape"),
    "constexpr_lut_to_sparse": _decoder(lut_to_sparse, "indices_mask", "indices_nonzero_data", "lut", "vector_axis"),
    "constexpr_sparse_blockwise_shift_scale": _decoder(
        sparse_blockwise_shift_scale, "data_mask", "nonzero_data", "scale", "offset"
    ),
    "constexpr_sparse_to_dense": _decoder(sparse_to_dense, "nonzero_data", "mask", "shape"),
}
