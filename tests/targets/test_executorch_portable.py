"""The portable kind: the same numbers as torch's, from operators that the plain SDK registers."""

from __future__ import annotations

import itertools
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

pytest.importorskip("executorch", reason="the executorch extra is not installed")

from calora_export import package as packages
from calora_export import resources
from calora_export.devices import host
from calora_export.errors import RecipeError
from calora_export.jobs import Case, Job
from calora_export.runtimes import executorch as runtime
from tests.bundles import LAYERS, VOCAB
from tests.conftest import Export, Families, Variant
from tests.families import PREFILL, STEPS, caloras, tokens
from tests.pte_file import DELEGATE, PteFile

RECIPE = "executorch-8da4w-portable"
NAMES = ("llama", "llama-tied", "qwen2", "qwen3", "phi3", "gemma2", "gemma3", "mistral")
IDS = [int(token) for token in np.random.default_rng(3).integers(0, VOCAB, PREFILL + STEPS)]
STOCK = re.compile(r"aten::|executorch_prim::|quantized_decomposed::")


@pytest.fixture(scope="module")
def portable(families: Families, variant: Variant) -> Export:
    """Name of a family → its package in fp32."""
    made: dict[str, Path] = {}

    def export(name: str) -> Path:
        if name not in made:
            made[name] = variant(families(name).bundle, "executorch-fp32", kernels="stock")
        return made[name]

    return export


def run(package: Path, mix: dict[str, float], ids: Sequence[int], prefill: int = PREFILL) -> np.ndarray:
    """Logits of a prefill, then token by token."""
    session = runtime.open_session(packages.load(package), 1)
    session.select(mix)
    return np.concatenate([session.extend(ids[:prefill]), *(session.extend([token]) for token in ids[prefill:])])


def steps(logits: Tensor) -> np.ndarray:
    """Of transformers' logits [1, S, vocab], those that `run` gives."""
    return logits[0, PREFILL - 1 :].numpy()


# ── numbers ─────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("name", NAMES)
def test_it_equals_transformers(families: Families, portable: Export, name: str) -> None:
    """Sliding windows of 6 positions in gemma2, gemma3 and mistral, capped scores in gemma2."""
    ids = tokens(PREFILL + STEPS)
    expected = steps(families(name).logits(ids))
    np.testing.assert_allclose(run(portable(name), {}, ids[0].tolist()), expected, atol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_adapters_equal_peft(families: Families, portable: Export, name: str) -> None:
    """All linear layers, ranks that differ, and q and v alone: in llama's a16 and mistral."""
    ids, family = tokens(PREFILL + STEPS), families(name)
    for adapter in ("a16", "pattern") if name == "llama" else ("all",):
        expected = steps(family.peft_logits(adapter, ids))
        assert np.abs(expected - steps(family.logits(ids))).max() > 1
        np.testing.assert_allclose(run(portable(name), {adapter: 1.0}, ids[0].tolist()), expected, atol=2e-4)


@pytest.mark.parametrize("weights", [(1.0, 0.0), (0.0, 1.0), (0.6, 0.4), (-0.5, 1.5)])
def test_recovery_rows_and_mixes_equal_the_formula(
    families: Families, portable: Export, weights: tuple[float, float]
) -> None:
    ids, llama = tokens(PREFILL + STEPS), families("llama")
    exact = caloras("llama", llama.hf)
    expected = steps(llama.mixed_logits(list(zip(exact.values(), weights, strict=True)), ids))
    made = run(portable("llama"), dict(zip(exact, weights, strict=True)), ids[0].tolist())
    np.testing.assert_allclose(made, expected, atol=2e-4)


def test_chunks_of_a_prompt_see_each_other(families: Families, variant: Variant) -> None:
    """Chunks of 5 behind what is cached, and windows that reach back over their borders."""
    package = variant(families("gemma2").bundle, "executorch-fp32", kernels="stock", chunk=5)
    ids = tokens(PREFILL + STEPS)
    expected = steps(families("gemma2").logits(ids))
    np.testing.assert_allclose(run(package, {}, ids[0].tolist()), expected, atol=1e-4)


def test_rows_up_to_the_whole_context_and_budget(families: Families, variant: Variant) -> None:
    """What is reserved is enough: a prefill as long as the context, a mix as wide as the budget."""
    llama = families("llama")
    package = variant(llama.bundle, "executorch-fp32", kernels="stock", rank_budget=14)
    context = packages.load(package).manifest.model.context
    ids, mix = tokens(context), {"one": 0.5, "two": 0.5}
    parts = [(adapter, 0.5) for adapter in caloras("llama", llama.hf).values()]
    expected = llama.mixed_logits(parts, ids)[0, -1:].numpy()
    assert sum(packages.load(package).adapter(name).rank for name in mix) == 14
    np.testing.assert_allclose(run(package, mix, ids[0].tolist(), context), expected, atol=2e-4)


def test_both_kinds_agree(package_executorch: Path, exported: Export) -> None:
    """int8 activations: what differs is rounded the same way, but for what lies on a rounding's edge."""
    for mix in ({}, {"alpha": 1.0}, {"alpha": 0.6, "beta": 0.4}):
        a, b = run(package_executorch, mix, IDS), run(exported(RECIPE), mix, IDS)
        assert 20 * np.log10(np.linalg.norm(a) / np.linalg.norm(a - b)) > 30


def test_rank_0_is_the_base_bit_for_bit(exported: Export) -> None:
    """Whatever memory held before: an adapter ran in it."""
    file, manifest = PteFile(exported(RECIPE)), packages.load(exported(RECIPE)).manifest
    session = runtime.open_session(packages.load(exported(RECIPE)), 1)
    session.select({"alpha": 1.0})
    session.extend(IDS)
    session.select({})
    none = runtime.Rows(*(torch.zeros(0) for _ in range(3)))
    inputs = runtime.adapter_inputs(none, manifest.slots, "stock")
    forward, adapted = file.load("forward"), file.load("adapted")
    start = [torch.tensor([IDS]), torch.tensor([0])]
    expected = forward(start)[0].clone()
    assert torch.equal(adapted([*start, *inputs])[0], expected)
    assert np.array_equal(session.extend(IDS), expected[0].numpy())


# ── programs ────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("method", ["forward", "adapted"])
def test_every_operator_is_a_stock_one(exported: Export, method: str) -> None:
    found = PteFile(exported(RECIPE)).operators(method)
    assert [name for name in found if name != DELEGATE and not STOCK.match(name)] == []
    assert found["aten::bmm"] == 2 * LAYERS + (method == "adapted") * 3 * LAYERS  # up of q, v and down


@pytest.mark.parametrize(("kind", "recipe"), [("calora", "executorch-8da4w"), ("stock", RECIPE)])
def test_the_documented_operators_are_those_of_the_programs(exported: Export, kind: str, recipe: str) -> None:
    """docs/executorch.md: a row may name several, of which a program has one."""
    table = [re.findall(r"`([^`]+)`", row[0]) + [row[column(kind)]] for row in documented()]
    file = PteFile(exported(recipe))
    for method, words in (("forward", {"both"}), ("adapted", {"both", "adapted"})):
        rows = [names for *names, word in table if word in words]
        found = set(file.operators(method))
        assert found <= {name for names in rows for name in names}
        assert [names for names in rows if not found & set(names)] == []


def column(kind: str) -> int:
    return {"calora": 3, "stock": 4}[kind]


def documented() -> list[list[str]]:
    """The rows of the table of operators: operator, library, purpose, llm, portable."""
    lines = (resources.root() / "docs" / "executorch.md").read_text(encoding="utf-8").splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("| operator |")) + 2
    rows = itertools.takewhile(lambda line: line.startswith("|"), lines[start:])
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in rows]


