"""What is said of a pruned weight's zeros: counted once more, in the bundle's own file and in the exported ones."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from calora_export import bundle as bundles
from calora_export import formats, inspection, recipe, sparsity
from calora_export import package as packages
from calora_export.cli import app
from calora_export.compression import DenseWeight
from calora_export.inspection import BundleView, PrunedView
from calora_export.package import Zeros
from calora_export.tensors import TensorIndex
from calora_export.weights import Weights
from tests.bundles import HIDDEN, LAYERS, copy_bundle, edit_json
from tests.conftest import Export
from tests.onnx_file import OnnxFile, bundle_weights

Read = Callable[[TensorIndex, str], np.ndarray]
BITS = {"onnx-int4": 4, "onnx-fp32": 32, "executorch-8da4w": 4, "coreml-fp16": 16, "coreml-int4": 4, "coreml-sparse": 4}
NUMBERS = LAYERS * HIDDEN * HIDDEN  # of q_proj, which is 2:4


def zeros_of(bundle: Path) -> int:
    found = [weight for module, weight in bundle_weights(bundle).items() if module.endswith("q_proj")]
    return sum(int((weight == 0).sum()) for weight in found)


@pytest.mark.parametrize("name", BITS)
def test_what_zeros_take_in_each_recipe(tiny: Path, name: str) -> None:
    settings, zeros = recipe.load(name), zeros_of(tiny)
    weights = Weights(bundles.load(tiny), settings)
    for module in weights.bundle.weights.formats:
        weights(module)
    taken = ("sparse", NUMBERS // 8) if name == "coreml-sparse" else ("dense", zeros * BITS[name] // 8)
    found = sparsity.total(weights.pruned.values(), settings)
    assert found == Zeros(LAYERS, NUMBERS, zeros, *taken)


def test_the_files_have_them(exported: Export) -> None:
    """q_proj is the first of q, k and v: rows of MatMulNBits, in which a nibble of 8 is 0, and columns of MatMul."""
    int4, fp32 = OnnxFile(exported("onnx-int4")), OnnxFile(exported("onnx-fp32"))
    packed = [int4.array(node.input[1])[:HIDDEN] for node in int4.nodes("MatMulNBits") if "q_proj" in node.input[1]]
    dense = [fp32.array(node.input[1])[:, :HIDDEN] for node in fp32.nodes("MatMul") if "q_proj" in node.input[1]]
    nibbles = sum(int(((codes & 15) == 8).sum() + ((codes >> 4) == 8).sum()) for codes in packed)
    assert packages.load(exported("onnx-int4")).manifest.zeros.bytes == nibbles // 2
    assert packages.load(exported("onnx-fp32")).manifest.zeros.bytes == sum((values == 0).sum() * 4 for values in dense)


@pytest.mark.parametrize("scheme", formats.samples())
def test_zeros_of_every_scheme_are_found(scheme: str) -> None:
    """In the scheme's own terms: 0, the zero point, or what means 0 in a codebook."""
    whole, off = formats.samples()[scheme], np.arange(formats.COLUMNS) % 4 < 2
    assert sparsity.measure(whole, whole, recipe.load("onnx-int4")) is None
    if isinstance(whole, DenseWeight):
        pruned = replace(whole, values=np.where(off, np.float32(0), whole.values))
    else:
        zero = np.zeros_like(whole.scale, np.int8) if whole.zero is None else whole.zero
        zero = zero if whole.codebook is None else np.full_like(zero, int(np.flatnonzero(whole.codebook == 0)[0]))
        pruned = replace(whole, q=np.where(off, zero.repeat(whole.group_size, axis=1), whole.q))
    found = sparsity.measure(pruned, pruned, recipe.load("onnx-int4"))
    assert found is not None and found.zeros == (pruned.dequantize() == 0).sum() >= found.numbers // 2


def test_export_and_inspect_say_it(tiny: Path, tmp_path: Path) -> None:
    made = CliRunner().invoke(app, ["export", str(tiny), "-o", str(tmp_path / "p"), "--recipe", "torch-fp32"]).stdout
    line = f"{zeros_of(tiny):,} of {NUMBERS:,} numbers in {LAYERS} pruned weights, stored dense: they take "
    assert line in made
    assert line in CliRunner().invoke(app, ["inspect", str(tmp_path / "p")]).stdout
    shown = json.loads(CliRunner().invoke(app, ["inspect", str(tmp_path / "p"), "--json"]).stdout)["zeros"]
    counted = {"weights": LAYERS, "numbers": NUMBERS, "zeros": zeros_of(tiny)}
    assert shown == counted | {"stored": "dense", "bytes": 4 * zeros_of(tiny)}


def small(read: Read) -> Read:
    """Shapes are read, weights are not."""

    def read_small(index: TensorIndex, name: str) -> np.ndarray:
        assert index.info(name).end - index.info(name).start <= 16
        return read(index, name)

    return read_small


@pytest.mark.parametrize(("pattern", "least"), [("2:4", NUMBERS // 4), ("unstructured", None)])
def test_a_bundle_says_what_its_headers_tell(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pattern: str, least: int | None
) -> None:
    copy = copy_bundle(tiny, tmp_path / "bundle")
    edit_json(copy / "bundle.json", lambda it: it["base"]["compression"][0].update(pattern=pattern))
    monkeypatch.setattr(TensorIndex, "array", small(TensorIndex.array))
    view = inspection.inspect(copy)
    assert isinstance(view, BundleView)
    assert view.base.pruned == [PrunedView(pattern, LAYERS, NUMBERS // 2, least)]
