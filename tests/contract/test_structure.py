"""A base whose layers have other numbers of heads and neurons each, on every target."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from calora_export import bundle as bundles
from calora_export import package as packages
from calora_export import profiles, recipe, runtimes
from calora_export.composing import compose
from calora_export.errors import BundleError
from tests import pruned
from tests.bundles import copy_bundle, edit_json, edit_tensors
from tests.conftest import Variant
from tests.contract import logits
from tests.families import CONTEXT, Family

RECIPES = (
    ("torch-fp32", {}),
    ("onnx-fp32", {}),
    ("executorch-fp32", {}),
    ("executorch-fp32", {"kernels": "stock"}),
    ("coreml-fp16", {}),
    ("coreml-multifunction", {}),
)
LIMITS = {"coreml-fp16": 0.03, "coreml-multifunction": 0.5}  # float16 throughout; and weights in int8


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Family:
    return pruned.make(tmp_path_factory.mktemp("pruned"))


def expected(family: Family, weight: float) -> np.ndarray:
    """Of transformers' whole model, in which what was pruned adds zero."""
    return logits.of_transformers(family, pruned.adapted(family.hf), weight)


def test_a_bundle_says_which_layers_have_widths_of_their_own(family: Family) -> None:
    bundle = bundles.load(family.bundle, deep=True)
    (step,) = bundle.manifest.base.compression
    assert (step.scheme, step.pattern) == ("prune", "structured")
    assert bundle.linears["model.layers.1.self_attn.k_proj"] == (16, 64)
    assert bundle.linears["model.layers.0.mlp.down_proj"] == (64, 64)
    assert bundle.structured == set(bundle.linears) - {"lm_head", "model.embed_tokens"}


@pytest.mark.parametrize("weight", [0.0, 1.0])
def test_the_reference_is_transformers_model_with_what_was_pruned_at_zero(family: Family, weight: float) -> None:
    bundle = bundles.load(family.bundle)
    model = compose(bundle, bundle.weight, context=CONTEXT)
    assert (model.shape.heads, model.shape.kv_heads) == ((4, 2), (2, 1))
    assert np.abs(logits.of_model(model, bundle, weight) - expected(family, weight)).max() <= 1e-5


@pytest.mark.parametrize(("name", "changes"), RECIPES, ids=str)
def test_every_target_lowers_it(family: Family, variant: Variant, name: str, changes: dict[str, str | int]) -> None:
    package = packages.load(variant(family.bundle, name, **changes))
    settings = package.manifest.settings
    session = runtimes.load(settings.target).open_session(package, 1)
    for weight, mix in ((0.0, {}), (1.0, {"one": 1.0})):
        error = np.abs(logits.of_session(session, mix) - expected(family, weight))
        assert error.max() <= LIMITS.get(name, 2e-5)  # logits reach ±5
    assert package.manifest.model.kv_heads == (2, 1)


def test_memory_is_that_of_the_heads_that_are_left(family: Family) -> None:
    bundle, settings = bundles.load(family.bundle), recipe.load("onnx-fp32")
    assert profiles._memory(bundle, settings)["cache"] == CONTEXT * 2 * (2 + 1) * 16 * 4


# ── what is refused ─────────────────────────────────────────────────────────────────────────────────────────


def refusal(family: Family, path: Path) -> str:
    bundle = bundles.load(path)
    with pytest.raises(BundleError) as caught:
        compose(bundle, bundle.weight, context=CONTEXT)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_widths_that_the_bundle_does_not_declare_are_refused(family: Family, tmp_path: Path) -> None:
    path = copy_bundle(family.bundle, tmp_path / "bundle")
    edit_json(path / "bundle.json", lambda manifest: manifest["base"].update(compression=[]))
    assert "pattern structured" in refusal(family, path)


@pytest.mark.parametrize(
    ("site", "rows", "line"),
    [
        ("model.layers.1.self_attn.v_proj", 8, "model.layers.1.self_attn: q, k, v, o: expected q and o of a multiple"),
        ("model.layers.1.mlp.gate_proj", 31, "widths: expected layers that fit each other"),
    ],
)
def test_layers_that_do_not_fit_each_other_are_refused(
    family: Family, tmp_path: Path, site: str, rows: int, line: str
) -> None:
    path = copy_bundle(family.bundle, tmp_path / "bundle")
    edit_json(path / "bundle.json", lambda manifest: manifest.update(adapters=[]))
    name = f"{site}.weight"
    edit_tensors(path / "base/model.safetensors", lambda tensors: tensors.update({name: tensors[name][:rows].copy()}))
    assert line in refusal(family, path)
