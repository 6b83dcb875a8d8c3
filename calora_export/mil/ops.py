"""The reference runtime's operators by name; here those that compute by element, reduce, or multiply matrices.

Every operator computes in float32 (or exactly, in integers); who runs it rounds the result to the declared type.
Sources: the documentation and the `value_inference` of coremltools' operator definitions.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import MappingProxyType
from typing import Any

import torch
from torch.nn import functional as F

from calora_export.mil import constexpr, layers, moves, places
from calora_export.mil.kernels import Builder, Given, Kernel

_INVERSE_SQRT = 1e-12  # the defaults of epsilon
_INVERSE = 1e-4
_LOGARITHM = 1e-45
_GELU_SIGMOID = 1.702
_ZERO = torch.zeros(())


def _unary(function: Callable[[torch.Tensor], torch.Tensor], exact: bool = False) -> Builder:
    return lambda given: Kernel(("x",), function, exact=exact or not given.floating)


def _binary(function: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], exact: bool = False) -> Builder:
    return lambda given: Kernel(("x", "y"), function, exact=exact or not given.floating)


def _with_epsilon(function: Callable[[torch.Tensor], torch.Tensor], default: float) -> Builder:
    def build(given: Given) -> Kernel:
        epsilon = given.value("epsilon", default)
        return Kernel(("x",), lambda x: function(x + epsilon))

    return build


def _scalars(function: Callable[..., torch.Tensor], *names: str) -> Builder:
    """An activation with constant scalar parameters, which follow x."""

    def build(given: Given) -> Kernel:
        values = tuple(given.needed(name) for name in names)
        return Kernel(("x",), lambda x: function(x, *values))

    return build


def _channels(value: Any, x: torch.Tensor) -> torch.Tensor:
    """A value per channel (axis 1), shaped to spread over x."""
    return torch.as_tensor(value).reshape(-1, *[1] * (x.dim() - 2))


def _per_channel(function: Callable[..., torch.Tensor], *names: str) -> Builder:
    return lambda given: Kernel(("x", *names), lambda x, *values: function(x, *[_channels(v, x) for v in values]))


def _truncated_division(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return torch.div(x, y, rounding_mode="trunc")


def _real_div(given: Given) -> Kernel:
    return Kernel(("x", "y"), torch.div if given.floating else _truncated_division, exact=not given.floating)


def _gelu(given: Given) -> Kernel:
    mode = given.value("mode", "EXACT")
    if mode == "EXACT":
        return Kernel(("x",), F.gelu)
    if mode == "TANH_APPROXIMATION":
        return Kernel(("x",), partial(F.gelu, approximate="tanh"))
    if mode == "SIGMOID_APPROXIMATION":
        return Kernel(("x",), lambda x: x * torch.sigmoid(_GELU_SIGMOID * x))
    raise given.refusal("mode", "EXACT, TANH_APPROXIMATION or SIGMOID_APPROXIMATION", mode)


def _clip(given: Given) -> Kernel:
    low, high = given.needed("alpha"), given.needed("beta")
    return Kernel(("x",), lambda x: x.clamp(low, high), exact=True)


_CASTS = {
    "bool": lambda x: x != 0,
    "fp16": lambda x: x.float(),
    "fp32": lambda x: x.float(),
    "int8": lambda x: x.to(torch.int8).int(),
    "int16": lambda x: x.to(torch.int16).int(),
    "int32": lambda x: x.int(),
    "uint8": lambda x: x.int() & 0xFF,
    "uint16": lambda x: x.int() & 0xFFFF,
}


def _cast(given: Given) -> Kernel:
    target = given.needed("dtype")
    if target not in _CASTS:
        raise given.refusal("dtype", "one of " + ", ".join(_CASTS), target)
    return Kernel(("x",), _CASTS[target], exact=target != "fp16", shares=target != "fp16")


def _softmax(given: Given) -> Kernel:
    axis = given.value("axis", -1)
    return Kernel(("x",), lambda x: x.softmax(axis))


def _select(given: Given) -> Kernel:
    return Kernel(("cond", "a", "b"), torch.where, exact=True)


def _reduction(function: Callable[[torch.Tensor, tuple[int, ...], bool], torch.Tensor], exact: bool = False) -> Builder:
    def build(given: Given) -> Kernel:
        axes, keep = given.ints("axes"), bool(given.value("keep_dims", False))
        if axes is None:
            return Kernel(("x",), lambda x: function(x, tuple(range(x.dim())), keep), exact=exact)
        return Kernel(("x",), lambda x: function(x, axes, keep), exact=exact or not given.floating)

    return build


def _mean(x: torch.Tensor, axes: tuple[int, ...], keep: bool) -> torch.Tensor:
    if x.dtype == torch.float32:
        return x.mean(axes, keep)
    return x.double().mean(axes, keep).to(x.dtype)


def _product(x: torch.Tensor, axes: tuple[int, ...], keep: bool) -> torch.Tensor:
    for axis in sorted((axis % x.dim() for axis in axes), reverse=True):
        x = x.prod(axis, keep, dtype=x.dtype)
    return x


def _best(function: Callable[[torch.Tensor, int, bool], torch.Tensor]) -> Builder:
    def build(given: Given) -> Kernel:
        given.ignore("output_dtype")
        axis, keep = given.value("axis", -1), bool(given.value("keep_dims", False))
        return Kernel(("x",), lambda x: function(x, axis, keep).int(), exact=True)

    return build


def _matmul(given: Given) -> Kernel:
    turn_x, turn_y = given.value("transpose_x", False), given.value("transpose_y", False)

    def run(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return torch.matmul(x.mT if turn_x and x.dim() > 1 else x, y.mT if turn_y and y.dim() > 1 else y)

    return Kernel(("x", "y"), run, exact=not given.floating)


def _linear(given: Given) -> Kernel:
    return Kernel(given.present("x", "weight", "bias"), F.linear)


def _einsum(given: Given) -> Kernel:
    equation = given.needed("equation")
    return Kernel(("values",), lambda *values: torch.einsum(equation, *values))


def _attention(given: Given) -> Kernel:
    def run(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None = None) -> Any:
        if mask is not None and mask.dim() < 2:
            mask = mask.expand(query.shape[-2], key.shape[-2])
        return F.scaled_dot_product_attention(query, key, value, mask)

    return Kernel(given.present("query", "key", "value", "attn_mask"), run)


def _cumsum(given: Given) -> Kernel:
    axis = given.value("axis", 0)
    exclusive, backwards = given.value("exclusive", False), given.value("reverse", False)

    def run(x: torch.Tensor) -> torch.Tensor:
        x = x.flip(axis) if backwards else x
        total = x.cumsum(axis, dtype=x.dtype)
        if exclusive:  # what came before: shifted by one, not total − x, which would cancel
            first = torch.zeros_like(total.narrow(axis, 0, min(1, total.shape[axis])))
            total = torch.cat([first, total.narrow(axis, 0, max(0, total.shape[axis] - 1))], axis)
        return total.flip(axis) if backwards else total

    return Kernel(("x",), run, exact=not given.floating)


def _quantize(given: Given) -> Kernel:
    low, high = {"int8": (-128, 127), "uint8": (0, 255)}[given.needed("output_dtype")]
    axis = given.value("axis", 0)

    def run(x: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor = _ZERO) -> torch.Tensor:
        return (torch.round(x / _along(scale, x, axis)) + _along(zero, x, axis)).clamp(low, high).int()

    return Kernel(given.present("input", "scale", "zero_point"), run, exact=True)


def _dequantize(given: Given) -> Kernel:
    axis = given.value("axis", 0)

    def run(x: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor = _ZERO) -> torch.Tensor:
        return (x.float() - _along(zero, x, axis)) * _along(scale, x, axis)

    return Kernel(given.present("input", "scale", "zero_point"), run)


def _along(value: torch.Tensor, x: torch.Tensor, axis: int) -> torch.Tensor:
    """A scalar, or a vector that lies along one axis of x."""
    if not value.dim():
        return value
    shape = [1] * x.dim()
    shape[axis] = -1
    return value.reshape(shape)


_BUILDERS: dict[str, Builder] = {
    "abs": _unary(torch.abs, exact=True),
    "acos": _unary(torch.acos),
    "add": _binary(torch.add),
    "asin": _unary(torch.asin),
    "atan": _unary(torch.atan),
    "atanh": _unary(torch.atanh),
    "cast": _cast,
    "ceil": _unary(torch.ceil),
    "clamped_relu": _scalars(lambda x, a, b: torch.where(x >= 0, x, x * a).clamp(max=b), "alpha", "beta"),
    "clip": _clip,
    "cos": _unary(torch.cos),
    "cosh": _unary(torch.cosh),
    "cumsum": _cumsum,
    "dequantize": _dequantize,
    "einsum": _einsum,
    "elu": _scalars(lambda x, a: torch.where(x > 0, x, a * torch.expm1(x)), "alpha"),
    "equal": _binary(torch.eq),
    "erf": _unary(torch.erf),
    "exp": _unary(torch.exp),
    "exp2": _unary(torch.exp2),
    "floor": _unary(torch.floor),
    "floor_div": _binary(torch.floor_divide),
    "gelu": _gelu,
    "greater": _binary(torch.gt),
    "greater_equal": _binary(torch.ge),
    "inverse": _with_epsilon(torch.reciprocal, _INVERSE),
    "leaky_relu": _scalars(F.leaky_relu, "alpha"),
    "less": _binary(torch.lt),
    "less_equal": _binary(torch.le),
    "linear": _linear,
    "linear_activation": _scalars(lambda x, a, b: a * x + b, "alpha", "beta"),
    "log": _with_epsilon(torch.log, _LOGARITHM),
    "logical_and": _binary(torch.logical_and),
    "logical_not": _unary(torch.logical_not),
    "logical_or": _binary(torch.logical_or),
    "logical_xor": _binary(torch.logical_xor),
    "matmul": _matmul,
    "maximum": _binary(torch.maximum, exact=True),
    "minimum": _binary(torch.minimum, exact=True),
    "mod": _binary(torch.remainder),
    "mul": _binary(torch.mul),
    "not_equal": _binary(torch.ne),
    "pow": _binary(torch.pow),
    "prelu": _per_channel(lambda x, a: torch.where(x > 0, x, a * x), "alpha"),
    "quantize": _quantize,
    "real_div": _real_div,
    "reduce_argmax": _best(torch.argmax),
    "reduce_argmin": _best(torch.argmin),
    "reduce_l1_norm": _reduction(lambda x, axes, keep: x.abs().sum(axes, keep, dtype=x.dtype)),
    "reduce_l2_norm": _reduction(lambda x, axes, keep: x.square().sum(axes, keep).sqrt().to(x.dtype)),
    "reduce_log_sum": _reduction(lambda x, axes, keep: x.sum(axes, keep).log().to(x.dtype)),
    "reduce_log_sum_exp": _reduction(lambda x, axes, keep: torch.logsumexp(x.float(), axes, keep).to(x.dtype)),
    "reduce_max": _reduction(torch.amax, exact=True),
    "reduce_mean": _reduction(_mean),
    "reduce_min": _reduction(torch.amin, exact=True),
    "reduce_prod": _reduction(_product),
    "reduce_sum": _reduction(lambda x, axes, keep: x.sum(axes, keep, dtype=x.dtype)),
    "reduce_sum_square": _reduction(lambda x, axes, keep: x.square().sum(axes, keep, dtype=x.dtype)),
    "relu": _unary(torch.relu, exact=True),
    "relu6": _unary(F.relu6, exact=True),
    "round": _unary(torch.round),
    "rsqrt": _with_epsilon(torch.rsqrt, _INVERSE_SQRT),
    "scaled_dot_product_attention": _attention,
    "scaled_tanh": _scalars(lambda x, a, b: a * torch.tanh(b * x), "alpha", "beta"),
    "select": _select,
    "sigmoid": _unary(torch.sigmoid),
    "sigmoid_hard": _scalars(lambda x, a, b: (a * x + b).clamp(0, 1), "alpha", "beta"),
    "sign": _unary(torch.sign),
    "silu": _unary(F.silu),
    "sin": _unary(torch.sin),
    "sinh": _unary(torch.sinh),
    "softmax": _softmax,
    "softplus": _unary(lambda x: torch.logaddexp(x, _ZERO)),
    "softplus_parametric": _per_channel(lambda x, a, b: a * torch.logaddexp(b * x, _ZERO), "alpha", "beta"),
    "softsign": _unary(F.softsign),
    "sqrt": _unary(torch.sqrt),
    "square": _unary(torch.square),
    "sub": _binary(torch.sub),
    "tan": _unary(torch.tan),
    "tanh": _unary(torch.tanh),
    "threshold": _scalars(lambda x, a: x.clamp(min=a), "alpha"),
    "thresholded_relu": _scalars(lambda x, a: torch.where(x >= a, x, _ZERO), "alpha"),
}

OPERATORS = MappingProxyType(
    _BUILDERS | constexpr.BUILDERS | layers.BUILDERS | moves.BUILDERS | places.BUILDERS
)
