"""Lowering to ExecuTorch: XNNPACK delegates, and between them attention, tables and slots.

`forward(tokens, input_pos)` is the base for stock runners; `adapted` also takes the rows of one adapter or of a mix.
Both read the same constants.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from calora_export import quiet
from calora_export.graph import Graph
from calora_export.package import Manifest, Slots
from calora_export.recipe import Recipe
from calora_export.routers import Router
from calora_export.targets import Origin, _executorch_llm, _executorch_portable, _nodes
from calora_export.targets._executorch_plan import Plan, plan
from calora_export.targets._executorch_program import Method, Program
from calora_export.targets._executorch_steps import RANK, Bounds, Frame, Inside, Kind, Outside, Ref
from calora_export.targets._xnnpack import SEQUENCE, Shape, Subgraph

MODEL, ROUTER = "model.pte", "router.pte"
KINDS: Mapping[str, Kind] = {"calora": _executorch_llm, "stock": _executorch_portable}
LONGEST_TEXT = 4096  # tokens that a router reads at once


def lower(graph: Graph, recipe: Recipe, directory: Path, origin: Origin) -> Slots:
    """Write model.pte; return where adapter files hold each slot."""
    kind, tensors = KINDS[recipe.kernels], _nodes.slot_tensors(graph)
    bounds = Bounds(min(recipe.chunk, graph.shape.context), graph.shape.context, recipe.rank_budget)
    program = Program()
    program.add(_method("forward", plan(graph, kind, slots=False), program, bounds))
    adapter = kind.adapter_inputs(tensors, recipe.adapters, recipe.rank_budget)
    program.add(_method("adapted", plan(graph, kind, slots=True), program, bounds, adapter, _extras(graph)))
    for name, values in _facts(graph, bounds.sequence, recipe, origin).items():
        program.answer(name, values)
    program.write(directory / MODEL)
    scaled, routed = _nodes.extras(graph)
    return Slots(
        rank="dynamic",
        gate="gate",
        recovery="recovery",
        fingerprint="base_fingerprint",
        dtype=recipe.adapters,
        tensors=tensors,
        scaled=scaled,
        routed=routed,
    )


def lower_router(router: Router, directory: Path) -> str:
    """Write router.pte: ids [1, tokens] → gates [classes], with the selection policy inside."""
    import torch
    from executorch.exir import EdgeCompileConfig, to_edge

    tokens = torch.export.Dim("tokens", min=1, max=LONGEST_TEXT)
    with torch.no_grad(), quiet.libraries():
        example = (torch.zeros(1, 8, dtype=torch.long),)
        traced = torch.export.export(router.eval(), example, dynamic_shapes={"ids": {1: tokens}}, strict=False)
        program = to_edge(traced, compile_config=EdgeCompileConfig(_check_ir_validity=False)).to_executorch()
    with (directory / ROUTER).open("wb") as file:
        program.write_to_file(file)
    return ROUTER


def accompany(manifest: Manifest, directory: Path) -> None:
    """Nothing yet: the stock runners find what they need in the program."""


def _facts(graph: Graph, longest: int, recipe: Recipe, origin: Origin) -> dict[str, Sequence[int | bool]]:
    """What the stock LLM runner asks a program for (extension/llm/runner/constants.h)."""
    facts: dict[str, Sequence[int | bool]] = {
        "get_max_seq_len": [longest],
        "get_max_context_len": [graph.shape.context],
        "get_vocab_size": [graph.shape.vocab],
        "get_n_layers": [graph.shape.layers],
        "enable_dynamic_shape": [True],
        "use_kv_cache": [True],
        "use_sdpa_with_kv_cache": [recipe.kernels == "calora"],
        "get_eos_ids": origin.eos,
    }
    return facts if origin.bos is None else facts | {"get_bos_id": [origin.bos]}


def _extras(graph: Graph) -> dict[str, Shape]:
    """Inputs that adapters fill beside rows: what does not grow with the rank, in one; and which rows are experts'."""
    total = sum(math.prod(shape) for shape in graph.extras.sizes(graph.slots).values())
    select: dict[str, Shape] = {"select": (1, graph.extras.experts, RANK)} if graph.extras.scopes else {}
    return ({"extras": (total,)} if total else {}) | select


def _method(
    name: str,
    plan: Plan,
    program: Program,
    bounds: Bounds,
    adapter: Sequence[tuple[str, Shape]] = (),
    extras: Mapping[str, Shape] = MappingProxyType({}),
) -> Method:
    """adapter: kind and shape of each input that an adapter's rows fill; extras: shapes of what it has beside them."""
    method = Method(name, program)
    tokens = method.input("int64", bounds.of((1, SEQUENCE)), dynamic=True)
    start = method.input("int64", [1], dynamic=False)
    rows = tuple(method.input(kind, bounds.of(shape), dynamic=True) for kind, shape in adapter)
    position = method.computed("aten::_local_scalar_dense", start)
    length = method.computed("aten::sym_size.int", tokens, method.number(1))
    end = method.computed("executorch_prim::add.Scalar", position, length)
    named = {name: method.constant(array) for name, array in plan.constants.items()}
    named |= {name: method.input("fp32", bounds.of(shape), dynamic=RANK in shape) for name, shape in extras.items()}
    named |= {name: method.state(shape) for name, shape in plan.caches.items()}
    frame = Frame(method, bounds, tokens, position, length, end, rows, named)
    values: dict[int, int] = {}
    for level in _levels(plan):
        new = [step.output for step in level.outside if step.in_place is None]
        for ref in (*new, *level.outputs):
            values[ref.number] = frame.tensor(ref.shape, ref.kind)
        for step in level.outside:
            if step.in_place is not None:
                values[step.output.number] = values[step.in_place.number]
            step.call(frame, [values[ref.number] for ref in step.inputs], values[step.output.number])
        if level.inside:
            payload, constants = _delegate(level).serialize()
            method.delegate(payload, constants, [values[ref.number] for ref in (*level.inputs, *level.outputs)])
    method.output(values[plan.logits.number])
    return method


@dataclass(frozen=True)
class _Level:
    """Outside operators, and the delegate that runs after them."""

    outside: tuple[Outside, ...]
    inside: tuple[Inside, ...]
    inputs: tuple[Ref, ...]
    outputs: tuple[Ref, ...]


def _levels(plan: Plan) -> list[_Level]:
    readers: dict[int, set[int]] = {plan.logits.number: {-1}}
    for step in plan.steps:
        reader = step.output.level if isinstance(step, Inside) else -1
        for ref in step.inputs:
            readers.setdefault(ref.number, set()).add(reader)
    found = []
    for number in sorted({step.output.level for step in plan.steps}):
        steps = [step for step in plan.steps if step.output.level == number]
        inside = tuple(step for step in steps if isinstance(step, Inside))
        made = {step.output for step in inside}
        read = dict.fromkeys(ref for step in inside for ref in step.inputs if ref not in made)
        outputs = tuple(step.output for step in inside if readers[step.output.number] - {number})
        outside = tuple(step for step in steps if isinstance(step, Outside))
        found.append(_Level(outside, inside, tuple(read), outputs))
    return found


def _delegate(level: _Level) -> Subgraph:
    graph = Subgraph()
    values = {ref.number: graph.input(ref.shape) for ref in level.inputs}
    for step in level.inside:
        values[step.output.number] = step.emit(graph, [values[ref.number] for ref in step.inputs])
    for ref in level.outputs:
        graph.output(values[ref.number])
    return graph
