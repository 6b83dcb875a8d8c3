"""torchao, as transformers saves it in safetensors: integers that are not packed, with scales and zero points.

`_weight_qdata` int8 [out, in], `_weight_scale` and `_weight_zero_point` [out, groups]; a file's metadata has the class
of each tensor and the bits that its integers fill.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import msgspec
import numpy as np

from calora_export import strict_json
from calora_export.compression import PackedWeight, WeightFormat
from calora_export.errors import BundleError, UnsupportedError, mismatch
from calora_export.layouts._words import require
from calora_export.tensors import TensorIndex

MARKS = ("._weight_qdata",)
BITS = {"int4": 4, "int8": 8}


class _Named(msgspec.Struct, frozen=True, rename={"data": "_data"}):
    data: str


class _Attributes(msgspec.Struct, frozen=True):
    target_dtype: _Named | None = None


class _Class(msgspec.Struct, frozen=True, rename={"kind": "_type", "data": "_data"}):
    kind: str
    data: _Attributes


def reader(config: bytes, tensors: TensorIndex, file: str) -> Reader:
    """The config says how to quantise; the tensors say how they were."""
    return Reader(tensors)


@dataclass(frozen=True)
class Reader:
    tensors: TensorIndex

    def modules(self) -> Sequence[str]:
        return [name.removesuffix(MARKS[0]) for name in self.tensors.names() if name.endswith(MARKS)]

    def format(self, module: str) -> WeightFormat:
        tensors, data = self.tensors, f"{module}._weight_qdata"
        bits = self._bits(module, data)
        rows, columns = require(tensors, data, (None, None), "I8")
        _, groups = require(tensors, f"{module}._weight_scale", (rows, None))
        if columns % groups:
            expected = f"a number of groups that divides {columns}"
            raise BundleError(mismatch(tensors.file_of(data), f"{module}._weight_scale", expected, groups))
        zero = f"{module}._weight_zero_point"
        if zero in tensors.tensors:
            require(tensors, zero, (rows, groups), "I8")
        symmetric = zero not in tensors.tensors or not tensors.array(zero).any()
        return WeightFormat((rows, columns), bits, columns // groups, symmetric)

    def read(self, module: str) -> PackedWeight:
        stored, name = self.format(module), f"{module}._weight_qdata"
        q, bits = self.tensors.array(name), stored.bits
        assert bits is not None and stored.group_size is not None
        half = 1 << (bits - 1)
        if q.min() < -half or q.max() >= half:
            found = f"{q.min()} to {q.max()}"
            raise BundleError(mismatch(self.tensors.file_of(name), name, f"values from {-half} to {half - 1}", found))
        zero = None if stored.symmetric else np.array(self.tensors.array(f"{module}._weight_zero_point"))
        return PackedWeight(q, self.tensors.array(f"{module}._weight_scale"), bits, stored.group_size, zero)

    def _bits(self, module: str, data: str) -> int:
        file, key = self.tensors.file_of(data), f"{module}.weight"
        text = self.tensors.metadata.get(key)
        if text is None:
            raise BundleError(mismatch(file, f"__metadata__.{key}", "torchao's description of the tensor", "nothing"))
        found = strict_json.decode(text.encode(), _Class, f"{file}: __metadata__.{key}")
        if found.kind == "Int8Tensor":
            return 8
        name = found.data.target_dtype.data if found.data.target_dtype is not None else "nothing"
        if found.kind != "IntxUnpackedToInt8Tensor" or name not in BITS:
            shown = strict_json.plain(f"{found.kind} of {name}")
            hint = "quantise with IntxWeightOnlyConfig or Int8WeightOnlyConfig"
            expected = "Int8Tensor or IntxUnpackedToInt8Tensor of int4 or int8"
            raise UnsupportedError(mismatch(file, f"__metadata__.{key}", expected, shown, hint))
        return BITS[name]