def test_layers_share_masks_and_positions(portable: Export) -> None:
    """gemma3 has two windows: two masks, but one set of positions."""
    assert PteFile(portable("gemma3")).operators("forward")["aten::arange"] == 3


def test_it_runs_where_only_the_sdk_is(exported: Export) -> None:
    """In a process that registers neither the LLM framework's operators nor ours."""
    script = (
        "import sys, numpy as np; from pathlib import Path\n"
        "from calora_export import native, package as packages\n"
        "from calora_export.runtimes import executorch as runtime\n"
        "native.kernels = None\n"
        "session = runtime.open_session(packages.load(Path(sys.argv[1])), 1)\n"
        "session.select({'alpha': 1.0})\n"
        "session.extend([1, 2, 3]); session.extend([4])\n"
        "from executorch.extension.pybindings import _C\n"
        "print([name for name in _C._get_operator_names() if name.startswith(('llama', 'calora'))])\n"
    )
    done = subprocess.run([sys.executable, "-c", script, str(exported(RECIPE))], capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip()) == (0, "[]"), done.stderr


@pytest.mark.skipif(not (shutil.which("c++") or shutil.which("g++")), reason="no C++ compiler")
def test_the_native_runner_hands_every_matrix_over(portable: Export) -> None:
    """Of rank 0, of one adapter in place, and of a mix."""
    package, ids = packages.load(portable("llama")), tokens(PREFILL + STEPS)[0].tolist()
    mixes: list[dict[str, float]] = [{}, {"one": 1.0}, {"pattern": 1.0}, {"one": 0.6, "a32": 0.4}]
    cases = tuple(Case(str(i), mix, tuple(ids), PREFILL) for i, mix in enumerate(mixes))
    trace = host.run("native", package, Job(threads=1, cases=cases))
    for case in cases:
        np.testing.assert_allclose(trace.logits[case.name], run(package.path, case.mix, ids), atol=2e-4)


# ── inputs ──────────────────────────────────────────────────────────────────────────────────────────────────


def test_an_adapter_is_read_where_it_is_mapped(exported: Export) -> None:
    """Every input is a part of the file's rows, and together they are all of them, in order."""
    package = packages.load(exported(RECIPE))
    rows, _ = runtime.read_adapter(package.path / package.adapter("alpha").file, package.manifest.slots)
    matrices = runtime.adapter_inputs(rows, package.manifest.slots, "stock")[:-2]
    place = rows.rows.data_ptr()
    for matrix in matrices:
        assert matrix.is_contiguous() and matrix.data_ptr() == place
        place += 4 * matrix.numel()
    assert place == rows.rows.data_ptr() + 4 * rows.rows.numel()


def test_half_precision_adapters_are_refused(tiny: Path, variant: Variant) -> None:
    with pytest.raises(RecipeError) as caught:
        variant(tiny, "executorch-fp32", kernels="stock", adapters="fp16")
    assert str(caught.value) == "recipe: adapters: expected fp32, which is what stock kernels multiply, found fp16"
