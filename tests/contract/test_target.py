"""What every target must satisfy: a new target module is tested unchanged.

Numbers depend on how weights are held, so those tests run with every recipe that ships; the others with one of each
target. The reference is transformers' own model with the bundle's weights unpacked, and CA-LoRA's formula in hooks.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from calora_export import bundle as bundles
from calora_export import package as packages
from calora_export import pipeline, recipe, resources, routers, runtimes, targets
from calora_export.adapters import load_adapter
from calora_export.errors import FingerprintError, PackageError
from calora_export.package import Package
from calora_export.recipe import Recipe, Tolerance
from calora_export.runtimes import Mix, Session
from tests.bundles import RANKS, copy_bundle
from tests.conftest import Export
from tests.packages import copy_package
from tests.twin import Family, calora, dense_twin

RECIPES = {
    target: [n for n, r in recipe.catalogue().items() if r.target == target and r.adapter_inputs != "functions"]
    for target in targets.names()
}
EVERY = [(target, name) for target, names in RECIPES.items() for name in names]
OTHER_BASE = "sha256:" + "5" * 64
PREFILL = 16
IDS = [int(token) for token in np.random.default_rng(5).integers(0, 256, PREFILL + 16)]
WEIGHTS = [(1.0, 0.0), (0.0, 1.0), (0.6, 0.4), (1.5, -0.5)]
MIXES = [{name: weight for name, weight in zip(("alpha", "beta"), pair, strict=True) if weight} for pair in WEIGHTS]


@dataclass(frozen=True)
class Subject:
    """One target's package of the tiny bundle."""

    target: str
    recipe: str
    package: Package

    @property
    def settings(self) -> Recipe:
        return self.package.manifest.settings

    @property
    def runtime(self) -> runtimes.Runtime:
        return runtimes.load(self.target)

    def open(self, package: Package | None = None) -> Session:
        return self.runtime.open_session(package or self.package, 1)

    def file(self, identifier: str) -> Path:
        return self.package.path / self.package.adapter(identifier).file


def plainest(names: list[str]) -> str:
    """The recipe that holds every weight in fp32 if there is one: what is left is what the target itself does."""
    return min(names, key=lambda name: ({rule.scheme for rule in recipe.load(name).precision} != {"fp32"}, name))


def make(target: str, name: str, exported: Export) -> Subject:
    require(target)
    return Subject(target, name, packages.load(exported(name)))


@pytest.fixture(scope="module", params=EVERY, ids=":".join)
def held(request: pytest.FixtureRequest, exported: Export) -> Subject:
    """Every recipe in turn."""
    return make(*request.param, exported)


@pytest.fixture(scope="module", params=[target for target, names in RECIPES.items() if names])
def subject(request: pytest.FixtureRequest, exported: Export) -> Subject:
    """Every target in turn."""
    return make(request.param, plainest(RECIPES[request.param]), exported)


@pytest.fixture(scope="module")
def without_slots(subject: Subject, bare: Path, tmp_path_factory: pytest.TempPathFactory) -> Package:
    """A package of the same base that was exported without any adapter."""
    return pipeline.export(bare, tmp_path_factory.mktemp("bare") / "package", subject.recipe)


def require(target: str) -> None:
    """Skip what an extra that is not installed would run; anything else that is missing is an error."""
    try:
        targets.load(target)
        runtimes.load(target)
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("calora_export"):
            raise
        pytest.skip(f"{target} needs {error.name}")


@pytest.fixture(scope="module")
def twin(tiny: Path) -> Family:
    return dense_twin(tiny)


