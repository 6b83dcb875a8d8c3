"""`list formats`, cell by cell: packed by quantisers, exported, and decoded by code that is not the writer."""

from __future__ import annotations

import functools
import json
import re
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from _pytest.mark import ParameterSet
from safetensors.numpy import load_file
from typer.testing import CliRunner

from calora_export import bundle as bundles
from calora_export import formats, pipeline
from calora_export.cli import app
from calora_export.errors import UnsupportedError
from tests import zoo
from tests.mlpackage_file import MlpackageFile
from tests.onnx_file import OnnxFile
from tests.pte_file import PteFile
from tests.zoo import Animal

Find = Callable[[str], Animal]
CELLS = {(cell.scheme, cell.recipe): cell for cell in formats.matrix()}
READERS: dict[str, Callable[[Path], list[np.ndarray]]] = {
    "onnx": lambda package: OnnxFile(package).dequantized() + OnnxFile(package).floats(),
    "executorch": lambda package: PteFile(package).filters(),
    "coreml": lambda package: MlpackageFile(package).dequantized() + MlpackageFile(package).floats(),
    "torch": lambda package: list(load_file(package / "model.safetensors").values()),
}


def cells(outcome: str) -> list[tuple[str, str]]:
    return [key for key, cell in CELLS.items() if cell.outcome == outcome]


def packed(outcome: str, recipe: str) -> list[tuple[str, str]]:
    return [key for key in cells(outcome) if key[1] == recipe and key[0] != zoo.FLOATS]


def exact() -> list[ParameterSet]:
    """Every cell; heavy are those of recipes that hold and lower weights as another does."""
    light = {("int4, groups, act-order", "torch-fp32"), ("nf4, blocks of 64", "torch-fp32")}
    light |= {key for recipe in ("onnx-int4", "executorch-8da4w", "coreml-int4") for key in packed("exact", recipe)}
    return [pytest.param(*key, marks=() if key in light else pytest.mark.heavy) for key in cells("exact")]


@pytest.fixture(scope="module")
def find(tmp_path_factory: pytest.TempPathFactory) -> Find:
    return functools.cache(lambda scheme: zoo.animal(scheme, tmp_path_factory.mktemp("zoo") / "bundle"))


def test_the_zoo_has_every_scheme() -> None:
    assert set(formats.samples()) == set(zoo.SCHEMES)


@pytest.mark.parametrize(("scheme", "recipe"), exact())
def test_exact_is_bit_for_bit_in_the_exported_file(find: Find, tmp_path: Path, scheme: str, recipe: str) -> None:
    held = find(scheme)
    package = pipeline.export(held.bundle, tmp_path / "package", recipe)
    found = READERS[package.manifest.target](package.path)
    assert len(held.expected) == 14
    assert [module for module, wanted in held.expected.items() if not zoo.has(found, wanted)] == []
    assert not {entry.module for entry in package.manifest.represented} & set(held.expected)


@pytest.mark.parametrize(("scheme", "recipe"), packed("re-represented", "executorch-8da8w"))
def test_re_represented_is_the_nearest_and_says_what_it_keeps(
    find: Find, tmp_path: Path, scheme: str, recipe: str
) -> None:
    held = find(scheme)
    package = pipeline.export(held.bundle, tmp_path / "package", recipe)
    found, said = PteFile(package.path).filters(), {entry.module: entry for entry in package.manifest.represented}
    for module, stored in held.expected.items():
        if said[module].stored == "int8/0 a8":
            assert said[module].held == "int8/0" and zoo.has(found, stored)
        elif said[module].held == "int8/0":
            scale = np.abs(stored).max(axis=1, keepdims=True) / np.float32(127)
            nearest = np.clip(np.rint(stored / scale), -128, 127) * scale + 0.0  # no negative zeros
            assert zoo.has(found, nearest.astype(np.float32)), module
            kept = 10 * np.log10(np.square(stored).sum() / np.square(stored - nearest).sum())
            assert said[module].sqnr_db == pytest.approx(kept, abs=0.02)
        else:
            assert (scheme, said[module].held) == ("int4, groups, fp16 scales", "int4/32")
            assert not zoo.has(found, stored)
            assert 45 < said[module].sqnr_db < 70


