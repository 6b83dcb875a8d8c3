"""An ExecuTorch program, written instruction by instruction.

Upstream gets from a traced model to these instructions in some twenty passes, each of which runs the model once more in
fake tensors. A decoder of delegates is a short list of calls, so this writes the list: what it costs hardly grows with
the model.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np
from executorch.exir import schema
from executorch.exir._serialize._flatbuffer_program import _program_to_flatbuffer
from executorch.exir._serialize._named_data_store import NamedDataStore, NamedDataStoreOutput
from executorch.exir._serialize._program import _ExtendedHeader, _insert_flatbuffer_header
from executorch.exir.scalar_type import ScalarType

from calora_export.targets._xnnpack import BACKEND

ALIGNMENT = 64  # of stored and planned tensors, in bytes
ARENA = 1  # the memory that a runtime gives a method
TYPES = {
    "fp32": (ScalarType.FLOAT, 4),
    "fp16": (ScalarType.HALF, 2),
    "int64": (ScalarType.LONG, 8),
    "bool": (ScalarType.BOOL, 1),
}
STORED = {
    np.dtype(np.float32): ScalarType.FLOAT,
    np.dtype(np.int64): ScalarType.LONG,
    np.dtype(np.int8): ScalarType.CHAR,
    np.dtype(np.uint8): ScalarType.BYTE,
}
ONE_OUTPUT = '[1, {"type": null, "context": null, "children_spec": []}]'


class Program:
    """Methods and what they share: constants, delegates' payloads and the data that delegates look up by key."""

    def __init__(self) -> None:
        self._plans: list[schema.ExecutionPlan] = []
        self._constants: dict[bytes, int] = {}
        self._payloads: dict[bytes, int] = {}
        self._named = NamedDataStore()

    def constant(self, array: np.ndarray) -> int:
        """The index of a constant; equal ones are one. 0 stands for none."""
        data = np.ascontiguousarray(array).tobytes()
        return self._constants.setdefault(data, len(self._constants) + 1)

    def payload(self, data: bytes, named: NamedDataStoreOutput) -> int:
        """The index of a delegate's payload."""
        self._named.merge_named_data_store(named)
        return self._payloads.setdefault(data, len(self._payloads))

    def add(self, method: Method) -> None:
        self._plans.append(method.plan())

    def answer(self, name: str, values: Sequence[int | bool]) -> None:
        """A method without inputs that returns constants: how runners ask a program for its sizes."""
        kinds = [schema.Bool(value) if isinstance(value, bool) else schema.Int(value) for value in values]
        self._plans.append(
            schema.ExecutionPlan(
                name,
                schema.ContainerMetadata("", ONE_OUTPUT if len(kinds) == 1 else ""),
                [schema.EValue(value) for value in kinds],
                [],
                list(range(len(kinds))),
                [schema.Chain([], [], [], None)],
                [],
                [],
                [0],
            )
        )

    def write(self, path: Path) -> None:
        """Write a .pte file: the program, then constants, payloads and named data, where equal bytes are stored once.

        So a token table that is also the head is one blob, which an operator reads as a constant and a delegate by key.
        """
        blobs = _Blobs()
        offsets = [0, *(blobs.place(data).offset for data in self._constants)]
        segments = [schema.DataSegment(0, blobs.size), *(blobs.place(data) for data in self._payloads)]
        output, named = self._named.get_named_data_store_output(), []
        for key, entry in output.pte_data.items():
            named.append(schema.NamedData(key, len(segments)))
            segments.append(blobs.place(output.buffers[entry.buffer_index]))  # type: ignore[arg-type]
        program = schema.Program(
            version=0,
            execution_plan=self._plans,
            constant_buffer=[],
            backend_delegate_data=[],
            segments=segments,
            constant_segment=schema.SubsegmentOffsets(0, offsets),
            named_data=named,
        )
        head = _program_to_flatbuffer(program)
        length = _aligned(_ExtendedHeader.EXPECTED_LENGTH, head.max_alignment)
        size = length + len(head.data)
        header = _ExtendedHeader(size, _aligned(size), blobs.size).to_bytes().ljust(length, b"\0")
        with path.open("wb") as out:
            out.write(
                _insert_flatbuffer_header(head.data, "ET[0-9a-zA-Z][0-9a-zA-Z]", header).ljust(_aligned(size), b"\0")
            )
            blobs.write(out)


