"""The program of a saved .mlpackage as plain values: operators, types, and how large a flexible length may become.

A specification says of a flexible length only that it is unknown. What it can be at most follows from the ranges of the
inputs: `Value.bound`. An operator without a rule of its own gets the longest length that stands in its place.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, Literal

from calora_export import mlpackage
from calora_export.errors import PackageError, mismatch

Dims = tuple[int | None, ...]
Shape = tuple[int, ...]
Flexibility = Literal["fixed", "range", "enumerated"]

BITS = {"float16": 16, "float32": 32, "float64": 64, "bfloat16": 16, "bool": 8, "float8e4m3fn": 8, "float8e5m2": 8}
NOT_TENSORS = ("string", "unused_type")
VIEWS = ("reshape", "expand_dims", "squeeze")


@dataclass(frozen=True)
class Value:
    """A tensor. dims: None where a call decides; bound: the largest that each can be; ints: the numbers of a short
    vector, as far as they are constant; made_by: the operator that gives it, or `input` or `state`; blob: where a
    constant is in the weight file.
    """

    name: str
    dtype: str
    dims: Dims
    bound: Shape
    made_by: str
    ints: Dims = ()
    blob: int | None = None

    @property
    def size(self) -> int:
        """Bytes at the most."""
        return -(-prod(self.bound) * bits(self.dtype) // 8)

    @property
    def constant(self) -> bool:
        return self.made_by == "const" or self.made_by.startswith("constexpr_")


@dataclass(frozen=True)
class Operation:
    """One operator; constants are values among its inputs, not operators."""

    type: str
    inputs: Mapping[str, tuple[Value, ...]]
    outputs: tuple[Value, ...]

    def first(self, name: str) -> Value | None:
        """The input of that name; None when it is not given."""
        return next(iter(self.inputs.get(name, ())), None)

    def values(self) -> Iterator[Value]:
        for given in self.inputs.values():
            yield from given


@dataclass(frozen=True)
class Function:
    """One function: `flexibility` by input; `outputs`: the names of what it returns."""

    name: str
    opset: str
    inputs: tuple[Value, ...]
    states: tuple[Value, ...]
    flexibility: Mapping[str, Flexibility]
    operations: tuple[Operation, ...]
    outputs: tuple[str, ...]


def bits(dtype: str) -> int:
    """Of one number: 4 for int4. Texts and lists count for nothing."""
    if dtype in NOT_TENSORS:
        return 0
    return BITS[dtype] if dtype in BITS else int(dtype.lstrip("uint"))


def functions(spec: Any, package: str) -> list[Function]:
    """Every function of a specification; PackageError when it is not one that can be read."""
    described = {entry.name: entry for entry in spec.description.functions} or {"main": spec.description}
    found = spec.mlProgram.functions
    if set(described) != set(found):
        raise PackageError(mismatch(package, "mlProgram.functions", sorted(described), sorted(found)))
    try:
        return [_Reader(described[name], name, found[name], package).function() for name in sorted(found)]
    except (KeyError, IndexError, ValueError, TypeError) as error:
        raise PackageError(mismatch(package, "mlProgram", "operators with their inputs", repr(error))) from error


class _Reader:
    """Reads one function in the order of its operators, so that every value is known before it is used."""

    def __init__(self, described: Any, name: str, made: Any, package: str) -> None:
        self.described = described
        self.name = name
        self.made = made
        self.package = package
        self.values: dict[str, Value] = {}
        self.operations: list[Operation] = []
        self.longest = 1

    def function(self) -> Function:
        shapes = {feature.name: _shapes(feature) for feature in self.described.input}
        flexibility: dict[str, Flexibility] = {name: kind for name, (kind, _) in shapes.items()}
        for given in self.made.inputs:
            is_state = given.type.WhichOneof("type") == "stateType"
            dtype, dims = _type(given.type.stateType.wrappedType if is_state else given.type)
            most = shapes[given.name][1] if given.name in shapes else ()
            bound = most if len(most) == len(dims) else tuple(size or 1 for size in dims)
            self.values[given.name] = Value(given.name, dtype, dims, bound, "state" if is_state else "input")
        given = tuple(self.values.values())
        self.longest = max((size for value in given for size in value.bound), default=1)
        block = self.made.block_specializations[self.made.opset]
        self._read(block)
        return Function(
            self.name,
            self.made.opset,
            tuple(value for value in given if value.made_by == "input"),
            tuple(value for value in given if value.made_by == "state"),
            flexibility,
            tuple(self.operations),
            tuple(block.outputs),
        )

    def _read(self, block: Any) -> None:
        for made in block.operations:
            for nested in made.blocks:
                self._read(nested)
            inputs = {name: tuple(map(self._argument, given.arguments)) for name, given in made.inputs.items()}
            if made.type == "const":
                self._constant(made)
                continue
            outputs = tuple(self._output(made.type, output, inputs) for output in made.outputs)
            self.values |= {value.name: value for value in outputs}
            self.operations.append(Operation(made.type, inputs, outputs))

    def _argument(self, argument: Any) -> Value:
        if argument.WhichOneof("binding") == "value":
            return _constant("", argument.value)
        if argument.name not in self.values:
            raise PackageError(mismatch(self.package, argument.name, "a value that is made before it is used", "none"))
        return self.values[argument.name]

    def _constant(self, made: Any) -> None:
        name = made.outputs[0].name
        self.values[name] = _constant(name, made.attributes["val"])

    def _output(self, kind: str, output: Any, inputs: Mapping[str, tuple[Value, ...]]) -> Value:
        dtype, dims = _type(output.type)
        ints = _joined(inputs) if kind == "concat" and len(dims) == 1 else ()
        return Value(output.name, dtype, dims, _bound(kind, dims, inputs, self.longest), kind, ints)


def _shapes(feature: Any) -> tuple[Flexibility, Shape]:
    """How an input may vary, and the largest of each length. An open range counts as its default."""
    array = feature.type.multiArrayType
    kind = array.WhichOneof("ShapeFlexibility")
    default = tuple(array.shape)
    if kind == "shapeRange":
        ranges = array.shapeRange.sizeRanges
        most = tuple(
            entry.upperBound if entry.upperBound > 0 else size for entry, size in zip(ranges, default, strict=True)
        )
        return ("range" if any(entry.lowerBound != entry.upperBound for entry in ranges) else "fixed"), most
    if kind == "enumeratedShapes":
        shapes = [tuple(entry.shape) for entry in array.enumeratedShapes.shapes]
        return ("enumerated" if len(set(shapes)) > 1 else "fixed"), max(shapes, key=prod)
    return "fixed", default


def _type(given: Any) -> tuple[str, Dims]:
    tensor = given.tensorType
    dims = tuple(
        entry.constant.size if entry.WhichOneof("dimension") == "constant" else None for entry in tensor.dimensions
    )
    return mlpackage.messages("MIL_pb2").DataType.Name(tensor.dataType).lower(), dims


def _constant(name: str, value: Any) -> Value:
    dtype, dims = _type(value.type)
    shape = tuple(size or 0 for size in dims)
    tensor = value.immediateValue.tensor
    ints = tuple(tensor.ints.values) or tuple(map(int, tensor.bools.values))
    blob = value.blobFileValue.offset if value.WhichOneof("value") == "blobFileValue" else None
    return Value(name, dtype, dims, shape, "const", ints, blob)


Given = Mapping[str, tuple[Value, ...]]


def _bound(kind: str, dims: Dims, inputs: Given, longest: int) -> Shape:
    """The largest shape of an operator's output."""
    if None not in dims:
        return tuple(size or 0 for size in dims)
    most = _RULES.get(kind, _aligned)(dims, inputs)
    if most is None or len(most) != len(dims):
        most = (longest,) * len(dims)
    return tuple(size or limit or longest for size, limit in zip(dims, most, strict=True))


