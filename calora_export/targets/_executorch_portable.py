"""Attention and slots by operators of the plain SDK: its kernels_optimized library, executorch_prim and XNNPACK.

Matrix products whose sides both change with the call are kernels_optimized's, because XNNPACK would pack them first;
masks, soft caps and softmax are XNNPACK's, because theirs is the vectorised one. Keys are kept as [KV, D, context], so
that a product reads them as they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import numpy as np
from executorch.backends.xnnpack.serialization import xnnpack_graph_schema as schema

from calora_export.errors import RecipeError, mismatch
from calora_export.package import SlotTensor
from calora_export.targets._executorch_steps import RANK, Attention, Call, Frame, Ref, Shape, Steps, call_slice
from calora_export.targets._xnnpack import END, SEQUENCE, Subgraph, Value

HIDDEN = 1e30  # taken off a score for each position that it is out of sight: softmax makes exactly 0 of it


def adapter_inputs(tensors: Sequence[SlotTensor], dtype: str, rank: int) -> list[tuple[str, Shape]]:
    """Every matrix of the file by itself, in its order: down [parts · R, in] of a group, up [1, R, out] of each."""
    if dtype != "fp32":
        raise RecipeError(mismatch("recipe", "adapters", "fp32, which is what stock kernels multiply", dtype))
    found: list[tuple[str, Shape]] = []
    for i, tensor in enumerate(tensors):
        if tensor.part == 0:
            found.append(("fp32", (tensor.parts * rank, tensor.inputs)))
            found += [("fp32", (1, RANK, member.outputs)) for member in tensors[i : i + tensor.parts]]
    return [*found, ("fp32", (RANK,)), ("fp32", (RANK,))]


class Operators:
    def __init__(self, steps: Steps) -> None:
        self._steps = steps
        self._layer = 0
        self._matrices = 0
        self._masks: dict[int, Ref] = {}

    def require(self, attention: Attention) -> None:
        """Windows and caps are computed."""

    # ── attention ─────────────────────────────────────────────────────────────────────────────────────────────────

    def attention(self, q: Ref, k: Ref, v: Ref, attention: Attention) -> Ref:
        groups, size = attention.kv_heads, attention.head_dim
        repeat = attention.heads // groups
        key, value = f"key_{self._layer}", f"value_{self._layer}"
        self._layer += 1
        self._steps.caches.update({key: (groups, size, attention.context), value: (groups, attention.context, size)})

        scale = np.array([attention.scale])
        scaled = self._steps.inside(
            lambda graph, values: graph.multiply(values[0], graph.constant(scale)), [q], q.shape
        )
        scores = self._steps.outside(
            self._product(key, 2, (groups, size, END), repeat),
            [self._moved(scaled, (1, 0, 2)), self._moved(k, (1, 2, 0)), self._positions],
            (attention.heads, SEQUENCE, END),
        )
        weights = self._softmax(scores, attention)
        mixed = self._steps.outside(
            self._product(value, 1, (groups, END, size), repeat),
            [weights, self._moved(v, (1, 0, 2)), self._positions],
            (attention.heads, SEQUENCE, size),
        )
        return self._steps.reshape(self._steps.transpose(mixed, (1, 0, 2)), (1, SEQUENCE, attention.heads * size))

    def _moved(self, x: Ref, order: Sequence[int]) -> Ref:
        """[1, S, KV, D] with its last three axes in another order."""
        return self._steps.transpose(self._steps.reshape(x, x.shape[1:]), order)

    def _product(self, name: str, axis: int, kept: Shape, repeat: int) -> Call:
        """call([x, new, positions]) puts new into a cache along its axis and multiplies x with what that holds now.

        x [KV · repeat, S, K], or more finely divided; of the cache [KV, K, N]: one product for every KV head.
        """

        def call(frame: Frame, inputs: Sequence[int], output: int) -> None:
            method, cache, (x, new, positions) = frame.method, frame.named[name], inputs
            indices = method.tensors([*([None] * axis), positions])
            method.call("aten::index_put_", [cache, indices, new, method.number(False), cache])
            cached = frame.tensor(kept)
            call_slice(method, cache, axis, method.number(0), frame.end, cached)
            rows = repeat * frame.bounds.sequence
            groups, inner, columns = frame.bounds.of(kept)
            left = method.tensor("fp32", [groups, rows, inner], dynamic=True)
            product = method.tensor("fp32", [groups, rows, columns], dynamic=True)
            now = method.computed("executorch_prim::mul.Scalar", frame.length, method.number(repeat))
            first, last = (frame.sizes((size,))[0] for size in kept[1:])
            method.view(x, [method.number(groups), now, first], left)
            method.call("aten::bmm.out", [left, cached, product, product])
            method.view(product, [method.number(groups * repeat), frame.length, last], output)

        return call

    def _softmax(self, scores: Ref, attention: Attention) -> Ref:
        window = attention.window if attention.window < attention.context else 0
        mask = self._mask(window)

        def emit(graph: Subgraph, values: Sequence[Value]) -> Value:
            scores, mask = values
            if attention.softcap:
                shrunk = graph.multiply(scores, graph.constant(np.array([1 / attention.softcap])))
                bent = graph.unary(schema.XNNTanh, shrunk)
                scores = graph.multiply(bent, graph.constant(np.array([attention.softcap])))
            return graph.unary(schema.XNNSoftmax, graph.add(scores, mask))

        return self._steps.inside(emit, [scores, mask], scores.shape)

    def _mask(self, window: int) -> Ref:
        """[S, end]: 0 where a position is seen, very negative where it is not. Layers with one window share it."""
        if window not in self._masks:

            def emit(graph: Subgraph, values: Sequence[Value]) -> Value:
                own, others = values
                distance = graph.subtract(graph.reshape(own, (SEQUENCE, 1)), others)
                beyond = _negative(graph, distance)
                if window:
                    left = graph.subtract(graph.constant(np.array([window - 1])), distance)
                    beyond = graph.add(beyond, _negative(graph, left))
                return graph.multiply(beyond, graph.constant(np.array([HIDDEN])))

            self._masks[window] = self._steps.inside(emit, [self._own, self._others], (SEQUENCE, END))
        return self._masks[window]

    @cached_property
    def _positions(self) -> Ref:
        return self._range((SEQUENCE,), "int64")

    @cached_property
    def _own(self) -> Ref:
        return self._range((SEQUENCE,), "fp32")

    @cached_property
    def _others(self) -> Ref:
        return self._range((END,), "fp32")

    def _range(self, shape: Shape, kind: str) -> Ref:
        """The positions of this call, or all up to its end."""

        def call(frame: Frame, _: Sequence[int], output: int) -> None:
            number = frame.method.number
            start = frame.position if shape == (SEQUENCE,) else number(0)
            frame.method.call("aten::arange.start_out", [start, frame.end, number(1), output, output])

        return self._steps.outside(call, [], shape, kind=kind)

    # ── slots ─────────────────────────────────────────────────────────────────────────────────────────────────────

    def slotted(self, x: Ref, y: Ref, widths: Sequence[int], members: Sequence[int], gates: Ref | None) -> list[Ref]:
        first = self._matrices
        self._matrices += 1 + len(members)
        rows = self._rows(x, first, len(members), gates)
        added = {i: self._up(rows, first + 1 + part, part, widths[i]) for part, i in enumerate(members)}
        outputs = [self._steps.slice(y, sum(widths[:i]), width) for i, width in enumerate(widths)]
        return [self._steps.add(output, added[i]) if i in added else output for i, output in enumerate(outputs)]

    def _rows(self, x: Ref, matrix: int, parts: int, gates: Ref | None) -> Ref:
        """gate ⊙ act(down x) of every part: [S, parts, R]."""
        shape = (SEQUENCE, parts, RANK)

        def call(frame: Frame, inputs: Sequence[int], output: int) -> None:
            method, (x, recovery, *own) = frame.method, inputs
            gate = frame.adapter[-2]
            if own:
                gate = frame.tensor((SEQUENCE, 1, RANK))
                method.view(own[0], frame.sizes((SEQUENCE, 1, RANK)), gate)
            flat = method.tensor("fp32", [1, frame.bounds.sequence, parts * frame.bounds.rank], dynamic=True)
            method.call("aten::linear.out", [x, frame.adapter[matrix], method.number(None), flat, flat])
            rows, bent, chosen = (frame.tensor(shape) for _ in range(3))
            method.view(flat, frame.sizes(shape), rows)
            method.call("aten::gelu.out", [rows, method.text("none"), bent, bent])
            method.call("aten::where.self_out", [recovery, bent, rows, chosen, chosen])
            method.call("aten::mul.out", [chosen, gate, output, output])

        return self._steps.outside(call, [x, self._recovery, *([] if gates is None else [gates])], shape)

    def _up(self, rows: Ref, matrix: int, part: int, width: int) -> Ref:
        """What one part adds: [1, S, out]."""
        shape = (1, SEQUENCE, width)

        def call(frame: Frame, inputs: Sequence[int], output: int) -> None:
            method, one, left = frame.method, frame.tensor((SEQUENCE, 1, RANK)), frame.tensor((1, SEQUENCE, RANK))
            call_slice(method, inputs[0], 1, method.number(part), method.number(part + 1), one)
            method.view(one, frame.sizes((1, SEQUENCE, RANK)), left)
            # A product over rank 0 is left as it was.
            method.call("aten::zeros.out", [method.sizes(frame.sizes(shape)), output, output])
            method.call("aten::bmm.out", [left, frame.adapter[matrix], output, output])

        return self._steps.outside(call, [rows], shape)

    @cached_property
    def _recovery(self) -> Ref:
        """Which rows are GELU rows: bool [R]."""

        def call(frame: Frame, _: Sequence[int], output: int) -> None:
            method = frame.method
            method.call("aten::gt.Scalar_out", [frame.adapter[-1], method.number(0.5), output, output])

        return self._steps.outside(call, [], (RANK,), kind="bool")


def _negative(graph: Subgraph, x: Value) -> Value:
    """x where it is negative, else 0."""
    return graph.binary(schema.XNNMinimum, x, graph.constant(np.array([0.0])))
