"""Lowering to ONNX Runtime.

Whole operators become contrib ones (MatMulNBits, GroupQueryAttention, SkipSimplifiedLayerNormalization …), the few ATen
operators between them their ONNX namesakes, and adapter tensors inputs that default to rank 0. The gate has no node: it
is folded into `up` when an adapter is activated, since what a slot costs on a CPU is launches and bytes.
"""

from __future__ import annotations

import logging
import operator
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import numpy as np
import onnx_ir as ir
import torch
from msgspec import UNSET
from torch.fx import Node

from calora_export.errors import UnsupportedError, mismatch
from calora_export.graph import Graph
from calora_export.package import Manifest, Slots
from calora_export.recipe import Recipe
from calora_export.routers import Router
from calora_export.targets import Origin, _genai, _nodes, _onnx_fusions, _onnx_weights
from calora_export.targets._nodes import ATEN, CALORA, VIEWS, W8A8, Weight
from calora_export.targets._onnx_builder import CONTRIB, OPSET, Builder, DataFile, named
from calora_export.targets._onnx_slots import RECOVERY, ROWS, Group, OurSlots, StockSlots, declare_input

MODEL = "model.onnx"
INT8_ACTIVATIONS, FLOAT_ACTIVATIONS = 4, 1  # accuracy_level of MatMulNBits


def lower(graph: Graph, recipe: Recipe, directory: Path, origin: Origin) -> Slots:
    """Write model.onnx and model.onnx.data; return which tensors an adapter file must hold."""
    with DataFile(directory / f"{MODEL}.data") as data:
        lowering = _Lowering(graph, recipe, Builder(data), bytes.fromhex(origin.fingerprint.removeprefix("sha256:")))
        outputs = lowering.run()
    ir.save(lowering.build.model(outputs), directory / MODEL)
    scaled, routed = _nodes.extras(graph)
    return Slots(
        rank="dynamic",
        gate="folded into up",
        recovery="recovery" if graph.recovery else None,
        fingerprint="base_fingerprint",
        dtype=recipe.adapters,
        tensors=lowering.tensors,
        rows=ROWS if ROWS in lowering.build.inputs else UNSET,
        scaled=scaled,
        routed=routed,
    )


def lower_router(router: Router, directory: Path) -> str:
    """Write router.onnx: ids [1, tokens] → gates [classes], with the selection policy inside."""
    file = "router.onnx"
    with torch.no_grad(), _quiet_exporter():
        program = torch.onnx.export(
            router.eval(),
            (torch.zeros(1, 8, dtype=torch.long),),
            input_names=["ids"],
            output_names=["gates"],
            dynamic_shapes={"ids": {1: torch.export.Dim("tokens", min=1)}},
            opset_version=OPSET,
            dynamo=True,
            verbose=False,
        )
    assert program is not None
    for node in program.model.graph:  # stack traces of this machine
        node.metadata_props.clear()
    program.save(directory / file, external_data=False)
    return file


def accompany(manifest: Manifest, directory: Path) -> None:
    """Write what onnxruntime-genai looks for beside the model."""
    _genai.write(manifest, directory)


