"""What of a model runs inside XNNPACK delegates and what between them.

Tables, and what a kind of operators says of attention and slots, are operators of their own; everything else is
XNNPACK's.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from executorch.backends.xnnpack.serialization import xnnpack_graph_schema as schema
from torch.fx import Node

from calora_export.errors import UnsupportedError, mismatch
from calora_export.graph import Graph
from calora_export.targets import _nodes
from calora_export.targets._executorch_steps import (
    RANK,
    Attention,
    Frame,
    Inside,
    Kind,
    Outside,
    Ref,
    Steps,
    call_slice,
)
from calora_export.targets._nodes import ATEN, CALORA, VIEWS, W8A8, Weight
from calora_export.targets._xnnpack import SEQUENCE, Filter, Shape, Subgraph, Value, nibbles

TINY = 1e-24  # the square of the smallest length that torch's normalize divides by


@dataclass(frozen=True)
class Plan:
    """One method: its steps in order, the constants and caches that they name, and the logits."""

    steps: tuple[Inside | Outside, ...]
    constants: Mapping[str, np.ndarray]
    caches: Mapping[str, Shape]
    logits: Ref


def plan(graph: Graph, kind: Kind, *, slots: bool) -> Plan:
    """Walk the graph; slots says whether the method takes adapters."""
    return _Walk(graph, kind, slots).run()


class _Walk:
    def __init__(self, graph: Graph, kind: Kind, slots: bool) -> None:
        self.graph, self.slots = graph, slots
        self.steps = Steps()
        self.operators = kind.Operators(self.steps)
        self.roles = graph.roles()
        self.values: dict[tuple[Node, int], Ref] = {}
        self.rope: dict[str, Ref] = {}
        self.sizes = graph.extras.sizes(graph.slots)
        self.extras: dict[str, Ref] = {}

    def run(self) -> Plan:
        outputs = _nodes.results(self.graph)
        needed = _nodes.live(outputs[:1], self._operands)
        nodes = [node for node in _nodes.calls(self.graph) if node in needed]
        for node in nodes:
            if node.target is CALORA.attention.default:
                self.operators.require(self._attention(node))
        for node in nodes:
            self._lower(node)
        steps, logits = self.steps, self.value(outputs[0])
        return Plan(_reachable(steps.found, logits), steps.constants, steps.caches, logits)

    def _operands(self, node: Node) -> Sequence[Node]:
        if node.target is CALORA.attention.default:
            return [_nodes.heads(arg)[0] for arg in node.args[:3]]
        return [_nodes.viewed(node)] if node.target in VIEWS else node.all_input_nodes

    def _lower(self, node: Node) -> None:
        if node.target in _nodes.SAME:
            self.values[node, 0] = self.value(node.args[0])
            return
        _nodes.handler("executorch", _HANDLERS, node)(self, node)

    # ── steps ─────────────────────────────────────────────────────────────────────────────────────────────────────

    def value(self, arg: object) -> Ref:
        """What a node computed."""
        node = _nodes.node(arg)
        return self.values[_nodes.member(node) if node.target is operator.getitem else (node, 0)]

    # ── linears and slots ─────────────────────────────────────────────────────────────────────────────────────────

    def lower_linears(self, node: Node) -> None:
        """All members side by side in one tensor; then each member's columns with its slot."""
        x, weights = self.value(node.args[0]), _nodes.weights(self.graph, self.roles, node)
        widths = [len(weight.values) for weight in weights]
        alike = len({weight.layout for weight in weights}) == 1
        x = self._rounded(x) if node.args[9] == W8A8 else x
        filters = [_stacked(weights)] if alike else [_stacked([weight]) for weight in weights]
        y = self.steps.inside(
            lambda graph, values: graph.concatenate([graph.linear(values[0], held) for held in filters]),
            [x],
            (*x.shape[:-1], sum(widths)),
        )
        y = self._masked(y, widths, _nodes.masks(node))
        members = [i for i, _ in _nodes.slot_sites(self.roles, node)] if self.slots else []
        if members:
            gates = _nodes.node(node.args[7])
            own = None if gates.op == "placeholder" else self.value(gates)
            outputs = self.operators.slotted(self.value(node.args[0]), y, widths, members, own)
        else:
            outputs = [self.steps.slice(y, sum(widths[:i]), width) for i, width in enumerate(widths)]
        self.values.update({(node, i): output for i, output in enumerate(outputs)})

    def _rounded(self, x: Ref) -> Ref:
        """x as W8A8 reads it (`ops.round_activations`). XNNPACK can neither find the largest of a position nor round:
        the first is another operator's, the second happens when what has no room for fractions is added."""

        def call(frame: Frame, inputs: Sequence[int], output: int) -> None:
            axes, keep = frame.method.numbers([-1]), frame.method.number(True)
            frame.method.call("aten::amax.out", [inputs[0], axes, keep, output, output])

        def emit(graph: Subgraph, values: Sequence[Value]) -> Value:
            x, most = values
            even, least = (graph.constant(np.array([value])) for value in (1.5 * 2.0**23, np.finfo(np.float32).tiny))
            scale = graph.binary(schema.XNNDiv, most, graph.constant(np.array([127.0])))
            scale = graph.binary(schema.XNNMaximum, scale, least)
            steps = graph.add(graph.binary(schema.XNNDiv, x, scale), even)
            return graph.multiply(graph.subtract(steps, even), scale)

        most = self.steps.outside(call, [self.steps.unary(schema.XNNAbs, x)], (*x.shape[:-1], 1))
        return self.steps.inside(emit, [x, most], x.shape)

    def _masked(self, y: Ref, widths: Sequence[int], masks: Sequence[Node | None]) -> Ref:
        """The members of a group side by side, those that have experts times their masks."""
        held = [mask for mask in masks if mask is not None]

        def emit(graph: Subgraph, values: Sequence[Value]) -> Value:
            y, parts, found = values[0], [], iter(values[1:])
            for i, width in enumerate(widths):
                part = graph.slice(y, sum(widths[:i]), width)
                parts.append(part if masks[i] is None else graph.multiply(part, next(found)))
            return graph.concatenate(parts)

        return self.steps.inside(emit, [y, *(self.value(mask) for mask in held)], y.shape) if held else y

    def lower_experts(self, node: Node) -> None:
        """XNNPACK scores the experts; the plain SDK's operators choose some and spread that over their neurons."""
        x, top_k = self.value(node.args[0]), _nodes.integer(node.args[4])
        hidden, scores, labels = (self.graph.tensors[self._role(arg)].numpy() for arg in node.args[1:4])
        columns, count = x.shape[-1], len(scores)

        def emit(graph: Subgraph, values: Sequence[Value]) -> Value:
            x = values[0]
            squares = graph.linear(graph.unary(schema.XNNSquare, x), _plain(np.ones((1, columns), np.float32)))
            shifted = graph.add(squares, graph.constant(np.array([TINY])))
            unit = graph.multiply(x, graph.unary(schema.XNNReciprocalSquareRoot, shifted))
            bent = graph.unary(schema.XNNTanh, graph.linear(unit, _plain(hidden)))
            return graph.linear(bent, _plain(scores))

        found = self.steps.inside(emit, [x], (*x.shape[:-1], count))
        owners, ones, zeros = f"{self._role(node.args[3])}", "one", "zero"
        self.steps.constants |= {
            owners: labels.astype(np.int64),
            ones: np.ones(1, np.float32),
            zeros: np.zeros(1, np.float32),
        }
        shape = (*x.shape[:-1], len(labels))

        def call(frame: Frame, inputs: Sequence[int], output: int) -> None:
            method, number = frame.method, frame.method.number
            best, order = (frame.tensor((*x.shape[:-1], top_k), kind) for kind in ("fp32", "int64"))
            (found,) = inputs
            options = [number(option) for option in (top_k, -1, True, True)]
            method.call("aten::topk.values", [found, *options, best, order, best])
            least = frame.tensor((*x.shape[:-1], 1))
            call_slice(method, best, 2, number(top_k - 1), number(top_k), least)
            chosen = frame.tensor(found_shape, "bool")
            method.call("aten::ge.Tensor_out", [found, least, chosen, chosen])
            weights = frame.tensor(found_shape)
            method.call("aten::where.self_out", [chosen, frame.named[ones], frame.named[zeros], weights, weights])
            method.call("aten::index_select.out", [weights, number(-1), frame.named[owners], output, output])

        found_shape = (*x.shape[:-1], count)
        self.values[node, 0] = self.steps.outside(call, [found], shape)

    def lower_token_gates(self, node: Node) -> None:
        """[1, S, R]; without slots nobody reads them."""
        if not self.slots:
            return
        x, weight, bias = self.value(node.args[0]), *(self._extra(arg) for arg in node.args[1:3])
        around = _nodes.node(node.args[4])
        outer = [] if around.op == "placeholder" else [self.value(around)]
        experts, shape = weight.shape[0], (1, SEQUENCE, RANK)

        def call(frame: Frame, inputs: Sequence[int], output: int) -> None:
            method, (x, weight, bias, *others) = frame.method, inputs
            one, named = method.number(1), frame.named
            inner, outer = (method.tensor("fp32", [1, experts], dynamic=False) for _ in range(2))
            for row, part in enumerate((inner, outer)):
                call_slice(method, bias, 0, method.number(row), method.number(row + 1), part)
            scores, shifted, shares, weights = (frame.tensor((1, SEQUENCE, experts)) for _ in range(4))
            marked = frame.tensor(shape)
            method.call("aten::linear.out", [x, weight, method.number(None), scores, scores])
            method.call("aten::add.out", [scores, inner, one, shifted, shifted])
            options = (method.number(-1), method.number(False))
            method.call("aten::_softmax.out", [shifted, *options, shares, shares])
            method.call("aten::add.out", [shares, outer, one, weights, weights])
            method.call("aten::bmm.out", [weights, named["select"], marked, marked])
            gate = others[0] if others else frame.adapter[-2]
            method.call("aten::add.out", [marked, gate, one, output, output])

        self.values[node, 0] = self.steps.outside(call, [x, weight, bias, *outer], shape)

    def _extra(self, arg: object) -> Ref:
        """A part of the input `extras`, in its shape."""
        role = self._role(arg)
        if role not in self.extras:
            names = list(self.sizes)
            start, shape = sum(math.prod(self.sizes[name]) for name in names[: names.index(role)]), self.sizes[role]

            def call(frame: Frame, _: Sequence[int], output: int) -> None:
                method, end = frame.method, start + math.prod(shape)
                part = method.tensor("fp32", [math.prod(shape)], dynamic=False)
                call_slice(method, frame.named["extras"], 0, method.number(start), method.number(end), part)
                method.view(part, [method.number(size) for size in shape], output)

            self.extras[role] = self.steps.outside(call, [], shape)
        return self.extras[role]

    # ── the other whole operators ─────────────────────────────────────────────────────────────────────────────────

    def lower_embedding(self, node: Node) -> None:
        held = _nodes.table(self.graph, self.roles, node)
        self.steps.constants["table"] = _table(held)
        if held.bits:  # always fp32: the operators take the scales to be of the type of their output
            self.steps.constants["table_scale"] = held.scale.numpy()
        bits, shape = held.bits, (1, SEQUENCE, held.values.shape[1])

        def call(frame: Frame, _: Sequence[int], output: int) -> None:
            method, table = frame.method, frame.named["table"]
            if not bits:
                options = (method.number(-1), method.number(False), method.number(False))
                method.call("aten::embedding.out", [table, frame.tokens, *options, output, output])
                return
            operator, half = {4: ("embedding_4bit", 8), 8: ("embedding_byte", 128)}[bits]
            limits = (method.number(None), method.number(-half), method.number(half - 1))
            arguments = [table, frame.named["table_scale"], *limits, frame.tokens, output, output]
            method.call(f"quantized_decomposed::{operator}.out", arguments)

        rows = self.steps.outside(call, [], shape)
        self.values[node, 0] = self.steps.inside(_swapped, [rows], shape) if bits == 4 else rows

    def lower_rms_norm(self, node: Node) -> None:
        x, weight, eps = self.value(node.args[0]), self.graph.tensors[self._role(node.args[1])], node.args[2]
        array = weight.numpy()
        self.values[node, 0] = self.steps.inside(
            lambda graph, values: graph.rms_norm(values[0], array, float(eps)),  # type: ignore[arg-type]
            [x],
            x.shape,
        )

    def _role(self, arg: object) -> str:
        return self.roles[_nodes.node(arg).name]

    def _attention(self, node: Node) -> Attention:
        shape, (scale, window, softcap) = self.graph.shape, node.args[7:10]
        sizes = (*_nodes.head_counts(node), shape.head_dim, shape.context)
        return Attention(*sizes, float(scale), _nodes.integer(window), float(softcap))  # type: ignore[arg-type]

    def lower_attention(self, node: Node) -> None:
        (cos, sin), attention = node.args[5:7], self._attention(node)
        q, k, v = (
            self._per_head(arg, heads)
            for arg, heads in zip(node.args[:3], (attention.heads, attention.kv_heads, attention.kv_heads), strict=True)
        )
        if _nodes.node(cos).meta["val"].numel():
            table = self._rope_rows(cos, sin)
            q, k = self._rotate(q, table), self._rotate(k, table)
        self.values[node, 0] = self.operators.attention(q, k, v, attention)

    def _per_head(self, arg: object, heads: int) -> Ref:
        """[1, S, H, D] from what attention gets as [1, H, S, D], where it can without moving it there and back."""
        source, _ = _nodes.heads(arg)
        if source is arg:
            return self.steps.transpose(self.value(source), (0, 2, 1, 3))
        return self.steps.reshape(self.value(source), (1, SEQUENCE, heads, self.graph.shape.head_dim))

    def _rope_rows(self, cos: object, sin: object) -> Ref:
        """Cosines, then sines, of the positions of this call: [1, S, 1, 2 · half]."""
        name = f"rope.{_nodes.short(self._role(cos))}".replace(".", "_")
        if name not in self.rope:
            table = np.concatenate([self.graph.tensors[self._role(part)].numpy() for part in (cos, sin)], axis=-1)
            self.steps.constants[name] = table[None, :, None]

            def call(frame: Frame, _: Sequence[int], output: int) -> None:
                call_slice(frame.method, frame.named[name], 1, frame.position, frame.end, output)

            self.rope[name] = self.steps.outside(call, [], (1, SEQUENCE, 1, table.shape[1]))
        return self.rope[name]

    def _rotate(self, x: Ref, table: Ref) -> Ref:
        """The half-split rotary embedding (arXiv 2104.09864) of `ops.rotate`, on [1, S, H, D]."""
        half, width = table.shape[-1] // 2, x.shape[-1]

        def emit(graph: Subgraph, values: Sequence[Value]) -> Value:
            x, rows = values
            cos, sin = graph.slice(rows, 0, half), graph.slice(rows, half, half)
            a, b = graph.slice(x, 0, half), graph.slice(x, half, half)
            first = graph.subtract(graph.multiply(a, cos), graph.multiply(b, sin))
            second = graph.add(graph.multiply(b, cos), graph.multiply(a, sin))
            rest = [graph.slice(x, 2 * half, width - 2 * half)] if width > 2 * half else []
            return graph.concatenate([first, second, *rest])

        return self.steps.inside(emit, [x, table], x.shape)

    # ── ATen ──────────────────────────────────────────────────────────────────────────────────────────────────────

    def lower_binary(self, node: Node) -> None:
        scale = next((arg for arg in node.args[:2] if self._is_extra(arg)), None)
        if scale is not None and not self.slots:  # without an adapter a layer is as it is
            (self.values[node, 0],) = (self.value(arg) for arg in node.args[:2] if arg is not scale)
            return
        kind, sides = _BINARY[node.target], [self._side(arg) for arg in node.args[:2]]

        def emit(graph: Subgraph, values: Sequence[Value]) -> Value:
            computed = iter(values)
            a, b = (next(computed) if isinstance(side, Ref) else graph.constant(side) for side in sides)
            return graph.binary(kind, a, b)

        self.values[node, 0] = self.steps.inside(emit, [side for side in sides if isinstance(side, Ref)], _shape(node))

    def _side(self, arg: object) -> Ref | np.ndarray:
        """An operand: computed, a tensor that the model holds, or a number."""
        if not isinstance(arg, Node):
            return np.array([arg])
        if self._is_extra(arg):
            return self._extra(arg)
        return self.graph.tensors[self._role(arg)].numpy() if arg.op == "placeholder" else self.value(arg)

    def _is_extra(self, arg: object) -> bool:
        return isinstance(arg, Node) and arg.op == "placeholder" and self._role(arg) in self.sizes

    def lower_silu(self, node: Node) -> None:
        x = self.value(node.args[0])

        def emit(graph: Subgraph, values: Sequence[Value]) -> Value:
            return graph.multiply(values[0], graph.unary(schema.XNNSigmoid, values[0]))

        self.values[node, 0] = self.steps.inside(emit, [x], x.shape)

    def lower_gelu(self, node: Node) -> None:
        x = self.value(node.args[0])
        if node.kwargs.get("approximate", "none") == "none":
            self.values[node, 0] = self.steps.unary(schema.XNNGelu, x)
            return

        def emit(graph: Subgraph, values: Sequence[Value]) -> Value:
            """0.5 x (1 + tanh(√(2/π) (x + 0.044715 x³))), arXiv 1606.08415."""
            x = values[0]
            cube = graph.multiply(graph.multiply(x, x), x)
            inner = graph.add(x, graph.multiply(cube, graph.constant(np.array([0.044715]))))
            bent = graph.unary(
                schema.XNNTanh, graph.multiply(inner, graph.constant(np.array([math.sqrt(2 / math.pi)])))
            )
            half = graph.multiply(x, graph.constant(np.array([0.5])))
            return graph.multiply(half, graph.add(bent, graph.constant(np.array([1.0]))))

        self.values[node, 0] = self.steps.inside(emit, [x], x.shape)

    def lower_tanh(self, node: Node) -> None:
        self.values[node, 0] = self.steps.unary(schema.XNNTanh, self.value(node.args[0]))

    def lower_view(self, node: Node) -> None:
        self.values[node, 0] = self.steps.reshape(self.value(_nodes.viewed(node)), _shape(node))

    def lower_transpose(self, node: Node) -> None:
        x = self.value(node.args[0])
        order = list(range(len(x.shape)))
        a, b = (_nodes.integer(axis) for axis in node.args[1:])
        order[a], order[b] = order[b], order[a]
        self.values[node, 0] = self.steps.transpose(x, order)

    def lower_slice(self, node: Node) -> None:
        x, axis = self.value(node.args[0]), _nodes.integer(node.args[1])
        start = _nodes.integer(node.args[2]) if len(node.args) > 2 else 0
        shape = _shape(node)
        if axis % len(shape) == len(shape) - 1:
            self.values[node, 0] = self.steps.slice(x, start % x.shape[-1], shape[-1])
            return
        if shape[axis] != 1 or start != -1:
            raise UnsupportedError(mismatch("executorch", "slice", "of features, or of the last position", str(node)))

        def call(frame: Frame, inputs: Sequence[int], output: int) -> None:
            number = frame.method.number
            call_slice(frame.method, inputs[0], 1, number(-1), number(2**63 - 1), output)

        self.values[node, 0] = self.steps.outside(call, [x], shape)

    def lower_chunk(self, node: Node) -> None:
        x, count = self.value(node.args[0]), _nodes.integer(node.args[1])
        size = x.shape[-1] // count
        for i in range(count):
            self.values[node, i] = self.steps.slice(x, i * size, size)

    def lower_getitem(self, node: Node) -> None:
        """Members are looked up where they are read."""


