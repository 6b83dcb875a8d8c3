"""Every kind of adapter on every target: what a package makes of it gives the logits of the published method.

One bundle has them all. The methods are plain torch (tests/importers/methods.py) in transformers' own model.
"""

from __future__ import annotations

import functools
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from calora_export import bundle as bundles
from calora_export import factors, pipeline
from calora_export import package as packages
from calora_export.errors import FingerprintError, PackageError
from calora_export.importers import lots, mtl_lora, peft, sharelora
from calora_export.package import Package
from calora_export.runtimes import Mix, Session
from tests.bundles import tiny_base
from tests.contract.test_target import OTHER_BASE
from tests.importers import methods
from tests.importers.methods import Delta
from tests.importers.test_reductions import IDS, SITES, adapted
from tests.importers.test_targets import LIMITS, RECIPES, session_of
from tests.packages import copy_package


@dataclass(frozen=True)
class Kinds:
    """A bundle with an adapter of each kind, and what each method adds."""

    bundle: Path
    deltas: dict[str, Delta]
    late: Path


def merged(parts: list[Path], out: Path) -> Path:
    """One bundle with the adapters of several, which have the same base."""
    shutil.copytree(parts[0], out)
    manifest = bundles.read_manifest(out)
    specs = list(manifest.adapters)
    for part in parts[1:]:
        for spec in bundles.read_manifest(part).adapters:
            shutil.copytree(part / "adapters" / spec.id, out / "adapters" / spec.id)
            specs.append(msgspec.structs.replace(spec, class_index=len(specs)))
        if (part / "shared").is_dir():
            shutil.copytree(part / "shared", out / "shared", dirs_exist_ok=True)
    bundles.write_manifest(out, msgspec.structs.replace(manifest, adapters=tuple(specs), router=None))
    return out


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("kinds") / "base"
    tiny_base(directory, np.random.default_rng(0), compressed=False)
    return directory


