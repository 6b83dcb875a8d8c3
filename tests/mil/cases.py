"""One or more cases of every operator of the reference runtime: how coremltools makes it, and what it has to give."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

_RANDOM = np.random.default_rng(0)


@dataclass(frozen=True)
class Case:
    """One operation: how coremltools' builder makes it of its inputs, and its result where the builder infers none."""

    operator: str
    build: Callable[..., Any]
    inputs: Sequence[np.ndarray]
    reference: Callable[..., Any] | None = None


def some(*shape: int, low: float = -2.0, high: float = 2.0) -> np.ndarray:
    """Numbers of float16, so that both precisions see the same."""
    return _RANDOM.uniform(low, high, shape).astype(np.float16).astype(np.float32)


def distinct(*shape: int) -> np.ndarray:
    """Numbers of which no two are equal: the order of equals is nobody's promise."""
    count = int(np.prod(shape))
    return (_RANDOM.permutation(count).astype(np.float32) - count / 2).reshape(shape)


def ints(*values: int) -> np.ndarray:
    return np.array(values, dtype=np.int32)


def whole(*shape: int, low: int = -5, high: int = 6) -> np.ndarray:
    return _RANDOM.integers(low, high, shape).astype(np.int32)


def one(operator: str, x: np.ndarray, reference: Callable[..., Any] | None = None, **parameters: Any) -> Case:
    """An operation on x alone."""
    return Case(operator, lambda m, x: getattr(m, operator)(x=x, **parameters), (x,), reference)


def two(operator: str, x: np.ndarray, y: np.ndarray, reference: Callable[..., Any] | None = None, **more: Any) -> Case:
    """An operation on x and y."""
    return Case(operator, lambda m, x, y: getattr(m, operator)(x=x, y=y, **more), (x, y), reference)


def made(operator: str, build: Callable[..., Any], *inputs: np.ndarray, reference: Any = None) -> Case:
    """An operation that needs more than its inputs' names."""
    return Case(operator, build, inputs, reference)


def on_torch(function: Callable[..., torch.Tensor], **parameters: Any) -> Callable[..., np.ndarray]:
    return lambda *arrays: function(*[torch.from_numpy(array) for array in arrays], **parameters).numpy()


