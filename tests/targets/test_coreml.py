from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("coremltools", reason="the coreml extra is not installed")

from calora_export import mil, mlpackage, ops, pipeline, runtimes
from calora_export import package as packages
from calora_export.errors import PackageError, UnsupportedError
from calora_export.targets import _coreml_ops, _coreml_weights, coreml
from calora_export.targets import _coreml_program as programs
from calora_export.targets._coreml_program import Description, Input
from calora_export.targets._nodes import Weight
from tests.bundles import HIDDEN, LAYERS, VOCAB, tiny_bundle
from tests.conftest import Export, Families, Lower, Variant
from tests.families import NAMES, PREFILL, STEPS, caloras, tokens
from tests.mlpackage_file import MlpackageFile
from tests.onnx_file import bundle_weights

INT4, FUNCTIONS = "coreml-int4", "coreml-multifunction"
IDS = [int(token) for token in np.random.default_rng(3).integers(0, VOCAB, PREFILL + STEPS)]
# Eleven bits a number: of logits below 8 an ulp is 1/256, and two layers add up a few.
HALF = 0.05


def spec(package: Path) -> Any:
    return mlpackage.read_spec(package / "model.mlpackage")


def run(package: Path, mix: dict[str, float], ids: Sequence[int]) -> np.ndarray:
    session = runtimes.load("coreml").open_session(packages.load(package), 1)
    session.select(mix)
    return np.concatenate([session.extend(ids[:PREFILL]), *(session.extend([token]) for token in ids[PREFILL:])])


# ── what is saved ─────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_model_has_the_interface_that_apps_and_swift_libraries_look_for(exported: Export) -> None:
    package = exported(INT4)
    about = spec(package).description
    slots = packages.load(package).manifest.slots
    rows = sum(slot.inputs + slot.outputs for slot in slots.tensors)
    ranges = {
        feature.name: [(size.lowerBound, size.upperBound) for size in feature.type.multiArrayType.shapeRange.sizeRanges]
        for feature in about.input
    }
    assert ranges == {
        "inputIds": [(1, 1), (1, 256)],
        "causalMask": [(1, 1), (1, 1), (1, 256), (1, 256)],
        "adapter": [(rows, rows), (1, 256)],
        "gate": [(1, 256)],
        "recovery": [(1, 256)],
    }
    assert [state.name for state in about.state] == ["keyCache", "valueCache"]
    assert [output.name for output in about.output] == ["logits"]
    assert all(feature.shortDescription for feature in (*about.input, *about.state, *about.output))


def test_xcode_shows_whose_the_model_is(tmp_path: Path) -> None:
    bundle = tiny_bundle(tmp_path / "bundle")
    document = json.loads((bundle / "bundle.json").read_text())
    document["provenance"] = {"author": "A team", "license": "Apache-2.0"}
    (bundle / "bundle.json").write_text(json.dumps(document))
    package = pipeline.export(bundle, tmp_path / "package", INT4)
    metadata = spec(package.path).description.metadata
    assert (metadata.author, metadata.license) == ("A team", "Apache-2.0")
    assert metadata.userDefined["base_fingerprint"] == document["base"]["fingerprint"]
    assert "com.github.apple.coremltools.conversion_date" not in metadata.userDefined


def test_integers_and_scales_are_those_of_the_bundle_bit_for_bit(tiny: Path, exported: Export) -> None:
    found, expected = MlpackageFile(exported(INT4)).dequantized(), bundle_weights(tiny)
    assert len(found) == len(expected)  # the tied head reads the table
    for module, weight in expected.items():
        assert any(np.array_equal(held, weight) for held in found), module
    assert packages.load(exported(INT4)).manifest.represented == ()


def test_attention_is_the_fused_operator_and_the_cache_is_written_in_place(exported: Export) -> None:
    found = Counter(operation.type for operation in MlpackageFile(exported(INT4)).block.operations)
    assert found["scaled_dot_product_attention"] == LAYERS
    assert found["write_state"] == found["slice_update"] == 2 * LAYERS
    groups = packages.load(exported(INT4)).manifest.slots.groups()
    assert found["gelu"] == found["select"] == len(groups)


def test_names_are_unique_as_core_ml_wants_them(exported: Export) -> None:
    for recipe in ("coreml-fp16", INT4):
        operations = MlpackageFile(exported(recipe)).block.operations
        names = [output.name for operation in operations for output in operation.outputs]
        assert len(names) == len(set(names)), recipe


def random_weights() -> dict[str, Weight]:
    rng, none = np.random.default_rng(0), torch.zeros(0)
    scale = torch.from_numpy(rng.uniform(0.01, 0.02, (8, 2)).astype(np.float16).astype(np.float32))

    def integers(low: int, high: int, columns: int = 64) -> torch.Tensor:
        return torch.from_numpy(rng.integers(low, high, (8, columns)).astype(np.int8))

    codebook = torch.from_numpy(np.linspace(-1, 1, 16).astype(np.float16).astype(np.float32))
    return {
        "dense": Weight("dense", integers(-8, 8).float(), none, none),
        "int4": Weight("int4", integers(-8, 8), scale, none),
        "int8": Weight("int8", integers(-128, 128), scale, none),
        "zero_points": Weight("zero_points", integers(-8, 8), scale, none, zero=integers(-8, 8, 2)),
        "codebook": Weight("codebook", integers(0, 16), scale, none, codebook=codebook),
    }


def test_every_form_of_a_weight_computes_what_it_stands_for(tmp_path: Path) -> None:
    weights = random_weights()

    def body(given: programs.Values) -> dict[str, programs.Var]:
        made = {name: _coreml_weights.weight_of(held) for name, held in weights.items()}
        return {f"{name}_y": programs.mb.linear(x=given["x"], weight=value) for name, value in made.items()}

    inputs = [Input("x", (1, 64), np.float16, "")]
    path = tmp_path / "forms.mlpackage"
    programs.save(programs.build(inputs, [], {"main": body}), path, Description("", "", "", "", {}, {}), inputs, [])
    function = mil.load(path).functions["main"]
    x = np.random.default_rng(1).standard_normal((1, 64)).astype(np.float16)
    made = function.run({"x": x}, function.state())
    for name, held in weights.items():
        weight = ops.dequantize(held.values, held.scale, held.zero, held.codebook).numpy().astype(np.float16)
        expected = x.astype(np.float32) @ weight.astype(np.float32).T
        np.testing.assert_allclose(made[f"{name}_y"], expected, rtol=2e-3, atol=2e-3, err_msg=name)


def test_what_coremltools_says_of_an_operator_is_one_line(exported: Export, tiny: Path, tmp_path: Path,
                                                           monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    def broken(**_: object) -> None:
        raise ValueError("shapes do not fit\nand a second line")

    monkeypatch.setitem(coreml._UNARY, torch.ops.aten.silu.default, broken)
    with pytest.raises(UnsupportedError, match=r"^coreml: building silu: shapes do not fit$"):
        pipeline.export(tiny, tmp_path / "package", INT4)
    assert not (tmp_path / "package").exists()


def test_a_router_that_coremltools_does_not_convert_is_one_line(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise NotImplementedError("Unsupported fx node and_1, kind __and__\nand a second line")

    monkeypatch.setattr(programs.ct, "convert", broken)
    with pytest.raises(UnsupportedError, match=r"^coreml: converting the router: Unsupported fx node and_1.*__and__$"):
        pipeline.export(tiny, tmp_path / "package", INT4)


def test_nothing_of_coremltools_is_heard(tiny: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    pipeline.export(tiny, tmp_path / "package", INT4)
    heard = capfd.readouterr()
    assert (heard.out, heard.err) == ("", "")


# ── what it computes ──────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("name", NAMES)
def test_the_base_equals_transformers(families: Families, lowered: Lower, name: str) -> None:
    ids = tokens(PREFILL + STEPS)
    expected = families(name).logits(ids)[0, PREFILL - 1 :].numpy()
    made = run(lowered(name, "coreml-fp16"), {}, ids[0].tolist())
    np.testing.assert_allclose(made, expected, atol=HALF)


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_adapters_equal_peft(families: Families, lowered: Lower, name: str) -> None:
    """All linear layers; q and v alone, in llama's a16."""
    ids, family = tokens(PREFILL + STEPS), families(name)
    for adapter in ("a16", "pattern") if name == "llama" else ("all",):
        expected = family.peft_logits(adapter, ids)[0, PREFILL - 1 :].numpy()
        made = run(lowered(name, "coreml-fp16"), {adapter: 1.0}, ids[0].tolist())
        np.testing.assert_allclose(made, expected, atol=HALF)


@pytest.mark.parametrize("weights", [(1.0, 0.0), (0.6, 0.4), (-0.5, 1.5)])
def test_recovery_rows_and_mixes_equal_the_formula(
    families: Families, lowered: Lower, weights: tuple[float, float]
) -> None:
    ids, llama = tokens(PREFILL + STEPS), families("llama")
    exact = caloras("llama", llama.hf)
    expected = llama.mixed_logits(list(zip(exact.values(), weights, strict=True)), ids)[0, PREFILL - 1 :].numpy()
    made = run(lowered("llama", "coreml-fp16"), dict(zip(exact, weights, strict=True)), ids[0].tolist())
    np.testing.assert_allclose(made, expected, atol=HALF)


@pytest.mark.parametrize("size", [1e-6, 1.0, 3e4])
def test_a_norm_holds_where_squares_leave_float16(tmp_path: Path, size: float) -> None:
    x = (np.random.default_rng(0).uniform(-size, size, (1, 3, HIDDEN))).astype(np.float16)
    weight = np.random.default_rng(1).uniform(0.5, 2, HIDDEN).astype(np.float16)

    def body(given: programs.Values) -> dict[str, programs.Var]:
        return {"y": _coreml_ops.rms_norm(given["x"], weight, 1e-5)}

    inputs, path = [Input("x", x.shape, np.float16, "")], tmp_path / "norm.mlpackage"
    programs.save(programs.build(inputs, [], {"main": body}), path, Description("", "", "", "", {}, {}), inputs, [])
    function = mil.load(path).functions["main"]
    expected = torch.nn.functional.rms_norm(
        torch.from_numpy(x).float(), (HIDDEN,), torch.from_numpy(weight).float(), 1e-5
    )
    np.testing.assert_allclose(function.run({"x": x}, {})["y"], expected, rtol=4e-3, atol=1e-6)


# ── one function per adapter ──────────────────────────────────────────────────────────────────────────────────────


def test_functions_compute_what_inputs_do(exported: Export, variant: Variant, tiny: Path) -> None:
    fused = variant(tiny, FUNCTIONS, context=64)
    for mix in ({}, {"alpha": 1.0}, {"beta": 1.0}):
        np.testing.assert_allclose(run(fused, mix, IDS), run(exported("coreml-int8"), mix, IDS), atol=HALF)


def test_a_function_alone_has_its_own_name(tmp_path: Path) -> None:
    """That of the base, where a bundle has no adapters."""
    inputs, about = [Input("x", (1, 4), np.float16, "")], Description("", "", "", "1", {}, {})
    program = programs.build(inputs, (), {"base": lambda given: {"y": programs.mb.relu(x=given["x"])}})
    programs.save(program, tmp_path / "one.mlpackage", about, inputs, ())
    assert list(mil.load(tmp_path / "one.mlpackage").functions) == ["base"]


def test_functions_share_their_weights(exported: Export, variant: Variant, tiny: Path) -> None:
    fused = variant(tiny, FUNCTIONS, context=64)
    about = spec(fused).description
    assert [found.name for found in about.functions] == ["base", "alpha", "beta"]
    assert about.defaultFunctionName == "base"
    one, all_of_them = (
        mlpackage.weight_file(package / "model.mlpackage").stat().st_size
        for package in (exported("coreml-int8"), fused)
    )
    adapters = sum((fused / entry.file).stat().st_size for entry in packages.load(fused).manifest.adapters)
    assert all_of_them < one + 2 * adapters  # 64-byte alignment of small tensors


def test_functions_take_no_mixes_and_no_late_adapters(variant: Variant, tiny: Path, tmp_path: Path) -> None:
    fused = variant(tiny, FUNCTIONS, context=64)
    session = runtimes.load("coreml").open_session(packages.load(fused), 1)
    with pytest.raises(PackageError, match="adapters: expected one at weight 1, .* found alpha=0.6, beta=0.4"):
        session.select({"alpha": 0.6, "beta": 0.4})
    with pytest.raises(PackageError, match="adapter_inputs: expected adapters that are files, found functions"):
        pipeline.add_adapter(fused, tiny / "adapters" / "alpha")


def test_ids_that_would_be_one_function_are_refused() -> None:
    assert mlpackage.function_names(["a-b", "2c"]) == {"": "base", "a-b": "a_b", "2c": "_2c"}
    with pytest.raises(UnsupportedError, match="found a.b, which would be a_b"):
        mlpackage.function_names(["a-b", "a.b"])
    with pytest.raises(UnsupportedError, match="found base"):
        mlpackage.function_names(["base"])
