"""What Core ML has no operator for, of those that it has; float16 throughout."""

from __future__ import annotations

import math

import numpy as np

from calora_export.targets._coreml_program import Var, mb

HALF = np.float16
TINY = HALF(2.0**-14)  # the smallest normal number
TO_THE_END = 2**31 - 1  # torch says sys.maxsize or more


def slice_along(x: Var, axis: int, start: int, end: int) -> Var:
    """x[start:end] along an axis, start from the end if negative."""
    begin, stop, to_the_end = [0] * x.rank, [0] * x.rank, [True] * x.rank
    begin[axis] = start
    if end < TO_THE_END:
        stop[axis], to_the_end[axis] = end, False
    return mb.slice_by_index(x=x, begin=begin, end=stop, end_mask=to_the_end)


def rotate(x: Var, cos: Var, sin: Var) -> Var:
    """The half-split rotary embedding of `ops.rotate`, on [1, S, H, D] with tables [1, S, 1, half]."""
    half, width = cos.shape[-1], x.shape[-1]
    a, b = slice_along(x, -1, 0, half), slice_along(x, -1, half, 2 * half)
    first = mb.sub(x=mb.mul(x=a, y=cos), y=mb.mul(x=b, y=sin))
    second = mb.add(x=mb.mul(x=b, y=cos), y=mb.mul(x=a, y=sin))
    rest = [slice_along(x, -1, 2 * half, width)] if width > 2 * half else []
    return mb.concat(values=[first, second, *rest], axis=-1)


def rounded(x: Var) -> Var:
    """x as W8A8 reads it (`ops.round_activations`), in float16, which holds its 255 steps. It divides by max|x| first,
    since a 127th of a small one would lose digits."""
    most = mb.maximum(x=largest(x), y=TINY)
    steps = mb.round(x=mb.mul(x=mb.real_div(x=x, y=most), y=HALF(127)))
    return mb.mul(x=mb.mul(x=steps, y=HALF(1 / 127)), y=most)


def largest(x: Var) -> Var:
    return mb.reduce_max(x=mb.abs(x=x), axes=[-1], keep_dims=True)


def rms_norm(x: Var, weight: Var | np.ndarray, eps: float) -> Var:
    """x / m · rsqrt(mean((x / m)²) + eps / m²) · weight with m = max|x|: squares stay in the range of float16."""
    most = mb.maximum(x=largest(x), y=TINY)
    y = mb.real_div(x=x, y=most)
    floor = mb.real_div(x=HALF(math.sqrt(eps)), y=most)
    mean = mb.reduce_mean(x=mb.mul(x=y, y=y), axes=[-1], keep_dims=True)
    scale = mb.rsqrt(x=mb.add(x=mean, y=mb.mul(x=floor, y=floor)), epsilon=HALF(0))
    return mb.mul(x=mb.mul(x=y, y=scale), y=weight)


def attend(q: Var, k: Var, v: Var, mask: Var, scale: float, softcap: float) -> Var:
    """softmax(scale · q kᵀ + mask) v; the fused operator where scores are not bounded by a softcap."""
    if softcap <= 0:
        factor = scale * math.sqrt(q.shape[-1])  # the operator divides by √D itself
        scaled = q if math.isclose(factor, 1.0) else mb.mul(x=q, y=HALF(factor))
        return mb.scaled_dot_product_attention(query=scaled, key=k, value=v, attn_mask=mask)
    scores = mb.matmul(x=mb.mul(x=q, y=HALF(scale / softcap)), y=k, transpose_y=True)
    scores = mb.add(x=mb.mul(x=mb.tanh(x=scores), y=HALF(softcap)), y=mask, name="masked_scores")
    return mb.matmul(x=mb.softmax(x=scores, axis=-1), y=v)
