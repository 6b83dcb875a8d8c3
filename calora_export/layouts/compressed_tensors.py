"""compressed-tensors, as llm-compressor and transformers save it: pack-quantized and int-quantized.

weight_packed int32 [out, in · bits / 32] holds q + 2^(bits-1); weight_zero_point int32 [out · bits / 32, groups] is
packed along the rows. int-quantized has int8 in `weight` and in `weight_zero_point` as they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import msgspec
import numpy as np

from calora_export import strict_json
from calora_export.compression import BITS, PackedWeight, WeightFormat
from calora_export.errors import BundleError, UnsupportedError, mismatch
from calora_export.layouts import KEY
from calora_export.layouts._words import order_of, require, signed, unpack
from calora_export.tensors import FLOATS, TensorIndex

MARKS = (".weight_packed",)
FORMATS = ("pack-quantized", "int-quantized")


class Arguments(msgspec.Struct, frozen=True):
    """How weights or activations are quantised."""

    num_bits: int | None = None
    symmetric: bool = True
    dynamic: object = False
    strategy: str | None = None


class Group(msgspec.Struct, frozen=True):
    """Of the layers that one scheme is for."""

    weights: Arguments | None = None
    input_activations: Arguments | None = None

    @property
    def w8a8(self) -> bool:
        """Whether its layers round x to int8, symmetrically for each token as it comes."""
        x = self.input_activations
        return x is not None and (x.num_bits, x.symmetric, x.dynamic, x.strategy) == (8, True, True, "token")


class Config(msgspec.Struct, frozen=True):
    """What of the quantization_config says how to read."""

    format: str | None = None
    config_groups: dict[str, Group] | None = None

    @property
    def w8a8(self) -> bool:
        """Whether that is said of everything in 8 bits."""
        groups = [g for g in (self.config_groups or {}).values() if g.weights is not None and g.weights.num_bits == 8]
        return bool(groups) and all(group.w8a8 for group in groups)


def reader(config: bytes, tensors: TensorIndex, file: str) -> Reader:
    """UnsupportedError for another of the library's formats."""
    found = strict_json.decode(config, Config, f"{file}: {KEY}")
    if found.format not in FORMATS:
        hint = "save it uncompressed, or with llm-compressor as pack-quantized"
        shown = strict_json.plain(str(found.format))
        raise UnsupportedError(mismatch(file, f"{KEY}.format", " or ".join(FORMATS), shown, hint))
    return Reader(tensors, found.w8a8)


@dataclass(frozen=True)
class Reader:
    """Every module tells its own form by its tensors."""

    tensors: TensorIndex
    w8a8: bool = False

    def modules(self) -> Sequence[str]:
        packed = [name.removesuffix(".weight_packed") for name in self.tensors.names() if name.endswith(MARKS)]
        whole = [
            name.removesuffix(".weight")
            for name, info in self.tensors.tensors.items()
            if name.endswith(".weight") and info.dtype == "I8" and f"{name}_scale" in self.tensors.tensors
        ]
        return packed + whole

    def format(self, module: str) -> WeightFormat:
        tensors, packed, dense = self.tensors, f"{module}.weight_packed", f"{module}.weight"
        if packed in tensors.tensors and dense in tensors.tensors:
            raise BundleError(mismatch(tensors.file_of(dense), dense, "either this or weight_packed", "both"))
        if packed in tensors.tensors:
            rows, columns = _stored_shape(tensors, f"{module}.weight_shape")
            bits = _bits(tensors, packed, rows, columns)
        else:
            rows, columns = require(tensors, dense, (None, None), "I8")
            bits = 8
        group = _group_size(tensors, f"{module}.weight_scale", rows, columns)
        zero, index = f"{module}.weight_zero_point", f"{module}.weight_g_idx"
        if zero in tensors.tensors:
            if packed in tensors.tensors:
                require(tensors, zero, (-(-rows * bits // 32), columns // group), "I32")
            else:
                require(tensors, zero, (rows, columns // group), "I8")
        if index in tensors.tensors:
            require(tensors, index, (columns,), "I32", "I64")
        symmetric = zero not in tensors.tensors
        rounds = self.w8a8 and bits == 8 and symmetric
        return WeightFormat((rows, columns), bits, group, symmetric, int8_activations=rounds)

    def read(self, module: str) -> PackedWeight:
        stored, tensors = self.format(module), self.tensors
        bits, group, (rows, columns) = stored.bits, stored.group_size, stored.shape
        assert bits is not None and group is not None
        packed, zero, index = (f"{module}.{name}" for name in ("weight_packed", "weight_zero_point", "weight_g_idx"))
        whole = packed not in tensors.tensors
        q = tensors.array(f"{module}.weight") if whole else signed(unpack(tensors.array(packed), bits), bits)
        order = order_of(tensors, index, columns // group) if index in tensors.tensors else None
        q = q[:, :columns] if order is None else q[:, :columns][:, order]
        zeros = None
        if not stored.symmetric:
            zeros = tensors.array(zero)
            zeros = zeros if whole else signed(unpack(zeros.T, bits)[:, :rows].T, bits)
            zeros = np.ascontiguousarray(zeros)
        q = q if whole and order is None else np.ascontiguousarray(q)
        return PackedWeight(q, tensors.array(f"{module}.weight_scale"), bits, group, zeros, order=order)


def _stored_shape(tensors: TensorIndex, name: str) -> tuple[int, int]:
    info = tensors.info(name)
    if info.shape != (2,) or info.dtype not in ("I64", "I32"):
        found = f"{info.dtype} {list(info.shape)}"
        raise BundleError(mismatch(tensors.file_of(name), name, "I64 [2]", found))
    rows, columns = (int(size) for size in tensors.array(name))
    if rows < 1 or columns < 1:
        found = f"[{rows}, {columns}]"
        raise BundleError(mismatch(tensors.file_of(name), name, "[out, in] of at least 1", found))
    return rows, columns


def _bits(tensors: TensorIndex, name: str, rows: int, columns: int) -> int:
    info = tensors.info(name)
    for bits in BITS:
        if info.dtype == "I32" and info.shape == (rows, -(-columns * bits // 32)):
            return bits
    expected = " or ".join(f"I32 [{rows}, {-(-columns * bits // 32)}] ({bits} bits)" for bits in BITS)
    raise BundleError(mismatch(tensors.file_of(name), name, expected, f"{info.dtype} {list(info.shape)}"))


def _group_size(tensors: TensorIndex, name: str, rows: int, columns: int) -> int:
    info = tensors.info(name)
    fits = len(info.shape) == 2 and info.shape[0] == rows and info.shape[1] > 0
    if not fits or columns % info.shape[1] or info.dtype not in FLOATS:
        expected = f"{' or '.join(FLOATS)} [{rows}, {columns} / group size]"
        raise BundleError(mismatch(tensors.file_of(name), name, expected, f"{info.dtype} {list(info.shape)}"))
    return columns // info.shape[1]
