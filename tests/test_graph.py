from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch import Tensor

from calora_export import bundle as bundles
from calora_export.adapters import load_adapter
from calora_export.composing import compose
from calora_export.graph import Graph, Slot, trace
from calora_export.model import Rows, SlotModel
from tests.conftest import Families
from tests.families import CONTEXT, LAYERS, VOCAB, Family, caloras, tokens


@pytest.fixture(scope="module")
def llama(families: Families) -> Family:
    return families("llama")


@pytest.fixture(scope="module")
def model(llama: Family) -> SlotModel:
    bundle = bundles.load(llama.bundle)
    return compose(bundle, bundle.weight, context=CONTEXT)


@pytest.fixture(scope="module")
def adapter(llama: Family) -> Rows:
    return Rows.of(load_adapter(bundles.load(llama.bundle), "one"))


@pytest.fixture(scope="module")
def graph(model: SlotModel, adapter: Rows) -> Graph:
    return trace(model, slots(adapter), last_only=True, recovery=True)


def slots(rows: Rows) -> tuple[Slot, ...]:
    return tuple(Slot(site, down.shape[1], up.shape[0]) for site, (down, up) in rows.sites.items())


def calls(graph: Graph, name: str) -> list[torch.fx.Node]:
    """The nodes that call an operator of ours."""
    return [node for node in graph.program.graph.nodes if str(node.target) == f"calora.{name}.default"]


def feeds(graph: Graph, ids: Tensor, rows: Rows, past: list[Tensor]) -> list[Tensor]:
    """What each placeholder takes, in the order of the program, by its role alone."""
    values = {"ids": ids, "gate": rows.gate, "recovery": rows.recovery}
    values |= {f"past.{i}": tensor for i, tensor in enumerate(past)}
    values |= {f"down.{site}": down for site, (down, _) in rows.sites.items()}
    values |= {f"up.{site}": up for site, (_, up) in rows.sites.items()}
    roles = graph.roles()
    names = [node.name for node in graph.program.graph.nodes if node.op == "placeholder"]
    assert list(roles) == names
    return [values[role] if role in values else graph.tensors[role] for role in roles.values()]


def test_the_program_computes_the_model_from_what_its_roles_say(
    llama: Family, graph: Graph, adapter: Rows
) -> None:
    """Against transformers with hooks; other lengths and another rank than those that were traced."""
    ids = tokens(9)
    empty = [torch.zeros(1, 2, 0, 16)] * (2 * LAYERS)
    interpreter = torch.fx.Interpreter(graph.program.graph_module)
    with torch.no_grad():
        first = interpreter.run(*feeds(graph, ids[:, :7], adapter, empty))
        logits, *present = interpreter.run(*feeds(graph, ids[:, 7:], adapter, list(first[1:])))
    expected = llama.mixed_logits([(caloras("llama", llama.hf)["one"], 1.0)], ids)
    assert logits.shape == (1, 1, VOCAB)
    torch.testing.assert_close(logits[0, 0], expected[0, -1], atol=5e-5, rtol=0)
    assert [tuple(tensor.shape) for tensor in present] == [(1, 2, 9, 16)] * (2 * LAYERS)


def test_whole_operators_stay_whole(graph: Graph) -> None:
    counts = {name: len(calls(graph, name)) for name in ("attention", "linears", "rms_norm", "embedding")}
    assert counts == {
        "attention": LAYERS,
        "linears": 4 * LAYERS + 1,  # q, k, v | o | gate, up | down, and the head
        "rms_norm": 2 * LAYERS + 1,
        "embedding": 1,
    }
    others = Counter(str(node.target) for node in graph.program.graph.nodes if node.op == "call_function")
    assert not [name for name in others if "softmax" in name or "matmul" in name or "linear." in name]


def test_groups_and_slots_are_those_of_the_model(graph: Graph, model: SlotModel, adapter: Rows) -> None:
    assert graph.groups == model.groups
    assert {slot.site for slot in graph.slots} == set(adapter.sites)
    for slot in graph.slots:
        linear = model.lm.get_submodule(slot.site)
        assert (slot.inputs, slot.outputs) == (linear.in_features, linear.out_features)


def test_last_only_leaves_the_head_one_position(graph: Graph, model: SlotModel) -> None:
    def head_positions(graph: Graph) -> object:
        return calls(graph, "linears")[-1].args[0].meta["val"].shape[1]

    assert head_positions(graph) == 1
    every = trace(model, (), last_only=False, recovery=False)
    assert isinstance(head_positions(every), torch.SymInt)
    assert set(every.roles().values()) >= {"ids", "gate", "recovery"}
