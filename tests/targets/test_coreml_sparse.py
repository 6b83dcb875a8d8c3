"""Weights without their zeros, on Core ML: smaller, and the same numbers to coremltools and the reference runtime."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from calora_export import bundle as bundles
from calora_export import mil, runtimes
from calora_export import package as packages
from calora_export.compression import NF4
from calora_export.errors import RecipeError
from calora_export.recipe import load
from calora_export.targets._nodes import Weight
from tests.conftest import Export
from tests.mil.programs import save

ct = pytest.importorskip("coremltools", reason="the coreml extra is not installed")
EMPTY = torch.zeros(0)


def pruned(form: str) -> Weight:
    """A weight [8, 64] in groups of 16, half of it zeros."""
    random = np.random.default_rng(0)
    dense = random.standard_normal((8, 64)).astype(np.float32)
    off = np.arange(64) % 4 < 2
    scale = torch.from_numpy(random.uniform(0.5, 1, (8, 4)).astype(np.float16).astype(np.float32))
    if form == "fp16":
        dense[:, off] = 0
        return Weight("a.weight", torch.from_numpy(dense), EMPTY, EMPTY)
    if form == "nf4":
        positions = random.integers(0, 16, (8, 64)).astype(np.int8)
        positions[:, off] = int(np.flatnonzero(NF4 == 0)[0])
        return Weight("a.weight", torch.from_numpy(positions), scale, EMPTY, codebook=torch.from_numpy(NF4.copy()))
    half = 8 if form.endswith("int4") else 128
    values = random.integers(-half, half, (8, 64)).astype(np.int8)
    values[0, 1] = -half
    zero = random.integers(-4, 4, (8, 4)).astype(np.int8) if form.startswith("u") else None
    values[:, off] = 0 if zero is None else zero.repeat(16, axis=1)[:, off]
    return Weight("a.weight", torch.from_numpy(values), scale, EMPTY, None if zero is None else torch.from_numpy(zero))


@pytest.mark.parametrize("form", ["fp16", "int4", "uint4", "int8", "uint8", "nf4"])
def test_what_is_left_is_the_same_numbers(form: str, tmp_path: Path) -> None:
    """As coremltools evaluates the constants (a chain of two it does not), and as the saved file computes."""
    from calora_export.targets import _coreml_weights

    held, made = pruned(form), {}

    def both(mb: Any, inputs: Mapping[str, Any]) -> dict[str, Any]:
        made.update(whole=_coreml_weights.weight_of(held), sparse=_coreml_weights.weight_of(held, sparse=True))
        return {name: mb.linear(x=inputs["x"], weight=weight) for name, weight in made.items()}

    unit = np.eye(64, dtype=np.float16)
    ran = mil.load(save(tmp_path / "both.mlpackage", {"x": unit}, both)).functions["main"].run({"x": unit}, {})
    assert (ran["whole"] == 0).mean() >= 0.5 and np.array_equal(ran["whole"], ran["sparse"])
    assert made["sparse"].op.op_type == "constexpr_sparse_to_dense"
    if form != "nf4":
        whole, sparse = (
            weight.op.materialized_val_inference() if weight.val is None else weight.val for weight in made.values()
        )
        assert np.array_equal(whole, sparse) and np.array_equal(whole.T, ran["whole"])


def test_a_pruned_package_is_smaller_and_computes_the_same(exported: Export, tiny: Path) -> None:
    """q_proj is 2:4; the others have few zeros and stay as they are."""
    whole, sparse = (packages.load(exported(name)) for name in ("coreml-int4", "coreml-sparse"))
    ids = list(range(40, 60))
    logits = [runtimes.load("coreml").open_session(package, 1).extend(ids) for package in (whole, sparse)]
    assert np.array_equal(*logits)
    files = [package.manifest.files for package in (whole, sparse)]
    sizes = [sum(file.size for name, file in listed.items() if "weight.bin" in name) for listed in files]
    numbers = sum(np.prod(s) for name, s in bundles.load(tiny).linears.items() if name.endswith("q_proj"))
    assert sizes[0] - sizes[1] == pytest.approx(numbers / 8, rel=0.2)  # of 4 bits a number, 1 is saved
    dense, mask = (package.manifest.zeros.bytes for package in (whole, sparse) if package.manifest.zeros)
    assert sizes[0] - sizes[1] == pytest.approx(dense - mask, abs=256)  # blobs begin at multiples of 64


def test_other_targets_have_no_sparse_form(tmp_path: Path, edited: Callable[[str, str], Path]) -> None:
    with pytest.raises(RecipeError, match="only coreml has a sparse form"):
        load(str(edited("onnx-int4", 'zeros = "sparse"')))


@pytest.fixture
def edited(tmp_path: Path) -> Callable[[str, str], Path]:
    def edit(name: str, line: str) -> Path:
        from calora_export import resources

        path = tmp_path / "recipe.toml"
        path.write_text(f"{line}\n{resources.recipes()[name].read_text()}")
        return path

    return edit