@pytest.fixture(scope="module")
def again(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every target's package once more, from a process of its own with other hashes: <recipe>/."""
    out = tmp_path_factory.mktemp("again")
    names = [plainest(names) for target, names in RECIPES.items() if names and available(target)]
    script = (
        "import sys, traceback; from pathlib import Path; from calora_export import pipeline\n"
        "bundle, out, *names = sys.argv[1:]\n"
        "for name in names:\n"
        "    try: pipeline.export(Path(bundle), Path(out) / name, name)\n"
        "    except Exception: traceback.print_exc()  # the other targets' tests go on\n"
    )
    environment = os.environ | {"PYTHONHASHSEED": "12345", "TZ": "Asia/Tokyo", "LC_ALL": "C"}
    subprocess.run([sys.executable, "-c", script, str(tiny), str(out), *names], env=environment, check=True)
    return out


def available(target: str) -> bool:
    try:
        require(target)
    except pytest.skip.Exception:
        return False
    return True


def run(session: Session, mix: Mix, ids: Sequence[int] = IDS) -> np.ndarray:
    """Logits [steps + 1, vocab]: of the last prefilled position, then of one decoded token after the other."""
    session.select(mix)
    rows = [session.extend(ids[:PREFILL])[-1], *(session.extend([token])[-1] for token in ids[PREFILL:])]
    return np.stack(rows)


def expected(twin: Family, bundle: Path, mix: Mix) -> np.ndarray:
    ranks = dict(zip(("alpha", "beta"), RANKS, strict=True))
    parts = [(calora(bundle, name, ranks[name]), weight) for name, weight in mix.items()]
    return twin.mixed_logits(parts, torch.tensor([IDS]))[0, PREFILL - 1 :].numpy()


def close(reference: np.ndarray, made: np.ndarray, limit: Tolerance) -> None:
    """Without top-1: the best two logits of a random model are often closer than any noise."""
    noise = np.linalg.norm(made - reference)
    assert np.abs(made - reference).max() <= limit.max_abs
    assert 20 * np.log10(np.linalg.norm(reference) / max(noise, 1e-30)) >= limit.sqnr_db


def hashes(directory: Path) -> dict[str, str]:
    files = [path for path in sorted(directory.rglob("*")) if path.is_file()]
    return {str(f.relative_to(directory)): hashlib.sha256(f.read_bytes()).hexdigest() for f in files}


# ── numbers ─────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_base_is_that_of_the_bundle(held: Subject, tiny: Path, twin: Family) -> None:
    close(expected(twin, tiny, {}), run(held.open(), {}), held.settings.parity.source)


@pytest.mark.parametrize("mix", MIXES, ids=str)
def test_adapters_and_mixes_have_their_effect(held: Subject, tiny: Path, twin: Family, mix: Mix) -> None:
    limit = held.settings.parity.source
    session, reference = held.open(), expected(twin, tiny, mix)
    made = run(session, mix)
    close(reference, made, limit)
    effect = np.linalg.norm(reference - expected(twin, tiny, {}))
    low, high = limit.effect_ratio
    assert low <= np.linalg.norm(made - run(session, {})) / effect <= high
    assert effect > 10


def test_gates_of_0_change_no_bit_of_the_base(held: Subject) -> None:
    session = held.open()
    base = run(session, {})
    assert np.array_equal(run(session, {"alpha": 0.0}), base)
    assert np.array_equal(run(session, {"alpha": 0.0, "beta": 0.0}), base)


def test_an_adapter_of_zeros_changes_no_bit_of_the_base(held: Subject, tiny: Path, tmp_path: Path) -> None:
    """Rows that are on, and computed, and add 0."""
    package, source = copy_package(held.package.path, tmp_path / "package"), tmp_path / "zeros"
    copy_bundle(tiny / "adapters" / "alpha", source)
    tensors = load_file(source / "adapter_model.safetensors")
    for name in tensors:
        if ".lora_B." in name or ".lora_a2." in name:
            tensors[name][:] = 0
    save_file(tensors, source / "adapter_model.safetensors")
    pipeline.add_adapter(package, source)
    session = held.open(packages.load(package))
    assert np.array_equal(run(session, {"zeros": 1.0}), run(session, {}))


def test_back_to_the_first_adapter_is_the_first_adapter_bit_for_bit(held: Subject) -> None:
    session = held.open()
    first, second = run(session, {"alpha": 1.0}), run(session, {"beta": 1.0})
    assert not np.array_equal(first, second)
    assert np.array_equal(run(session, {"alpha": 1.0}), first)
    assert np.array_equal(run(held.open(), {"beta": 1.0}), second)
    both = run(session, {"alpha": 0.5, "beta": 0.5})
    run(session, {})
    assert np.array_equal(run(session, {"alpha": 0.5, "beta": 0.5}), both)


def test_a_cache_is_never_read_under_another_adapter(held: Subject) -> None:
    session = held.open()
    alone = run(session, {"beta": 1.0})
    session.select({"alpha": 1.0})
    session.extend(IDS)
    assert np.array_equal(run(session, {"beta": 1.0}), alone)
    session.select({"alpha": 1.0})
    session.extend(IDS[:PREFILL])
    session.select({"beta": 1.0}, keep_cache=True)
    stale = session.extend(IDS[PREFILL : PREFILL + 1])[-1]
    assert not np.allclose(stale, alone[1], atol=1e-3)


def test_the_router_decides_as_in_the_bundle(held: Subject, tiny: Path) -> None:
    reference, session = routers.load(bundles.load(tiny)), held.open()
    assert reference is not None
    rng = np.random.default_rng(2)
    for length in rng.integers(1, 64, 50):
        ids = rng.integers(0, 256, int(length)).tolist()
        wanted, made = reference(torch.tensor([ids])).numpy(), session.route(ids)
        assert np.array_equal(made > 0, wanted > 0)
        np.testing.assert_allclose(made, wanted, atol=held.settings.parity.gates_max_abs)


# ── files ───────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_package_lists_every_file_it_has(subject: Subject) -> None:
    manifest = subject.package.manifest
    found = {name: value for name, value in hashes(subject.package.path).items() if name != packages.FILE}
    assert {name: entry.sha256 for name, entry in manifest.files.items()} == found
    assert manifest.target == subject.target and manifest.recipe == subject.recipe
    assert manifest.model.file == targets.load(subject.target).MODEL
    for name in (manifest.model.file, manifest.tokenizer, *(entry.file for entry in manifest.adapters)):
        assert any(file == name or file.startswith(f"{name}/") for file in found)  # a model may be a directory
    assert all(entry.file.endswith(subject.runtime.suffix()) for entry in manifest.adapters)


def test_slots_that_are_empty_change_no_bit_of_the_base(subject: Subject, without_slots: Package) -> None:
    assert subject.package.manifest.slots.tensors and not without_slots.manifest.slots.tensors
    assert np.array_equal(run(subject.open(without_slots), {}), run(subject.open(), {}))


def test_slots_are_where_the_adapters_have_rows(subject: Subject, tiny: Path) -> None:
    bundle = bundles.load(tiny)
    sites = {site for name in ("alpha", "beta") for site in load_adapter(bundle, name).sites}
    assert subject.package.manifest.slots.linears() == {site: bundle.linears[site] for site in sites}


def test_two_exports_are_the_same_bytes(subject: Subject, again: Path) -> None:
    assert hashes(again / subject.recipe) == hashes(subject.package.path)


def test_an_adapter_for_another_base_is_refused_with_both_fingerprints(
    subject: Subject, tiny: Path, tmp_path: Path
) -> None:
    """It is the file that says so, whatever package.json lists."""
    session, manifest = subject.open(), subject.package.manifest
    forged = tmp_path / subject.file("alpha").name
    adapter = load_adapter(bundles.load(tiny), "alpha")
    subject.runtime.encode_adapter(adapter, manifest.slots, manifest.base_fingerprint, forged)
    assert forged.read_bytes() == subject.file("alpha").read_bytes()
    session.admit(forged)
    subject.runtime.encode_adapter(adapter, manifest.slots, OTHER_BASE, forged)
    with pytest.raises(FingerprintError) as caught:
        session.admit(forged)
    assert OTHER_BASE in str(caught.value) and manifest.base_fingerprint in str(caught.value)
    package = copy_package(subject.package.path, tmp_path / "package")
    (package / subject.package.adapter("alpha").file).write_bytes(forged.read_bytes())
    swapped = subject.open(Package(package, manifest))
    with pytest.raises(FingerprintError):
        swapped.select({"alpha": 1.0})


def test_an_adapter_that_is_added_later_is_as_if_it_had_been_there(
    subject: Subject, tiny: Path, tmp_path: Path
) -> None:
    package = copy_package(subject.package.path, tmp_path / "package")
    before = hashes(package)
    copy_bundle(tiny / "adapters" / "beta", tmp_path / "late")
    entry = pipeline.add_adapter(package, tmp_path / "late")
    after = hashes(package)
    assert {name for name, value in after.items() if before.get(name) != value} == {entry.file, packages.FILE}
    assert (package / entry.file).read_bytes() == subject.file("beta").read_bytes()
    late = run(subject.open(packages.load(package)), {"late": 1.0})
    assert np.array_equal(late, run(subject.open(), {"beta": 1.0}))


def test_the_context_is_a_limit_that_is_said(subject: Subject) -> None:
    session, context = subject.open(), subject.package.manifest.model.context
    session.extend([65] * context)
    with pytest.raises(PackageError, match=str(context)):
        session.extend([65])


# ── all of them ─────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("target", targets.names())
def test_every_target_has_a_recipe_and_a_runtime(target: str) -> None:
    assert RECIPES[target] and (resources.target_dir(target) / "target.toml").is_file()
    require(target)
    assert runtimes.load(target).suffix().startswith(".")
