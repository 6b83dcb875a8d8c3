"""Which packed weights each target's kernels read, and the nearest that they read instead of one that they do not."""

from __future__ import annotations

from dataclasses import replace

import ml_dtypes
import numpy as np

from calora_export.compression import NF4, PackedWeight, quantize_symmetric
from calora_export.errors import UnsupportedError, mismatch

EXACT = {"onnx": "onnx-fp32", "executorch": "executorch-fp32", "coreml": "coreml-fp16", "torch": "torch-fp32"}
"""The recipe of each target that holds every weight as floats."""


def hold(target: str, module: str, weight: PackedWeight) -> PackedWeight:
    """The weight as a target holds it: itself where a kernel reads it, else the same numbers in another form, else the
    nearest ones. UnsupportedError when there is no such kernel at all.
    """
    kernels = {"onnx": _onnx, "executorch": _xnnpack, "coreml": _coreml, "torch": _any}
    return kernels[target](module, _simplest(weight))


def _simplest(weight: PackedWeight) -> PackedWeight:
    """The same numbers without what says nothing: zero points of 0, an order of columns that share one scale."""
    if weight.zero is not None and not weight.zero.any():
        weight = replace(weight, zero=None)
    if weight.order is not None and weight.scale.shape[1] == 1:
        weight = replace(weight, q=weight.q[:, np.argsort(weight.order)], order=None)
    return weight


def _any(_module: str, weight: PackedWeight) -> PackedWeight:
    return weight


def _onnx(module: str, weight: PackedWeight) -> PackedWeight:
    """MatMulNBits, or MatMulBnb4 for NF4: groups of 16 to 128, a power of two. Scale and zero point of a longer group
    are repeated.
    """
    if weight.codebook is not None and not np.array_equal(weight.codebook, NF4):
        raise UnsupportedError(mismatch(module, "codebook", "that of NF4", "another one", f"use {EXACT['onnx']}"))
    size = min(weight.group_size & -weight.group_size, 128)
    if size < 16:
        expected, hint = "a group size that a power of two from 16 divides", f"use {EXACT['onnx']}"
        raise UnsupportedError(mismatch(module, "group_size", expected, weight.group_size, hint))
    if size == weight.group_size:
        return weight
    times = weight.group_size // size
    zero = None if weight.zero is None else weight.zero.repeat(times, axis=1)
    return replace(weight, scale=weight.scale.repeat(times, axis=1), zero=zero, group_size=size)


def _xnnpack(module: str, weight: PackedWeight) -> PackedWeight:
    """XNNPACK: one fp32 scale a row; or, for 4 bits, groups of a multiple of 32 with bf16 scales. It has no zero points
    of ours, no codebooks and no orders: such weights, and 8 bits in groups, become 8 bits in rows. It reads x in int8,
    from the least to the largest of a position, W8A8 from -max|x| to max|x|.
    """
    if weight.activations == "int8_absmax":  # its kernels round x themselves, asymmetrically
        weight = replace(weight, activations="int8_token")
    symmetric = weight.zero is None and weight.codebook is None
    if symmetric and weight.scale.shape[1] == 1:
        return weight
    if not symmetric or weight.order is not None or weight.bits == 8:
        return quantize_symmetric(weight.dequantize(), 8, weight.shape[1], scales=np.float32)
    if weight.group_size % 32:
        expected, hint = "a multiple of 32", f"use {EXACT['executorch']}"
        raise UnsupportedError(mismatch(module, "group_size", expected, weight.group_size, hint))
    wide = weight.scale.astype(np.float32)
    rounded = wide.astype(ml_dtypes.bfloat16)
    return weight if np.array_equal(rounded.astype(np.float32), wide) else replace(weight, scale=rounded)


def _coreml(module: str, weight: PackedWeight) -> PackedWeight:
    """constexpr_blockwise_shift_scale and constexpr_lut_to_dense (iOS 18): 4 or 8 bits, zero points and codebooks, in
    groups of any size; scales and codebooks in fp16, to which others are rounded.
    """
    scale = _half(module, weight.scale)
    codebook = None if weight.codebook is None else _half(module, weight.codebook)
    if scale is weight.scale and codebook is weight.codebook:
        return weight
    return replace(weight, scale=scale, codebook=codebook)


def _half(module: str, array: np.ndarray) -> np.ndarray:
    """The array itself where fp16 holds its numbers, else rounded to it, in its own dtype."""
    with np.errstate(over="ignore"):
        rounded = array.astype(np.float32).astype(np.float16).astype(np.float32)
    if not np.isfinite(rounded).all():
        largest = float(np.abs(array.astype(np.float32)).max())
        raise UnsupportedError(mismatch(module, "weight_scale", "at most 65504, which fp16 holds", largest))
    return array if np.array_equal(rounded, array.astype(np.float32)) else rounded.astype(array.dtype)
