from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from calora_export import bundle as bundles
from calora_export.adapters import Adapter, load_adapter, mix
from calora_export.composing import compose
from calora_export.compression import DenseWeight
from calora_export.errors import BundleError, UnsupportedError
from calora_export.model import Rows, SlotModel
from tests.bundles import copy_bundle, edit_json, edit_tensors
from tests.conftest import Families
from tests.families import CONTEXT, NAMES, PREFILL, STEPS, Family, caloras, loras, tokens

Models = Callable[[str], SlotModel]

BASE, ADAPTED = 1e-5, 5e-5  # logits reach ±10


def composed(path: Path, context: int = CONTEXT) -> SlotModel:
    bundle = bundles.load(path)
    return compose(bundle, bundle.weight, context=context)


@pytest.fixture(scope="module")
def llama(families: Families) -> Family:
    return families("llama")


@pytest.fixture(scope="module")
def models(families: Families) -> Models:
    return functools.cache(lambda name: composed(families(name).bundle))


@pytest.fixture(scope="module")
def model(models: Models) -> SlotModel:
    return models("llama")


def rows(family: Family, adapter: str) -> Rows:
    return Rows.of(load_adapter(bundles.load(family.bundle), adapter))


def one_pass(model: SlotModel, rows: Rows, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return model(ids, model.empty_cache(), rows)[0]


def stepwise(model: SlotModel, rows: Rows, ids: Tensor) -> Tensor:
    """Prefill, then one position at a time: logits of all positions."""
    past, parts = model.empty_cache(), []
    with torch.no_grad():
        for part in (ids[:, :PREFILL], *ids[:, PREFILL:].split(1, dim=1)):
            logits, past = model(part, past, rows)
            parts.append(logits)
    return torch.cat(parts, dim=1)


def furthest(a: Tensor, b: Tensor) -> float:
    return (a - b).abs().max().item()


@pytest.mark.parametrize("name", NAMES)
def test_prefill_and_decode_equal_transformers(families: Families, models: Models, name: str) -> None:
    family, ids = families(name), tokens(PREFILL + STEPS)
    assert furthest(stepwise(models(name), Rows.none(), ids), family.logits(ids)) < BASE


@pytest.mark.parametrize("name", [name for name in NAMES if name != "llama"])
def test_every_family_takes_the_adapters_of_peft(families: Families, models: Models, name: str) -> None:
    family, ids = families(name), tokens(PREFILL + STEPS)
    expected = family.peft_logits("all", ids)
    assert furthest(expected, family.logits(ids)) > 1
    assert furthest(stepwise(models(name), rows(family, "all"), ids), expected) < ADAPTED


@pytest.mark.parametrize("adapter", loras("llama"))
def test_alpha_rslora_patterns_and_targets_mean_what_peft_means(
    llama: Family, model: SlotModel, adapter: str
) -> None:
    ids = tokens(PREFILL + STEPS)
    expected = llama.peft_logits(adapter, ids)
    assert furthest(expected, llama.logits(ids)) > 1
    assert furthest(one_pass(model, rows(llama, adapter), ids), expected) < ADAPTED


@pytest.mark.parametrize("adapter", ["one", "two"])
def test_recovery_equals_the_formula_of_the_paper(llama: Family, model: SlotModel, adapter: str) -> None:
    ids = tokens(PREFILL + STEPS)
    expected = llama.mixed_logits([(caloras("llama", llama.hf)[adapter], 1.0)], ids)
    assert furthest(expected, llama.logits(ids)) > 1
    assert furthest(stepwise(model, rows(llama, adapter), ids), expected) < ADAPTED


@pytest.mark.parametrize("weights", [(0.6, 0.4), (1.0, 1.0), (0.25, 0.0), (-0.5, 1.5)])
def test_a_mix_is_the_weighted_sum_of_deltas(
    llama: Family, model: SlotModel, weights: tuple[float, float]
) -> None:
    bundle, ids = bundles.load(llama.bundle), tokens(PREFILL + STEPS)
    exact = caloras("llama", llama.hf)
    expected = llama.mixed_logits([(exact["one"], weights[0]), (exact["two"], weights[1])], ids)
    parts = [(load_adapter(bundle, name), weight) for name, weight in zip(exact, weights, strict=True)]
    assert furthest(one_pass(model, Rows.of(mix(parts)), ids), expected) < ADAPTED


def test_gates_scale_each_row(llama: Family, model: SlotModel) -> None:
    """Gates beside the rows give the same as weights folded into them."""
    bundle, ids = bundles.load(llama.bundle), tokens(PREFILL)
    exact = caloras("llama", llama.hf)
    pair = [load_adapter(bundle, name) for name in ("one", "two")]
    plain = Rows.of(mix([(adapter, 1.0) for adapter in pair]))
    gate = torch.cat([torch.full((pair[0].rank,), 0.6), torch.full((pair[1].rank,), 0.4)])
    expected = llama.mixed_logits([(exact["one"], 0.6), (exact["two"], 0.4)], ids)
    assert furthest(one_pass(model, Rows(plain.sites, gate, plain.recovery), ids), expected) < ADAPTED


def test_rank_0_and_gate_0_are_the_base_bit_for_bit(llama: Family, model: SlotModel) -> None:
    ids = tokens(PREFILL)
    base, one = one_pass(model, Rows.none(), ids), rows(llama, "one")
    assert torch.equal(base, llama.logits(ids))
    empty = {site: (down[:0], up[:, :0]) for site, (down, up) in one.sites.items()}
    for silent in (
        Rows(empty, one.gate[:0], one.recovery[:0]),
        Rows(one.sites, torch.zeros_like(one.gate), one.recovery),
        Rows.of(Adapter("none", None, 0, np.zeros(0, bool), {})),
    ):
        assert torch.equal(one_pass(model, silent, ids), base)


def test_an_adapter_leaves_nothing_behind(llama: Family, model: SlotModel) -> None:
    ids, one, two = tokens(PREFILL), rows(llama, "one"), rows(llama, "two")
    first = one_pass(model, one, ids)
    second = one_pass(model, two, ids)
    assert torch.equal(one_pass(model, one, ids), first)
    assert not torch.equal(first, second)


LLAMA_GROUPS = (
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    ("self_attn.o_proj",),
    ("mlp.gate_proj", "mlp.up_proj"),
    ("mlp.down_proj",),
)
PHI_GROUPS = (("self_attn.qkv_proj",), ("self_attn.o_proj",), ("mlp.gate_up_proj",), ("mlp.down_proj",))


@pytest.mark.parametrize(("name", "groups"), [("llama", LLAMA_GROUPS), ("phi3", PHI_GROUPS)])
def test_linear_layers_that_share_an_input_are_one_group(
    models: Models, name: str, groups: tuple[tuple[str, ...], ...]
) -> None:
    layers = [tuple(f"model.layers.{layer}.{site}" for site in group) for layer in (0, 1) for group in groups]
    assert models(name).groups == (*layers, ("lm_head",))


def test_last_only_computes_the_last_position(llama: Family, model: SlotModel) -> None:
    ids = tokens(PREFILL)
    with torch.no_grad():
        logits, _ = model(ids, model.empty_cache(), Rows.none(), last_only=True)
    assert logits.shape[1] == 1
    assert furthest(logits[0, 0], llama.logits(ids)[0, -1]) < BASE


def test_weights_come_from_weight_of(llama: Family) -> None:
    """A target hands in its own weights: one that is all zero makes all logits zero."""
    bundle = bundles.load(llama.bundle)

    def weight_of(module: str) -> DenseWeight:
        stored = bundle.weight(module)
        assert isinstance(stored, DenseWeight)
        return DenseWeight(stored.values * np.float32(module != "lm_head"))

    changed = compose(bundle, weight_of, context=CONTEXT)
    assert not one_pass(changed, Rows.none(), tokens(PREFILL)).any()


def test_context_is_what_the_recipe_asks_for_up_to_what_the_model_was_made_for(llama: Family) -> None:
    assert composed(llama.bundle, context=32).shape.context == 32
    assert composed(llama.bundle, context=4096).shape.context == CONTEXT


# ── what is refused ─────────────────────────────────────────────────────────────────────────────────────────


def test_a_missing_tensor_is_named(llama: Family, tmp_path: Path) -> None:
    path = copy_bundle(llama.bundle, tmp_path / "bundle")
    edit_tensors(path / "base" / "model.safetensors", lambda tensors: tensors.pop("model.norm.weight"))
    with pytest.raises(BundleError, match=r"model\.norm\.weight"):
        composed(path)


def test_a_linear_layer_of_another_shape_is_named(llama: Family, tmp_path: Path) -> None:
    path = copy_bundle(llama.bundle, tmp_path / "bundle")
    edit_json(path / "base" / "config.json", lambda config: config.update(intermediate_size=80))
    with pytest.raises(BundleError, match=r"gate_proj.*\[80, 64\].*\[96, 64\]"):
        composed(path)


def test_a_rotary_table_that_depends_on_the_length_is_refused(llama: Family, tmp_path: Path) -> None:
    path = copy_bundle(llama.bundle, tmp_path / "bundle")
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4, "original_max_position_embeddings": 32}
    edit_json(path / "base" / "config.json", lambda config: config.update(rope_parameters=rope))
    with pytest.raises(UnsupportedError, match="context"):
        composed(path)


@pytest.mark.parametrize("model_type", ["t5", "no_such_model"])
def test_what_is_no_causal_lm_is_refused_in_one_line(llama: Family, tmp_path: Path, model_type: str) -> None:
    path = copy_bundle(llama.bundle, tmp_path / "bundle")
    edit_json(path / "base" / "config.json", lambda config: config.update(model_type=model_type))
    with pytest.raises(UnsupportedError, match=model_type) as caught:
        composed(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "reason"), [("cohere", "rotary"), ("gpt_oss", "softmax attention"), ("stablelm", "exchanged")]
)
def test_an_architecture_that_would_come_out_wrong_is_refused(
    families: Families, name: str, reason: str
) -> None:
    with pytest.raises(UnsupportedError, match=f"model_type: .*{reason}.*{name}"):
        composed(families(name).bundle)
