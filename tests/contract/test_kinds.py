"""Every kind of adapter on every target: what a package makes of it gives the logits of the published method.

One bundle has them all. The methods are plain torch (tests/importers/methods.py) in transformers' own model.
"""

from __future__ import annotations

import functools
import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from calora_export import bundle as bundles
from calora_export import factors, mlpackage, pipeline, resources, runtimes
from calora_export import package as packages
from calora_export.adapters import load_adapter
from calora_export.devices import host
from calora_export.errors import DeviceError, FingerprintError, PackageError, UnsupportedError
from calora_export.importers import flora, llava_mole, lora_flow, lots, mtl_lora, peft, sharelora
from calora_export.jobs import Case, Job
from calora_export.package import Package, Slots, SlotTensor
from calora_export.runtimes import Mix, Session
from tests.bundles import HIDDEN, LAYERS, tiny_base
from tests.contract.test_target import OTHER_BASE
from tests.importers import methods
from tests.importers.methods import Delta, Install
from tests.importers.test_reductions import IDS, SITES
from tests.importers.test_targets import LIMITS, RECIPES, session_of
from tests.packages import copy_package


@dataclass(frozen=True)
class Kinds:
    """A bundle with an adapter of each kind, what each method adds, or what else it does to a model."""

    bundle: Path
    deltas: dict[str, Delta]
    installs: dict[str, Install]
    late: Path

    def install(self, kind: str) -> Install:
        return self.installs[kind] if kind in self.installs else methods.added(self.deltas[kind])


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
    installs = {"german": methods.flora(SITES, directory / "german.pt")}
    flora.run(base, [directory / "german.pt"], directory / "flora")
    loras, gate, installs["flow"] = methods.lora_flow(SITES, directory, HIDDEN, 0.5)
    lora_flow.run(base, gate, loras, directory / "lora-flow", "flow", 0.5)
    installs["mole"] = methods.llava_mole(SITES, directory / "mole.pt", HIDDEN, 6, 3)
    llava_mole.run(base, directory / "mole.pt", directory / "llava-mole", 6)
    parts = [directory / name for name in ("peft", "lots", "mtl-lora", "sharelora", "flora", "lora-flow", "llava-mole")]
    late = directory / "lots" / "adapters" / "second"
    return Kinds(merged(parts, directory / "bundle"), deltas, installs, late)


FACTORED = ("first", "second", "piqa", "siqa", "tied")
OTHERS = ("german", "flow", "mole")  # FLoRA, LoRA-Flow, LLaVA-MoLE


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


def reference(hf: PreTrainedModel, *installs: Install) -> np.ndarray:
    return methods.run_with(hf, IDS, *installs)[0, -1].numpy()


@pytest.mark.parametrize("kind", ["plain", *FACTORED, *OTHERS])
def test_an_adapter_of_each_kind_is_its_method(package: Package, kinds: Kinds, hf: PreTrainedModel, kind: str) -> None:
    expected, plain = reference(hf, kinds.install(kind)), reference(hf)
    assert np.abs(expected - plain).max() > 0.1
    assert np.abs(logits(session_of(package), {kind: 1.0}) - expected).max() <= LIMITS[package.manifest.target]


def test_kinds_mix(package: Package, kinds: Kinds, hf: PreTrainedModel) -> None:
    mix = {"first": 0.6, "tied": 0.3, "plain": 0.5}

    def delta(site: str, x: torch.Tensor) -> torch.Tensor:
        parts = [(gate, kinds.deltas[name](site, x)) for name, gate in mix.items()]
        return sum((gate * part for gate, part in parts if part is not None), torch.zeros(()))

    limit = LIMITS[package.manifest.target]
    assert np.abs(logits(session_of(package), mix) - reference(hf, methods.added(delta))).max() <= limit


def test_what_weighs_its_experts_by_token_mixes_with_rows(package: Package, kinds: Kinds, hf: PreTrainedModel) -> None:
    """A gate of 1 is the trained adapter; beside it others have theirs."""
    expected = reference(hf, kinds.install("mole"), methods.added(lambda site, x: half(kinds.deltas["plain"](site, x))))
    found = logits(session_of(package), {"plain": 0.5, "mole": 1.0})
    assert np.abs(found - expected).max() <= LIMITS[package.manifest.target]


