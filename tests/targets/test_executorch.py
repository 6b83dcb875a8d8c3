from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

pytest.importorskip("executorch", reason="the executorch extra is not installed")

from calora_export import package as packages
from calora_export import pipeline, recipe, resources
from calora_export.compression import DenseWeight, PackedWeight
from calora_export.errors import UnsupportedError
from calora_export.recipe import Representation
from calora_export.runtimes import executorch as runtime
from tests.bundles import HEADS, HIDDEN, LAYERS, VOCAB
from tests.conftest import Export, Families, Lower
from tests.families import PREFILL, STEPS, Family, caloras, tokens
from tests.onnx_file import bundle_weights
from tests.pte_file import DELEGATE, PteFile

FP32 = "executorch-fp32"
NAMES = ("llama", "llama-tied", "qwen2", "qwen3", "phi3")
IDS = [int(token) for token in np.random.default_rng(3).integers(0, VOCAB, PREFILL + STEPS)]


def fed(method: str, package: Path, ids: Sequence[int], adapter: Sequence[Tensor] = ()) -> np.ndarray:
    """Logits of a prefill, then token by token, of one method as a stock runner calls it."""
    run, position, rows = PteFile(package).load(method), 0, []
    for part in (ids[:PREFILL], *([token] for token in ids[PREFILL:])):
        (logits,) = run([torch.tensor([list(part)]), torch.tensor([position]), *adapter])
        rows.append(logits[0, -1].numpy())
        position += len(part)
    return np.stack(rows)


def run(package: Path, mix: dict[str, float], ids: Sequence[int]) -> np.ndarray:
    """The same of a session, which feeds `adapted`."""
    session = runtime.open_session(packages.load(package), 1)
    session.select(mix)
    return np.concatenate([session.extend(ids[:PREFILL]), *(session.extend([token]) for token in ids[PREFILL:])])


def steps(logits: Tensor) -> np.ndarray:
    """Of transformers' logits [1, S, vocab], those that `fed` and `run` give."""
    return logits[0, PREFILL - 1 :].numpy()


# ── programs ────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_layer_is_one_delegate_and_one_more_per_group_of_slots(package_executorch: Path) -> None:
    """forward: before, between and behind the layers' attention, and the head of the last position alone."""
    file = PteFile(package_executorch)
    base, adapted = file.operators("forward"), file.operators("adapted")
    groups = sum(tensor.part == 0 for tensor in packages.load(package_executorch).manifest.slots.tensors)
    assert groups == 2 * LAYERS  # q and v; down
    assert base[DELEGATE] == LAYERS + 2
    assert adapted[DELEGATE] == LAYERS + groups + 2
    assert adapted["calora::slot"] == groups
    for found in (base, adapted):
        assert found["llama::custom_sdpa"] == LAYERS
        assert found["llama::update_cache"] == 2 * LAYERS
    assert base.keys() - {DELEGATE} == {
        "aten::_local_scalar_dense",
        "aten::sym_size",
        "executorch_prim::add",
        "aten::slice_copy",
        "quantized_decomposed::embedding_byte",
        "llama::custom_sdpa",
        "llama::update_cache",
    }


def test_stock_runners_need_no_operator_of_ours(package_executorch: Path) -> None:
    assert not any(name.startswith("calora") for name in PteFile(package_executorch).operators("forward"))


