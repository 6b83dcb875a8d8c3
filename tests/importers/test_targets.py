"""Every imported adapter runs on every target: added to a package there, it answers as the method itself does."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from calora_export import package as packages
from calora_export import pipeline, runtimes
from calora_export.importers import ca_lora, chain_of_lora, lots, mtl_lora, multilora, nola, peft, sharelora
from calora_export.runtimes import Session
from tests.bundles import tiny_base
from tests.importers import methods
from tests.importers.methods import Delta
from tests.importers.test_reductions import IDS, SITES, adapted

RECIPES = {"onnx": "onnx-fp32", "executorch": "executorch-fp32", "coreml": "coreml-fp16", "torch": "torch-fp32"}
LIMITS = dict.fromkeys(RECIPES, 2e-5)  # other kernels than torch's, and logits of a few units
LIMITS["coreml"] = 1e-2  # everything is float16 there; what one rounding moves in this model


def import_all(base: Path, directory: Path) -> dict[str, tuple[Path, Delta]]:
    """By method: the imported adapter's directory, and what the method itself adds."""
    torch.manual_seed(3)
    made: dict[str, tuple[Path, Delta]] = {}

    def keep(method: str, identifier: str, delta: Delta) -> None:
        made[method] = directory / method / "adapters" / identifier, delta

    plain = methods.draw_pairs(SITES, 2)
    methods.save_peft(directory / "plain", plain, 2, 3)
    peft.run(base, [directory / "plain"], directory / "peft")
    keep("peft", "plain", methods.lora(plain, 3 / 2))
    delta = methods.ca_lora(SITES, directory / "alpaca.pt", 4, 6, "gelu")
    ca_lora.run(base, [directory / "alpaca.pt"], directory / "ca-lora", alpha=6)
    keep("ca-lora", "alpaca", delta)
    delta = methods.ca_lora_peft(SITES, directory / "two")
    ca_lora.run(base, [directory / "two"], directory / "ca-lora-peft")
    keep("ca-lora-peft", "two", delta)
    deltas = methods.mtl_lora(SITES, directory / "mtl.pt", 2, 10, 0.5, diagonal=False, scaler=False)
    mtl_lora.run(base, directory / "mtl.pt", directory / "mtl-lora", alpha=10, temperature=0.5, tasks="piqa,siqa")
    keep("mtl-lora", "siqa", deltas[1])
    delta = methods.multilora(SITES, directory / "mixture.pt", 5)
    multilora.run(base, [directory / "mixture.pt"], directory / "multilora", alpha=5)
    keep("multilora", "mixture", delta)
    delta = methods.sharelora(SITES, directory / "shared", "A")
    sharelora.run(base, [directory / "shared"], directory / "sharelora")
    keep("sharelora", "shared", delta)
    links, delta = methods.chain(SITES, directory / "links")
    chain_of_lora.run(base, links, directory / "chain-of-lora", "summed")
    keep("chain-of-lora", "summed", delta)
    delta = methods.nola(SITES, directory / "guanaco", torch.float32)
    nola.run(base, [directory / "guanaco"], directory / "nola", "cpu")
    keep("nola", "guanaco", delta)
    lots_deltas = methods.lots(SITES, directory / "joint.pt", scale=1.5)
    lots.run(base, directory / "joint.pt", directory / "lots", scale=1.5)
    keep("lots", "second", lots_deltas["second"])
    return made


METHODS = ("peft", "ca-lora", "ca-lora-peft", "mtl-lora", "multilora", "sharelora", "chain-of-lora", "nola", "lots")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("targets") / "base"
    tiny_base(directory, np.random.default_rng(0), compressed=False)
    return directory


@pytest.fixture(scope="module")
def imported(base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Delta]]:
    made = import_all(base, tmp_path_factory.mktemp("imported"))
    assert tuple(made) == METHODS
    return made


@pytest.fixture(scope="module")
def package(
    imported: dict[str, tuple[Path, Delta]], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], packages.Package]:
    """One package per target: exported with CA-LoRA's adapter, which is everywhere; the others are added to it."""

    @functools.cache
    def export(target: str) -> packages.Package:
        bundle = imported["ca-lora"][0].parent.parent
        made = pipeline.export(bundle, tmp_path_factory.mktemp(target) / "package", RECIPES[target])
        for method, (directory, _) in imported.items():
            if method != "ca-lora":
                assert pipeline.add_adapter(made.path, directory).stated, "its bundle says which base it is for"
        return packages.load(made.path)

    return export


@pytest.fixture(scope="module")
def hf(base: Path):
    return AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("target", RECIPES)
def test_an_imported_adapter_runs(
    imported: dict[str, tuple[Path, Delta]],
    package: Callable[[str], packages.Package],
    hf: AutoModelForCausalLM,
    target: str,
    method: str,
) -> None:
    directory, delta = imported[method]
    with torch.no_grad():
        expected = adapted(hf, delta)[0, -1].numpy()  # type: ignore[arg-type]
        plain = adapted(hf, lambda site, x: None)[0, -1].numpy()  # type: ignore[arg-type]
    session = session_of(package(target))
    session.select({directory.name: 1.0})
    found = session.extend(IDS[0].tolist())[-1]
    assert np.abs(expected - plain).max() > 0.1
    assert np.abs(found - expected).max() <= LIMITS[target]


def session_of(package: packages.Package) -> Session:
    """The target's own runtime; for Core ML the reference that executes the saved file on any machine."""
    if package.manifest.target == "coreml":
        from calora_export.coreml_engines import Reference
        from calora_export.runtimes.coreml import CoremlSession

        return CoremlSession(package, Reference())
    return runtimes.load(package.manifest.target).open_session(package, 1)
