"""Linear layers and token tables in ONNX Runtime's operators, the bundle's own integers in each.

MatMulNBits: 4 or 8 bits in blocks, zero points, or 2^(bits-1) for all. MatMulBnb4: NF4. GatherBlockQuantized: tables.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
import onnx_ir as ir
import torch

from calora_export.errors import UnsupportedError, mismatch
from calora_export.targets._nodes import Weight
from calora_export.targets._onnx_builder import CONTRIB, Builder

NF4 = 1  # quant_type of MatMulBnb4


def linear(build: Builder, x: ir.Value, weights: Sequence[Weight], *, level: int, by_rows: bool) -> ir.Value:
    """x times the weights, one below the other: they are alike in `Weight.layout`.

    level: accuracy_level of MatMulNBits. by_rows: a dense weight is stored as a table is, to be stored with it.
    """
    first, layout = weights[0], weights[0].layout
    name = "+".join([first.name, *(weight.name.split(".")[-2] for weight in weights[1:])])
    rows, columns = sum(weight.values.shape[0] for weight in weights), first.values.shape[1]
    bias = _stacked(build, f"{name}.bias", [weight.bias for weight in weights], [rows]) if layout.biased else None
    if not layout.bits:
        return _plus(build, _dense(build, x, weights, name, by_rows), bias)
    if first.order is not None:
        x = _gathered(build, x, first.order)
    if first.codebook is not None:
        return _plus(build, _looked_up(build, x, weights, name), bias)
    bits, group = layout.bits, layout.group
    packed = build.stored(
        f"{name}.q{bits}",
        lambda: np.concatenate([weight.packed() for weight in weights]),
        [rows, columns // group, group * bits // 8],
        ir.DataType.UINT8,
        key=f"{name}.q",
    )
    scale = _stacked(build, f"{name}.scale", [weight.scale for weight in weights], [rows, columns // group])
    inputs = [x, packed, scale, _zeros(build, name, weights), None, bias]
    while inputs[-1] is None:
        inputs.pop()
    options = {"K": columns, "N": rows, "bits": bits, "block_size": group, "accuracy_level": level}
    return build.emit("MatMulNBits", *inputs, domain=CONTRIB, **options)


def lookup(build: Builder, ids: ir.Value, weight: Weight) -> ir.Value:
    """Rows of a token table. UnsupportedError for one with a codebook."""
    bits, group = weight.layout.bits, weight.layout.group
    rows, columns = weight.values.shape
    if not bits:
        return build.emit("Gather", build.floats(weight.name, weight.values.numpy, [rows, columns]), ids)
    if weight.codebook is not None:
        raise UnsupportedError(mismatch(weight.name, "weight", "integers or floats in a token table", "a codebook"))
    packed = build.stored(
        f"{weight.name}.table",
        weight.packed,
        [rows, columns * bits // 8],
        ir.DataType.UINT8,
        key=f"{weight.name}.q",
    )
    scale = _stacked(build, f"{weight.name}.scale", [weight.scale], list(weight.scale.shape))
    inputs = [packed, ids, scale, _zeros(build, weight.name, [weight])]
    options = {"bits": bits, "block_size": group, "gather_axis": 0, "quantize_axis": 1}
    return build.emit("GatherBlockQuantized", *(inputs if inputs[-1] else inputs[:-1]), domain=CONTRIB, **options)


def _dense(build: Builder, x: ir.Value, weights: Sequence[Weight], name: str, by_rows: bool) -> ir.Value:
    values = [weight.values for weight in weights]
    rows, columns = sum(len(value) for value in values), values[0].shape[1]
    if by_rows:
        weight = _stacked(build, name, values, [rows, columns])
        return build.emit("FusedMatMul", x, weight, domain=CONTRIB, transB=1)
    transposed = build.floats(f"{name}.T", lambda: torch.cat(values).numpy().T, [columns, rows])
    return build.emit("MatMul", x, transposed)


def _looked_up(build: Builder, x: ir.Value, weights: Sequence[Weight], name: str) -> ir.Value:
    """Two codes a byte, the first in the high half, in blocks of the flattened matrix."""
    rows, columns, group = sum(len(w.values) for w in weights), weights[0].values.shape[1], weights[0].layout.group

    def pack() -> np.ndarray:
        codes = np.concatenate([weight.values.numpy().reshape(-1) for weight in weights]).astype(np.uint8)
        return (codes[0::2] << 4) | codes[1::2]

    codes = build.stored(f"{name}.nf4", pack, [rows * columns // 2], ir.DataType.UINT8)
    scale = _stacked(build, f"{name}.scale", [w.scale.reshape(-1) for w in weights], [rows * columns // group])
    options = {"K": columns, "N": rows, "block_size": group, "quant_type": NF4}
    return build.emit("MatMulBnb4", x, codes, scale, domain=CONTRIB, **options)


def _zeros(build: Builder, name: str, weights: Sequence[Weight]) -> ir.Value | None:
    """uint8 [out, groups], two a byte for 4 bits, the first in the low half; None where there are none."""
    if weights[0].zero is None:
        return None
    bits, groups = weights[0].bits, weights[0].scale.shape[1]

    def pack() -> np.ndarray:
        zero = np.concatenate([weight.zero.numpy() for weight in weights if weight.zero is not None])
        codes = (zero.astype(np.int16) + (1 << (bits - 1))).astype(np.uint8)
        if bits == 8:
            return codes
        codes = np.pad(codes, ((0, 0), (0, groups % 2)))
        return codes[:, 0::2] | (codes[:, 1::2] << 4)

    rows = sum(len(weight.values) for weight in weights)
    return build.stored(f"{name}.zero", pack, [rows, groups if bits == 8 else -(-groups // 2)], ir.DataType.UINT8)


def _gathered(build: Builder, x: ir.Value, order: torch.Tensor) -> ir.Value:
    """The features of x in the order of a weight's columns; layers that share both share the result."""
    indices = order.numpy()
    digest = hashlib.sha256(indices.tobytes()).hexdigest()[:12]
    return build.once(
        ("order", x.name, digest),
        lambda: build.emit("Gather", x, build.constant(f"order_{digest}", indices), axis=-1),
    )


def _stacked(build: Builder, name: str, tensors: Sequence[torch.Tensor], shape: Sequence[int]) -> ir.Value:
    return build.floats(name, lambda: np.concatenate([tensor.numpy() for tensor in tensors]), shape)


def _plus(build: Builder, y: ir.Value, bias: ir.Value | None) -> ir.Value:
    return y if bias is None else build.emit("Add", y, bias)
