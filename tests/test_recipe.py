from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from calora_export import recipe, resources
from calora_export.compression import DenseWeight, PackedWeight, quantize_symmetric
from calora_export.errors import RecipeError, UnsupportedError
from calora_export.recipe import Recipe, Rule, represent

PARITY = """
[parity.source]
max_abs = 1.0
kl_max = 0.1
top1_agreement = 0.9
sqnr_db = 20.0

[parity.target]
max_abs = 0.5
kl_max = 0.02
top1_agreement = 0.95
sqnr_db = 30.0
"""
HEAD = 'target = "onnx"\ndescription = "A test."\n'
RULES = """
[[precision]]
modules = "*embed_tokens"
scheme = "int8"
group_size = 16

[[precision]]
modules = "model.layers.0.*"
scheme = "fp32"

[[precision]]
modules = "*"
scheme = "int4"
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "mine.toml"
    path.write_text(HEAD + RULES + PARITY)
    return path


@pytest.fixture
def mine(file: Path) -> Recipe:
    return recipe.load(str(file))


def dense(columns: int = 64) -> np.ndarray:
    return np.random.default_rng(0).standard_normal((6, columns), np.float32)


@pytest.mark.parametrize(
    ("module", "scheme", "group_size"),
    [
        ("model.embed_tokens", "int8", 16),
        ("model.layers.0.mlp.up_proj", "fp32", 32),
        ("model.layers.1.mlp.up_proj", "int4", 32),
        ("model.layers.01mlp.up_proj", "int4", 32),  # a dot is a dot
        ("lm_head", "int4", 32),
    ],
)
def test_the_first_rule_that_matches_wins(mine: Recipe, module: str, scheme: str, group_size: int) -> None:
    assert mine.rule(module) == Rule(mine.rule(module).modules, scheme, group_size)


def test_a_module_without_a_rule_is_named(file: Path) -> None:
    file.write_text(HEAD + RULES[: RULES.rindex("[[precision]]")] + PARITY)
    with pytest.raises(RecipeError, match="a rule that matches lm_head"):
        recipe.load(str(file)).rule("lm_head")


@pytest.mark.parametrize("pattern", ["[", "(", "model.(layers|norm)", "a+", "\\\\d"])
def test_only_the_star_is_special(file: Path, pattern: str) -> None:
    """What looks like a regular expression names that text, and is never a traceback."""
    file.write_text(HEAD + RULES.replace("*embed_tokens", pattern) + PARITY)
    loaded = recipe.load(str(file))
    assert loaded.rule("model.norm").scheme == "int4"
    assert loaded.rule(loaded.precision[0].modules).scheme == "int8"


@pytest.mark.parametrize(
    ("old", "new", "line"),
    [
        ('target = "onnx"', 'target = "onnx"\nquantise = true', "unknown field `quantise`"),
        ("group_size = 16", "groupsize = 16", "unknown field `groupsize` - at `$.precision[0]`"),
        ('scheme = "int8"', 'scheme = "int3"', "Invalid enum value 'int3' - at `$.precision[0].scheme`"),
        ("group_size = 16", 'group_size = "16"', "Expected `int`, got `str` - at `$.precision[0].group_size`"),
        ("group_size = 16", "group_size = -1", "Expected `int` >= 0 - at `$.precision[0].group_size`"),
        ('target = "onnx"', 'target = "onnx"\ncontext = 63', "Expected `int` >= 64 - at `$.context`"),
        ("kl_max = 0.1\n", "", "missing required field `kl_max` - at `$.parity.source`"),
        ('target = "onnx"\n', "", "missing required field `target`"),
        ("[parity.source]", "[parity.source", ""),
        ('target = "onnx"', "target = \x00", ""),
    ],
)
def test_a_wrong_recipe_is_one_line_with_file_and_key(file: Path, old: str, new: str, line: str) -> None:
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new, 1))
    with pytest.raises(RecipeError) as caught:
        recipe.load(str(file))
    assert str(caught.value).startswith("mine.toml: ")
    assert line in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_unknown_name_lists_those_that_ship() -> None:
    with pytest.raises(RecipeError) as caught:
        recipe.load("onnx-int3")
    assert all(name in str(caught.value) for name in resources.recipes())


def test_a_file_that_is_not_text_is_refused(file: Path) -> None:
    file.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(RecipeError, match=r"mine\.toml"):
        recipe.load(str(file))


def test_every_recipe_that_ships_is_whole() -> None:
    catalogue = recipe.catalogue()
    assert list(catalogue) == sorted(resources.recipes())
    for name, shipped in catalogue.items():
        assert shipped.description.endswith("."), name
        assert shipped.rule("model.embed_tokens") and shipped.rule("lm_head")
        for tolerance in (shipped.parity.source, shipped.parity.target):
            low, high = tolerance.effect_ratio
            assert low < 1 < high


# ── weights ─────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("bits", [4, 8])
def test_a_packed_weight_is_never_quantised_again(mine: Recipe, bits: int) -> None:
    """Whatever its bits and groups are: they are the bundle's."""
    stored = quantize_symmetric(dense(), bits, 16)
    made = represent(mine, "lm_head", stored)
    assert made.exact
    assert made.weight is stored


