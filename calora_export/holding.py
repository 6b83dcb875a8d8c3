"""Which packed weights each target's kernels read, and the nearest that they read instead of one that they do not."""

from __future__ import annotations

from dataclasses import replace

import ml_dtypes
import numpy as np

from calora_export.compression import PackedWeight, quantize_symmetric
from calora_export.errors import UnsupportedError, mismatch


def hold(target: str, module: str, weight: PackedWeight) -> PackedWeight:
    """The weight as a target holds it: itself where a kernel reads it, else the same numbers in another form, else the
    nearest ones. UnsupportedError when there is no such kernel at all.
    """
    return {"onnx": _onnx, "executorch": _xnnpack, "torch": _any}[target](module, weight)


def _any(_module: str, weight: PackedWeight) -> PackedWeight:
    return weight


def _onnx(module: str, weight: PackedWeight) -> PackedWeight:
    """MatMulNBits: groups of 16 to 128, a power of two. The scale of a longer group is repeated."""
    size = min(weight.group_size & -weight.group_size, 128)
    if size < 16:
        expected = "a group size that a power of two from 16 divides"
        raise UnsupportedError(mismatch(module, "group_size", expected, weight.group_size, "use onnx-fp32"))
    if size == weight.group_size:
        return weight
    scale = weight.scale.repeat(weight.group_size // size, axis=1)
    return PackedWeight(weight.q, scale, weight.bits, size)


def _xnnpack(module: str, weight: PackedWeight) -> PackedWeight:
    """XNNPACK: one fp32 scale a row; or, for 4 bits, groups of a multiple of 32 with bf16 scales. 8 bits in groups
    become 8 bits in rows.
    """
    if weight.scale.shape[1] == 1:
        return weight
    if weight.bits == 8:
        return quantize_symmetric(weight.dequantize(), 8, weight.shape[1], scales=np.float32)
    if weight.group_size % 32:
        expected = "a multiple of 32"
        raise UnsupportedError(mismatch(module, "group_size", expected, weight.group_size, "use executorch-fp32"))
    wide = weight.scale.astype(np.float32)
    rounded = wide.astype(ml_dtypes.bfloat16)
    return weight if np.array_equal(rounded.astype(np.float32), wide) else replace(weight, scale=rounded)