@pytest.mark.parametrize(("scheme", "recipe"), packed("re-represented", "coreml-int4"))
def test_core_ml_rounds_a_codebook_to_fp16(find: Find, tmp_path: Path, scheme: str, recipe: str) -> None:
    held = find(scheme)
    package = pipeline.export(held.bundle, tmp_path / "package", recipe)
    found, said = MlpackageFile(package.path).dequantized(), {e.module: e for e in package.manifest.represented}
    for module, stored in held.expected.items():
        same = [matrix for matrix in found if matrix.shape == stored.shape]
        made = min(same, key=lambda matrix: np.abs(matrix - stored).max())
        kept = 10 * np.log10(np.square(stored).sum() / np.square(stored - made).sum())
        assert said[module].sqnr_db == pytest.approx(kept, abs=0.02) and kept > 65


@pytest.mark.parametrize(("scheme", "recipe"), cells("refused"))
def test_refused_is_one_line_at_once_and_names_a_recipe_that_works(
    find: Find, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scheme: str, recipe: str
) -> None:
    """However large the base is: not all of it is read."""
    monkeypatch.delattr(bundles, "check_bytes")
    bundle, started = find(scheme).bundle, time.perf_counter()
    with pytest.raises(UnsupportedError) as caught:
        pipeline.export(bundle, tmp_path / "package", recipe)
    took, line = time.perf_counter() - started, str(caught.value)
    assert "\n" not in line and "use executorch-fp32" in line and ".down_proj: " in line
    assert CELLS[scheme, "executorch-fp32"].outcome == "exact"
    assert not (tmp_path / "package").exists()
    assert took < 2


def test_a_refusal_ends_the_command_with_1(find: Find, tmp_path: Path) -> None:
    bundle = str(find("nf4, blocks of 64").bundle)
    result = CliRunner().invoke(app, ["export", bundle, "-o", str(tmp_path / "p"), "--recipe", "executorch-8da4w"])
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr.count("\n") == 1 and "found nf4 in groups of 64" in result.stderr


def test_what_the_list_says_is_what_the_cells_are() -> None:
    rows = json.loads(CliRunner().invoke(app, ["list", "formats", "--json"]).stdout)["formats"]
    said = {(row["stored as"], name): row["outcome"] for row in rows for name in row["recipes"].split(", ")}
    for (scheme, recipe), cell in CELLS.items():
        assert said.get((scheme, recipe), said.get(("every scheme", recipe))) == cell.outcome


def test_the_printed_list_has_every_cell() -> None:
    """A block for each target, a line for each scheme; what a refusal's number means is below."""
    blocks = CliRunner().invoke(app, ["list", "formats"]).stdout.split("\n\n")
    for (scheme, recipe), cell in CELLS.items():
        (block,) = (block for block in blocks if re.search(rf"(?m)^{cell.target}-…", block))
        (line,) = (line for line in block.splitlines() if line.startswith(f"{scheme}  "))
        assert f"…{recipe.removeprefix(f'{cell.target}-')}" in block
        if cell.outcome == "refused":
            number = next(line for line in block.splitlines() if line.endswith(f") {cell.note}")).split()[0]
            assert f"refused {number}" in line
        else:
            assert f"{'exact' if cell.outcome == 'exact' else cell.note}, {cell.held_as}" in line


@pytest.mark.parametrize("columns", [80, 100])
def test_the_printed_list_fits_a_terminal(monkeypatch: pytest.MonkeyPatch, columns: int) -> None:
    for name, value in {"TTY_COMPATIBLE": "1", "NO_COLOR": "1", "COLUMNS": str(columns)}.items():
        monkeypatch.setenv(name, value)
    lines = re.sub(r"\x1b\[\d*m", "", CliRunner().invoke(app, ["list", "formats"]).stdout).splitlines()
    assert max(map(len, lines)) <= columns
    names = " ".join(lines[:3])
    assert all(f"…{name}" in names for name in ("fp16", "int4", "sparse", "int8", "multifunction"))


@pytest.mark.parametrize("scheme", ["nf4, blocks of 64", "int4, groups, act-order", "int8, groups, zero points"])
def test_a_package_computes_what_the_bundle_does(find: Find, tmp_path: Path, scheme: str) -> None:
    """The same numbers in the file are the same logits only if the kernel reads them as we say."""
    held = find(scheme)
    package = pipeline.export(held.bundle, tmp_path / "package", "onnx-int4")
    report = pipeline.validate(package.path, held.bundle)
    assert report.passed
    assert {row.against for row in report.parity} == {"source", "target"}
