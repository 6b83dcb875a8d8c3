"""What an importer makes of a checkpoint, through the bundle and the model with slots, is the method itself."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from calora_export import bundle as bundles
from calora_export.adapters import load_adapter, load_adapter_dir
from calora_export.composing import compose
from calora_export.importers import (
    ca_lora,
    chain_of_lora,
    flora,
    llava_mole,
    lora_flow,
    lots,
    mtl_lora,
    multilora,
    nola,
    sharelora,
)
from calora_export.model import Rows, SlotModel
from tests.bundles import HIDDEN, LAYERS, LINEARS, tiny_base
from tests.importers import methods
from tests.importers.methods import Delta, Install

SITES = {f"model.layers.{layer}.{name}": shape for layer in range(LAYERS) for name, shape in LINEARS.items()}
IDS = torch.tensor([list(b"What is a low rank?")])
LIMIT = 1e-5

Judge = Callable[[Path, str, Delta], None]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("reductions") / "base"
    tiny_base(directory, np.random.default_rng(0), compressed=False)
    return directory


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def judge(base: Path) -> Judge:
    """Logits of the imported adapter in the model with slots against the method's own delta in transformers'."""
    hf = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()

    def judge(bundle: Path, identifier: str, delta: Delta) -> None:
        loaded = bundles.load(bundle, deep=True)
        model = compose(loaded, loaded.weight, context=64)
        rows = Rows.of(load_adapter(loaded, identifier))
        with torch.no_grad():
            plain, expected, found = hf(IDS).logits, adapted(hf, delta), logits(model, rows)
        assert float((expected - plain).abs().max()) > 0.1, "an adapter without effect would pass with anything"
        assert float((found - expected).abs().max()) <= LIMIT

    return judge


@pytest.fixture(scope="module")
def judge_method(base: Path) -> Callable[[Path, str, Install], None]:
    """As `judge`, for a method that does more than add to layers."""
    hf = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()

    def judge(bundle: Path, identifier: str, install: Install) -> None:
        loaded = bundles.load(bundle, deep=True)
        model = compose(loaded, loaded.weight, context=64)
        rows = Rows.of(load_adapter(loaded, identifier))
        plain, expected = methods.run_with(hf, IDS), methods.run_with(hf, IDS, install)
        with torch.no_grad():
            found = logits(model, rows)
        assert float((expected - plain).abs().max()) > 0.1, "an adapter without effect would pass with anything"
        assert float((found - expected).abs().max()) <= LIMIT

    return judge


def adapted(hf: PreTrainedModel, delta: Delta) -> Tensor:
    def hook(site: str):
        def add(module: object, inputs: tuple[Tensor], output: Tensor) -> Tensor:
            more = delta(site, inputs[0])
            return output if more is None else output + more

        return add

    with ExitStack() as stack:
        for site, module in hf.named_modules():
            if site in SITES:
                stack.enter_context(module.register_forward_hook(hook(site)))
        return hf(IDS).logits


def logits(model: SlotModel, rows: Rows) -> Tensor:
    return model(IDS, model.empty_cache(), rows)[0]


@pytest.mark.parametrize("act", ["gelu", "identity"])
def test_ca_lora_file(base: Path, tmp_path: Path, judge: Judge, act: str) -> None:
    delta = methods.ca_lora(SITES, tmp_path / "alpaca.pt", 4, 6, act)
    made = ca_lora.run(base, [tmp_path / "alpaca.pt"], tmp_path / "out", alpha=6, act=act)  # type: ignore[arg-type]
    assert made.adapters == ("alpaca",)
    judge(tmp_path / "out", "alpaca", delta)
    roles = {branch.role: branch.act for branch in bundles.load(tmp_path / "out").adapter("alpaca").branches}
    assert roles == {"lora": "identity", "recovery": act}


def test_ca_lora_with_two_directories_is_one_lora(base: Path, tmp_path: Path, judge: Judge) -> None:
    delta = methods.ca_lora_peft(SITES, tmp_path / "code")
    ca_lora.run(base, [tmp_path / "code"], tmp_path / "out")
    judge(tmp_path / "out", "code", delta)
    branches = bundles.load(tmp_path / "out").adapter("code").branches
    assert {(branch.role, branch.r) for branch in branches} == {("lora", 7), ("lora", 3)}


@pytest.mark.parametrize(("diagonal", "scaler"), [(True, False), (False, False), (False, True)])
def test_mtl_lora_per_task(base: Path, tmp_path: Path, judge: Judge, diagonal: bool, scaler: bool) -> None:
    file = tmp_path / "final_checkpoint.pt"
    deltas = methods.mtl_lora(SITES, file, 3, 10, 0.7, diagonal=diagonal, scaler=scaler)
    mtl_lora.run(base, file, tmp_path / "out", alpha=10, temperature=0.7, tasks="boolq,piqa,siqa")
    specs = bundles.load(tmp_path / "out").manifest.adapters
    assert [(spec.id, spec.class_index) for spec in specs] == [("boolq", 0), ("piqa", 1), ("siqa", 2)]
    for spec, delta in zip(specs, deltas, strict=True):
        judge(tmp_path / "out", spec.id, delta)


def test_multilora(base: Path, tmp_path: Path, judge: Judge) -> None:
    delta = methods.multilora(SITES, tmp_path / "mixture.pt", 5)
    multilora.run(base, [tmp_path / "mixture.pt"], tmp_path / "out", alpha=5)
    judge(tmp_path / "out", "mixture", delta)
    assert load_adapter(bundles.load(tmp_path / "out"), "mixture").rank == 4 * 3


@pytest.mark.parametrize("shared", ["A", "B", "AB"])
def test_sharelora(base: Path, tmp_path: Path, judge: Judge, shared: str) -> None:
    delta = methods.sharelora(SITES, tmp_path / "shared", shared)
    sharelora.run(base, [tmp_path / "shared"], tmp_path / "out")
    judge(tmp_path / "out", "shared", delta)


@pytest.mark.parametrize(("shared", "kept"), [("A", 2 + 4), ("B", 4 + 2), ("AB", 2 + 2)])
def test_sharelora_stores_what_is_shared_once(base: Path, tmp_path: Path, shared: str, kept: int) -> None:
    """Two kinds of layer in two layers: four matrices of each side, or two where they are shared."""
    methods.sharelora(SITES, tmp_path / "shared", shared)
    sharelora.run(base, [tmp_path / "shared"], tmp_path / "out")
    loaded = bundles.load(tmp_path / "out")
    directory = loaded.adapter_dir("shared")
    stored = bundles.TensorIndex.open(directory)
    assert len(stored.names()) == kept
    inside, beside = load_adapter(loaded, "shared"), load_adapter_dir(directory, loaded.adaptable)
    for site, rows in inside.sites.items():
        np.testing.assert_array_equal(beside.sites[site].down, rows.down)
        np.testing.assert_array_equal(beside.sites[site].up, rows.up)


def test_chain_of_lora(base: Path, tmp_path: Path, judge: Judge) -> None:
    links, delta = methods.chain(SITES, tmp_path / "links")
    made = chain_of_lora.run(base, links, tmp_path / "out", "summed")
    assert made.adapters == ("summed",)
    judge(tmp_path / "out", "summed", delta)


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
def test_nola(base: Path, tmp_path: Path, judge: Judge, kind: torch.dtype) -> None:
    """The generator draws other numbers for bfloat16."""
    delta = methods.nola(SITES, tmp_path / "guanaco", kind)
    before = torch.random.get_rng_state()
    nola.run(base, [tmp_path / "guanaco"], tmp_path / "out", "cpu")
    assert torch.equal(torch.random.get_rng_state(), before), "a caller's own random numbers go on"
    judge(tmp_path / "out", "guanaco", delta)


def test_lots(base: Path, tmp_path: Path, judge: Judge) -> None:
    """One with an r×r core, one with a diagonal."""
    deltas = methods.lots(SITES, tmp_path / "joint.pt", diagonals=("second",), scale=1.5)
    made = lots.run(base, tmp_path / "joint.pt", tmp_path / "out", scale=1.5)
    assert made.adapters == tuple(deltas)
    for identifier, delta in deltas.items():
        judge(tmp_path / "out", identifier, delta)


JudgeMethod = Callable[[Path, str, Install], None]


def test_flora_of_rank_1(base: Path, tmp_path: Path, judge_method: JudgeMethod) -> None:
    install = methods.flora(SITES, tmp_path / "german.pt")
    made = flora.run(base, [tmp_path / "german.pt"], tmp_path / "out")
    assert made.adapters == ("german",)
    judge_method(tmp_path / "out", "german", install)


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_lora_flow(base: Path, tmp_path: Path, judge_method: JudgeMethod, temperature: float) -> None:
    loras, gate, install = methods.lora_flow(SITES, tmp_path, HIDDEN, temperature)
    lora_flow.run(base, gate, loras, tmp_path / "out", "zh-math", temperature)
    judge_method(tmp_path / "out", "zh-math", install)


@pytest.mark.parametrize("attention", [False, True])
def test_llava_mole(base: Path, tmp_path: Path, judge_method: JudgeMethod, attention: bool) -> None:
    install = methods.llava_mole(SITES, tmp_path / "mole.pt", HIDDEN, 6, 3)
    pairs = methods.draw_pairs(methods.some(SITES, "q_proj", "o_proj"), 2)
    lora = methods.save_peft(tmp_path / "attention", pairs, 2, 3) if attention else None
    llava_mole.run(base, tmp_path / "mole.pt", tmp_path / "out", 6, lora)

    def both(model: torch.nn.Module, stack: ExitStack) -> None:
        install(model, stack)
        if attention:
            methods.added(methods.lora(pairs, 3 / 2))(model, stack)

    judge_method(tmp_path / "out", "mole", both)