def test_both_methods_read_the_same_constants(tiny: Path, package_executorch: Path) -> None:
    """All the data is what the weights need, once, and less than 5 % of it is anything else."""
    context = packages.load(package_executorch).manifest.model.context
    stored = PteFile(package_executorch).parsed
    assert stored.named_data is not None
    linears = {name: array for name, array in bundle_weights(tiny).items() if "embed" not in name}
    assert len(linears) == 7 * LAYERS + 1
    head = linears.pop("lm_head").size + 4 * VOCAB
    packed = sum(array.size // 2 + array.size // 32 * 2 for array in linears.values())
    assert head + packed <= sum(map(len, stored.named_data.buffers)) <= 1.05 * (head + packed)
    table, rope = VOCAB * HIDDEN + 4 * VOCAB, 4 * context * HIDDEN // HEADS
    assert sum(len(buffer.storage) for buffer in stored.program.constant_buffer) == table + rope


@pytest.mark.parametrize("name", ["llama", "llama-tied"])
def test_a_weight_is_stored_once(families: Families, lowered: Lower, name: str) -> None:
    """Of q, k and v, which lie in one filter, too; a tied table serves as the head."""
    file, hf = PteFile(lowered(name, FP32)), families(name).hf
    for key, parameter in hf.named_parameters():
        if parameter.dim() == 2:
            assert file.content.count(parameter.detach().numpy().tobytes()) == 1, key


def test_it_says_what_stock_runners_ask_for(package_executorch: Path) -> None:
    file, manifest = PteFile(package_executorch), packages.load(package_executorch).manifest
    expected = {
        "get_max_seq_len": [min(manifest.settings.chunk, manifest.model.context)],
        "get_max_context_len": [manifest.model.context],
        "get_vocab_size": [VOCAB],
        "get_n_layers": [LAYERS],
        "enable_dynamic_shape": [1],
        "use_kv_cache": [1],
        "use_sdpa_with_kv_cache": [1],
        "get_eos_ids": list(manifest.model.eos),
    }
    assert {name: file.answer(name) for name in expected} == expected


@pytest.mark.parametrize("name", ["executorch-8da4w", FP32])
def test_rank_0_is_the_base_bit_for_bit(exported: Export, name: str) -> None:
    package = exported(name)
    dtype = runtime.DTYPES[packages.load(package).manifest.slots.dtype]
    none = [torch.zeros(0, dtype=dtype), torch.zeros(0), torch.zeros(0)]
    assert np.array_equal(fed("adapted", package, IDS, none), fed("forward", package, IDS))


def test_starting_at_0_forgets(package_executorch: Path) -> None:
    """What the caches hold from before is behind what is read."""
    forward = PteFile(package_executorch).load("forward")

    def fresh(ids: list[int]) -> Tensor:
        return forward([torch.tensor([ids]), torch.tensor([0])])[0].clone()

    short = fresh(IDS[:3])
    fresh(IDS)
    assert torch.equal(fresh(IDS[:3]), short)


# ── numbers ─────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("name", NAMES)
def test_forward_equals_transformers(families: Families, lowered: Lower, name: str) -> None:
    ids = tokens(PREFILL + STEPS)
    expected = steps(families(name).logits(ids))
    np.testing.assert_allclose(fed("forward", lowered(name, FP32), ids[0].tolist()), expected, atol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_adapted_equals_peft(families: Families, lowered: Lower, name: str) -> None:
    """All linear layers; q and v alone, in llama's a16."""
    ids, family = tokens(PREFILL + STEPS), families(name)
    for adapter in ("a16", "pattern") if name == "llama" else ("all",):
        expected = steps(family.peft_logits(adapter, ids))
        assert np.abs(expected - steps(family.logits(ids))).max() > 1
        made = run(lowered(name, FP32), {adapter: 1.0}, ids[0].tolist())
        np.testing.assert_allclose(made, expected, atol=2e-4)


@pytest.mark.parametrize("weights", [(1.0, 0.0), (0.0, 1.0), (0.6, 0.4), (-0.5, 1.5)])
def test_recovery_rows_and_mixes_equal_the_formula(
    families: Families, lowered: Lower, weights: tuple[float, float]
) -> None:
    ids, llama = tokens(PREFILL + STEPS), families("llama")
    exact = caloras("llama", llama.hf)
    expected = steps(llama.mixed_logits(list(zip(exact.values(), weights, strict=True)), ids))
    made = run(lowered("llama", FP32), dict(zip(exact, weights, strict=True)), ids[0].tolist())
    np.testing.assert_allclose(made, expected, atol=2e-4)


RULES = {"int8 rows": ("int8", 0), "int4 groups": ("int4", 32), "int4 rows": ("int4", 0)}


@pytest.mark.parametrize("name", RULES)
def test_a_tied_table_is_stored_once_however_it_is_held(families: Families, tmp_path: Path, name: str) -> None:
    """An operator reads rows of it, XNNPACK multiplies with it: int4 has its nibbles in two orders."""
    scheme, group = RULES[name]
    rule = f'[[precision]]\nmodules = "*"\nscheme = "{scheme}"\ngroup_size = {group}\n'
    shipped = resources.recipes()["executorch-8da4w"].read_text()
    head, tail = shipped.partition("[[precision]]")[0], shipped.partition("[parity.source]")[2]
    (tmp_path / "held.toml").write_text(f"{head}{rule}[parity.source]{tail}")
    family, held = families("llama-tied"), recipe.load(str(tmp_path / "held.toml"))
    package = pipeline.export(family.bundle, tmp_path / "package", str(tmp_path / "held.toml")).path
    table = represented(held, "model.embed_tokens", family)
    assert isinstance(table.weight, PackedWeight)
    q = table.weight.q
    code = q if scheme == "int8" else (q[:, 0::2] + 8 | q[:, 1::2] + 8 << 4).astype(np.uint8)
    assert PteFile(package).content.count(code.tobytes()) == 1
    twin = families("llama-tied").hf.__class__(family.hf.config).eval()
    with torch.no_grad():
        for module, weight in family.hf.named_parameters():
            twin.get_parameter(module).copy_(
                torch.from_numpy(represented(held, module.removesuffix(".weight"), family).weight.dequantize())
                if weight.dim() == 2
                else weight
            )
    ids = tokens(PREFILL + STEPS)
    expected = steps(Family("held", twin, tmp_path).logits(ids))
    made = fed("forward", package, ids[0].tolist())
    assert 20 * np.log10(np.linalg.norm(expected) / np.linalg.norm(made - expected)) > 25


def represented(held: recipe.Recipe, module: str, family: Family) -> Representation:
    values = family.hf.get_submodule(module).weight.detach().numpy()
    return recipe.represent(held, module, DenseWeight(values))


# ── what is refused ─────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("gemma2", "sliding_window 6, softcap 2.0"),
        ("gemma3", "sliding_window 6, softcap 0"),
        ("mistral", "sliding_window 6, softcap 0"),
        ("phi", "aten.layer_norm"),
    ],
)
def test_what_no_kernel_computes_is_named(families: Families, tmp_path: Path, name: str, reason: str) -> None:
    with pytest.raises(UnsupportedError) as caught:
        pipeline.export(families(name).bundle, tmp_path / "package", FP32)
    assert reason in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "package").exists()


def test_a_window_as_wide_as_the_context_is_none(families: Families, lowered: Lower) -> None:
    ids = tokens(PREFILL + STEPS)
    expected = steps(families("mistral-full").logits(ids))
    np.testing.assert_allclose(fed("forward", lowered("mistral-full", FP32), ids[0].tolist()), expected, atol=1e-4)
