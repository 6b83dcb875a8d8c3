"""An ExecuTorch program, written instruction by instruction.

Upstream gets from a traced model to these instructions in some twenty passes, each of which runs the model once more in
fake tensors. A decoder of delegates is a short list of calls, so this writes the list: what it costs hardly grows with
the model.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence, Set
from pathlib import Path

import numpy as np
from executorch.exir import schema
from executorch.exir._serialize._named_data_store import NamedDataStore, NamedDataStoreOutput
from executorch.exir._serialize._program import PTEFile, serialize_pte_binary
from executorch.exir._serialize.data_serializer import DataEntry, DataPayload
from executorch.exir.scalar_type import ScalarType
from executorch.exir.tensor_layout import TensorLayout
from executorch.extension.flat_tensor.serialize.serialize import FlatTensorSerializer

from calora_export.targets._xnnpack import BACKEND, key_of

ALIGNMENT = 64  # of planned tensors, in bytes
SHARED_ALIGNMENT = 16  # of shared constants, in bytes
ARENA = 1  # the memory that a runtime gives a method
TYPES = {"fp32": (ScalarType.FLOAT, 4), "fp16": (ScalarType.HALF, 2), "int64": (ScalarType.LONG, 8)}
STORED = {
    np.dtype(np.float32): ScalarType.FLOAT,
    np.dtype(np.int8): ScalarType.CHAR,
    np.dtype(np.uint8): ScalarType.BYTE,
}
ONE_OUTPUT = '[1, {"type": null, "context": null, "children_spec": []}]'


class Program:
    """Methods and what they share: constants, delegates' payloads and the data that delegates look up by key."""

    def __init__(self) -> None:
        self._plans: list[schema.ExecutionPlan] = []
        self._constants: list[schema.Buffer] = [schema.Buffer(b"")]
        self._payloads: list[schema.BackendDelegateInlineData] = []
        self._named = NamedDataStore()
        self._known: dict[bytes, int] = {}
        self._shared: dict[str, tuple[bytes, TensorLayout]] = {}

    def constant(self, array: np.ndarray) -> int:
        """The index of a constant; equal ones are stored once."""
        return self._once(np.ascontiguousarray(array).tobytes(), self._constants, schema.Buffer)

    @property
    def shared(self) -> Set[str]:
        """Keys of what the data file holds."""
        return self._shared.keys()

    def share(self, array: np.ndarray) -> str:
        """The key of a constant that operators and delegates both read: only a data file can be read by both."""
        data = np.ascontiguousarray(array).tobytes()
        key = key_of(data)
        self._shared[key] = (data, TensorLayout(STORED[array.dtype], list(array.shape), list(range(array.ndim))))
        return key

    def payload(self, data: bytes, named: NamedDataStoreOutput) -> int:
        """The index of a delegate's payload."""
        self._named.merge_named_data_store(named)
        return self._once(data, self._payloads, schema.BackendDelegateInlineData)

    def _once(self, data: bytes, stored: list, kind: type) -> int:
        key = kind.__name__.encode() + hashlib.sha256(data).digest()
        if key not in self._known:
            stored.append(kind(data))
            self._known[key] = len(stored) - 1
        return self._known[key]

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
        """Write a .pte file, and beside it a .ptd file when something is shared."""
        if self._shared:
            buffers = [data for data, _ in self._shared.values()]
            layouts = [layout for _, layout in self._shared.values()]
            entries = [DataEntry(i, SHARED_ALIGNMENT, layout) for i, layout in enumerate(layouts)]
            payload = DataPayload(buffers, dict(zip(self._shared, entries, strict=True)))
            with path.with_suffix(".ptd").open("wb") as out:
                FlatTensorSerializer().serialize(payload).write_to_file(out)
        program = schema.Program(
            version=0,
            execution_plan=self._plans,
            constant_buffer=self._constants,
            backend_delegate_data=self._payloads,
            segments=[],
            constant_segment=schema.SubsegmentOffsets(0, []),
        )
        file = PTEFile(program, named_data=self._named.get_named_data_store_output())
        with path.open("wb") as out:
            serialize_pte_binary(file, extract_delegate_segments=True).write_to_file(out)


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
        self._known: dict[object, int] = {}

    # ── values ────────────────────────────────────────────────────────────────────────────────────────────────────

    def _value(self, value: schema.KernelTypes) -> int:
        self._values.append(schema.EValue(value))
        return len(self._values) - 1

    def number(self, value: int | float | bool | None) -> int:
        """A constant argument."""
        key = (type(value), value)
        if key not in self._known:
            kinds = {bool: schema.Bool, int: schema.Int, float: schema.Double}
            self._known[key] = self._value(schema.Null() if value is None else kinds[type(value)](value))
        return self._known[key]

    def numbers(self, values: Sequence[int]) -> int:
        return self._value(schema.IntList([self.number(value) for value in values]))

    def result(self) -> int:
        """An integer that an instruction computes."""
        return self._value(schema.Int(0))

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

    def shared(self, array: np.ndarray) -> int:
        """A constant that delegates read too."""
        key = self._program.share(array)
        value = self._tensor(STORED[array.dtype], array.shape, dynamic=False)
        tensor = self._values[value].val
        assert isinstance(tensor, schema.Tensor)
        tensor.extra_tensor_info = schema.ExtraTensorInfo(0, key, schema.TensorDataLocation.EXTERNAL)
        return value

    # ── instructions ──────────────────────────────────────────────────────────────────────────────────────────────

    def call(self, operator: str, arguments: Sequence[int]) -> None:
        """`namespace::name.overload`; the tensor that it writes is the last argument, as out and as result."""
        name, _, overload = operator.partition(".")
        found = schema.Operator(name, overload)
        if found not in self._operators:
            self._operators.append(found)
        self._instruct(schema.KernelCall(self._operators.index(found), list(arguments)), arguments)

    def delegate(self, payload: bytes, named: NamedDataStoreOutput, arguments: Sequence[int]) -> None:
        index = self._program.payload(payload, named)
        place = schema.BackendDelegateDataReference(schema.DataLocation.INLINE, index)
        self._delegates.append(schema.BackendDelegate(BACKEND, place, []))
        self._instruct(schema.DelegateCall(len(self._delegates) - 1, list(arguments)), arguments)

    def _instruct(self, call: schema.KernelCall | schema.DelegateCall, arguments: Sequence[int]) -> None:
        for value in arguments:
            if value in self._sizes:
                self._lives.setdefault(value, []).append(len(self._instructions))
        self._instructions.append(schema.Instruction(call))

    def output(self, value: int) -> None:
        self._outputs.append(value)
        self._lives.setdefault(value, []).append(len(self._instructions))

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


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT
