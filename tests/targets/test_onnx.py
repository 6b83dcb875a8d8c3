from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor

from calora_export import package as packages
from calora_export import pipeline
from calora_export.errors import UnsupportedError
from calora_export.runtimes import onnx as runtime
from tests.bundles import LAYERS, RANKS, tiny_bundle
from tests.conftest import Export, Families, Lower, Variant
from tests.families import NAMES, PREFILL, STEPS, caloras, tokens
from tests.onnx_file import OnnxFile, bundle_weights
from tests.twin import calora, dense_twin

ADAPTERS = ("alpha", "beta")
IDS = [int(token) for token in np.random.default_rng(3).integers(0, 256, PREFILL + STEPS)]


@pytest.fixture(scope="session")
def bare_package(bare: Path, variant: Variant) -> Path:
    return variant(bare, "onnx-int4")


@pytest.fixture(scope="session")
def unrouted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`tiny` without its router, which costs most of an export."""
    return tiny_bundle(tmp_path_factory.mktemp("unrouted") / "bundle", router=False)


def run(package: Path, mix: dict[str, float], ids: Sequence[int]) -> np.ndarray:
    """Prefill, then token by token: logits of each step, or of all positions, as the package has them."""
    session = runtime.open_session(packages.load(package), 1)
    session.select(mix)
    return np.concatenate([session.extend(ids[:PREFILL]), *(session.extend([token]) for token in ids[PREFILL:])])


def steps(logits: Tensor) -> np.ndarray:
    """Of transformers' logits [1, S, vocab], those that `run` gives of a package with the last position's."""
    return logits[0, PREFILL - 1 :].numpy()


# ── bytes ───────────────────────────────────────────────────────────────────────────────────────────────────


def test_packed_weights_are_those_of_the_bundle_bit_for_bit(tiny: Path, package: Path) -> None:
    """int4 linears and int8 tables: every one of them, once, and nothing else."""
    expected = bundle_weights(tiny)
    assert len(expected) == 7 * LAYERS + 2
    found = OnnxFile(package).dequantized()
    assert sorted(array.tobytes() for array in found) == sorted(array.tobytes() for array in expected.values())


def test_q_k_and_v_are_one_matmul_in_that_order(tiny: Path, bare_package: Path) -> None:
    weights = bundle_weights(tiny)
    found = [array.tobytes() for array in OnnxFile(bare_package).dequantized()]
    for layer in range(LAYERS):
        parts = [weights.pop(f"model.layers.{layer}.self_attn.{name}_proj") for name in "qkv"]
        found.remove(np.concatenate(parts).tobytes())
    assert sorted(found) == sorted(array.tobytes() for array in weights.values())


def test_pruned_values_stay_zero(tiny: Path, package: Path) -> None:
    q = bundle_weights(tiny)["model.layers.1.self_attn.q_proj"]
    (found,) = [array for array in OnnxFile(package).dequantized() if array.tobytes() == q.tobytes()]
    assert (np.count_nonzero(found.reshape(-1, 4), axis=1) <= 2).all()


@pytest.mark.parametrize("recipe", ["onnx-int4", "onnx-fp32"])
def test_the_data_file_holds_each_array_once_on_a_page_and_nothing_else(exported: Export, recipe: str) -> None:
    file = OnnxFile(exported(recipe))
    places = sorted({place for name in file.initializers if (place := file.place(name)) is not None})
    end = 0
    for offset, length in places:
        assert offset == -(-end // 4096) * 4096
        assert not any(file.data[end:offset])
        end = offset + length
    assert end == len(file.data)
    assert len({file.data[offset : offset + length] for offset, length in places if length > 1024}) == len(
        [place for place in places if place[1] > 1024]
    )


def test_a_packed_weight_has_no_fp32_copy(tiny: Path, package: Path, package_fp32: Path) -> None:
    packed, dense = OnnxFile(package).data, OnnxFile(package_fp32).data
    for weight in bundle_weights(tiny).values():
        rows = weight[3].tobytes(), np.ascontiguousarray(weight[:, 3]).tobytes()
        assert not any(row in packed for row in rows)
        assert any(row in dense for row in rows)


def test_a_tied_table_is_stored_once(families: Families, lowered: Lower, variant: Variant) -> None:
    """In fp32 one initializer serves both; packed, the two operators want two shapes of the same bytes."""
    family = families("llama-tied")
    table = family.hf.get_input_embeddings().weight.detach().numpy()
    dense, packed = OnnxFile(lowered("llama-tied")), OnnxFile(variant(family.bundle, "onnx-int4"))
    assert dense.data.count(table[5].tobytes()) == 1
    assert table.T[5].tobytes() not in dense.data
    (gather,) = packed.nodes("GatherBlockQuantized")
    head = next(node for node in packed.nodes("MatMulNBits") if node.output[0] == "logits")
    assert gather.input[0] != head.input[1]
    assert packed.place(gather.input[0]) == packed.place(head.input[1])
    assert packed.place(gather.input[2]) == packed.place(head.input[2])
    rounded, *_ = packed.dequantized()
    assert np.abs(rounded - table).max() < np.abs(table).max() / 127  # int8 of a dense table: rounded, once


def test_graph_files_say_nothing_of_the_machine(package: Path) -> None:
    for name in ("model.onnx", "router.onnx"):
        content = (package / name).read_bytes()
        assert b".py" not in content and str(Path.home()).encode() + b"/" not in content


# ── operators ───────────────────────────────────────────────────────────────────────────────────────────────


def test_whole_operators_become_the_runtimes_fused_ones(package: Path, bare_package: Path) -> None:
    for path in (package, bare_package):
        found = OnnxFile(path).operators()
        assert found["GroupQueryAttention"] == LAYERS
        assert found["SkipSimplifiedLayerNormalization"] == 2 * LAYERS
        assert found["SimplifiedLayerNormalization"] == 1
        assert found["GatherBlockQuantized"] == 1
        assert not found.keys() & {"RotaryEmbedding", "ReduceMean", "Softmax", "Transpose", "Reshape", "Gather"}


def test_a_base_without_slots_is_as_small_as_it_can_be(bare_package: Path) -> None:
    """Per layer q+k+v, o, gate, up, down, attention, two norms, the gated activation; else the head, lengths."""
    found = OnnxFile(bare_package).operators()
    assert found["MatMulNBits"] == 5 * LAYERS + 1
    assert sum(found.values()) <= 10 * LAYERS + 12


def test_adapter_tensors_are_inputs_that_default_to_rank_0(package: Path) -> None:
    file, slots = OnnxFile(package), packages.load(package).manifest.slots
    names = {name for tensor in slots.tensors for name in (tensor.down, tensor.up)} | {"recovery"}
    assert names <= file.inputs.keys() & file.initializers.keys()
    assert all(0 in file.initializers[name].dims for name in names)
    assert all(node.op_type != "Mul" or not set(node.input) & names for node in file.graph.node)


# ── numbers ─────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("name", NAMES)
def test_onnxruntime_equals_transformers(families: Families, lowered: Lower, name: str) -> None:
    ids = tokens(PREFILL + STEPS)
    expected = steps(families(name).logits(ids))
    np.testing.assert_allclose(run(lowered(name), {}, ids[0].tolist()), expected, atol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_onnxruntime_equals_peft(families: Families, lowered: Lower, name: str) -> None:
    """All linear layers; q and v alone, in mistral and in llama's a16."""
    ids, family = tokens(PREFILL + STEPS), families(name)
    for adapter in ("a16", "pattern") if name == "llama" else ("all",):
        expected = steps(family.peft_logits(adapter, ids))
        made = run(lowered(name), {adapter: 1.0}, ids[0].tolist())
        assert np.abs(expected - steps(family.logits(ids))).max() > 1
        np.testing.assert_allclose(made, expected, atol=2e-4)


