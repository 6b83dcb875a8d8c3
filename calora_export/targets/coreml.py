"""Lowering to Core ML: one stateful ML program for iOS 18, whose adapters are one input.

Everything is float16, as on the GPU and the Neural Engine; attention is the system's fused one and the KV cache its
state. inputIds, causalMask, keyCache, valueCache and logits are what Swift libraries for language models look for.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch.fx import Node

from calora_export import mlpackage
from calora_export.errors import UnsupportedError, mismatch
from calora_export.graph import Graph, Rows
from calora_export.package import Manifest, Slots, SlotTensor
from calora_export.recipe import Recipe
from calora_export.routers import Router
from calora_export.targets import Origin, _coreml_ops, _coreml_program, _nodes
from calora_export.targets._coreml_ops import HALF, TINY, TO_THE_END
from calora_export.targets._coreml_program import Description, Flexible, Input, State, Var, mb, stage
from calora_export.targets._coreml_weights import constant, label, weight_of
from calora_export.targets._nodes import ATEN, CALORA, VIEWS, W8A8, Weight
from calora_export.version import VERSION

MODEL, ROUTER = "model.mlpackage", "router.mlpackage"
LOWEST = HALF(np.finfo(HALF).min)  # what a hidden position scores
_PARTS = ("key", "value")


def lower(graph: Graph, recipe: Recipe, directory: Path, origin: Origin) -> Slots:
    """Write model.mlpackage; return where adapter files hold each slot."""
    slots = _nodes.slot_tensors(graph)
    inputs, states = _inputs(graph, slots, recipe), _states(graph)
    sparse = recipe.zeros == "sparse"
    lowerings = {"main": _Lowering(graph, slots, None, sparse)}
    if recipe.adapter_inputs == "functions":
        rows = {mlpackage.BASE: Rows.none(), **graph.adapters}
        names = mlpackage.function_names(graph.adapters)
        lowerings = {names[adapter]: _Lowering(graph, slots, baked, sparse) for adapter, baked in rows.items()}
    program = _coreml_program.build(inputs, states, {name: lowering.run for name, lowering in lowerings.items()})
    _coreml_program.save(program, directory / MODEL, _description(recipe, origin), inputs, states)
    scaled, routed = _nodes.extras(graph)
    return Slots(
        rank="dynamic",
        gate="gate",
        recovery="recovery",
        fingerprint="base_fingerprint",
        dtype=recipe.adapters,
        tensors=slots,
        scaled=scaled,
        routed=routed,
    )


def lower_router(router: Router, directory: Path) -> str:
    """Write router.mlpackage: ids [1, tokens] → gates [classes], with the selection policy inside."""
    _coreml_program.save_traced(router, directory / ROUTER)
    return ROUTER


def accompany(manifest: Manifest, directory: Path) -> None:
    """Nothing: what Xcode shows of a model is inside it."""


def _inputs(graph: Graph, slots: Sequence[SlotTensor], recipe: Recipe) -> list[Input]:
    context = graph.shape.context
    new = Flexible("new", min(recipe.chunk, context), recipe.lengths)
    positions = context if recipe.lengths else Flexible("positions", context)
    mask = "Added to attention scores: 0 where a new token sees a position, very low where not."
    if not recipe.lengths:
        mask += " Its last length is how many positions are filled once the new tokens are in the cache."
    found = [
        Input("inputIds", (1, new), np.int32, "The new tokens."),
        Input("causalMask", (1, 1, new, positions), HALF, mask),
    ]
    if recipe.lengths:
        found.append(Input("position", (1,), np.int32, "How many positions are filled before the new tokens."))
    if recipe.adapter_inputs == "functions":
        return found
    if slots:
        rows, rank = sum(slot.inputs + slot.outputs for slot in slots), Flexible("rank", recipe.rank_budget)
        found += [
            Input("adapter", (rows, rank), HALF, "An adapter file's `rows`; of a mix, those of each, side by side."),
            Input("gate", (rank,), HALF, "Each row's weight, 1 for an adapter alone. Rank 1 and gate 0: the base."),
            Input("recovery", (rank,), HALF, "1 where a row is recovery, and passes a GELU; else 0."),
        ]
    if extras := sum(math.prod(shape) for shape in graph.extras.sizes(graph.slots).values()):
        found.append(Input("extras", (extras,), HALF, "An adapter file's `extras`: scales of layers, routers."))
    if graph.extras.scopes:
        select = (graph.extras.experts, Flexible("rank", recipe.rank_budget))
        found.append(Input("select", select, HALF, "1 where a row is an expert's, whose gate is 0 then."))
    return found


def _states(graph: Graph) -> list[State]:
    s, (layers, heads) = graph.shape, _cache_places(graph.shape.kv_heads)[1]
    axes = "layers, heads" if layers > 1 else "1, the heads of all layers"
    shape = (layers, heads, s.context, s.head_dim)
    return [State(f"{part}Cache", shape, f"Cached {part}s: {axes}, positions, features.") for part in _PARTS]


def _cache_places(kv_heads: Sequence[int]) -> tuple[list[tuple[int, int]], tuple[int, int]]:
    """Where each layer's heads start in a state [layers, heads, …], and its first two lengths: a row for every layer
    where all have as many heads, else one row for all."""
    if len(set(kv_heads)) == 1:
        return [(layer, 0) for layer in range(len(kv_heads))], (len(kv_heads), kv_heads[0])
    return [(0, sum(kv_heads[:layer])) for layer in range(len(kv_heads))], (1, sum(kv_heads))


def _description(recipe: Recipe, origin: Origin) -> Description:
    facts = {"base_fingerprint": origin.fingerprint, "calora_export": VERSION}
    if origin.bos is not None:
        facts["bos_token_id"] = str(origin.bos)
    facts["eos_token_ids"] = ", ".join(str(token) for token in origin.eos)
    positions = "the last new token" if recipe.logits == "last" else "every new token"
    text = f"{origin.name}: a language model with slots for adapters"
    return Description(text, origin.author, origin.licence, VERSION, facts, {"logits": f"Scores after {positions}."})


class _Lowering:
    """One walk over the traced graph. baked: the adapter that becomes part of it, None where adapters are inputs.
    sparse: weights without their zeros."""

    def __init__(self, graph: Graph, slots: Sequence[SlotTensor], baked: Rows | None, sparse: bool) -> None:
        self.graph, self.slots, self.baked = graph, {slot.site: slot for slot in slots}, baked
        self.sparse = sparse
        self.offsets = _offsets(slots)
        self.extras = graph.extras.sizes(graph.slots)
        self.own = None if baked is None else _beside_rows(baked)
        self.roles = graph.roles()
        self.values: dict[tuple[Node, int], Var] = {}
        self.shared: dict[object, Var] = {}
        self.inputs: Mapping[str, Var] = {}

    def run(self, inputs: Mapping[str, Var]) -> dict[str, Var]:
        """Emit every operator that the logits need."""
        self.inputs = inputs
        logits = _nodes.results(self.graph)[0]
        needed = _nodes.live([logits], self._operands)
        for node in _nodes.calls(self.graph):
            if node in needed:
                with stage(f"building {node.name}"):
                    self._lower(node)
        return {"logits": self.value(logits)}

    def _operands(self, node: Node) -> Sequence[Node]:
        if node.target is CALORA.attention.default:
            return [_nodes.heads(arg)[0] for arg in node.args[:3]]
        return [_nodes.viewed(node)] if node.target in VIEWS else node.all_input_nodes

    def _lower(self, node: Node) -> None:
        _nodes.handler("coreml", _HANDLERS, node)(self, node)

    def value(self, arg: object) -> Var:
        """What a node computed, or a tensor of the model."""
        node = _nodes.node(arg)
        if node.op != "placeholder":
            return self.values[_nodes.member(node) if node.target is operator.getitem else (node, 0)]
        role = self.roles[node.name]
        if role in self.extras or role in ("gate", "select"):
            return self._once(role, lambda: self._given(role))
        return self.inputs["inputIds"] if role == "ids" else self._held(role)

    def _given(self, role: str) -> Var:
        """What an adapter has beside rows: an input, a part of the input `extras` in its shape, or baked in."""
        if self.own is not None:
            return constant(role, self.own[role].numpy())
        if role not in self.extras:
            return self.inputs[role]
        names = list(self.extras)
        start = sum(math.prod(self.extras[name]) for name in names[: names.index(role)])
        shape = self.extras[role]
        part = _coreml_ops.slice_along(self.inputs["extras"], 0, start, start + math.prod(shape))
        return mb.reshape(x=part, shape=list(shape))

    def _missing(self, arg: object) -> bool:
        """Whether it is a scale or a router of other adapters than the baked one."""
        role = self.roles.get(arg.name, "") if isinstance(arg, Node) else ""
        return self.own is not None and role in self.extras and role not in self.own

    def _held(self, role: str) -> Var:
        return self._once(role, lambda: constant(_nodes.short(role), self.graph.tensors[role].numpy()))

    def _once(self, key: object, make: Callable[[], Var]) -> Var:
        if key not in self.shared:
            self.shared[key] = make()
        return self.shared[key]

    # ── linears and slots ─────────────────────────────────────────────────────────────────────────────────────────

    def lower_linears(self, node: Node) -> None:
        x, weights = self.value(node.args[0]), _nodes.weights(self.graph, self.roles, node)
        deltas = self._deltas(x, _nodes.slot_sites(self.roles, node), node.args[7])
        x = _coreml_ops.rounded(x) if node.args[9] == W8A8 else x
        for i, weight in enumerate(weights):
            bias = constant(f"{weight.name}.bias", weight.bias.numpy()) if weight.bias.numel() else None
            order = None if weight.order is None else weight.order.numpy().astype(np.int32)
            seen = x if order is None else mb.gather(x=x, indices=order, axis=-1)
            site = weight.name.removesuffix(".weight")
            y = mb.linear(x=seen, weight=self._weight(weight), bias=bias, name=label(site))
            mask = _nodes.masks(node)[i]
            y = y if mask is None else mb.mul(x=y, y=self.value(mask))
            self.values[node, i] = mb.add(x=y, y=deltas[i]) if i in deltas else y

    def lower_experts(self, node: Node) -> None:
        """Of x / max|x|, whose squares stay in the range of float16."""
        x, hidden, scores, labels, top_k = node.args
        found = self.value(x)
        found = mb.real_div(x=found, y=mb.maximum(x=_coreml_ops.largest(found), y=TINY))
        length = mb.reduce_l2_norm(x=found, axes=[-1], keep_dims=True)
        unit = mb.real_div(x=found, y=mb.maximum(x=length, y=TINY))
        bent = mb.tanh(x=mb.matmul(x=unit, y=self.value(hidden), transpose_y=True))
        found = mb.matmul(x=bent, y=self.value(scores), transpose_y=True)
        best, _ = mb.topk(x=found, k=_nodes.integer(top_k), axis=-1)
        chosen = mb.greater_equal(x=found, y=mb.reduce_min(x=best, axes=[-1], keep_dims=True))
        owners = self.graph.tensors[self.roles[_nodes.node(labels).name]].numpy().astype(np.int32)
        self.values[node, 0] = mb.gather(x=mb.cast(x=chosen, dtype="fp16"), indices=owners, axis=-1)

    def _weight(self, weight: Weight) -> Var:
        return self._once(weight.name, lambda: weight_of(weight, sparse=self.sparse))

    def _deltas(self, x: Var, members: Sequence[tuple[int, str]], gates: object) -> dict[int, Var]:
        """Member → what its slot adds: one `down` and one non-linearity for the group, one `up` each."""
        if self.baked is not None:
            members = [(member, site) for member, site in members if site in self.baked.sites]
        if not members:
            return {}
        sites = [site for _, site in members]
        rows = self._act(mb.matmul(x=x, y=self._down(sites)), gates)  # [members, S, R]
        deltas: dict[int, Var] = {}
        for part, (member, site) in enumerate(members):
            mine = rows if len(members) == 1 else _coreml_ops.slice_along(rows, 0, part, part + 1)
            deltas[member] = mb.matmul(x=mine, y=self._up(site), transpose_y=True, name=label(f"{site}.slot"))
        return deltas

    def _down(self, sites: Sequence[str]) -> Var:
        """[sites, in, R]"""
        if self.baked is not None:
            stacked = np.stack([self.baked.sites[site][0].numpy().T for site in sites])
            return constant(f"{sites[0]}.down", stacked)
        first = self.slots[sites[0]]
        start, count = self.offsets[sites[0]][0], len(sites) * first.inputs
        rows = _coreml_ops.slice_along(self.inputs["adapter"], 0, start, start + count)
        return mb.reshape(x=rows, shape=[len(sites), first.inputs, -1])

    def _up(self, site: str) -> Var:
        """[out, R]"""
        if self.baked is not None:
            return constant(f"{site}.up", self.baked.sites[site][1].numpy())
        start = self.offsets[site][1]
        return _coreml_ops.slice_along(self.inputs["adapter"], 0, start, start + self.slots[site].outputs)

    def _act(self, rows: Var, gates: object) -> Var:
        """GELU on recovery rows, then gates."""
        if self.baked is not None:
            marks = self.baked.recovery.numpy()
            rows = mb.select(cond=marks, a=mb.gelu(x=rows, mode="EXACT"), b=rows) if marks.any() else rows
            return mb.mul(x=rows, y=self.value(gates)) if self.baked.routers else rows
        if self.graph.recovery:
            marked = self._once("recovery", lambda: mb.greater(x=self.inputs["recovery"], y=HALF(0.5)))
            rows = mb.select(cond=marked, a=mb.gelu(x=rows, mode="EXACT"), b=rows)
        return mb.mul(x=rows, y=self.value(gates))

    def lower_token_gates(self, node: Node) -> None:
        if self._missing(node.args[1]):
            self.values[node, 0] = self.value(node.args[4])
            return
        x, weight, bias, select, gate = (self.value(arg) for arg in node.args)
        inner, outer = mb.split(x=bias, num_splits=2, axis=0)
        scores = mb.add(x=mb.matmul(x=x, y=weight, transpose_y=True), y=inner)
        weights = mb.add(x=mb.softmax(x=scores, axis=-1), y=outer)
        self.values[node, 0] = mb.add(x=mb.matmul(x=weights, y=select), y=gate)

    # ── the other whole operators ─────────────────────────────────────────────────────────────────────────────────

    def lower_embedding(self, node: Node) -> None:
        weight = self._weight(_nodes.table(self.graph, self.roles, node))
        self.values[node, 0] = mb.gather(x=weight, indices=self.value(node.args[0]), axis=0)

    def lower_rms_norm(self, node: Node) -> None:
        x, weight, eps = self.value(node.args[0]), self.value(node.args[1]), node.args[2]
        self.values[node, 0] = _coreml_ops.rms_norm(x, weight, float(eps))  # type: ignore[arg-type]

    def lower_attention(self, node: Node) -> None:
        """The query heads that share a key head are rows of one query: keys and values are read as they are cached."""
        head_dim, (query_heads, kv_heads) = self.graph.shape.head_dim, _nodes.head_counts(node)
        *qkv, past, _, cos, sin, scale, window, softcap = node.args
        layer = int(self.roles[_nodes.node(past).name].removeprefix("past.")) // 2
        q, k, v = (
            self._per_head(arg, heads)
            for arg, heads in zip(qkv, (query_heads, kv_heads, kv_heads), strict=True)
        )
        if _nodes.node(cos).meta["val"].numel():
            tables = self._positions_of(cos), self._positions_of(sin)
            q, k = _coreml_ops.rotate(q, *tables), _coreml_ops.rotate(k, *tables)
        keys, values = (
            self._cached(f"{part}Cache", layer, mb.transpose(x=new, perm=[0, 2, 1, 3]))
            for part, new in zip(_PARTS, (k, v), strict=True)
        )
        queries, sharing = self._by_key_head(q, kv_heads), query_heads // kv_heads
        mask = self._mask(_nodes.integer(window), sharing)
        factor = float(scale)  # type: ignore[arg-type]
        out = _coreml_ops.attend(queries, keys, values, mask, factor, float(softcap))  # type: ignore[arg-type]
        out = mb.reshape(x=out, shape=[1, query_heads, -1, head_dim])
        out = mb.transpose(x=out, perm=[0, 2, 1, 3])
        self.values[node, 0] = mb.reshape(x=out, shape=[1, -1, query_heads * head_dim])

    def _per_head(self, arg: object, heads: int) -> Var:
        """[1, S, H, D] from what attention gets as [1, H, S, D], where it can without moving it there and back."""
        source, _ = _nodes.heads(arg)
        if source is arg:
            return mb.transpose(x=self.value(source), perm=[0, 2, 1, 3])
        return mb.reshape(x=self.value(source), shape=[1, -1, heads, self.graph.shape.head_dim])

    def _by_key_head(self, q: Var, kv_heads: int) -> Var:
        """[1, KV, H / KV · S, D] of [1, S, H, D]."""
        q = mb.transpose(x=q, perm=[0, 2, 1, 3])
        return mb.reshape(x=q, shape=[1, kv_heads, -1, self.graph.shape.head_dim])

    def _cached(self, name: str, layer: int, new: Var) -> Var:
        """Put new keys or values [1, KV, S, D] behind the old ones; all of them, or the whole cache."""
        shape, state, (start, end) = self.graph.shape, self.inputs[name], self._bounds()
        row, head = _cache_places(shape.kv_heads)[0][layer]
        last = head + shape.kv_heads[layer]
        stop = mb.concat(values=[row + 1, last, end, shape.head_dim], axis=0)
        begin = mb.concat(values=[row, head, start, 0], axis=0)
        grown = mb.slice_update(x=mb.read_state(input=state), update=new, begin=begin, end=stop)
        mb.coreml_update_state(state=state, value=grown)
        now = mb.read_state(input=state)
        if "position" in self.inputs:
            whole = [row + 1, last, shape.context, shape.head_dim]
            return mb.slice_by_index(x=now, begin=[row, head, 0, 0], end=whole)
        return mb.slice_by_index(x=now, begin=[row, head, 0, 0], end=stop)

    def _bounds(self) -> tuple[Var, Var]:
        """Where this call's positions start and end."""
        sizes = self._once("sizes", lambda: mb.shape(x=self.inputs["causalMask"]))
        new = self._once("new", lambda: mb.gather(x=sizes, indices=2, axis=0))
        if "position" in self.inputs:
            start = self._once("start", lambda: mb.squeeze(x=self.inputs["position"], axes=[0]))
            return start, self._once("end", lambda: mb.add(x=start, y=new))
        end = self._once("end", lambda: mb.gather(x=sizes, indices=3, axis=0))
        return self._once("start", lambda: mb.sub(x=end, y=new)), end

    def _positions_of(self, table: object) -> Var:
        """This call's rows of a rotary table, [1, S, 1, half]."""
        role = self.roles[_nodes.node(table).name]
        half = self.graph.tensors[role].shape[1]

        def rows() -> Var:
            begin, end = (
                mb.concat(values=[bound, last], axis=0) for bound, last in zip(self._bounds(), (0, half), strict=True)
            )
            return mb.reshape(x=mb.slice_by_index(x=self._held(role), begin=begin, end=end), shape=[1, -1, 1, half])

        return self._once((role, "now"), rows)

    def _mask(self, window: int, copies: int) -> Var:
        """What is added to the scores of all query heads that share a key head, [1, 1, copies · S, P + S]."""

        def seen() -> Var:
            start, end = self._bounds()
            last = self.graph.shape.context if "position" in self.inputs else end
            new, old = mb.range_1d(start=start, end=end, step=1), mb.range_1d(start=0, end=last, step=1)
            distance = mb.sub(x=mb.expand_dims(x=new, axes=[1]), y=mb.expand_dims(x=old, axes=[0]))
            far = mb.greater_equal(x=distance, y=window)
            return mb.select(cond=far, a=LOWEST, b=self.inputs["causalMask"], name=f"mask_{window}")

        mask = self._once(("mask", window), seen) if window > 0 else self.inputs["causalMask"]
        if copies == 1:
            return mask
        name = f"mask_{window}_{copies}"
        return self._once(name, lambda: mb.tile(x=mask, reps=[1, 1, copies, 1], name=name))

    # ── ATen ──────────────────────────────────────────────────────────────────────────────────────────────────────

    def lower_binary(self, node: Node) -> None:
        if self._missing(node.args[1]):
            self.values[node, 0] = self.value(node.args[0])
            return
        a, b = (HALF(arg) if isinstance(arg, (int, float)) else self.value(arg) for arg in node.args[:2])
        self.values[node, 0] = _BINARY[node.target](x=a, y=b)

    def lower_unary(self, node: Node) -> None:
        self.values[node, 0] = _UNARY[node.target](x=self.value(node.args[0]))

    def lower_gelu(self, node: Node) -> None:
        mode = {"none": "EXACT", "tanh": "TANH_APPROXIMATION"}[str(node.kwargs.get("approximate", "none"))]
        self.values[node, 0] = mb.gelu(x=self.value(node.args[0]), mode=mode)

    def lower_view(self, node: Node) -> None:
        """A reshape whose only unknown length is the sequence's; none at all if a chain of them ends as it began."""
        source = _nodes.viewed(node)
        wanted = node.meta["val"].shape
        shape = [size if isinstance(size, int) else -1 for size in wanted]
        if shape.count(-1) > 1:
            raise UnsupportedError(mismatch("coreml", str(node.target), "one dynamic dimension", str(shape)))
        same = source.meta["val"].shape == wanted
        self.values[node, 0] = self.value(source) if same else mb.reshape(x=self.value(source), shape=shape)

    def lower_transpose(self, node: Node) -> None:
        x, a, b = _nodes.node(node.args[0]), _nodes.integer(node.args[1]), _nodes.integer(node.args[2])
        order = list(range(len(x.meta["val"].shape)))
        order[a], order[b] = order[b], order[a]
        self.values[node, 0] = mb.transpose(x=self.value(x), perm=order)

    def lower_slice(self, node: Node) -> None:
        x, axis, start, end = (*node.args, *(0, 0, TO_THE_END)[len(node.args) - 1 :])
        bounds = _nodes.integer(start), min(_nodes.integer(end), TO_THE_END)
        self.values[node, 0] = _coreml_ops.slice_along(self.value(x), _nodes.integer(axis), *bounds)

    def lower_chunk(self, node: Node) -> None:
        count, axis = _nodes.integer(node.args[1]), _nodes.integer(node.args[2])
        parts = mb.split(x=self.value(node.args[0]), num_splits=count, axis=axis)
        self.values.update({(node, i): part for i, part in enumerate(parts)})

    def lower_same(self, node: Node) -> None:
        self.values[node, 0] = self.value(node.args[0])

    def lower_getitem(self, node: Node) -> None:
        """Read where it is used."""