def _plain(values: np.ndarray) -> Filter:
    return Filter(values, None, 32, None)


def _table(held: Weight) -> np.ndarray:
    """The token table in the bytes of an XNNPACK filter, so that a tied head is stored with it."""
    values = held.values.numpy()
    return nibbles(values) if held.bits == 4 else values


def _swapped(graph: Subgraph, values: Sequence[Value]) -> Value:
    """Neighbours exchanged: embedding_4bit has the first of two in the high half of a byte, XNNPACK in the low."""
    x = values[0]
    pairs = graph.reshape(x, (*x.shape[:-1], x.shape[-1] // 2, 2))
    return graph.reshape(graph.concatenate([graph.slice(pairs, 1, 1), graph.slice(pairs, 0, 1)]), x.shape)


def _stacked(weights: Sequence[Weight]) -> Filter:
    """Weights of one layout, one below the other."""
    values = np.concatenate([weight.values.numpy() for weight in weights])
    bits, biased = weights[0].bits, weights[0].layout.biased
    scale = np.concatenate([weight.scale.numpy() for weight in weights]) if bits else None
    return Filter(values, scale, bits or 32, np.concatenate([w.bias.numpy() for w in weights]) if biased else None)


def _shape(node: Node) -> Shape:
    return tuple(size if isinstance(size, int) else SEQUENCE for size in node.meta["val"].shape)


def _reachable(steps: Sequence[Inside | Outside], logits: Ref) -> tuple[Inside | Outside, ...]:
    needed, kept = {logits.number}, []
    for step in reversed(steps):
        if step.output.number in needed:
            needed.update(ref.number for ref in step.inputs)
            kept.append(step)
    return tuple(reversed(kept))


_BINARY: Mapping[object, type[schema.XNNNode2x1]] = {
    ATEN.add.Tensor: schema.XNNAdd,
    ATEN.sub.Tensor: schema.XNNSubtract,
    ATEN.mul.Tensor: schema.XNNMultiply,
    ATEN.div.Tensor: schema.XNNDiv,
}

_HANDLERS: Mapping[object, Callable[[_Walk, Node], None]] = {
    CALORA.linears.default: _Walk.lower_linears,
    CALORA.experts.default: _Walk.lower_experts,
    CALORA.token_gates.default: _Walk.lower_token_gates,
    CALORA.embedding.default: _Walk.lower_embedding,
    CALORA.rms_norm.default: _Walk.lower_rms_norm,
    CALORA.attention.default: _Walk.lower_attention,
    operator.getitem: _Walk.lower_getitem,
    ATEN.silu.default: _Walk.lower_silu,
    ATEN.gelu.default: _Walk.lower_gelu,
    ATEN.tanh.default: _Walk.lower_tanh,
    ATEN.slice.Tensor: _Walk.lower_slice,
    ATEN.chunk.default: _Walk.lower_chunk,
    ATEN.transpose.int: _Walk.lower_transpose,
    **dict.fromkeys(_BINARY, _Walk.lower_binary),
    **dict.fromkeys(VIEWS, _Walk.lower_view),
}