def half(x: torch.Tensor | None) -> torch.Tensor | None:
    return None if x is None else x / 2


@pytest.mark.parametrize(
    ("mix", "expected"),
    [
        ({"german": 0.5}, "german: expected it alone at weight 1, .*, found german=0.5"),
        ({"german": 1.0, "plain": 1.0}, "german: expected it alone at weight 1, .*, found german=1, plain=1"),
        ({"flow": 1.0, "mole": 1.0}, "mole: expected one adapter that weighs its experts by token, found flow and "),
    ],
)
def test_what_no_formula_adds_up_is_refused(package: Package, mix: Mix, expected: str) -> None:
    with pytest.raises(UnsupportedError, match=f"^mix: {expected}"):
        session_of(package).select(mix)


def test_back_to_the_first_is_the_first_bit_for_bit(package: Package) -> None:
    session = session_of(package)
    base = logits(session, {})
    made = {kind: logits(session, {kind: 1.0}) for kind in ("first", *OTHERS)}
    for kind, found in made.items():
        assert not np.array_equal(found, base)
        assert np.array_equal(logits(session, {kind: 1.0}), found)
    assert np.array_equal(logits(session, {}), base)


def test_a_prefill_in_one_call_and_token_by_token_are_alike(package: Package) -> None:
    """Every token has gates of its own, whatever it is fed with."""
    session = session_of(package)
    for kind in OTHERS:
        whole = logits(session, {kind: 1.0})
        session.select({kind: 1.0})
        single = [session.extend([token])[-1] for token in IDS[0].tolist()]
        assert np.abs(single[-1] - whole).max() <= LIMITS[package.manifest.target]


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


@pytest.mark.parametrize(
    ("kind", "expected"),
    [("german", "a layer that this package scales"), ("flow", "a module that this package reads")],
)
@pytest.mark.parametrize("target", RECIPES)
def test_what_a_package_has_no_inputs_for_is_not_added(
    kinds: Kinds, tmp_path: Path, target: str, kind: str, expected: str
) -> None:
    """Its router would be left out, and its experts would say nothing."""
    bundle = bundles.load(kinds.bundle)
    sites = tuple(SlotTensor(site, f"{site}.down", 0, 1, f"{site}.up", b, a) for site, (a, b) in SITES.items())
    slots = Slots("dynamic", "gate", "recovery", "base_fingerprint", "fp32", sites)
    with pytest.raises(UnsupportedError, match=f"^{kind}: .*expected {expected}, found another"):
        runtimes.load(target).encode_adapter(load_adapter(bundle, kind), slots, OTHER_BASE, tmp_path / "file")
    assert not (tmp_path / "file").exists()


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


def test_every_kind_runs_on_the_plain_sdk_of_executorch(kinds: Kinds, hf: PreTrainedModel, tmp_path: Path) -> None:
    """With kernels that are not ours: gates of each token are multiplied elsewhere."""
    pytest.importorskip("executorch")
    text = resources.recipes()["executorch-fp32"].read_text()
    assert 'kernels = "calora"' in text
    recipe = tmp_path / "stock.toml"
    recipe.write_text(text.replace('kernels = "calora"', 'kernels = "stock"'))
    package = pipeline.export(kinds.bundle, tmp_path / "package", str(recipe))
    session = session_of(package)
    assert np.abs(logits(session, {}) - reference(hf)).max() <= LIMITS["executorch"]
    for kind in OTHERS:
        expected = reference(hf, kinds.install(kind))
        assert np.abs(logits(session, {kind: 1.0}) - expected).max() <= LIMITS["executorch"]


