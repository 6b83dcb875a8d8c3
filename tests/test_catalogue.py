"""What `list` says must be what the code does: the same modules, the same recipes, the same outcomes."""

from __future__ import annotations

import tomllib
from pathlib import Path

import numpy as np
import pytest

import calora_export
from calora_export import catalogue, formats, recipe, resources
from calora_export.compression import DenseWeight, PackedWeight, quantize_symmetric

LISTS = ("targets", "recipes", "devices", "adapters", "routers", "formats")


@pytest.mark.parametrize("what", LISTS)
def test_a_list_is_a_table_of_texts(what: str) -> None:
    rows = catalogue.entries(what)
    assert rows
    for row in rows:
        assert list(row) == list(rows[0])
        assert all(isinstance(value, str) and value for value in row.values())


def test_targets_are_the_modules() -> None:
    folder = Path(calora_export.__file__).parent / "targets"
    modules = {file.stem for file in folder.glob("*.py") if not file.stem.startswith("_")}
    assert {row["target"] for row in catalogue.entries("targets")} == modules


def test_recipes_and_devices_are_the_files() -> None:
    for what, key in (("recipes", "recipe"), ("devices", "device")):
        files = {file.stem: file for file in (resources.root() / what).glob("*.toml")}
        rows = catalogue.entries(what)
        assert {row[key] for row in rows} == set(files)
    for row in catalogue.entries("recipes"):
        document = tomllib.loads((resources.root() / "recipes" / f"{row['recipe']}.toml").read_text())
        assert (row["target"], row["description"]) == (document["target"], document["description"])


def test_every_scheme_meets_every_recipe() -> None:
    cells = formats.matrix()
    schemes = {cell.scheme for cell in cells}
    assert len(schemes) == 6
    assert {(cell.scheme, cell.recipe) for cell in cells} == {(s, r) for s in schemes for r in recipe.catalogue()}
    assert len(cells) == 6 * len(recipe.catalogue())


def test_what_each_target_holds_exactly() -> None:
    outcomes = {(cell.scheme, cell.recipe): cell.outcome for cell in formats.matrix()}
    packed = {scheme for scheme, _ in outcomes if scheme.startswith("int")}
    assert {outcomes[scheme, "onnx-int4"] for scheme in packed} == {"exact"}
    assert outcomes["fp32, fp16, bf16", "onnx-fp32"] == "exact"
    assert outcomes["fp32, fp16, bf16", "onnx-int4"] == "re-represented"
    inexact = {scheme for scheme in packed if outcomes[scheme, "executorch-8da4w"] != "exact"}
    assert inexact == {"int8, groups of 32", "int4, fp16 scales"}  # XNNPACK: bf16 scales, int8 only by rows


@pytest.mark.parametrize("name", sorted(recipe.catalogue()))
@pytest.mark.parametrize("bits", [0, 4, 8])
def test_exact_means_the_same_numbers(name: str, bits: int) -> None:
    """Dequantised by hand, not by the code under test."""
    dense = np.random.default_rng(0).standard_normal((4, 64)).astype(np.float32)
    stored: DenseWeight | PackedWeight = DenseWeight(dense)
    if bits:
        stored = quantize_symmetric(dense, bits, 32)
        dense = (stored.q.reshape(4, 2, 32) * np.asarray(stored.scale, np.float32)[..., None]).reshape(4, 64)
    made = recipe.represent(recipe.load(name), "model.layers.0.mlp.up_proj", stored)
    held = made.weight.dequantize() if isinstance(made.weight, PackedWeight) else made.weight.values
    assert made.exact == bool((held == dense).all())
