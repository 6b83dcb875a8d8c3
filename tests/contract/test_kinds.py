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
from calora_export import devices, factors, inspection, mlpackage, pipeline, resources, runtimes
from calora_export import package as packages
from calora_export.adapters import load_adapter
from calora_export.devices import host
from calora_export.errors import DeviceError, FingerprintError, PackageError, UnsupportedError
from calora_export.importers import flora, llava_mole, lora_flow, lots, mtl_lora, peft, sharelora
from calora_export.jobs import Case, Job, Safety, SafetyTrace
from calora_export.package import Package, Slots, SlotTensor
from calora_export.runtimes import Mix, Session, _extras
from tests.bundles import HIDDEN, LAYERS, tiny_base
from tests.contract.test_target import OTHER_BASE
from tests.devices.beds import require_browser
from tests.importers import methods
from tests.importers.methods import Delta, Install
from tests.importers.test_reductions import IDS, SITES
from tests.importers.test_targets import LIMITS, RECIPES, session_of
from tests.packages import copy_package, refresh
from tests.tampering import read_adapter


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
    joint = methods.lots(SITES, directory / "joint.pt", diagonals=("second",), scale=1.5)
    lots.run(base, directory / "joint.pt", directory / "lots", scale=1.5)
    tasks = methods.mtl_lora(SITES, directory / "mtl.pt", 2, 10, 0.5, diagonal=False, scaler=False)
    mtl_lora.run(base, directory / "mtl.pt", directory / "mtl-lora", alpha=10, temperature=0.5, tasks="piqa,siqa")
    tied = methods.sharelora(SITES, directory / "tied", "AB")
    sharelora.run(base, [directory / "tied"], directory / "sharelora")
    deltas = {"plain": methods.lora(plain, 3 / 2), **joint, "piqa": tasks[0], "siqa": tasks[1], "tied": tied}
    installs = {"german": methods.flora(SITES, directory / "german.pt")}
    flora.run(base, [directory / "german.pt"], directory / "flora")
    loras, gate, installs["flow"] = methods.lora_flow(SITES, directory, HIDDEN, 0.5)
    lora_flow.run(base, gate, loras, directory / "lora-flow", "flow", 0.5)
    installs["mole"] = methods.llava_mole(SITES, directory / "mole.pt", HIDDEN, 6, 3)
    llava_mole.run(base, directory / "mole.pt", directory / "llava-mole", 6)
    parts = [directory / name for name in ("peft", "lots", "mtl-lora", "sharelora", "flora", "lora-flow", "llava-mole")]
    late = directory / "lots" / "adapters" / "second"
    bundle = merged(parts, directory / "bundle")
    deltas["fixed"] = add_fixed(bundle, "fixed", "mole", (0.5, 0.2, 0.3))
    return Kinds(bundle, deltas, installs, late)


def add_fixed(bundle: Path, identifier: str, routed: str, weights: tuple[float, ...]) -> Delta:
    """A dense mixture of the experts of another adapter without its router: y += Σ_e w_e · B_e A_e x."""
    manifest = bundles.read_manifest(bundle)
    source, directory = (bundle / "adapters" / name for name in (routed, identifier))
    shutil.copytree(source, directory)
    tensors = load_file(source / "adapter_model.safetensors")
    save_file({k: v for k, v in tensors.items() if ".token_router." not in k}, directory / "adapter_model.safetensors")
    (spec,) = (spec for spec in manifest.adapters if spec.id == routed)
    changes = {"id": identifier, "class_index": len(manifest.adapters), "token_router": None, "expert_weights": weights}
    specs = (*manifest.adapters, msgspec.structs.replace(spec, **changes))
    bundles.write_manifest(bundle, msgspec.structs.replace(manifest, adapters=specs))
    state = {name.removeprefix("base_model.model."): torch.from_numpy(value) for name, value in tensors.items()}

    def delta(site: str, x: torch.Tensor) -> torch.Tensor | None:
        if f"{site}.lora_expert_A" not in state:
            return None
        downs, ups = state[f"{site}.lora_expert_A"], state[f"{site}.lora_expert_B"]
        return sum((w * (x @ a.T @ b.T) for w, a, b in zip(weights, downs, ups, strict=True)), torch.zeros(()))

    return delta