def test_functions_of_core_ml_hold_every_kind(kinds: Kinds, hf: PreTrainedModel, tmp_path: Path) -> None:
    """Cores are multiplied out, scales and routers are constants, and nothing of them is in the other functions."""
    chosen = ("first", *OTHERS)
    bundle = merged([kinds.bundle], tmp_path / "bundle")
    manifest = bundles.read_manifest(bundle)
    specs = [spec for spec in manifest.adapters if spec.id in chosen]
    specs = [msgspec.structs.replace(spec, class_index=index) for index, spec in enumerate(specs)]
    bundles.write_manifest(bundle, msgspec.structs.replace(manifest, adapters=tuple(specs)))
    text = resources.recipes()["coreml-multifunction"].read_text()
    changes = {"context = 2048": "context = 64", "64]": "16]", "chunk = 64": "chunk = 16", '"int8"': '"fp16"'}
    assert all(part in text for part in changes)
    recipe = tmp_path / "functions.toml"
    recipe.write_text(functools.reduce(lambda made, change: made.replace(*change), changes.items(), text))
    package = pipeline.export(bundle, tmp_path / "package", str(recipe))
    session = session_of(package)
    assert np.abs(logits(session, {}) - reference(hf)).max() <= LIMITS["coreml"]
    for kind in chosen:
        expected = reference(hf, kinds.install(kind))
        assert np.abs(logits(session, {kind: 1.0}) - expected).max() <= LIMITS["coreml"]
    functions = mlpackage.read_spec(package.path / "model.mlpackage").mlProgram.functions
    blocks = {name: found.block_specializations[found.opset] for name, found in functions.items()}
    used = {name: Counter(operation.type for operation in block.operations) for name, block in blocks.items()}
    assert used["german"]["mul"] == used["base"]["mul"] + 2 * len(package.manifest.slots.scaled or ())
    assert used["flow"]["softmax"] == LAYERS and not used["base"]["softmax"] and not used["first"]["softmax"]


def test_experts_of_fixed_weights_are_rows(kinds: Kinds, hf: PreTrainedModel, tmp_path: Path) -> None:
    """A dense mixture without a router: y += Σ_e w_e · scale · B_e A_e x."""
    bundle = merged([kinds.bundle], tmp_path / "bundle")
    manifest = bundles.read_manifest(bundle)
    directory = bundle / "adapters" / "mole"
    tensors = load_file(directory / "adapter_model.safetensors")
    save_file({k: v for k, v in tensors.items() if ".token_router." not in k}, directory / "adapter_model.safetensors")
    weights = (0.5, 0.2, 0.3)
    specs = [
        msgspec.structs.replace(spec, token_router=None, expert_weights=weights) if spec.id == "mole" else spec
        for spec in manifest.adapters
    ]
    bundles.write_manifest(bundle, msgspec.structs.replace(manifest, adapters=tuple(specs)))
    state = {name.removeprefix("base_model.model."): torch.from_numpy(value) for name, value in tensors.items()}

    def delta(site: str, x: torch.Tensor) -> torch.Tensor | None:
        if f"{site}.lora_expert_A" not in state:
            return None
        downs, ups = state[f"{site}.lora_expert_A"], state[f"{site}.lora_expert_B"]
        return sum((w * (x @ a.T @ b.T) for w, a, b in zip(weights, downs, ups, strict=True)), torch.zeros(()))

    package = pipeline.export(bundle, tmp_path / "package", "torch-fp32")
    entry = package.adapter("mole")
    assert entry.kind is msgspec.UNSET and entry.rank == 9
    found = logits(session_of(package), {"mole": 1.0})
    assert np.abs(found - reference(hf, methods.added(delta))).max() <= LIMITS["torch"]


@pytest.mark.parametrize("target", ["onnx", "executorch"])
def test_native_runners_say_what_they_do_not_multiply(
    exports: Callable[[str], Package], base: Path, tmp_path: Path, target: str
) -> None:
    if shutil.which("g++") is None:
        pytest.skip("no compiler")
    with pytest.raises(DeviceError, match=r"slots\.scaled: expected adapters of rows alone, found scaled"):
        host.run("native", exports(target), Job(threads=1))
    methods.lots(SITES, tmp_path / "joint.pt", diagonal=True, scale=1.0)
    lots.run(base, tmp_path / "joint.pt", tmp_path / "lots")
    package = pipeline.export(tmp_path / "lots", tmp_path / "package", RECIPES[target])
    case = Case(name="first", mix={"first": 1.0}, ids=(1, 2, 3), prefill=2)
    with pytest.raises(DeviceError, match=r"first\.factors: kind: expected rows, found factors of rows"):
        host.run("native", package, Job(threads=1, cases=(case,)))