def elementwise() -> list[Case]:
    wide = [
        "abs",
        "atan",
        "ceil",
        "cos",
        "erf",
        "exp",
        "exp2",
        "floor",
        "relu",
        "relu6",
        "round",
        "softplus",
        "softsign",
        "square",
        "tanh",
    ]
    near = ["acos", "asin", "atanh", "cosh", "sigmoid", "sign", "sin", "sinh", "tan"]
    integers = ["equal", "not_equal", "greater", "greater_equal", "less", "less_equal"]
    slopes = {"alpha": np.float32([0.5, 1.0, 2.0]), "beta": np.float32([1.0, 0.5, 2.0])}
    divisors = ints(3, -3, 2, 5, -7, 4, 1, 6, 2)
    return [
        *[one(name, some(3, 5, low=-7, high=7)) for name in wide],
        *[one(name, some(3, 5, low=-0.9, high=0.9)) for name in near],
        one("sqrt", some(4, low=0.1)),
        one("silu", some(3, 5, low=-8, high=8), on_torch(F.silu)),
        one("rsqrt", some(6, low=0.0, high=0.5), epsilon=1e-2),
        one("inverse", some(6, low=0.1), epsilon=1e-2),
        one("log", some(6, low=0.0), epsilon=1e-2),
        one("clip", some(3, 5), alpha=-0.5, beta=0.75),
        one("threshold", some(3, 5), alpha=0.25),
        one("clamped_relu", some(3, 5), alpha=0.5, beta=1.0),
        one("elu", some(3, 5), alpha=0.5),
        one("leaky_relu", some(3, 5), alpha=0.125),
        one("linear_activation", some(3, 5), alpha=0.5, beta=0.25),
        one("prelu", some(2, 3, 4, 2), alpha=slopes["alpha"]),
        one("scaled_tanh", some(3, 5), alpha=0.5, beta=2.0),
        one("sigmoid_hard", some(3, 5, low=-4, high=4), alpha=0.25, beta=0.5),
        one("softplus_parametric", some(2, 3, 4, 2), **slopes),
        one("thresholded_relu", some(3, 5), alpha=0.5),
        *[
            one("gelu", some(3, 5, low=-5, high=5), mode=mode)
            for mode in ("EXACT", "TANH_APPROXIMATION", "SIGMOID_APPROXIMATION")
        ],
        *[two(name, some(2, 3, 4), some(3, 1)) for name in ("add", "sub", "mul", "maximum", "minimum")],
        *[two(name, whole(2, 3), whole(3)) for name in ("add", "sub", "mul", "maximum", "minimum")],
        *[
            two(name, some(3, 4, low=-9, high=9), some(3, 4, low=0.5, high=3))
            for name in ("real_div", "floor_div", "mod")
        ],
        two("floor_div", whole(9, low=-20, high=20), divisors),
        two("mod", whole(9, low=-20, high=20), divisors),
        two("real_div", ints(12, 9, 8), ints(3, 9, 2), lambda x, y: x // y),
        one("pow", some(3, 4), y=2.0),
        two("pow", some(3, 4, low=0.1), some(3, 4)),
        *[two(name, whole(4, 5, low=0, high=3), whole(5, low=0, high=3)) for name in integers],
        *[
            made(
                name,
                lambda m, x, y, name=name: getattr(m, name)(x=m.less(x=x, y=0), y=m.less(x=y, y=0)),
                whole(9),
                whole(9),
            )
            for name in ("logical_and", "logical_or", "logical_xor")
        ],
        made("logical_not", lambda m, x: m.logical_not(x=m.less(x=x, y=0)), whole(9)),
        made("select", lambda m, x, y: m.select(cond=m.less(x=x, y=y), a=x, b=y), some(3, 4), some(3, 4)),
        *[
            one("cast", some(9, low=0, high=99), lambda x, kind=kind: x.astype(kind), dtype=kind)
            for kind in ("int32", "int16", "uint16", "int8", "uint8", "bool")
        ],
        one("cast", some(9) / np.float32(3), lambda x: x.astype(np.float16), dtype="fp16"),
        one("cast", whole(9), lambda x: x.astype(np.float32), dtype="fp32"),
        made(
            "quantize",
            lambda m, x: m.quantize(
                input=x, scale=np.float32([0.5, 0.25]), zero_point=np.int8([3, -2]), axis=1, output_dtype="int8"
            ),
            some(3, 2, 4),
            reference=lambda x: np.round(x / [[[0.5], [0.25]]]) + [[[3], [-2]]],
        ),
        made(
            "dequantize",
            lambda m, x: m.dequantize(input=m.cast(x=x, dtype="int8"), scale=np.float32(0.5), zero_point=np.int8(3)),
            whole(3, 4),
            reference=lambda x: (x - 3) * np.float32(0.5),
        ),
    ]


def reductions() -> list[Case]:
    names = ["sum", "mean", "max", "min", "prod", "l1_norm", "l2_norm", "log_sum", "log_sum_exp", "sum_square"]
    positive = {"low": 0.25, "high": 1.5}
    return [
        *[one(f"reduce_{name}", some(2, 3, 5, **positive), axes=[-1], keep_dims=True) for name in names],
        *[one(f"reduce_{name}", some(2, 3, 5, **positive), axes=[0, 2], keep_dims=False) for name in names],
        *[one(f"reduce_{name}", some(2, 3, **positive)) for name in names],
        one("reduce_sum", whole(3, 4), axes=[1]),
        one("reduce_max", whole(3, 4), axes=[1]),
        one("reduce_argmax", distinct(3, 7), axis=1, keep_dims=False),
        one("reduce_argmin", distinct(3, 7), axis=-1, keep_dims=True),
        one("softmax", some(2, 3, 5, low=-8, high=8), axis=-1),
        one("softmax", some(2, 3, 5), axis=1),
        one("cumsum", some(2, 6), axis=1),
        one("cumsum", some(2, 6), axis=1, reverse=True),
        one("cumsum", some(2, 6), lambda x: np.cumsum(np.pad(x, ((0, 0), (1, 0)))[:, :-1], 1), axis=1, exclusive=True),
        one("cumsum", whole(6), axis=0),
    ]


def products() -> list[Case]:
    weight, bias = some(5, 4), some(5)
    return [
        two("matmul", some(2, 3, 4), some(4, 5)),
        two("matmul", some(2, 1, 4, 3), some(2, 5, 4), transpose_x=True, transpose_y=True),
        two("matmul", some(4), some(2, 4, 5)),
        two("matmul", whole(3, 4), whole(4, 2)),
        made("linear", lambda m, x: m.linear(x=x, weight=weight, bias=bias), some(2, 3, 4)),
        made("linear", lambda m, x: m.linear(x=x, weight=weight), some(2, 3, 4)),
        made(
            "einsum",
            lambda m, x, y: m.einsum(values=(x, y), equation="nchw,nwhu->nchu"),
            some(2, 3, 4, 5),
            some(2, 5, 4, 6),
            reference=lambda x, y: np.einsum("nchw,nwhu->nchu", x, y),
        ),
    ]


def attention() -> list[Case]:
    name = "scaled_dot_product_attention"
    query, key, value = some(1, 2, 3, 8), some(1, 2, 5, 8), some(1, 2, 5, 4)
    later = np.triu(np.ones((3, 5), np.int32), 1)
    return [
        made(name, lambda m, q, k, v: m.scaled_dot_product_attention(query=q, key=k, value=v), query, key, value),
        made(
            name,
            lambda m, q, k, v, mask: m.scaled_dot_product_attention(query=q, key=k, value=v, attn_mask=mask),
            query, key, value, some(3, 5, low=-9, high=0),
        ),
        made(
            name,
            lambda m, q, k, v, n: m.scaled_dot_product_attention(query=q, key=k, value=v, attn_mask=m.equal(x=n, y=0)),
            some(2, 3, 8), some(2, 5, 8), some(2, 5, 8), later,
        ),
    ]  # fmt: skip


def norms() -> list[Case]:
    gamma, beta, epsilon = some(6), some(6), 1e-3
    mean, variance, scale, shift = np.float32([[0.5, 1], [1, 4], [2, 3], [1, -1]])[:, :, None, None]
    return [
        made(
            "layer_norm",
            lambda m, x: m.layer_norm(x=x, axes=[-1], gamma=gamma, beta=beta, epsilon=epsilon),
            some(2, 3, 6),
        ),
        made("layer_norm", lambda m, x: m.layer_norm(x=x, axes=[1, 2], epsilon=epsilon), some(2, 3, 6)),
        made(
            "layer_norm",
            lambda m, x: m.layer_norm(x=x, axes=[1], gamma=gamma[:3], epsilon=epsilon),
            some(2, 3, 6),
        ),
        made(
            "instance_norm",
            lambda m, x: m.instance_norm(x=x, gamma=np.float32([0.5, 1, 2]), beta=np.float32([0, 1, 2]), epsilon=0.125),
            some(2, 3, 4, 5),
            reference=on_torch(F.instance_norm, weight=torch.tensor([0.5, 1, 2]), bias=torch.arange(3.0), eps=0.125),
        ),
        made(
            "batch_norm",
            lambda m, x: m.batch_norm(
                x=x,
                mean=np.float32([0.5, 1]),
                variance=np.float32([1, 4]),
                gamma=np.float32([2, 3]),
                beta=np.float32([1, -1]),
                epsilon=0.25,
            ),
            some(2, 2, 3, 3),
            reference=lambda x: (x - mean) / np.sqrt(variance + 0.25) * scale + shift,
        ),
        one("l2_norm", some(2, 3, 4, 5), epsilon=1e-3),
        one("l2_norm", some(3, 4, 5), epsilon=1e-3),
        one("local_response_norm", some(1, 5, 2, 3), _neighbours, size=3, alpha=0.5, beta=0.75, k=1.5),
    ]


def _neighbours(x: np.ndarray) -> np.ndarray:
    """Local response normalisation by its formula, over three channels."""
    near = np.pad(x * x, ((0, 0), (1, 1), (0, 0), (0, 0)))
    return x / (1.5 + 0.5 / 3 * (near[:, :-2] + near[:, 1:-1] + near[:, 2:])) ** 0.75


def _convolved(x: np.ndarray, w: np.ndarray, pads: tuple[int, ...], stride: int = 1, groups: int = 1) -> np.ndarray:
    """Two-dimensional convolution by its definition; pads are top, bottom, left, right."""
    x = np.pad(x, ((0, 0), (0, 0), pads[:2], pads[2:]))
    high, wide = w.shape[2:]
    rows, columns = (x.shape[2] - high) // stride + 1, (x.shape[3] - wide) // stride + 1
    result = np.zeros((len(x), len(w), rows, columns), np.float32)
    inside, outside = x.shape[1] // groups, len(w) // groups
    for o, i, j in itertools.product(range(len(w)), range(rows), range(columns)):
        channel, top, left = o // outside * inside, i * stride, j * stride
        patch = x[:, channel : channel + inside, top : top + high, left : left + wide]
        result[:, o, i, j] = (patch * w[o]).sum((1, 2, 3))
    return result


def convolutions() -> list[Case]:
    kernel, separate, line, back = some(4, 3, 3, 2), some(6, 1, 3, 3), some(2, 3, 2), some(3, 2, 3, 3)
    bias = np.float32([1, 2, 3, 4])
    on = {"weight": torch.from_numpy(back), "stride": 2}

    def case(pads: tuple[int, ...], stride: int = 1, **parameters: Any) -> Case:
        def build(m: Any, x: Any) -> Any:
            return m.conv(x=x, weight=kernel, strides=[stride, stride], **parameters)

        return made("conv", build, some(1, 3, 6, 5), reference=lambda x: _convolved(x, kernel, pads, stride))

    def transposed(reference: Callable[..., Any], **parameters: Any) -> Case:
        def build(m: Any, x: Any) -> Any:
            return m.conv_transpose(x=x, weight=back, strides=[2, 2], **parameters)

        return made("conv_transpose", build, some(1, 3, 4, 5), reference=reference)

    return [
        case((0, 0, 0, 0)),
        case((1, 2, 0, 1), 2, pad_type="custom", pad=[1, 2, 0, 1]),
        case((1, 1, 0, 1), pad_type="same"),
        case((1, 1, 1, 0), pad_type="same_lower"),
        case((0, 1, 0, 1), 2, pad_type="same"),
        made(
            "conv",
            lambda m, x: m.conv(x=x, weight=kernel, bias=bias),
            some(1, 3, 6, 5),
            reference=lambda x: _convolved(x, kernel, (0, 0, 0, 0)) + bias[:, None, None],
        ),
        made(
            "conv",
            lambda m, x: m.conv(x=x, weight=separate, groups=3, pad_type="same"),
            some(1, 3, 4, 4),
            reference=lambda x: _convolved(x, separate, (1, 1, 1, 1), groups=3),
        ),
        made(
            "conv",
            lambda m, x: m.conv(x=x, weight=line, dilations=[2]),
            some(1, 3, 7),
            reference=on_torch(F.conv1d, weight=torch.from_numpy(line), dilation=2),
        ),
        transposed(on_torch(F.conv_transpose2d, **on)),
        transposed(on_torch(F.conv_transpose2d, padding=1, **on), pad_type="custom", pad=[1, 1, 1, 1]),
        transposed(
            on_torch(F.conv_transpose2d, padding=1, output_padding=1, **on),
            pad_type="custom",
            pad=[1, 1, 1, 1],
            output_shape=[1, 2, 8, 10],
        ),
    ]


def _pooled(x: np.ndarray, reduce: Callable[..., Any], pads: tuple[int, ...], fill: float) -> np.ndarray:
    """Windows of 3 × 2 with steps of 2 over the padded input."""
    x = np.pad(x, ((0, 0), (0, 0), pads[:2], pads[2:]), constant_values=fill)
    rows, columns = (x.shape[2] - 3) // 2 + 1, (x.shape[3] - 2) // 2 + 1
    windows = [
        [reduce(x[..., 2 * i : 2 * i + 3, 2 * j : 2 * j + 2], (2, 3)) for j in range(columns)] for i in range(rows)
    ]
    return np.moveaxis(np.array(windows), (0, 1), (2, 3))


def pools() -> list[Case]:
    window = {"kernel_sizes": [3, 2], "strides": [2, 2]}
    pads = (1, 2, 0, 1)
    padded = {"pad_type": "custom", "pad": list(pads)}
    ceil = {"kernel_sizes": [3, 3], "strides": [2, 2], "ceil_mode": True}
    on = {"kernel_size": 3, "stride": 2, "ceil_mode": True}
    even = {"pad_type": "custom", "pad": [1, 1, 1, 1]}
    nan = float("nan")
    return [
        one("max_pool", some(1, 2, 7, 6), lambda x: _pooled(x, np.max, (0, 0, 0, 0), 0), pad_type="valid", **window),
        one("max_pool", some(1, 2, 6, 5), lambda x: _pooled(x, np.max, pads, -np.inf), **padded, **window),
        one("avg_pool", some(1, 2, 6, 5), lambda x: _pooled(x, np.mean, pads, 0), **padded, **window),
        one(
            "avg_pool",
            some(1, 2, 6, 5),
            lambda x: _pooled(x, np.nanmean, pads, nan),
            exclude_padding_from_average=True,
            **padded,
            **window,
        ),
        one("max_pool", some(1, 2, 6, 8), on_torch(F.max_pool2d, **on), pad_type="valid", **ceil),
        one("max_pool", some(1, 2, 6, 8), on_torch(F.max_pool2d, padding=1, **on), **even, **ceil),
        one("avg_pool", some(1, 2, 6, 8), on_torch(F.avg_pool2d, padding=1, **on), **even, **ceil),
        one(
            "avg_pool",
            some(1, 2, 6, 8),
            on_torch(F.avg_pool2d, padding=1, count_include_pad=False, **on),
            exclude_padding_from_average=True,
            **even,
            **ceil,
        ),
        one(
            "max_pool",
            some(1, 2, 8),
            on_torch(F.max_pool1d, kernel_size=2),
            kernel_sizes=[2],
            strides=[2],
            pad_type="valid",
        ),
    ]


def _stretched(x: np.ndarray, size: tuple[int, int], corners: bool) -> np.ndarray:
    """Linear interpolation at the grid points of the operators' documentation."""
    for axis, out in zip((-2, -1), size, strict=True):
        n = x.shape[axis]
        i = np.arange(out)
        at = i * (n - 1) / (out - 1) if corners else np.clip((i + 0.5) * n / out - 0.5, 0, n - 1)
        low = np.floor(at).astype(int)
        high = np.minimum(low + 1, n - 1)
        share = (at - low).astype(np.float32)
        share = share if axis == -1 else share[:, None]
        x = np.take(x, low, axis) * (1 - share) + np.take(x, high, axis) * share
    return x


def sizes() -> list[Case]:
    x = some(1, 2, 3, 4)
    target = {"target_size_height": 5, "target_size_width": 9}
    factors = {"scale_factor_height": 2, "scale_factor_width": 3}
    return [
        one("upsample_nearest_neighbor", x, lambda x: x.repeat(2, -2).repeat(3, -1), **factors),
        one("upsample_bilinear", x, lambda x: _stretched(x, (6, 12), True), align_corners=True, **factors),
        one(
            "upsample_bilinear",
            x,
            lambda x: _stretched(x, (6, 12), False),
            align_corners=False,
            half_pixel_centers=True,
            **factors,
        ),
        one("resize_bilinear", x, lambda x: _stretched(x, (5, 9), False), sampling_mode="UNALIGN_CORNERS", **target),
        one(
            "resize_bilinear", x, lambda x: _stretched(x, (5, 9), True), sampling_mode="STRICT_ALIGN_CORNERS", **target
        ),
        one("pixel_shuffle", some(1, 8, 2, 3), on_torch(F.pixel_shuffle, upscale_factor=2), upscale_factor=2),
        one(
            "pixel_unshuffle",
            some(1, 2, 4, 6),
            on_torch(F.pixel_unshuffle, downscale_factor=2),
            downscale_factor=np.uint32(2),
        ),
    ]


def shapes() -> list[Case]:
    x = some(2, 3, 4)
    return [
        one("reshape", x, shape=[4, -1]),
        one("reshape", x, lambda x: x.reshape(1, 6, 4), shape=[1, -1, 0]),
        one("reshape", some(2, 5), lambda x: x.reshape(1, 1, 2, 5), shape=[1, 0, -1, 0]),
        one("reshape", some(2, 3, 4, 5), lambda x: x.reshape(6, 20), shape=[-1, 20]),
        made("reshape", lambda m, x, s: m.reshape(x=x, shape=s), x, ints(6, 4)),
        made(
            "reshape_like",
            lambda m, x, y: m.reshape_like(
                x=x, ref_tensors=(y, y), begins=(1, 0), ends=(2, 1), end_masks=(False, False)
            ),
            x,
            some(3, 8),
            reference=lambda x, y: x.reshape(8, 3),
        ),
        one("expand_dims", x, axes=[0, -1]),
        one("expand_dims", x, axes=[-2]),
        one("squeeze", some(1, 3, 1, 2), axes=[0, -2]),
        one("squeeze", some(1, 3, 1, 2)),
        one("flatten2d", x, lambda x: x.reshape(6, 4), axis=2),
        one("flatten2d", x, lambda x: x.reshape(6, 4), axis=-1),
        one("transpose", x, perm=[2, 0, 1]),
        one("transpose", x, perm=[-1, 0, -2]),
        made("concat", lambda m, x, y: m.concat(values=[x, y], axis=1), some(2, 3), some(2, 1)),
        made(
            "concat",
            lambda m, x, y: m.concat(values=[x, y], axis=0, interleave=True),
            some(3, 2),
            some(3, 2),
            reference=_in_turn,
        ),
        made("concat", lambda m, x: m.concat(values=[m.reduce_max(x=x), 3], axis=0), whole(4), reference=_with_three),
        made("stack", lambda m, x, y: m.stack(values=[x, y], axis=1), some(2, 3), some(2, 3)),
        one("split", some(2, 6), num_splits=3, axis=1),
        one("split", some(2, 6), split_sizes=[1, 3, 2], axis=-1),
        one("shape", x),
        one("identity", x),
        one("tile", some(2, 3), reps=[2, 3]),
        made("tile", lambda m, x, r: m.tile(x=x, reps=r), some(2, 3), ints(1, 2), reference=lambda x, r: np.tile(x, r)),
        one("reverse", x, axes=[0, -1]),
        one("reverse", x),
        one("pad", some(2, 3), pad=[1, 0, 0, 2], mode="constant", constant_val=0.5),
        one("pad", some(2, 4), pad=[2, 3], mode="reflect"),
        one("pad", some(2, 3), pad=[1, 0, 2, 2], mode="replicate"),
        *[one("band_part", some(2, 4, 5), lower=low, upper=up) for low, up in ((-1, 0), (0, -1), (1, 2))],
        made(
            "fill", lambda m, s: m.fill(shape=s, value=2.5), ints(2, 3), reference=lambda s: np.full(s, np.float32(2.5))
        ),
        made(
            "fill_like", lambda m, x: m.fill_like(ref_tensor=x, value=2.5), x, reference=lambda x: np.full_like(x, 2.5)
        ),
        made("range_1d", lambda m, n: m.range_1d(start=1, end=m.reduce_max(x=n), step=2), ints(8, 3), reference=_odd),
        made(
            "one_hot",
            lambda m, i: m.one_hot(indices=i, one_hot_vector_size=4, axis=0, on_value=2, off_value=-1),
            ints(3, 0, 1),
            reference=lambda i: 3 * np.eye(4, dtype=np.int32)[i].T - 1,
        ),
        one("non_zero", whole(4, 3, low=0, high=2)),
    ]


def _in_turn(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """As the operator's documentation has it; coremltools' own inference forgets to interleave."""
    return np.array([row for pair in zip(x, y, strict=True) for row in pair])


def _with_three(x: np.ndarray) -> np.ndarray:
    return ints(x.max(), 3)


def _odd(n: np.ndarray) -> np.ndarray:
    return np.arange(1, n.max(), 2)


def slices() -> list[Case]:
    x = some(4, 5, 6)
    update = some(2, 5, 3)

    def dynamic(m: Any, x: Any, begin: Any, end: Any) -> Any:
        return m.slice_by_index(x=x, begin=begin, end=end, end_mask=[False, True, False])

    def updated(m: Any, x: Any, update: Any, begin: Any, end: Any) -> Any:
        return m.slice_update(x=x, update=update, begin=begin, end=end)

    return [
        one("slice_by_index", x, begin=[1, 0, 2], end=[3, 5, 5]),
        one("slice_by_index", x, begin=[-3, 0, 2], end=[-1, 0, 0], end_mask=[False, True, True], stride=[1, 2, 3]),
        one(
            "slice_by_index", x, begin=[1, 0, -1], end=[0, 0, 2], stride=[1, 1, -2],
            begin_mask=[False, True, False], end_mask=[True, True, False],
        ),
        one(
            "slice_by_index", x, begin=[0, 2, 1], end=[0, 0, 4],
            end_mask=[True, False, False], squeeze_mask=[False, True, False],
        ),
        made("slice_by_index", dynamic, x, ints(1, 2, 0), ints(3, 0, -2)),
        one("slice_by_size", x, begin=[1, 0, -2], size=[2, -1, 1]),
        made("slice_by_size", lambda m, x, b: m.slice_by_size(x=x, begin=b, size=[2, -1, 1]), x, ints(1, 3, 2)),
        made("slice_update", updated, x, update, ints(1, 0, 2), ints(3, 5, 5)),
        made(
            "slice_update",
            lambda m, x, u: m.slice_update(
                x=x, update=u, begin=[0, 4, 0], end=[0, 0, 0], end_mask=[True, True, True], stride=[2, -2, 2],
                begin_mask=[True, False, False],
            ),
            x,
            some(2, 3, 3),
        ),
    ]  # fmt: skip


def gathers() -> list[Case]:
    x = some(3, 4, 5)
    pairs = np.int32([[[0, 1]], [[2, 3]]])
    modes = {
        "add": np.add,
        "sub": np.subtract,
        "mul": np.multiply,
        "div": np.divide,
        "max": np.maximum,
        "min": np.minimum,
    }

    def scattered(mode: str) -> Callable[..., np.ndarray]:
        def reference(data: np.ndarray, indices: np.ndarray, updates: np.ndarray) -> np.ndarray:
            data = data.copy()
            for place, row in enumerate(indices):
                data[:, row] = updates[:, place] if mode == "update" else modes[mode](data[:, row], updates[:, place])
            return data

        return reference

    def pairwise(data: np.ndarray, indices: np.ndarray, updates: np.ndarray) -> np.ndarray:
        data = data.copy()
        for index, update in zip(indices.reshape(-1, 2), updates.reshape(-1, 5), strict=True):
            data[tuple(index)] += update
        return data

    return [
        *[
            made("gather", lambda m, x, i, a=axis: m.gather(x=x, indices=i, axis=a), x, whole(2, 2, low=0, high=3))
            for axis in (0, 1, -1)
        ],
        made("gather", lambda m, x: m.gather(x=x, indices=2, axis=1), x),
        made(
            "gather",
            lambda m, x, i: m.gather(x=x, indices=i, axis=2, batch_dims=1),
            x,
            whole(3, 2, 2, low=0, high=5),
            reference=lambda x, i: np.stack([np.take(a, b, 1) for a, b in zip(x, i, strict=True)]),
        ),
        made(
            "gather_along_axis",
            lambda m, x, i: m.gather_along_axis(x=x, indices=i, axis=1),
            x,
            whole(3, 2, 5, low=0, high=4),
        ),
        made(
            "gather_nd",
            lambda m, x, i: m.gather_nd(x=x, indices=i),
            x,
            pairs,
            reference=lambda x, i: x[i[..., 0], i[..., 1]],
        ),
        made(
            "gather_nd",
            lambda m, x, i: m.gather_nd(x=x, indices=i, batch_dims=1),
            x,
            np.int32([[[0, 1]], [[2, 3]], [[1, 4]]]),
            reference=lambda x, i: np.stack([a[b[:, 0], b[:, 1]] for a, b in zip(x, i, strict=True)]),
        ),
        *[
            made(
                "scatter",
                lambda m, d, i, u, mode=mode: m.scatter(data=d, indices=i, updates=u, axis=1, mode=mode),
                x,
                ints(3, 0),
                some(3, 2, 5, low=0.5),
                reference=scattered(mode),
            )
            for mode in ("update", *modes)
        ],
        made(
            "scatter_along_axis",
            lambda m, d, i, u: m.scatter_along_axis(data=d, indices=i, updates=u, axis=1, mode="update"),
            some(2, 4),
            np.int32([[3, 0], [1, 2]]),
            some(2, 2),
        ),
        made(
            "scatter_nd",
            lambda m, d, i, u: m.scatter_nd(data=d, indices=i, updates=u, mode="add"),
            x,
            pairs,
            some(2, 1, 5),
            reference=pairwise,
        ),
        one("topk", distinct(2, 7), k=3, axis=1),
        one("topk", distinct(2, 7), k=2, axis=0, ascending=True),
        one("argsort", distinct(2, 7), axis=1),
        one("argsort", distinct(2, 7), axis=-1, ascending=True),
    ]


GROUPS = (
    elementwise, reductions, products, attention, norms, convolutions, pools, sizes, shapes, slices, gathers,
)  # fmt: skip