def test_fp32_holds_what_a_packed_weight_stands_for(mine: Recipe) -> None:
    stored = quantize_symmetric(dense(), 4, 16)
    made = represent(mine, "model.layers.0.mlp.up_proj", stored)
    scales = np.repeat(stored.scale.astype(np.float32), 16, axis=1)
    assert made.exact
    assert isinstance(made.weight, DenseWeight)
    assert np.array_equal(made.weight.values, stored.q.astype(np.float32) * scales)


@pytest.mark.parametrize(("module", "bits", "group"), [("lm_head", 4, 32), ("model.embed_tokens", 8, 16)])
def test_a_dense_weight_is_rounded_to_the_nearest_and_said_to_be(
    mine: Recipe, module: str, bits: int, group: int
) -> None:
    values = dense()
    made = represent(mine, module, DenseWeight(values))
    assert not made.exact
    assert isinstance(made.weight, PackedWeight)
    assert (made.weight.bits, made.weight.group_size) == (bits, group)
    steps = np.repeat(made.weight.scale.astype(np.float32), group, axis=1)
    error = np.abs(made.weight.q * steps - values) / steps
    assert error.max() <= 0.5 + 2**-6 * 2 ** (bits - 1)  # the scale itself is bfloat16


@pytest.mark.parametrize(("target", "group"), [("onnx", 64), ("executorch", 192)])
def test_a_dense_weight_is_quantised_into_what_the_target_holds(file: Path, target: str, group: int) -> None:
    """Rows of 192 are no group of ONNX Runtime's, groups of int8 none of XNNPACK's."""
    rows = "group_size = 16" if target == "executorch" else "group_size = 0"
    text = file.read_text().replace('target = "onnx"', f'target = "{target}"').replace("group_size = 16", rows)
    file.write_text(text)
    made = represent(recipe.load(str(file)), "model.embed_tokens", DenseWeight(values := dense(192)))
    assert isinstance(made.weight, PackedWeight) and not made.exact
    assert (made.weight.bits, made.weight.group_size, made.weight.scale.shape[1]) == (8, group, 192 // group)
    assert np.abs(made.weight.dequantize() - values).max() < np.abs(values).max() / 100


def test_a_group_size_that_does_not_divide_is_an_error_that_names_both(mine: Recipe) -> None:
    with pytest.raises(UnsupportedError, match="lm_head: input features: .*group_size 32, found 48"):
        represent(mine, "lm_head", DenseWeight(dense(48)))


@pytest.mark.parametrize(("group", "columns", "held"), [(64, 64, 64), (96, 96, 32), (256, 512, 128), (48, 96, 16)])
@pytest.mark.parametrize("bits", [4, 8])
def test_a_group_that_no_kernel_takes_is_cut_without_changing_a_number(
    mine: Recipe, bits: int, group: int, columns: int, held: int
) -> None:
    """Kernels take powers of two from 16 to 128; one scale per row is a group as wide as the row."""
    stored = quantize_symmetric(dense(columns), bits, group)
    made = represent(mine, "lm_head", stored)
    assert made.exact
    assert isinstance(made.weight, PackedWeight)
    assert made.weight.group_size == held
    assert made.weight.scale.shape == (6, columns // held)
    assert np.array_equal(made.weight.dequantize(), stored.dequantize())


def test_a_group_that_cannot_be_cut_is_refused(mine: Recipe) -> None:
    with pytest.raises(UnsupportedError, match=r"lm_head: group_size: .*found 24"):
        represent(mine, "lm_head", quantize_symmetric(dense(48), 4, 24))


def test_what_no_kernel_reads_is_refused_unless_the_rule_allows_it() -> None:
    stored = quantize_symmetric(dense(64), 8, 32)
    refusing = recipe.load("executorch-8da4w")
    with pytest.raises(UnsupportedError) as caught:
        represent(refusing, "model.layers.0.mlp.up_proj", stored)
    line = str(caught.value)
    assert line.startswith("model.layers.0.mlp.up_proj: weight: expected what a kernel of executorch reads, found int8")
    assert "use executorch-fp32, or lossy = \"allow\", which keeps" in line and line.endswith("dB as int8/0)")
    made = represent(recipe.load("executorch-8da8w"), "model.layers.0.mlp.up_proj", stored)
    assert isinstance(made.weight, PackedWeight) and not made.exact
    assert (made.weight.bits, made.weight.group_size) == (8, 64)


def test_int8_adapters_need_our_operators(file: Path) -> None:
    file.write_text(HEAD + 'adapters = "int8"\n' + RULES + PARITY)
    with pytest.raises(RecipeError, match="mine.toml: expected fp32 or fp16, found int8 for onnx with stock kernels"):
        recipe.load(str(file))
    file.write_text(HEAD + 'adapters = "int8"\nkernels = "calora"\n' + RULES + PARITY)
    assert recipe.load(str(file)).adapters == "int8"