def _beside_rows(rows: Rows) -> dict[str, torch.Tensor]:
    """What an adapter gives to a graph beside rows, by role."""
    found = {"gate": rows.gate} if rows.select is None else {"gate": rows.gate, "select": rows.select}
    for first, second, pairs in (("before", "after", rows.scales), ("router", "router_bias", rows.routers)):
        found |= {f"{first}.{name}": pair[0] for name, pair in pairs.items()}
        found |= {f"{second}.{name}": pair[1] for name, pair in pairs.items()}
    return found


def _offsets(slots: Sequence[SlotTensor]) -> dict[str, tuple[int, int]]:
    """Site → where its down and its up start among the rows of `adapter`: by group, first the downs, then the ups."""
    found: dict[str, tuple[int, int]] = {}
    start = up = 0
    for slot in slots:
        if slot.part == 0:
            start = up
            up = start + slot.parts * slot.inputs
        found[slot.site] = (start + slot.part * slot.inputs, up)
        up += slot.outputs
    return found


_BINARY: Mapping[object, Callable[..., Var]] = {
    ATEN.add.Tensor: mb.add,
    ATEN.mul.Tensor: mb.mul,
    ATEN.div.Tensor: mb.real_div,
}
_UNARY: Mapping[object, Callable[..., Var]] = {ATEN.silu.default: mb.silu, ATEN.tanh.default: mb.tanh}
_HANDLERS: Mapping[object, Callable[[_Lowering, Node], None]] = {
    CALORA.linears.default: _Lowering.lower_linears,
    CALORA.experts.default: _Lowering.lower_experts,
    CALORA.token_gates.default: _Lowering.lower_token_gates,
    CALORA.embedding.default: _Lowering.lower_embedding,
    CALORA.rms_norm.default: _Lowering.lower_rms_norm,
    CALORA.attention.default: _Lowering.lower_attention,
    operator.getitem: _Lowering.lower_getitem,
    ATEN.gelu.default: _Lowering.lower_gelu,
    ATEN.transpose.int: _Lowering.lower_transpose,
    ATEN.slice.Tensor: _Lowering.lower_slice,
    ATEN.chunk.default: _Lowering.lower_chunk,
    **dict.fromkeys(_BINARY, _Lowering.lower_binary),
    **dict.fromkeys(_UNARY, _Lowering.lower_unary),
    **dict.fromkeys(_nodes.SAME, _Lowering.lower_same),
    **dict.fromkeys(VIEWS, _Lowering.lower_view),
}