class _Blobs:
    """Data one after the other, aligned, equal ones once."""

    def __init__(self) -> None:
        self.size = 0
        self._places: dict[bytes, schema.DataSegment] = {}

    def place(self, data: bytes) -> schema.DataSegment:
        """Where the data is, from the beginning of all blobs."""
        if data not in self._places:
            self._places[data] = schema.DataSegment(self.size, len(data))
            self.size += _aligned(len(data))
        return self._places[data]

    def write(self, out: BinaryIO) -> None:
        for data in self._places:
            out.write(data)
            out.write(bytes(_aligned(len(data)) - len(data)))


class Method:
    """Collects the values and instructions of one method. Every value is known by its number."""

    def __init__(self, name: str, program: Program) -> None:
        self.name, self._program = name, program
        self._values: list[schema.EValue] = []
        self._inputs: list[int] = []
        self._outputs: list[int] = []
        self._instructions: list[schema.Instruction] = []
        self._operators: list[schema.Operator] = []
        self._delegates: list[schema.BackendDelegate] = []
        self._sizes: dict[int, int] = {}
        self._lives: dict[int, list[int]] = {}
        self._kept: dict[int, int] = {}
        self._viewed: dict[int, int] = {}
        self._listed: dict[int, list[int]] = {}
        self._known: dict[object, int] = {}

    # ── values ────────────────────────────────────────────────────────────────────────────────────────────────────

    def _value(self, value: schema.KernelTypes) -> int:
        self._values.append(schema.EValue(value))
        return len(self._values) - 1

    def number(self, value: int | float | bool | None) -> int:
        """A constant argument."""
        kinds = {bool: schema.Bool, int: schema.Int, float: schema.Double}
        return self._once((type(value), value), schema.Null() if value is None else kinds[type(value)](value))

    def _once(self, key: object, value: schema.KernelTypes) -> int:
        if key not in self._known:
            self._known[key] = self._value(value)
        return self._known[key]

    def text(self, value: str) -> int:
        return self._once(value, schema.String(value))

    def numbers(self, values: Sequence[int]) -> int:
        return self.sizes([self.number(value) for value in values])

    def sizes(self, values: Sequence[int]) -> int:
        """A list of integers, constant and computed, by their numbers."""
        return self._once(("sizes", *values), schema.IntList(list(values)))

    def tensors(self, values: Sequence[int | None]) -> int:
        """A list of tensors that may be none."""
        found = [-1 if value is None else value for value in values]
        number = self._once(("tensors", *found), schema.OptionalTensorList(found))
        self._listed[number] = found
        return number

    def computed(self, operator: str, *arguments: int) -> int:
        """The number of the integer that an operator makes of these; computed where it is first asked for."""
        key = (operator, *arguments)
        if key not in self._known:
            self._known[key] = self._value(schema.Int(0))
            self.call(operator, [*arguments, self._known[key]])
        return self._known[key]

    def _tensor(self, kind: ScalarType, shape: Sequence[int], *, dynamic: bool, buffer: int = 0) -> int:
        dynamism = schema.TensorShapeDynamism.DYNAMIC_BOUND if dynamic else schema.TensorShapeDynamism.STATIC
        sizes, order = list(shape), list(range(len(shape)))
        return self._value(schema.Tensor(kind, 0, sizes, order, False, 0, buffer, None, dynamism))

    def input(self, kind: str, shape: Sequence[int], *, dynamic: bool) -> int:
        """The next argument, of at most this shape; its memory is the caller's."""
        value = self._tensor(TYPES[kind][0], shape, dynamic=dynamic)
        self._inputs.append(value)
        return value

    def tensor(self, kind: str, shape: Sequence[int], *, dynamic: bool) -> int:
        """A tensor that instructions write, of at most this shape."""
        value = self._tensor(TYPES[kind][0], shape, dynamic=dynamic)
        self._sizes[value] = math.prod(shape) * TYPES[kind][1]
        return value

    def state(self, shape: Sequence[int]) -> int:
        """An fp32 tensor that keeps its content from call to call."""
        value = self._tensor(ScalarType.FLOAT, shape, dynamic=False)
        self._kept[value] = math.prod(shape) * 4
        return value

    def constant(self, array: np.ndarray) -> int:
        index = self._program.constant(array)
        return self._tensor(STORED[array.dtype], array.shape, dynamic=False, buffer=index)

    # ── instructions ──────────────────────────────────────────────────────────────────────────────────────────────

    def call(self, operator: str, arguments: Sequence[int]) -> None:
        """`namespace::name.overload`; the tensor that it writes is the last argument, as out and as result."""
        name, _, overload = operator.partition(".")
        found = schema.Operator(name, overload)
        if found not in self._operators:
            self._operators.append(found)
        self._instruct(schema.KernelCall(self._operators.index(found), list(arguments)), arguments)

    def view(self, x: int, sizes: Sequence[int], view: int) -> None:
        """Let a tensor be x with other sizes: it has the place of x, which lives as long as either is used."""
        self._sizes.pop(view)
        self._viewed[view] = self._viewed.get(x, x)
        self.call("executorch_prim::et_view.default", [x, self.sizes(sizes), view])

    def delegate(self, payload: bytes, named: NamedDataStoreOutput, arguments: Sequence[int]) -> None:
        index = self._program.payload(payload, named)
        place = schema.BackendDelegateDataReference(schema.DataLocation.SEGMENT, 1 + index)  # after the constants
        self._delegates.append(schema.BackendDelegate(BACKEND, place, []))
        self._instruct(schema.DelegateCall(len(self._delegates) - 1, list(arguments)), arguments)

    def _instruct(self, call: schema.KernelCall | schema.DelegateCall, arguments: Sequence[int]) -> None:
        for value in arguments:
            self._use(value)
        self._instructions.append(schema.Instruction(call))

    def _use(self, value: int) -> None:
        for member in self._listed.get(value, [value]):
            place = self._viewed.get(member, member)
            if place in self._sizes:
                self._lives.setdefault(place, []).append(len(self._instructions))

    def output(self, value: int) -> None:
        self._outputs.append(value)
        self._use(value)

    def plan(self) -> schema.ExecutionPlan:
        size = self._place()
        return schema.ExecutionPlan(
            self.name,
            schema.ContainerMetadata("", ONE_OUTPUT),
            self._values,
            self._inputs,
            self._outputs,
            [schema.Chain([], [], self._instructions, None)],
            self._operators,
            self._delegates,
            [0, size],
        )

    def _place(self) -> int:
        """Give every tensor its place in the arena; its size in bytes. States first, then the largest tensors: each
        goes to the lowest place that no tensor of the same time has."""
        end = 0
        for value, size in self._kept.items():
            self._allocate(value, end)
            end += _aligned(size)
        first, placed = end, []
        for value, size in sorted(self._sizes.items(), key=lambda item: -item[1]):
            lives = self._lives[value]
            start = first
            for low, high, since, until in sorted(placed):
                if since <= lives[-1] and until >= lives[0] and start < high and low < start + size:
                    start = high
            placed.append((start, start + _aligned(size), lives[0], lives[-1]))
            self._allocate(value, start)
            end = max(end, start + _aligned(size))
        return end

    def _allocate(self, value: int, offset: int) -> None:
        tensor = self._values[value].val
        assert isinstance(tensor, schema.Tensor)
        tensor.allocation_info = schema.AllocationDetails(ARENA, offset & (2**32 - 1), offset >> 32)


def _aligned(size: int, alignment: int = ALIGNMENT) -> int:
    return -(-size // alignment) * alignment