@pytest.fixture(scope="module")
def kinds(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Kinds:
    torch.manual_seed(5)
    directory = tmp_path_factory.mktemp("parts")
    plain = methods.draw_pairs(SITES, 2)
    methods.save_peft(directory / "plain", plain, 2, 3)
    peft.run(base, [directory / "plain"], directory / "peft")
    full = methods.lots(SITES, directory / "joint.pt", diagonal=False, scale=1.5)
    lots.run(base, directory / "joint.pt", directory / "lots", scale=1.5)
    tasks = methods.mtl_lora(SITES, directory / "mtl.pt", 2, 10, 0.5, diagonal=False, scaler=False)
    mtl_lora.run(base, directory / "mtl.pt", directory / "mtl-lora", alpha=10, temperature=0.5, tasks="piqa,siqa")
    tied = methods.sharelora(SITES, directory / "tied", "AB")
    sharelora.run(base, [directory / "tied"], directory / "sharelora")
    deltas = {"plain": methods.lora(plain, 3 / 2), **full, "piqa": tasks[0], "siqa": tasks[1], "tied": tied}
    parts = [directory / name for name in ("peft", "lots", "mtl-lora", "sharelora")]
    return Kinds(merged(parts, directory / "bundle"), deltas, directory / "lots" / "adapters" / "second")


FACTORED = ("first", "second", "piqa", "siqa", "tied")


@pytest.fixture(scope="module")
def hf(base: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def exports(kinds: Kinds, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Package]:
    @functools.cache
    def export(target: str) -> Package:
        return pipeline.export(kinds.bundle, tmp_path_factory.mktemp(target) / "package", RECIPES[target])

    return export


@pytest.fixture(scope="module", params=RECIPES)
def package(request: pytest.FixtureRequest, exports: Callable[[str], Package]) -> Package:
    return exports(request.param)


def logits(session: Session, mix: Mix) -> np.ndarray:
    session.select(mix)
    return session.extend(IDS[0].tolist())[-1]


def reference(hf: PreTrainedModel, delta: Delta) -> np.ndarray:
    with torch.no_grad():
        return adapted(hf, delta)[0, -1].numpy()


@pytest.mark.parametrize("kind", ["plain", *FACTORED])
def test_an_adapter_of_each_kind_is_its_method(package: Package, kinds: Kinds, hf: PreTrainedModel, kind: str) -> None:
    expected, plain = reference(hf, kinds.deltas[kind]), reference(hf, lambda site, x: None)
    assert np.abs(expected - plain).max() > 0.1
    assert np.abs(logits(session_of(package), {kind: 1.0}) - expected).max() <= LIMITS[package.manifest.target]


def test_kinds_mix(package: Package, kinds: Kinds, hf: PreTrainedModel) -> None:
    mix = {"first": 0.6, "tied": 0.3, "plain": 0.5}

    def delta(site: str, x: torch.Tensor) -> torch.Tensor:
        parts = [(gate, kinds.deltas[name](site, x)) for name, gate in mix.items()]
        return sum((gate * part for gate, part in parts if part is not None), torch.zeros(()))

    limit = LIMITS[package.manifest.target]
    assert np.abs(logits(session_of(package), mix) - reference(hf, delta)).max() <= limit


def test_back_to_the_first_is_the_first_bit_for_bit(package: Package) -> None:
    session = session_of(package)
    base, first = logits(session, {}), logits(session, {"first": 1.0})
    assert not np.array_equal(first, logits(session, {"second": 1.0}))
    assert np.array_equal(logits(session, {"first": 1.0}), first)
    assert np.array_equal(logits(session, {}), base)


def test_an_adapter_file_holds_only_what_is_its_own(package: Package) -> None:
    for identifier, sites in (("first", 4), ("piqa", 6)):
        entry = package.adapter(identifier)
        stored = load_file(package.path / entry.file)
        assert set(stored) - {factors.LAYOUT} == {name for name in stored if name.endswith(".core")}
        assert len(stored) - 1 == sites == entry.sites
    shared = {package.adapter(identifier).shared for identifier in FACTORED[:4]}
    assert shared == {"shared/joint.safetensors", "shared/tasks.safetensors"} <= package.manifest.files.keys()


def test_what_layers_share_is_in_an_adapter_file_once(package: Package) -> None:
    """Two kinds of layer in two layers, whose A and B are the same in both."""
    stored = load_file(package.path / package.adapter("tied").file)
    assert len(set(stored) - {factors.LAYOUT}) == 4 and package.adapter("tied").sites == 4


def test_an_adapter_of_a_basis_that_is_there_is_added_as_cores(package: Package, kinds: Kinds, tmp_path: Path) -> None:
    copy = copy_package(package.path, tmp_path / "package")
    entries = [entry for entry in package.manifest.adapters if entry.id != "second"]
    packages.write_manifest(copy, msgspec.structs.replace(package.manifest, adapters=tuple(entries)))
    entry = pipeline.add_adapter(copy, kinds.late)
    assert entry.file == package.adapter("second").file and entry.shared == "shared/joint.safetensors"
    added = logits(session_of(packages.load(copy)), {"second": 1.0})
    assert np.array_equal(added, logits(session_of(package), {"second": 1.0}))


def test_cores_for_another_base_are_refused(package: Package, tmp_path: Path) -> None:
    slots, path = package.manifest.slots, package.path / package.adapter("first").file
    adapter, _ = factors.read(path, slots.fingerprint)
    forged = tmp_path / path.name
    factors.write(adapter, slots.dtype, slots.fingerprint, OTHER_BASE, forged)
    with pytest.raises(FingerprintError, match=OTHER_BASE):
        session_of(package).admit(forged)


@pytest.mark.parametrize("damage", ["site", "shape", "basis"])
def test_cores_that_do_not_fit_are_refused_in_one_line(package: Package, tmp_path: Path, damage: str) -> None:
    slots, path = package.manifest.slots, package.path / package.adapter("first").file
    adapter, fingerprint = factors.read(path, slots.fingerprint)
    site = next(iter(adapter.layout.sites))
    if damage == "site":
        sites = {"model.layers.9.self_attn.q_proj": adapter.layout.sites[site]}
        adapter = replace(adapter, layout=msgspec.structs.replace(adapter.layout, sites=sites))
    elif damage == "shape":
        adapter = replace(adapter, tensors={**adapter.tensors, f"{site}.core": np.zeros((6, 5), np.float32)})
    else:
        adapter = replace(adapter, layout=msgspec.structs.replace(adapter.layout, basis="../package.json"))
    broken = tmp_path / path.name
    factors.write(adapter, slots.dtype, slots.fingerprint, fingerprint, broken)
    wanted = {"site": "a site with a slot", "shape": r"\[6, 6\]", "basis": "a file of this package"}[damage]
    with pytest.raises(PackageError, match=rf"^first.factors: .*expected {wanted}, found"):
        session_of(package).admit(broken)
