"""What a method consists of: XNNPACK nodes inside delegates, and operators between them.

An operator's level is the number of outside operators on the longest way to it, so that all XNNPACK nodes of one level
are one delegate: without slots, 30 layers become 31 delegates.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from executorch.backends.xnnpack.serialization import xnnpack_graph_schema as schema

from calora_export.package import SlotTensor
from calora_export.targets._executorch_program import Method
from calora_export.targets._xnnpack import END, SEQUENCE, Shape, Subgraph, Value

RANK = -2
"""In a shape: the rank of the adapter. Never inside a delegate."""

Emit = Callable[[Subgraph, Sequence[Value]], Value]


@dataclass(frozen=True)
class Ref:
    """A tensor of the program. level: of the delegate that computes it, or of the first that can read it."""

    number: int
    shape: Shape
    level: int
    inside: bool
    kind: str = "fp32"


@dataclass(frozen=True)
class Inside:
    """A node of the delegate of its output's level."""

    emit: Emit
    inputs: tuple[Ref, ...]
    output: Ref


@dataclass(frozen=True)
class Bounds:
    """The most that each dimension that varies can be."""

    sequence: int
    context: int
    rank: int

    def of(self, shape: Shape) -> list[int]:
        most = {SEQUENCE: self.sequence, END: self.context, RANK: self.rank}
        return [most.get(size, size) for size in shape]


@dataclass(frozen=True)
class Frame:
    """A method that is being written, and the numbers of what outside operators read. position: how many positions are
    cached; length: how many are new; end: how many will be cached; constants and caches by their names."""

    method: Method
    bounds: Bounds
    tokens: int
    position: int
    length: int
    end: int
    adapter: tuple[int, ...]
    named: Mapping[str, int]

    def tensor(self, shape: Shape, kind: str = "fp32") -> int:
        """A tensor that instructions write."""
        return self.method.tensor(kind, self.bounds.of(shape), dynamic=min(shape) <= 0)

    def sizes(self, shape: Shape) -> list[int]:
        """The numbers of what a shape is in this call."""
        method, now = self.method, {SEQUENCE: self.length, END: self.end}
        if RANK in shape:
            now[RANK] = method.computed("aten::sym_size.int", self.adapter[-1], method.number(0))
        return [now[size] if size in now else method.number(size) for size in shape]


Call = Callable[[Frame, Sequence[int], int], None]


@dataclass(frozen=True)
class Outside:
    """An operator between delegates: call(frame, inputs, output) writes its instructions.

    in_place is the input that the output takes the memory of.
    """

    call: Call
    inputs: tuple[Ref, ...]
    output: Ref
    in_place: Ref | None = None


@dataclass
class Steps:
    """Collects the steps of a method in order, and the constants and caches that they name."""

    found: list[Inside | Outside] = field(default_factory=list)
    constants: dict[str, np.ndarray] = field(default_factory=dict)
    caches: dict[str, Shape] = field(default_factory=dict)
    _count: int = 0

    def inside(self, emit: Emit, inputs: Sequence[Ref], shape: Shape) -> Ref:
        output = self._ref(shape, max(ref.level for ref in inputs), inside=True)
        self.found.append(Inside(emit, tuple(inputs), output))
        return output

    def outside(
        self, call: Call, inputs: Sequence[Ref], shape: Shape, *, in_place: Ref | None = None, kind: str = "fp32"
    ) -> Ref:
        level = max((ref.level + ref.inside for ref in inputs), default=0)
        output = self._ref(shape, level, inside=False, kind=kind)
        self.found.append(Outside(call, tuple(inputs), output, in_place))
        return output

    def _ref(self, shape: Shape, level: int, *, inside: bool, kind: str = "fp32") -> Ref:
        self._count += 1
        return Ref(self._count, shape, level, inside, kind)

    def unary(self, node: type[schema.XNNNode1x1], x: Ref) -> Ref:
        return self.inside(lambda graph, values: graph.unary(node, values[0]), [x], x.shape)

    def add(self, a: Ref, b: Ref) -> Ref:
        return self.inside(lambda graph, values: graph.add(*values), [a, b], a.shape)

    def reshape(self, x: Ref, shape: Shape) -> Ref:
        if shape == x.shape:
            return x
        return self.inside(lambda graph, values: graph.reshape(values[0], shape), [x], shape)

    def transpose(self, x: Ref, order: Sequence[int]) -> Ref:
        shape = tuple(x.shape[axis] for axis in order)
        return self.inside(lambda graph, values: graph.transpose(values[0], order), [x], shape)

    def slice(self, x: Ref, start: int, size: int) -> Ref:
        shape = (*x.shape[:-1], size)
        if shape == x.shape:
            return x
        return self.inside(lambda graph, values: graph.slice(values[0], start, size), [x], shape)


@dataclass(frozen=True)
class Attention:
    """The sizes of a layer's attention. window > 0 looks back only that far; softcap > 0 bounds scores."""

    heads: int
    kv_heads: int
    head_dim: int
    context: int
    scale: float
    window: int
    softcap: float


class Operators(Protocol):
    """Which operators compute attention and slots, for one method."""

    def require(self, attention: Attention) -> None:
        """Refuse what no operator computes, before anything is lowered."""
        ...

    def attention(self, q: Ref, k: Ref, v: Ref, attention: Attention) -> Ref:
        """q [1, S, H, D], k and v [1, S, KV, D], rotated → [1, S, H · D]; keeps keys and values for later calls."""
        ...

    def slotted(self, x: Ref, y: Ref, widths: Sequence[int], members: Sequence[int], gates: Ref | None) -> list[Ref]:
        """The linear layers of x whose outputs are side by side in y: those among members with their slots added.

        gates: [1, S, R] where each token has its own.
        """
        ...


class Kind(Protocol):
    """What a module of outside operators offers."""

    def Operators(self, steps: Steps) -> Operators: ...

    def adapter_inputs(self, tensors: Sequence[SlotTensor], dtype: str, rank: int) -> list[tuple[str, Shape]]:
        """Kind and shape of what a method takes of an adapter, rows first, gate [R] and recovery [R] last."""
        ...


def call_slice(method: Method, x: int, axis: int, start: int, end: int, output: int) -> None:
    """Positions [start, end) of an axis; start and end are numbers of values."""
    one = method.number(1)
    method.call("aten::slice_copy.Tensor_out", [x, method.number(axis), start, end, one, output, output])