@pytest.mark.parametrize("weights", [(1.0, 0.0), (0.0, 1.0), (0.6, 0.4), (-0.5, 1.5)])
def test_recovery_rows_and_mixes_equal_the_formula(
    families: Families, lowered: Lower, weights: tuple[float, float]
) -> None:
    ids, llama = tokens(PREFILL + STEPS), families("llama")
    exact = caloras("llama", llama.hf)
    expected = steps(llama.mixed_logits(list(zip(exact.values(), weights, strict=True)), ids))
    made = run(lowered("llama"), dict(zip(exact, weights, strict=True)), ids[0].tolist())
    np.testing.assert_allclose(made, expected, atol=2e-4)


@pytest.mark.parametrize("adapters", ["fp32", "fp16"])
def test_a_compressed_bundle_equals_transformers_with_its_weights_unpacked(
    unrouted: Path, variant: Variant, adapters: str
) -> None:
    """Int4 base, CA-LoRA adapters, logits of all positions; no activation is rounded."""
    package = variant(unrouted, "onnx-int4", activations="float", logits="all", adapters=adapters)
    twin, ids = dense_twin(unrouted), torch.tensor([IDS])
    half = onnx.TensorProto.FLOAT16 if adapters == "fp16" else onnx.TensorProto.FLOAT
    slots = packages.load(package).manifest.slots
    assert {OnnxFile(package).inputs[tensor.up] for tensor in slots.tensors} == {half}
    dtype = torch.float16 if adapters == "fp16" else torch.float32
    exact = {name: [(calora(unrouted, name, r, dtype), 1.0)] for name, r in zip(ADAPTERS, RANKS, strict=True)}
    for mix, parts in (({}, []), *(({name: 1.0}, part) for name, part in exact.items())):
        made = run(package, mix, IDS)
        assert made.shape == (len(IDS), 256)
        np.testing.assert_allclose(made, twin.mixed_logits(parts, ids)[0].numpy(), atol=2e-4)


def test_int8_activations_stay_close_to_the_unrounded_base(unrouted: Path, package: Path) -> None:
    expected = steps(dense_twin(unrouted).logits(torch.tensor([IDS])))
    made = run(package, {}, IDS)
    assert 20 * np.log10(np.linalg.norm(expected) / np.linalg.norm(made - expected)) > 30
    assert np.abs(made - expected).max() > 1e-4  # rounded they are


# ── browsers ────────────────────────────────────────────────────────────────────────────────────────────────


def test_browsers_get_required_inputs_over_the_same_data(tiny: Path, exported: Export, variant: Variant) -> None:
    package = variant(tiny, "onnx-int4", activations="float")
    web, native = OnnxFile(exported("onnx-web")), OnnxFile(package)
    slots = packages.load(web.package).manifest.slots
    names = {name for tensor in slots.tensors for name in (tensor.down, tensor.up)} | {"recovery"}
    assert names <= web.inputs.keys()
    assert not names & web.initializers.keys()
    assert web.data == native.data
    for mix in ({}, {"alpha": 1.0}, {"alpha": 0.3, "beta": 0.7}):
        assert np.array_equal(run(web.package, mix, IDS), run(package, mix, IDS))


# ── what is refused ─────────────────────────────────────────────────────────────────────────────────────────


def test_an_operator_that_is_not_lowered_is_named(families: Families, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match=r"aten\.layer_norm"):
        pipeline.export(families("phi").bundle, tmp_path / "package", "onnx-fp32")
    assert not (tmp_path / "package").exists()
