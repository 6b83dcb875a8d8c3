"""Quantising by what layers read, against rounding to nearest and against transformers' own activations."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

from calora_export import bundle as bundles
from calora_export import calibration, golden, pipeline, recipe, resources
from calora_export.composing import compose
from calora_export.compression import quantize_calibrated, quantize_symmetric
from calora_export.errors import RecipeError
from calora_export.model import Rows
from calora_export.weights import Weights
from tests.bundles import edit_json, tiny_bundle

RULE = '[[precision]]\nmodules = "*.layers.*"\nscheme = "int4"\n{}\n\n[[precision]]\nmodules = "*"\nscheme = "fp32"\n\n'


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_bundle(tmp_path_factory.mktemp("dense") / "bundle", compressed=False, router=False)


def written(path: Path, more: str) -> str:
    """torch-fp32 with int4 layers."""
    text = resources.recipes()["torch-fp32"].read_text()
    path.write_text(re.sub(r"\[\[precision\]\].*?(?=\[parity)", RULE.format(more), text, flags=re.S))
    return str(path)


def test_outputs_are_nearer_on_inputs_that_it_has_not_seen() -> None:
    random = np.random.default_rng(0)
    weight, spread = random.standard_normal((64, 256)).astype(np.float32), random.lognormal(0, 1, 256)
    seen, other = (random.standard_normal((512, 256)) * spread for _ in range(2))
    importance = np.square(seen).mean(0).astype(np.float32)

    def error(made: np.ndarray) -> float:
        return float(np.square(other @ (made - weight).T).mean())

    nearest = error(quantize_symmetric(weight, 4, 32).dequantize())
    calibrated = error(quantize_calibrated(weight, 4, 32, importance).dequantize())
    even = error(quantize_calibrated(weight, 4, 32, np.ones(256, np.float32)).dequantize())
    assert calibrated < 0.8 * nearest and calibrated < even


def test_zeros_stay_zeros() -> None:
    weight = np.random.default_rng(0).standard_normal((8, 64)).astype(np.float32)
    weight[:, ::2] = 0
    made = quantize_calibrated(weight, 4, 32, np.linspace(1, 2, 64, dtype=np.float32)).dequantize()
    assert (made[:, ::2] == 0).all() and made[:, 1::2].any()


def test_moments_are_of_what_transformers_model_reads(dense: Path) -> None:
    bundle, seen = bundles.load(dense), {}
    hf = transformers.AutoModelForCausalLM.from_pretrained(str(dense / "base"), dtype=torch.float32).eval()
    site = "model.layers.1.mlp.down_proj"
    hf.get_submodule(site).register_forward_pre_hook(lambda module, inputs: seen.setdefault("x", []).append(inputs[0]))
    ids = torch.tensor([golden.stream(bundle, calibration.TOKENS)])
    with torch.no_grad():
        for part in ids.split(calibration.AT_ONCE, dim=1):
            hf(part)
    expected = torch.cat(seen["x"], dim=1)[0].square().mean(0).numpy()
    np.testing.assert_allclose(calibration.second_moments(bundle)[site], expected, rtol=1e-4)


def test_a_calibrated_base_is_nearer_to_the_trained_one(dense: Path, tmp_path: Path) -> None:
    bundle, errors = bundles.load(dense), []
    ids = torch.randint(0, 256, (1, 64), generator=torch.Generator().manual_seed(1))
    source = compose(bundle, bundle.weight, context=64)
    trained = source(ids, source.empty_cache(), Rows.none())[0]
    for more in ("", 'calibration = "eval"'):
        settings = recipe.load(written(tmp_path / "recipe.toml", more))
        made = compose(bundle, Weights(bundle, settings), context=64)
        errors.append(float((made(ids, made.empty_cache(), Rows.none())[0] - trained).square().mean()))
    assert errors[1] < 0.9 * errors[0]


def test_the_package_says_what_is_calibrated(dense: Path, tmp_path: Path) -> None:
    name = written(tmp_path / "recipe.toml", 'calibration = "eval"')
    package = pipeline.export(dense, tmp_path / "package", name)
    held = {entry.module: (entry.stored, entry.held) for entry in package.manifest.represented}
    assert len(held) == 14 and set(held.values()) == {("float", "int4/32 calibrated")}


def test_a_bundle_without_prompts_is_refused(dense: Path, tmp_path: Path) -> None:
    path = tiny_bundle(tmp_path / "bundle", compressed=False, router=False)
    edit_json(path / "bundle.json", lambda manifest: manifest.update(tasks=[]))
    with pytest.raises(RecipeError, match="calibration: expected a bundle with tasks"):
        pipeline.export(path, tmp_path / "package", written(tmp_path / "recipe.toml", 'calibration = "eval"'))