def _shape(inputs: Given, name: str) -> Shape:
    return inputs[name][0].bound


def _aligned(dims: Dims, inputs: Given) -> Dims:
    """By place, counted from the right as in broadcasting. Unknown lengths that meet in a place are one length, so the
    shorter bound holds.
    """
    values = [value for given in inputs.values() for value in given if not value.constant]

    def most(place: int) -> int | None:
        unknown = [value.bound[-place] for value in values if place <= len(value.dims) and value.dims[-place] is None]
        return min(unknown, default=None)

    return tuple(most(place) for place in range(len(dims), 0, -1))


def _slice(dims: Dims, inputs: Given) -> Dims | None:
    """What is cut out where that is constant, else at most all of it."""
    x = _shape(inputs, "x")
    if len(x) != len(dims):
        return None
    begin, end = _numbers(inputs, "begin", len(x)), _numbers(inputs, "end", len(x))
    open_begin, open_end = _numbers(inputs, "begin_mask", len(x)), _numbers(inputs, "end_mask", len(x))
    made = []
    for axis, size in enumerate(x):
        first, last = 0 if open_begin[axis] else begin[axis], size if open_end[axis] else end[axis]
        made.append(last - first if first is not None and last is not None and 0 <= first < last else size)
    return tuple(made)


def _numbers(inputs: Given, name: str, count: int) -> Dims:
    given = inputs.get(name, ())
    return given[0].ints if given and len(given[0].ints) == count else (None,) * count