@contextmanager
def _quiet_exporter() -> Iterator[None]:
    """torch.onnx speaks of torchvision, which nobody here needs, and of its own deprecations."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


class _Lowering:
    """One walk over the traced graph."""

    def __init__(self, graph: Graph, recipe: Recipe, build: Builder, fingerprint: bytes) -> None:
        self.graph, self.recipe, self.build = graph, recipe, build
        self.roles, self.tensors = graph.roles(), _nodes.slot_tensors(graph)
        self.values: dict[Node, ir.Value] = {}
        self.members: dict[tuple[Node, int], ir.Value] = {}
        self.calls, self.results = _nodes.calls(graph), _nodes.results(graph)
        self.weights = cache(lambda node: _nodes.weights(graph, self.roles, node))
        self.norm_of = _onnx_fusions.norms_after_add(self.calls)
        self.packed = _onnx_fusions.packed_projections(self.calls, self.weights)
        ours = recipe.kernels == "calora"
        self.units = _onnx_fusions.gated_units(self.calls, self.weights) if ours else {}
        self.normed = _onnx_fusions.normed(self.norm_of) if ours else {}
        self.sums = {after.add: linears for linears, after in self.normed.items()}
        self.tables = {
            self.roles[_nodes.node(n.args[1]).name] for n in self.calls if n.target is CALORA.embedding.default
        }
        self._declare_inputs(fingerprint)
        self.slots = (OurSlots if ours else StockSlots)(build, recipe, self.tensors)

    # ── the walk ──────────────────────────────────────────────────────────────────────────────────────────────────

    def run(self) -> list[ir.Value]:
        """Emit every node that the outputs need; return the outputs."""
        live = _nodes.live(self.results, self._operands)
        for node in self.calls:
            if node in live:
                self._lower(node)
        positions = 1 if self.graph.last_only else "sequence_length"
        logits, *present = (self.value(node) for node in self.results)
        shape = ["batch_size", positions, self.graph.shape.vocab]
        outputs = [named(logits, "logits", ir.DataType.FLOAT, shape)]
        for i, (name, value) in enumerate(zip(self._cache_names("present"), present, strict=True)):
            outputs.append(named(value, name, ir.DataType.FLOAT, self._cache_shape(i, "total_sequence_length")))
        base = self.build.emit("Identity", self.build.inputs["base_fingerprint"])
        return [*outputs, named(base, "fingerprint", ir.DataType.UINT8, [32])]

    def _operands(self, node: Node) -> list[Node]:
        """What the lowering of a node reads, given what is fused away."""
        if node.target is CALORA.attention.default:
            if node in self.packed:
                return [self.packed[node]]
            return [_nodes.heads(arg)[0] for arg in node.args[:3]]
        if node in self.units:
            return [self.units[node]]
        if node in self.sums:
            return [self.sums[node]]
        if node in self.normed:
            return [*node.all_input_nodes, self.normed[node].skip]
        return [_nodes.viewed(node)] if node.target in VIEWS else node.all_input_nodes

    def _lower(self, node: Node) -> None:
        _nodes.handler("onnx", _HANDLERS, node)(self, node)

    def value(self, arg: object) -> ir.Value:
        """The ONNX value of an FX node: a result, an input, or a float tensor that the model holds."""
        node = _nodes.node(arg)
        if node.op != "placeholder":
            return self.values[node]
        role = self.roles[node.name]
        if role in self.build.inputs:
            return self.build.inputs[role]
        tensor = self.graph.tensors[role]
        return self.build.floats(_nodes.short(role), lambda: tensor.numpy(), list(tensor.shape))

    # ── inputs ────────────────────────────────────────────────────────────────────────────────────────────────────

    def _cache_names(self, prefix: str) -> list[str]:
        return [f"{prefix}.{layer}.{kv}" for layer in range(self.graph.shape.layers) for kv in ("key", "value")]

    def _cache_shape(self, index: int, length: str) -> list[int | str]:
        """Of the index-th cache: keys and values of one layer after the other."""
        return ["batch_size", self.graph.shape.kv_heads[index // 2], length, self.graph.shape.head_dim]

    def _declare_inputs(self, fingerprint: bytes) -> None:
        declare = self.build.declare
        declare("ids", "input_ids", ir.DataType.INT64, ["batch_size", "sequence_length"])
        declare("mask", "attention_mask", ir.DataType.INT64, ["batch_size", "total_sequence_length"])
        for i, name in enumerate(self._cache_names("past_key_values")):
            declare(f"past.{i}", name, ir.DataType.FLOAT, self._cache_shape(i, "past_sequence_length"))
        base = declare("base_fingerprint", "base_fingerprint", ir.DataType.UINT8, [32])
        self.build.default(base, np.frombuffer(fingerprint, np.uint8).copy())
        if self.graph.recovery:
            declare_input(self.build, self.recipe, RECOVERY, ["rank"])
        self._declare_extras()

    def _declare_extras(self) -> None:
        """Scales are 1 and routers 0 without an adapter that has such."""
        extras = self.graph.extras
        for role, shape in extras.sizes(self.graph.slots).items():
            value = self.build.declare(role, _nodes.named_extra(role), ir.DataType.FLOAT, shape)
            if self.recipe.adapter_inputs == "optional":
                none = float(role.startswith(("before.", "after.")))
                self.build.default(value, np.full(shape, none, np.float32))
        if extras.scopes:
            declare_input(self.build, self.recipe, "select", [extras.experts, "rank"])
            declare_input(self.build, self.recipe, "always", ["rank"])

    # ── linears and slots ─────────────────────────────────────────────────────────────────────────────────────────

    def lower_linears(self, node: Node) -> None:
        x, weights, members = self.value(node.args[0]), self.weights(node), _nodes.slot_sites(self.roles, node)
        rounded = node.args[9] == W8A8
        read = self._rounded(x) if rounded else x
        packed, unit = node in self.packed.values(), node in self.units.values()
        if packed or unit:
            ys = [self._matmul(read, weights, rounded)]
        else:
            masks = [None if mask is None else self.value(mask) for mask in _nodes.masks(node)]
            products = [self._matmul(read, [weight], rounded) for weight in weights]
            pairs = zip(products, masks, strict=True)
            ys = [y if mask is None else self.build.emit("Mul", y, mask) for y, mask in pairs]
        if members:
            ys = self._add_slots(node, Group(x, ys, members, self._token_gates(node)))
        if packed or unit:
            self.values[node] = ys[0]
        else:
            self.members.update({(node, i): y for i, y in enumerate(ys)})

    def _add_slots(self, node: Node, group: Group) -> Sequence[ir.Value]:
        if not isinstance(self.slots, OurSlots):
            return self.slots.add(group)
        if node in self.units.values():
            return [self.slots.gated_unit(group)]
        if (after := self.normed.get(node)) is None:
            return self.slots.add(group)
        _, weight, eps = after.norm.args
        made = self.slots.norm(group, self.value(after.skip), self.value(weight), _nodes.real(eps))
        self.values[after.norm], self.values[after.add] = made
        return made[1:]

    def _token_gates(self, node: Node) -> ir.Value | None:
        """Gates of each token, where there are such; others are folded into `up`."""
        gates = _nodes.node(node.args[7])
        return None if gates.op == "placeholder" else self.value(gates)

    def _rounded(self, x: ir.Value) -> ir.Value:
        """x as W8A8 reads it, in floats: each position in 127 steps either way (`ops.round_activations`)."""
        emit = self.build.emit
        most = emit("ReduceMax", emit("Abs", x), self.build.integers([-1]), keepdims=1)
        least = self.build.constant("least", np.array(np.finfo(np.float32).tiny))
        scale = emit("Max", emit("Div", most, self.build.scalar(127.0)), least)
        return emit("Mul", emit("Round", emit("Div", x, scale)), scale)

    def _matmul(self, x: ir.Value, weights: Sequence[Weight], rounded: bool) -> ir.Value:
        """x times the weights, one below the other; rounded: x is in steps already, which kernels are to leave."""
        int8 = self.recipe.activations == "int8_block" and not rounded
        level = INT8_ACTIVATIONS if int8 else FLOAT_ACTIVATIONS
        return _onnx_weights.linear(self.build, x, weights, level=level, by_rows=self._is_table(weights[0]))

    def _is_table(self, weight: Weight) -> bool:
        return any(_nodes.short(table) == weight.name for table in self.tables)

    def lower_experts(self, node: Node) -> None:
        """LpNormalization, as torch's normalize, makes no NaN of zeros."""
        x, hidden, scores, labels, top_k = node.args
        emit, found = self.build.emit, self.value(x)
        unit = emit("LpNormalization", found, axis=-1, p=2)
        bent = emit("Tanh", emit("FusedMatMul", unit, self.value(hidden), domain=CONTRIB, transB=1))
        found = emit("FusedMatMul", bent, self.value(scores), domain=CONTRIB, transB=1)
        count = self.build.integers([_nodes.integer(top_k)])
        best, _ = self.build.emit_many("TopK", found, count, outputs=2, axis=-1)
        least = emit("ReduceMin", best, self.build.integers([-1]), keepdims=1)
        chosen = emit("Cast", emit("GreaterOrEqual", found, least), to=int(ir.DataType.FLOAT))
        self.values[node] = emit("Gather", chosen, self._labels(labels), axis=-1)

    def _labels(self, labels: object) -> ir.Value:
        role = self.roles[_nodes.node(labels).name]
        owners = self.graph.tensors[role]
        return self.build.stored(_nodes.short(role), owners.numpy, list(owners.shape), ir.DataType.INT64)

    # ── the other whole operators ─────────────────────────────────────────────────────────────────────────────────

    def lower_token_gates(self, node: Node) -> None:
        """Without what is folded into `up`: 1 on rows that are no expert's."""
        x, weight, bias, select, gate = node.args
        emit = self.build.emit
        inner, outer = self.build.emit_many("Split", self.value(bias), outputs=2, axis=0, num_outputs=2)
        scores = emit("FusedMatMul", self.value(x), self.value(weight), domain=CONTRIB, transB=1)
        weights = emit("Add", emit("Softmax", emit("Add", scores, inner), axis=-1), outer)
        marked = emit("MatMul", weights, self.value(select))
        around = _nodes.node(gate)
        others = self.build.inputs["always"] if around.op == "placeholder" else self.value(around)
        self.values[node] = emit("Add", marked, others)

    def lower_embedding(self, node: Node) -> None:
        weight = _nodes.table(self.graph, self.roles, node)
        self.values[node] = _onnx_weights.lookup(self.build, self.value(node.args[0]), weight)

    def lower_rms_norm(self, node: Node) -> None:
        if node in self.values:  # came with the addition before it
            return
        x, weight, eps = node.args
        self.values[node] = self.build.emit(
            "SimplifiedLayerNormalization",
            self.value(x),
            self.value(weight),
            epsilon=eps,
            axis=-1,
            stash_type=1,
        )

    def lower_add(self, node: Node) -> None:
        if node in self.values:  # came with the slots before it
            return
        norm = self.norm_of.get(node)
        if norm is None:
            self.values[node] = self._binary("Add", node)
            return
        _, weight, eps = norm.args
        made = self.build.emit_many(
            "SkipSimplifiedLayerNormalization",
            *(self.value(arg) for arg in node.args),
            self.value(weight),
            outputs=4,
            domain=CONTRIB,
            epsilon=eps,
        )
        made[1].name = made[2].name = ""
        self.values[norm], self.values[node] = made[0], made[3]

    def lower_attention(self, node: Node) -> None:
        *qkv, past_key, past_value, cos, sin, scale, window, softcap = node.args
        rotary = _nodes.node(cos).meta["val"].numel() > 0
        heads, kv_heads = _nodes.head_counts(node)
        if node in self.packed:
            projections: list[ir.Value | None] = [self.values[self.packed[node]], None, None]
        else:
            projections = [self._flat_heads(arg) for arg in qkv]
        made = self.build.emit_many(
            "GroupQueryAttention",
            *projections,
            self.value(past_key),
            self.value(past_value),
            *self._lengths(),
            *([self.value(cos), self.value(sin)] if rotary else []),
            outputs=3,
            domain=CONTRIB,
            num_heads=heads,
            kv_num_heads=kv_heads,
            scale=scale,
            do_rotary=int(rotary),
            local_window_size=window or -1,
            softcap=softcap,
        )
        self.members.update({(node, i): value for i, value in enumerate(made)})

    def _flat_heads(self, arg: object) -> ir.Value:
        """[B, S, H·D] from what attention gets as [B, H, S, D], without moving it there and back."""
        source, flat = _nodes.heads(arg)
        value = self.value(source)
        if flat:
            return value
        if source is arg:
            value = self.build.emit("Transpose", value, perm=[0, 2, 1, 3])
        return self.build.emit("Reshape", value, self.build.integers([0, 0, -1]))

    def _lengths(self) -> list[ir.Value]:
        """seqlens_k [batch] (the total less one) and total_sequence_length [], from the attention mask."""
        mask, one, emit = self.build.inputs["mask"], self.build.integers([1]), self.build.emit

        def last() -> ir.Value:
            return emit("Cast", emit("Sub", emit("ReduceSum", mask, one, keepdims=0), one), to=int(ir.DataType.INT32))

        def total() -> ir.Value:
            length = emit("Squeeze", emit("Shape", mask, start=1), self.build.integers([0]))
            return emit("Cast", length, to=int(ir.DataType.INT32))

        return [self.build.once("last", last), self.build.once("total", total)]

    # ── ATen ──────────────────────────────────────────────────────────────────────────────────────────────────────

    def _binary(self, op: str, node: Node) -> ir.Value:
        sides = [self.build.scalar(arg) if isinstance(arg, (int, float)) else self.value(arg) for arg in node.args[:2]]
        return self.build.emit(op, *sides)

    def lower_mul(self, node: Node) -> None:
        fused = self.units.get(node)
        self.values[node] = self._binary("Mul", node) if fused is None else self.values[fused]

    def lower_div(self, node: Node) -> None:
        self.values[node] = self._binary("Div", node)

    def lower_silu(self, node: Node) -> None:
        self.values[node] = self.build.emit("QuickGelu", self.value(node.args[0]), domain=CONTRIB, alpha=1.0)

    def lower_gelu(self, node: Node) -> None:
        kind = node.kwargs.get("approximate", "none")
        self.values[node] = self.build.emit("Gelu", self.value(node.args[0]), approximate=kind)

    def lower_tanh(self, node: Node) -> None:
        self.values[node] = self.build.emit("Tanh", self.value(node.args[0]))

    def lower_getitem(self, node: Node) -> None:
        self.values[node] = self.members[_nodes.node(node.args[0]), _nodes.integer(node.args[1])]

    def lower_view(self, node: Node) -> None:
        """A reshape whose only unknown length is the sequence's; none at all if a chain of them ends as it began."""
        source = _nodes.viewed(node)
        wanted = node.meta["val"].shape
        if source.meta["val"].shape == wanted:
            self.values[node] = self.value(source)
            return
        shape = [size if isinstance(size, int) else -1 for size in wanted]
        if shape.count(-1) > 1:
            raise UnsupportedError(mismatch("onnx", str(node.target), "one dynamic dimension", str(shape)))
        self.values[node] = self.build.emit("Reshape", self.value(source), self.build.integers(shape))

    def lower_transpose(self, node: Node) -> None:
        x, a, b = _nodes.node(node.args[0]), _nodes.integer(node.args[1]), _nodes.integer(node.args[2])
        order = list(range(len(x.meta["val"].shape)))
        order[a], order[b] = order[b], order[a]
        self.values[node] = self.build.emit("Transpose", self.value(x), perm=order)

    def lower_slice(self, node: Node) -> None:
        x, axis, start, end = node.args[:4]
        bounds = [self.build.integers([_nodes.integer(bound)]) for bound in (start, end, axis)]
        self.values[node] = self.build.emit("Slice", self.value(x), *bounds)

    def lower_chunk(self, node: Node) -> None:
        count = _nodes.integer(node.args[1])
        parts = self.build.emit_many(
            "Split", self.value(node.args[0]), outputs=count, axis=node.args[2], num_outputs=count
        )
        self.members.update({(node, i): part for i, part in enumerate(parts)})

    def lower_same(self, node: Node) -> None:
        self.values[node] = self.value(node.args[0])


_HANDLERS: Mapping[object, Callable[[_Lowering, Node], None]] = {
    CALORA.linears.default: _Lowering.lower_linears,
    CALORA.experts.default: _Lowering.lower_experts,
    CALORA.token_gates.default: _Lowering.lower_token_gates,
    CALORA.embedding.default: _Lowering.lower_embedding,
    CALORA.rms_norm.default: _Lowering.lower_rms_norm,
    CALORA.attention.default: _Lowering.lower_attention,
    operator.getitem: _Lowering.lower_getitem,
    ATEN.add.Tensor: _Lowering.lower_add,
    ATEN.mul.Tensor: _Lowering.lower_mul,
    ATEN.div.Tensor: _Lowering.lower_div,
    ATEN.silu.default: _Lowering.lower_silu,
    ATEN.gelu.default: _Lowering.lower_gelu,
    ATEN.tanh.default: _Lowering.lower_tanh,
    ATEN.transpose.int: _Lowering.lower_transpose,
    ATEN.slice.Tensor: _Lowering.lower_slice,
    ATEN.chunk.default: _Lowering.lower_chunk,
    **dict.fromkeys(_nodes.SAME, _Lowering.lower_same),
    **dict.fromkeys(VIEWS, _Lowering.lower_view),
}
