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
    return {"onnx": _onnx, "executorch": _xnnpack, "coreml": _coreml, "torch": _any}[target](module, weight)


def _any(_module: str, weight: PackedWeight) -> PackedWeight:
    return weight


def _onnx(module: str, weight: PackedWeight) -> PackedWeight:
    """MatMulNBits: groups of 16 to 128, a power of two. The scale of a longer group is repeated."""
    _require_plain(module, weight, "use onnx-fp32")
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
    _require_plain(module, weight, "use executorch-fp32")
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


def _coreml(module: str, weight: PackedWeight) -> PackedWeight:
    """constexpr_blockwise_shift_scale and constexpr_lut_to_dense (iOS 18): 4 or 8 bits, zero points, codebooks, groups
    of any size; scales and codebooks in fp16, to which others are rounded. No operator reorders the input.
    """
    if weight.order is not None:
        raise UnsupportedError(mismatch(module, "weight", "columns in order", _form(weight), "use coreml-fp16"))
    scale, codebook = (_half(module, part) for part in (weight.scale, weight.codebook))
    if scale is weight.scale and codebook is weight.codebook:
        return weight
    assert scale is not None
    return replace(weight, scale=scale, codebook=codebook)


def _half(module: str, array: np.ndarray | None) -> np.ndarray | None:
    """The array itself where fp16 holds its numbers, else rounded to it, in its own dtype."""
    if array is None:
        return None
    with np.errstate(over="ignore"):
        rounded = array.astype(np.float32).astype(np.float16).astype(np.float32)
    if not np.isfinite(rounded).all():
        largest = float(np.abs(array.astype(np.float32)).max())
        raise UnsupportedError(mismatch(module, "weight_scale", "at most 65504, which fp16 holds", largest))
    return array if np.array_equal(rounded, array.astype(np.float32)) else rounded.astype(array.dtype)


def _require_plain(module: str, weight: PackedWeight, hint: str) -> None:
    if found := _form(weight):
        raise UnsupportedError(mismatch(module, "weight", "symmetric groups in column order", found, hint))


def _form(weight: PackedWeight) -> str:
    """What of a weight is more than symmetric groups in column order."""
    parts = {"zero points": weight.zero, "a codebook": weight.codebook, "an activation order": weight.order}
    return " and ".join(name for name, part in parts.items() if part is not None)
