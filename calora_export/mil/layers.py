"""Operators over channels and space: normalisations, convolutions, pools, and changes of size.

Tensors are [batch, channel, space …]; a pad is (before, after) for each dimension of space.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch.nn import functional as F

from calora_export.mil.kernels import Builder, Given, Kernel

Pads = list[tuple[int, int]]
_CONVOLUTIONS = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
_TRANSPOSED = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}
_MAX_POOLS = {1: F.max_pool1d, 2: F.max_pool2d, 3: F.max_pool3d}
_MEAN_POOLS = {1: F.avg_pool1d, 2: F.avg_pool2d, 3: F.avg_pool3d}


def layer_norm(given: Given) -> Kernel:
    """gamma · (x − mean) / sqrt(variance + epsilon) + beta over some axes."""
    epsilon, axes = given.value("epsilon", 1e-5), given.ints("axes")
    scaled, shifted = given.has("gamma"), given.has("beta")

    def run(x: torch.Tensor, *affine: torch.Tensor) -> torch.Tensor:
        over = sorted(axis % x.dim() for axis in axes) if axes is not None else list(range(x.dim()))
        shape = [x.shape[axis] if axis in over else 1 for axis in range(x.dim())]
        variance, mean = torch.var_mean(x, over, correction=0, keepdim=True)
        result = (x - mean) * torch.rsqrt(variance + epsilon)
        result = result * affine[0].reshape(shape) if scaled else result
        return result + affine[-1].reshape(shape) if shifted else result

    return Kernel(given.present("x", "gamma", "beta"), run)


def _per_channel(value: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return value.reshape(-1, *[1] * (x.dim() - 2))


def instance_norm(given: Given) -> Kernel:
    """The same over space, with gamma and beta for each channel."""
    epsilon = given.value("epsilon", 1e-5)
    scaled, shifted = given.has("gamma"), given.has("beta")

    def run(x: torch.Tensor, *affine: torch.Tensor) -> torch.Tensor:
        variance, mean = torch.var_mean(x, list(range(2, x.dim())), correction=0, keepdim=True)
        result = (x - mean) * torch.rsqrt(variance + epsilon)
        result = result * _per_channel(affine[0], x) if scaled else result
        return result + _per_channel(affine[-1], x) if shifted else result

    return Kernel(given.present("x", "gamma", "beta"), run)


def batch_norm(given: Given) -> Kernel:
    """gamma · (x − mean) / sqrt(variance + epsilon) + beta with stored statistics for each channel."""
    epsilon = given.value("epsilon", 1e-5)
    names = given.present("x", "mean", "variance", "gamma", "beta")

    def run(*values: torch.Tensor) -> torch.Tensor:
        named = dict(zip(names, values, strict=True))
        gamma, beta = named.get("gamma"), named.get("beta")
        return F.batch_norm(named["x"], named["mean"], named["variance"], gamma, beta, eps=epsilon)

    return Kernel(names, run)


def l2_norm(given: Given) -> Kernel:
    """x / sqrt(Σ x² + epsilon) over the last three axes."""
    epsilon = given.value("epsilon", 1e-6)
    return Kernel(("x",), lambda x: x * torch.rsqrt(x.square().sum((-3, -2, -1), keepdim=True) + epsilon))


def local_response_norm(given: Given) -> Kernel:
    """x / (k + alpha/size · Σ x²)^beta over neighbouring channels."""
    size = given.needed("size")
    alpha, beta, k = given.value("alpha", 1e-4), given.value("beta", 0.75), given.value("k", 1.0)
    return Kernel(("x",), lambda x: F.local_response_norm(x, size, alpha, beta, k))


def _padding(given: Given) -> Callable[[Sequence[int], Sequence[int], Sequence[int]], Pads]:
    """A function of input size, window (dilated) and stride that gives the pads."""
    kind, pad = given.value("pad_type", "valid"), given.ints("pad")
    if kind == "valid":
        return lambda size, window, stride: [(0, 0)] * len(window)
    if kind == "custom":
        fixed = list(zip(pad[::2], pad[1::2], strict=True)) if pad else None
        return lambda size, window, stride: fixed or [(0, 0)] * len(window)
    if kind not in ("same", "same_lower"):
        raise given.refusal("pad_type", "valid, custom, same or same_lower", kind)

    def same(size: Sequence[int], window: Sequence[int], stride: Sequence[int]) -> Pads:
        totals = [max(0, s * math.ceil(n / s) - n + w - s) for n, w, s in zip(size, window, stride, strict=True)]
        if kind == "same_lower":
            return [(total - total // 2, total // 2) for total in totals]
        return [(total // 2, total - total // 2) for total in totals]

    return same


def _padded(x: torch.Tensor, pads: Pads, value: float = 0.0) -> torch.Tensor:
    flat = [side for pair in reversed(pads) for side in pair]
    return F.pad(x, flat, value=value) if any(flat) else x


def conv(given: Given) -> Kernel:
    """Convolution of one to three dimensions."""
    padding, groups = _padding(given), given.value("groups", 1)
    strides, dilations = given.ints("strides"), given.ints("dilations")

    def run(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        space = x.dim() - 2
        stride, dilation = strides or (1,) * space, dilations or (1,) * space
        window = [(k - 1) * d + 1 for k, d in zip(weight.shape[2:], dilation, strict=True)]
        x = _padded(x, padding(x.shape[2:], window, stride))
        return _CONVOLUTIONS[space](x, weight, bias, stride=stride, dilation=dilation, groups=groups)

    return Kernel(given.present("x", "weight", "bias"), run)


def conv_transpose(given: Given) -> Kernel:
    """The full transposed convolution, cropped by the pads or grown at its end to the declared size; then the bias."""
    kind, pad, shape = given.value("pad_type", "valid"), given.ints("pad"), given.ints("output_shape")
    groups, strides, dilations = given.value("groups", 1), given.ints("strides"), given.ints("dilations")

    def run(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        space = x.dim() - 2
        stride, dilation = strides or (1,) * space, dilations or (1,) * space
        full = _TRANSPOSED[space](x, weight, stride=stride, dilation=dilation, groups=groups)
        for axis in range(space):
            before, after = (pad[2 * axis], pad[2 * axis + 1]) if kind == "custom" and pad else (0, 0)
            size = full.shape[axis + 2]
            if kind == "same":
                surplus = max(0, size - x.shape[axis + 2] * stride[axis])
                before, after = surplus // 2, surplus - surplus // 2
            want = shape[axis + 2] if shape else size - before - after
            short = max(0, before + want - size)
            full = F.pad(full, [0, 0] * (space - 1 - axis) + [0, short]).narrow(axis + 2, before, want)
        return full if bias is None else full + _per_channel(bias, full)

    return Kernel(given.present("x", "weight", "bias"), run)


def _pool(
    given: Given, reduce: Callable[[torch.Tensor, Pads, Pads, Sequence[int], Sequence[int]], torch.Tensor]
) -> Kernel:
    """A pool. `reduce` takes x, its pads, what a last partial window lacks after them, the window and the stride."""
    window, strides = given.ints("kernel_sizes") or (), given.ints("strides")
    padding, ceil = _padding(given), bool(given.value("ceil_mode", False))

    def run(x: torch.Tensor) -> torch.Tensor:
        stride = strides or (1,) * len(window)
        pads = padding(x.shape[2:], window, stride)
        missing = [
            (0, _overhang(n, w, s, pair) if ceil else 0)
            for n, w, s, pair in zip(x.shape[2:], window, stride, pads, strict=True)
        ]
        return reduce(x, pads, missing, window, stride)

    return Kernel(("x",), run)


def _overhang(size: int, window: int, stride: int, pads: tuple[int, int]) -> int:
    """What a last partial window of ceil mode lacks after the padded input; none starts in the padding."""
    total = size + sum(pads)
    count = -(-(total - window) // stride) + 1
    if sum(pads) and (count - 1) * stride >= size + pads[0]:
        count -= 1
    return max(0, (count - 1) * stride + window - total)


def max_pool(given: Given) -> Kernel:
    """The largest value of each window; padding never wins."""

    def reduce(
        x: torch.Tensor, pads: Pads, missing: Pads, window: Sequence[int], stride: Sequence[int]
    ) -> torch.Tensor:
        x = _padded(_padded(x, pads, -math.inf), missing, -math.inf)
        return _MAX_POOLS[len(window)](x, tuple(window), tuple(stride))

    kernel = _pool(given, reduce)
    return Kernel(kernel.inputs, kernel.run, exact=True)


def avg_pool(given: Given) -> Kernel:
    """The mean of each window; the padding counts as zeros or not at all, what lies beyond it never counts."""
    outside = bool(given.value("exclude_padding_from_average", False))

    def reduce(
        x: torch.Tensor, pads: Pads, missing: Pads, window: Sequence[int], stride: Sequence[int]
    ) -> torch.Tensor:
        pool = _MEAN_POOLS[len(window)]
        ones = torch.ones(1, 1, *x.shape[2:])
        ones = _padded(ones, pads, 0.0 if outside else 1.0)
        total = pool(_padded(_padded(x, pads), missing), tuple(window), tuple(stride))
        return total / pool(_padded(ones, missing), tuple(window), tuple(stride))

    return _pool(given, reduce)


def _resized(x: torch.Tensor, size: tuple[int, int], mode: str, corners: bool | None = None) -> torch.Tensor:
    """The last two axes in another size."""
    flat = x.reshape(1, -1, *x.shape[-2:])
    return F.interpolate(flat, size, mode=mode, align_corners=corners).reshape(*x.shape[:-2], *size)


def _scaled(x: torch.Tensor, height: float, width: float) -> tuple[int, int]:
    return math.floor(x.shape[-2] * height), math.floor(x.shape[-1] * width)


def upsample_nearest_neighbor(given: Given) -> Kernel:
    """Each pixel repeated, by a whole factor."""
    height, width = given.value("scale_factor_height", 1), given.value("scale_factor_width", 1)
    if height != int(height) or width != int(width):
        raise given.refusal("scale_factor", "whole factors", f"{height} and {width}")
    return Kernel(("x",), lambda x: _resized(x, _scaled(x, height, width), "nearest"), exact=True)


def upsample_bilinear(given: Given) -> Kernel:
    """Linear interpolation between corners, or between centres of pixels."""
    height, width = given.value("scale_factor_height", 1), given.value("scale_factor_width", 1)
    corners = bool(given.value("align_corners", True))
    if given.value("half_pixel_centers", not corners) == corners:
        raise given.refusal("half_pixel_centers", not corners, corners)
    return Kernel(("x",), lambda x: _resized(x, _scaled(x, height, width), "bilinear", corners))


def resize_bilinear(given: Given) -> Kernel:
    """Linear interpolation to a size."""
    size = (given.value("target_size_height", 1), given.value("target_size_width", 1))
    mode = given.value("sampling_mode", "DEFAULT")
    corners = {"STRICT_ALIGN_CORNERS": True, "UNALIGN_CORNERS": False}.get(mode)
    if corners is None:
        raise given.refusal("sampling_mode", "STRICT_ALIGN_CORNERS or UNALIGN_CORNERS", mode)
    return Kernel(("x",), lambda x: _resized(x, size, "bilinear", corners))


BUILDERS: dict[str, Builder] = {
    "avg_pool": avg_pool,
    "batch_norm": batch_norm,
    "conv": conv,
    "conv_transpose": conv_transpose,
    "instance_norm": instance_norm,
    "l2_norm": l2_norm,
    "layer_norm": layer_norm,
    "local_response_norm": local_response_norm,
    "max_pool": max_pool,
    "resize_bilinear": resize_bilinear,
    "upsample_bilinear": upsample_bilinear,
    "upsample_nearest_neighbor": upsample_nearest_neighbor,
}