def _joined(inputs: Given) -> Dims:
    return tuple(number for part in inputs["values"] for number in part.ints or (None,) * prod(part.bound))


def _view(dims: Dims, inputs: Given) -> Dims:
    """As many numbers as before; several unknown lengths are each at most the longest of the input."""
    shape = _shape(inputs, "x")
    known = prod(size for size in dims if size is not None)
    most = prod(shape) // max(known, 1) if dims.count(None) == 1 else max(shape, default=1)
    return (most,) * len(dims)


def _transpose(dims: Dims, inputs: Given) -> Dims:
    return tuple(_shape(inputs, "x")[axis] for axis in inputs["perm"][0].ints if axis is not None)


def _matmul(dims: Dims, inputs: Given) -> Dims | None:
    x, y = _shape(inputs, "x"), _shape(inputs, "y")
    if len(x) < 2 or len(y) < 2:
        return None
    rows = x[-1 if _true(inputs, "transpose_x") else -2]
    columns = y[-2 if _true(inputs, "transpose_y") else -1]
    batch = [max(shape[-place] for shape in (x, y) if len(shape) >= place) for place in range(len(dims), 2, -1)]
    return (*batch, rows, columns)


def _true(inputs: Given, name: str) -> bool:
    return any(value.ints == (1,) for value in inputs.get(name, ()))


def _linear(dims: Dims, inputs: Given) -> Dims:
    return (*_shape(inputs, "x")[:-1], _shape(inputs, "weight")[0])


def _attention(dims: Dims, inputs: Given) -> Dims:
    return (*_shape(inputs, "query")[:-1], _shape(inputs, "value")[-1])


def _gather(dims: Dims, inputs: Given) -> Dims | None:
    x = _shape(inputs, "x")
    at = _axis(inputs, len(x))
    if at is None:
        return None
    return (*x[:at], *_shape(inputs, "indices"), *x[at + 1 :])


def _tile(dims: Dims, inputs: Given) -> Dims:
    x = _shape(inputs, "x")
    repeated = zip(x, _numbers(inputs, "reps", len(x)), strict=True)
    return tuple(None if times is None else size * times for size, times in repeated)


def _concat(dims: Dims, inputs: Given) -> Dims | None:
    columns = zip(*(value.bound for value in inputs["values"]), strict=True)
    at = _axis(inputs, len(dims))
    return None if at is None else tuple(sum(sizes) if i == at else max(sizes) for i, sizes in enumerate(columns))


def _axis(inputs: Given, rank: int) -> int | None:
    [axis] = _numbers(inputs, "axis", 1)
    return axis % rank if rank and axis is not None else None


_RULES: Mapping[str, Callable[[Dims, Given], Dims | None]] = {
    **dict.fromkeys(VIEWS, _view),
    "slice_by_index": _slice,
    "transpose": _transpose,
    "matmul": _matmul,
    "linear": _linear,
    "scaled_dot_product_attention": _attention,
    "gather": _gather,
    "concat": _concat,
    "tile": _tile,
}


def read(package: Path) -> tuple[Any, list[Function]]:
    """The specification of a package and its functions."""
    spec: Any = mlpackage.read_spec(package)
    return spec, functions(spec, package.name)
