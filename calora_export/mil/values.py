"""Types and constant values of a MIL program, from its protobuf messages."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from calora_export.errors import PackageError, mismatch
from calora_export.mil.kernels import Constant
from calora_export.mil.weights import WeightFile, from_bytes, map_weights, storage

_MODEL_PATH = "@model_path/"
_TYPES = {
    1: "bool",
    2: "string",
    **dict(enumerate(("float16", "float32", "float64", "bfloat16"), start=10)),
    **dict(enumerate(("int8", "int16", "int32", "int64", "int4"), start=21)),
    **dict(enumerate(("uint8", "uint16", "uint32", "uint64", "uint4", "uint2", "uint1", "uint6", "uint3"), start=31)),
    **dict(enumerate(("float8_e4m3fn", "float8_e5m2"), start=40)),
}


@dataclass(frozen=True)
class TensorSpec:
    """What a function takes, gives or keeps: numpy's name of the type, and a shape with None where a size is free.

    `sizes` are the allowed sizes per axis, (least, most or None); `shapes` the only allowed shapes, where they are
    enumerated. `default` is what an optional input holds when it is not given.
    """

    dtype: str
    shape: tuple[int | None, ...]
    default: float | None = None
    sizes: tuple[tuple[int, int | None], ...] = ()
    shapes: tuple[tuple[int, ...], ...] = ()

    def allows(self, shape: tuple[int, ...]) -> bool:
        """Whether a tensor may have this shape."""
        if len(shape) != len(self.shape) or (self.shapes and shape not in self.shapes):
            return False
        if any(want not in (None, size) for want, size in zip(self.shape, shape, strict=True)):
            return False
        return all(
            low <= size and (high is None or size <= high) for size, (low, high) in zip(shape, self.sizes, strict=False)
        )

    def __str__(self) -> str:
        if self.shapes:
            return f"{self.dtype} " + " or ".join(str(list(shape)) for shape in self.shapes)
        sizes = self.sizes or tuple((0 if size is None else size, size) for size in self.shape)
        spans = [f"{low}" if low == high else f"{low}..{'' if high is None else high}" for low, high in sizes]
        return f"{self.dtype} [{', '.join(spans)}]"


def tensor_type(message: Any, where: str) -> tuple[str, tuple[int | None, ...]]:
    """The type and shape of a ValueType, a tensor, a state or a list; PackageError when it is none of them."""
    if message.WhichOneof("type") == "stateType":
        message = message.stateType.wrappedType
    kind = message.WhichOneof("type")
    if kind == "listType":  # of strings or numbers, only in constants
        return tensor_type(message.listType.type, where)[0], (message.listType.length.constant.size,)
    if kind != "tensorType":
        raise PackageError(mismatch(where, "type", "a tensor", kind))
    tensor = message.tensorType
    dtype = _TYPES.get(tensor.dataType)
    if dtype is None:
        raise PackageError(mismatch(where, "type", f"one of {', '.join(_TYPES.values())}", tensor.dataType))
    return dtype, tuple(d.constant.size if d.HasField("constant") else None for d in tensor.dimensions)


def described_tensor(dtype: str, shape: tuple[int | None, ...], feature: Any) -> TensorSpec:
    """An input with what the model's description adds: its flexible sizes and its default."""
    if feature is None or feature.type.WhichOneof("Type") != "multiArrayType":
        return TensorSpec(dtype, shape)
    array = feature.type.multiArrayType
    kind = array.WhichOneof("defaultOptionalValue")
    default = float(getattr(array, kind)) if kind else None
    ranges = tuple((r.lowerBound, r.upperBound if r.upperBound > 0 else None) for r in array.shapeRange.sizeRanges)
    shapes = tuple(tuple(choice.shape) for choice in array.enumeratedShapes.shapes)
    return TensorSpec(dtype, shape, default, ranges, shapes)


@dataclass
class Constants:
    """The constants of one program: each decoded at most once, equal ones shared between operations and functions."""

    package: str
    directory: Path  # of the model file
    _files: dict[str, WeightFile] = field(default_factory=dict)
    _known: dict[bytes, Constant] = field(default_factory=dict)

    def of(self, value: Any, where: str) -> Constant:
        """The constant of a Value message; PackageError when it is damaged."""
        key = value.SerializeToString(deterministic=True)
        if key not in self._known:
            self._known[key] = self._decode(value, where)
        return self._known[key]

    def _decode(self, value: Any, where: str) -> Constant:
        dtype, shape = tensor_type(value.type, where)
        sizes = tuple(size if size is not None else -1 for size in shape)
        if value.WhichOneof("value") == "blobFileValue":
            return self._blob(value.blobFileValue, dtype, sizes, where)
        try:
            array = _immediate(value.immediateValue, dtype, math.prod(sizes)).reshape(sizes)
        except ValueError as error:
            raise PackageError(mismatch(where, "value", f"{dtype} {list(sizes)}", error)) from error
        return Constant(lambda: array)

    def _blob(self, value: Any, dtype: str, shape: tuple[int, ...], where: str) -> Constant:
        file = self._file(value.fileName, where)
        blob = file.blob(value.offset)
        found, expected = f"{blob.dtype} × {blob.count}", f"{dtype} × {math.prod(shape)}"
        if found != expected:
            raise PackageError(mismatch(file.name, f"blob at byte {value.offset} ({where})", expected, found))
        return Constant(lambda: file.array(blob).reshape(shape))

    def _file(self, name: str, where: str) -> WeightFile:
        if name not in self._files:
            path = name.removeprefix(_MODEL_PATH)
            if path == name or ".." in Path(path).parts:
                raise PackageError(mismatch(where, "weight file", f"{_MODEL_PATH}…", name))
            self._files[name] = map_weights(self.directory / path, self.package)
        return self._files[name]


def _immediate(message: Any, dtype: str, count: int) -> np.ndarray:
    """The elements of a value that is in the specification itself, in one dimension."""
    if message.WhichOneof("value") == "list":
        return np.array(
            [_immediate(value.immediateValue, dtype, 1).item() for value in message.list.values], dtype=object
        )
    kind = message.tensor.WhichOneof("value")
    if kind is None:
        return np.zeros(0, dtype=object if dtype == "string" else storage(dtype))
    values = getattr(message.tensor, kind).values
    if kind == "bytes":
        return from_bytes(np.frombuffer(values, dtype=np.uint8), dtype, count)
    return np.array(list(values), dtype=object if dtype == "string" else storage(dtype))