ROWS = ("plain", "fixed")
FACTORED = ("first", "second", "piqa", "siqa", "tied")
OTHERS = ("german", "flow", "mole")  # FLoRA, LoRA-Flow, LLaVA-MoLE


@pytest.fixture(scope="module")
def hf(base: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def exports(kinds: Kinds, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Package]:
    @functools.cache
    def export(recipe: str) -> Package:
        return pipeline.export(kinds.bundle, tmp_path_factory.mktemp(recipe) / "package", recipe)

    return export


@pytest.fixture(scope="module", params=RECIPES.values())
def package(request: pytest.FixtureRequest, exports: Callable[[str], Package]) -> Package:
    return exports(request.param)


def logits(session: Session, mix: Mix) -> np.ndarray:
    session.select(mix)
    return session.extend(IDS[0].tolist())[-1]


def reference(hf: PreTrainedModel, *installs: Install) -> np.ndarray:
    return methods.run_with(hf, IDS, *installs)[0, -1].numpy()


@pytest.mark.parametrize("kind", [*ROWS, *FACTORED, *OTHERS])
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


NOT_ADDED: dict[str, Mix] = {
    "german: expected it alone at weight 1, .*, found german=0.5": {"german": 0.5},
    "german: expected it alone at weight 1, .*, found german=1, plain=1": {"german": 1.0, "plain": 1.0},
    "mole: expected one adapter that weighs its experts by token, found flow and ": {"flow": 1.0, "mole": 1.0},
}


@pytest.mark.parametrize("expected", NOT_ADDED)
def test_what_no_formula_adds_up_is_refused(package: Package, expected: str) -> None:
    with pytest.raises(UnsupportedError, match=f"^mix: {expected}"):
        session_of(package).select(NOT_ADDED[expected])


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


@pytest.mark.parametrize("recipe", ["onnx-fp32", "onnx-int4-fused"])
def test_what_a_row_takes_is_counted(exports: Callable[[str], Package], recipe: str) -> None:
    """A joint basis's saving is told by it: int8 rows have scales."""
    package = exports(recipe)
    slots, entry = package.manifest.slots, package.adapter("plain")
    arrays = read_adapter(package.path / entry.file)
    beside = {slots.recovery, slots.fingerprint, "always", *_extras.shapes(slots, 0)}
    assert sum(a.nbytes for name, a in arrays.items() if name not in beside) == entry.rank * slots.row_bytes()


def test_inspect_says_what_an_adapter_has_beside_rows(package: Package) -> None:
    shown = {adapter.id: adapter.branches[2:] for adapter in inspection.inspect(package.path).adapters}
    assert shown["plain"] == [] and shown["first"] == ["cores in shared/joint.safetensors"]
    assert (shown["german"], shown["mole"]) == (["scales of layers"], ["experts weighed by token"])


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


def forge(package: Package, file: Path) -> Path:
    """Cores that say that they are for another base."""
    slots, own = package.manifest.slots, package.path / package.adapter("first").file
    adapter, _ = factors.read(own, slots.fingerprint)
    factors.write(adapter, slots.dtype, slots.fingerprint, OTHER_BASE, file)
    return file


def test_cores_for_another_base_are_refused(package: Package, tmp_path: Path) -> None:
    with pytest.raises(FingerprintError, match=OTHER_BASE):
        session_of(package).admit(forge(package, tmp_path / "first.factors"))


DAMAGE = {"site": "a site with a slot", "shape": r"\[6, 6\]", "basis": "a file of this package"}


def damage(package: Package, kind: str, file: Path) -> None:
    """Cores that do not fit."""
    slots, path = package.manifest.slots, package.path / package.adapter("first").file
    adapter, fingerprint = factors.read(path, slots.fingerprint)
    site = next(iter(adapter.layout.sites))
    if kind == "site":
        sites = {"model.layers.9.self_attn.q_proj": adapter.layout.sites[site]}
        adapter = replace(adapter, layout=msgspec.structs.replace(adapter.layout, sites=sites))
    elif kind == "shape":
        adapter = replace(adapter, tensors={**adapter.tensors, f"{site}.core": np.zeros((6, 5), np.float32)})
    else:
        adapter = replace(adapter, layout=msgspec.structs.replace(adapter.layout, basis="../package.json"))
    factors.write(adapter, slots.dtype, slots.fingerprint, fingerprint, file)


@pytest.mark.parametrize("kind", DAMAGE)
def test_cores_that_do_not_fit_are_refused_in_one_line(package: Package, tmp_path: Path, kind: str) -> None:
    damage(package, kind, tmp_path / "first.factors")
    with pytest.raises(PackageError, match=f"^first.factors: .*expected {DAMAGE[kind]}, found"):
        session_of(package).admit(tmp_path / "first.factors")


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


def test_experts_of_fixed_weights_are_rows(package: Package) -> None:
    entry = package.adapter("fixed")
    assert entry.kind is msgspec.UNSET and entry.rank == 9


# ── runners without Python ────────────────────────────────────────────────────────────────────────────────────────────

MIXES: dict[str, dict[str, float]] = {name: {name: 1.0} for name in (*ROWS, *FACTORED, *OTHERS)} | {
    "base": {},
    "factors": {"first": 0.6, "tied": 0.3, "plain": 0.5},
    "one factor": {"second": -0.4},
    "experts": {"plain": 0.5, "mole": 1.0, "siqa": 0.3},
}


@pytest.mark.parametrize(
    ("device", "recipe"),
    [
        ("host:native", "onnx-fp32"),
        ("host:native", "executorch-fp32"),
        ("host:native", "onnx-int4-fused"),
        ("browser", "onnx-web"),
        pytest.param("host:native", "executorch-8da4w", marks=pytest.mark.heavy),
        pytest.param("host:native", "onnx-web", marks=pytest.mark.heavy),
    ],
)
def test_a_runner_computes_what_python_does(
    exports: Callable[[str], Package], tmp_path: Path, device: str, recipe: str
) -> None:
    if device == "browser":
        require_browser()
    package = exports(recipe)
    forged = forge(package, tmp_path / "forged.factors")
    cases = tuple(Case(name, dict(mix), tuple(IDS[0].tolist()), 3) for name, mix in MIXES.items())
    job = Job(1, cases, safety=Safety({"first": 1.0}, {"mole": 1.0}, cases[0].ids, str(forged)))
    made, expected = devices.run(device, package, job), host.answer(package, job)
    assert made.answer.safety == expected.answer.safety == SafetyTrace(aba=True, fresh=True, stale=True, refused=True)
    for name, logits in expected.logits.items():
        assert np.abs(made.logits[name] - logits).max() <= 1e-4, name
        assert name == "base" or np.abs(made.logits[name] - made.logits["base"]).max() > 0.1


@pytest.mark.parametrize(
    ("device", "recipe"),
    [
        ("host:native", "onnx-fp32"),
        ("host:native", "executorch-fp32"),
        pytest.param("browser", "onnx-web", marks=pytest.mark.heavy),
    ],
)
def test_a_runner_refuses_what_python_does(
    exports: Callable[[str], Package], tmp_path: Path, device: str, recipe: str
) -> None:
    if device == "browser":
        require_browser()
    package = exports(recipe)

    def refused(package: Package, mix: Mix, expected: str) -> None:
        job = Job(threads=1, cases=(Case("one", dict(mix), (1, 2, 3), 2),))
        with pytest.raises(DeviceError, match=f"^(host|browser: run): {expected}"):
            devices.run(device, package, job)

    for expected, mix in NOT_ADDED.items():
        refused(package, mix, f"mix: {expected}")
    copy = copy_package(package.path, tmp_path / "package")
    for kind, wanted in DAMAGE.items():
        damage(package, kind, copy / package.adapter("first").file)
        refresh(copy)
        refused(packages.load(copy), {"first": 1.0}, f"first.factors: .*expected {wanted}, found")
