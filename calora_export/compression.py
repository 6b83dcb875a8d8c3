"""A linear or embedding weight: dense, or integers with scales per group. How they lie in files: `layouts`."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np

BITS = (4, 8)
Activations = Literal["float", "int8_block", "int8_token", "int8_absmax"]
"""How a layer reads x: as it is, or rounded to int8 (`ops.round_activations`)."""
NF4 = np.array(
    [-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
     -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
     0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0], np.float32,
)  # fmt: skip
"""The codebook of 4-bit NormalFloat (arXiv 2305.14314, appendix E)."""


@dataclass(frozen=True)
class DenseWeight:
    """A weight as stored: `values` [out, in] in fp32, fp16 or bf16; `activations` as of a PackedWeight."""

    values: np.ndarray
    activations: Activations | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)"""
        return self.values.shape[0], self.values.shape[1]

    def dequantize(self) -> np.ndarray:
        """float32 [out, in]"""
        return self.values.astype(np.float32)


@dataclass(frozen=True)
class PackedWeight:
    """`q` int8 [out, in] in [-2^(bits-1), 2^(bits-1)); `scale` [out, in / group_size], dtype as stored.

    `zero` int8 [out, in / group_size]: zero points in the range of q, None for a symmetric weight. `codebook` float32
    [2^bits]: q are positions in it, from 0 (NF4). `order` int64 [in]: the input feature that each column of q is for,
    where a quantiser sorted them (GPTQ's act-order). `activations`: how the base itself reads x, None where that is for
    a recipe to say.
    """

    q: np.ndarray
    scale: np.ndarray
    bits: int
    group_size: int
    zero: np.ndarray | None = None
    codebook: np.ndarray | None = None
    order: np.ndarray | None = None
    activations: Activations | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)"""
        return self.q.shape[0], self.q.shape[1]

    def dequantize(self) -> np.ndarray:
        """float32 [out, in] = (q - zero) · scale or codebook[q] · scale, columns in the input's own order"""
        rows, columns = self.shape
        values = self.q.astype(np.float32) if self.codebook is None else self.codebook[self.q]
        groups = values.reshape(rows, columns // self.group_size, self.group_size)
        if self.zero is not None:
            groups = groups - self.zero.astype(np.float32)[:, :, None]
        made = (groups * self.scale.astype(np.float32)[:, :, None]).reshape(rows, columns)
        return made if self.order is None else made[:, np.argsort(self.order)]


def describe(weight: DenseWeight | PackedWeight) -> str:
    """A weight's form in words: `int4 in groups of 32 with zero points and float16 scales`."""
    if isinstance(weight, DenseWeight):
        return str(weight.values.dtype)
    kind = f"{'int' if weight.codebook is None else 'nf'}{weight.bits}"
    groups = "rows" if weight.scale.shape[1] == 1 else f"groups of {weight.group_size}"
    more = {
        "zero points": weight.zero,
        "an activation order": weight.order,
        f"{weight.activations} activations": weight.activations,
    }
    parts = [name for name, part in more.items() if part is not None]
    return f"{kind} in {groups} with {' and '.join([*parts, f'{weight.scale.dtype} scales'])}"


def form(weight: DenseWeight | PackedWeight) -> str:
    """A weight's form in short: `int4/32`, a group of 0 being a row; `uint` has zero points, `nf` a codebook; `a8`
    that the base itself reads x in int8."""
    own = " a8" if weight.activations == "int8_absmax" else ""
    if isinstance(weight, DenseWeight):
        return f"float{own}"
    kind = "int" if weight.codebook is None and weight.zero is None else "uint" if weight.codebook is None else "nf"
    return f"{kind}{weight.bits}/{weight.group_size if weight.scale.shape[1] > 1 else 0}{own}"


def fewest_bits(*parts: np.ndarray | None) -> int:
    """Of 4 and 8, the fewer that hold integers and their zero points."""
    return 4 if all(part is None or (part.min() >= -8 and part.max() <= 7) for part in parts) else 8


def nonzero(values: np.ndarray, zero: np.ndarray | None = None, codebook: np.ndarray | None = None) -> np.ndarray:
    """bool [out, in]: which numbers of a weight are not 0; values, zero and codebook are as a PackedWeight's."""
    if codebook is not None:
        return codebook[values] != 0
    if zero is None:
        return values != 0
    return (values.reshape(*zero.shape, -1) != zero[..., None]).reshape(values.shape)


def sqnr(original: np.ndarray, made: np.ndarray) -> float:
    """Signal to quantisation noise in dB, of float32 arrays of one shape."""
    noise = float(np.square(original - made).sum())
    return 10 * math.log10(max(float(np.square(original).sum()), 1e-30) / max(noise, 1e-30))


@dataclass(frozen=True)
class WeightFormat:
    """What the headers say of a weight: shape (out, in); `bits` and `group_size` are None for a dense one.
    int8_activations: the layout says that the layer reads x rounded to int8, per token.
    """

    shape: tuple[int, int]
    bits: int | None
    group_size: int | None
    symmetric: bool = True
    codebook: bool = False
    int8_activations: bool = False

    @property
    def scheme(self) -> str:
        """As `base.compression` names it, `dense` where it does not."""
        return "dense" if self.bits is None else f"{'nf' if self.codebook else 'int'}{self.bits}"


def pack_int32(q: np.ndarray, bits: int) -> np.ndarray:
    """int8 [..., in] to int32 [..., in · bits / 32] as compressed-tensors' pack-quantized has them: q + 2^(bits-1), the
    first column in the lowest bits. ValueError for values out of range or partial words.
    """
    half = 1 << (bits - 1)
    if bits not in BITS or q.shape[-1] * bits % 32:
        raise ValueError(f"{q.shape[-1]} columns of {bits} bits do not fill 32-bit words")
    if q.size and (q.min() < -half or q.max() >= half):
        raise ValueError(f"values from {q.min()} to {q.max()} are not in [{-half}, {half - 1}]")
    codes = np.ascontiguousarray(q, np.int8).view(np.uint8) + np.uint8(half)  # wraps: two's complement plus half
    if bits == 4:
        codes = codes & 15
        codes = codes[..., 0::2] | (codes[..., 1::2] << 4)
    return np.ascontiguousarray(codes).view("<i4").astype(np.int32, copy=False)


def unpack_int32(packed: np.ndarray, bits: int) -> np.ndarray:
    """The inverse of `pack_int32`: int32 [..., words] to int8 [..., words · 32 / bits]."""
    if bits not in BITS:
        raise ValueError(f"bits: expected 4 or 8, found {bits}")
    codes = np.ascontiguousarray(packed, "<i4").view(np.uint8)
    if bits == 4:
        codes = np.stack([codes & 15, codes >> 4], axis=-1).reshape(*codes.shape[:-1], -1)
    return (codes - np.uint8(1 << (bits - 1))).view(np.int8)


CLIPS = np.linspace(1.0, 0.5, 26, dtype=np.float32)  # of a group's largest value


def quantize_calibrated(weight: np.ndarray, bits: int, group_size: int, importance: np.ndarray) -> PackedWeight:
    """`quantize_symmetric` with every group's scale at one of CLIPS: where Σ importance · error² is least.

    importance [in]: the mean square of each input feature, so that this is the output's error. Source: the search for a
    clip of AWQ (arXiv 2306.00978, sec. 3.3 and its code), for the diagonal of the inputs' second moments.
    """
    rows, columns = weight.shape
    groups = weight.reshape(rows, -1, group_size)
    weighted = importance.reshape(1, -1, group_size)
    best, least = quantize_symmetric(weight, bits, group_size), np.inf
    for clip in CLIPS:
        made = quantize_symmetric(weight, bits, group_size, clip=float(clip))
        error = (np.square(made.dequantize().reshape(groups.shape) - groups) * weighted).sum(-1)
        better = error < least
        least = np.where(better, error, least)
        q = np.where(better.repeat(group_size, axis=1), made.q, best.q)
        best = PackedWeight(q, np.where(better, made.scale, best.scale), bits, group_size)
    return best


def quantize_symmetric(
    weight: np.ndarray, bits: int, group_size: int, scales: type[np.generic] | None = None, clip: float = 1.0
) -> PackedWeight:
    """Round float32 [out, in] to the nearest q · scale; scale = clip · absmax / (2^(bits-1) - 1), bfloat16 unless
    stated; what a clip leaves out is rounded to the last step.

    Zeros stay exactly zero, a group of zeros gets scale 1. ValueError when groups do not divide the columns.
    """
    import ml_dtypes

    rows, columns = weight.shape
    if bits not in BITS or columns % group_size:
        raise ValueError(f"expected 4 or 8 bits and groups that divide {columns}, found {bits} and {group_size}")
    groups = weight.astype(np.float32).reshape(rows, columns // group_size, group_size)
    top = (1 << (bits - 1)) - 1
    absmax = np.abs(groups).max(axis=2) * np.float32(clip)
    # Below the smallest normal number bfloat16 loses its precision, and absmax / scale would leave the range.
    scale = np.maximum(absmax / np.float32(top), np.finfo(np.float32).tiny)
    scale = np.where(absmax > 0, scale, 1).astype(scales or ml_dtypes.bfloat16)
    q = np.clip(np.rint(groups / scale.astype(np.float32)[:, :, None]), -top - 1, top)
    return PackedWeight(q.astype(np.int8).reshape(rows, columns), scale, bits, group_size)
