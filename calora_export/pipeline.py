"""The flow: bundle → model with slots → graph → package → report."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
from msgspec import UNSET, UnsetType

from calora_export import adapter_format, devices, factors, fitness, joint_basis, profiles, sparsity, targets, tokens
from calora_export import adapters as rows
from calora_export import bundle as bundles
from calora_export import package as packages
from calora_export import recipe as recipes
from calora_export import report as reports
from calora_export.adapters import Opened
from calora_export.bundle import Bundle
from calora_export.encoding import AdapterSource, Encoder
from calora_export.errors import (
    CaloraError,
    DeviceError,
    FingerprintError,
    PackageError,
    mismatch,
)
from calora_export.manifest import check_id
from calora_export.package import AdapterEntry, JointBasis, Manifest, ModelInfo, Package, RouterEntry, Slots
from calora_export.recipe import Recipe
from calora_export.report import Report
from calora_export.sites import expand_sites, natural_key
from calora_export.version import VERSION
from calora_export.weights import Weights

if TYPE_CHECKING:
    from calora_export import graph
    from calora_export.model import SlotModel

LIBRARIES = ("torch", "transformers", "onnx-ir", "onnxruntime", "executorch", "coremltools")
GOLDEN_ADAPTERS = 8
Progress = Callable[[str], None]


def silent(stage: str) -> None:
    """Progress for callers that want none."""


def export(
    bundle_path: Path, out: Path, recipe_name: str, progress: Progress = silent, device: str | None = None
) -> Package:
    """Lower a bundle into a package at `out`; everything that can be checked is checked before the first slow step.

    What the profile of a device does not allow is refused: before, as far as recipe and bundle tell, and for Core ML
    once more from the saved files, before they take the place of an older package.
    """
    recipe = recipes.load(recipe_name)
    targets.require_installed(recipe.target)
    if device is not None:
        profiles.check(device, bundle_path, recipe_name)
    progress("reading the bundle")
    bundle = bundles.load(bundle_path)
    Weights(bundle, recipe).check()
    special = tokens.special_tokens(bundle)
    bundles.check_bytes(bundle)  # last: of a large base it takes seconds
    with packages.written(out, packages.FILE) as directory:
        job = _Export(bundle, directory, recipe, Path(recipe_name).stem, special)
        job.run(targets.load(recipe.target), progress)
        if device is not None:
            fitness.check(device, directory)
    return packages.load(out)


def add_adapter(package_path: Path, adapter_path: Path) -> AdapterEntry:
    """Encode one more adapter into a package. Only its own file and package.json are written."""
    package = packages.load(package_path)
    manifest = package.manifest
    if manifest.settings.adapter_inputs == "functions":
        hint = "export again, or with a recipe whose adapters are inputs"
        expected = "adapters that are files"
        raise PackageError(mismatch(packages.FILE, "settings.adapter_inputs", expected, "functions", hint))
    _require_slots(adapter_path, manifest.slots)
    opened = rows.open_adapter_dir(adapter_path, manifest.slots.linears())
    adapter = opened.rows()
    check_id(adapter.id, str(adapter_path), "id")
    if adapter.id in {entry.id for entry in manifest.adapters}:
        hint = "the adapter's id is its directory's name: rename it"
        raise PackageError(mismatch(packages.FILE, "adapters", "an id of its own", f"{adapter.id} again", hint))
    if adapter.fingerprint is not None:
        package.require_fingerprint(str(adapter_path), adapter.fingerprint)
    index = max((entry.class_index for entry in manifest.adapters), default=-1) + 1
    try:
        encoder = Encoder(package.path, manifest.target, manifest.slots, manifest.base_fingerprint)
        factored = factors.of(opened, _shared_already(opened, package))
        if factored is None:
            entry = encoder.rows(adapter, adapter.id, index)
        else:
            entry = encoder.factors(factored, adapter, adapter.id, index)
        files = {**manifest.files, entry.file: packages.hash_file(package.path / entry.file)}
        packages.write_manifest(
            package.path, msgspec.structs.replace(manifest, adapters=(*manifest.adapters, entry), files=files)
        )
    except OSError as error:
        raise PackageError(f"{package.path}: cannot be written: {error.strerror or error}") from error
    return entry


def _shared_already(opened: Opened, package: Package) -> str | None:
    """The package's file of what the adapter shares with others, if it is the very same; else it needs rows."""
    for name, basis in opened.bases.items():
        entry = package.manifest.files.get(file := factors.basis_file(name))
        data = factors.basis_bytes(basis.all_float32(), package.manifest.slots.dtype)
        if entry is not None and entry.sha256 == hashlib.sha256(data).hexdigest():
            return file
    return None


def _require_slots(adapter_path: Path, slots: Slots) -> None:
    """Slots were placed at export, where its adapters have rows: another adapter may need others."""
    if not (adapter_path / adapter_format.WEIGHTS).is_file():
        return  # load_adapter_dir says what is missing
    label = str(adapter_path)
    adapter_format.read_config(adapter_path, label)
    sites = adapter_format.sites_of(adapter_format.open_weights(adapter_path, label))
    if unknown := sorted(sites - set(slots.linears()), key=natural_key):
        hint = "export again from a bundle with such an adapter"
        raise PackageError(mismatch(adapter_path, unknown[0], "a site with a slot in this package", "none", hint))


@dataclass(frozen=True)
class Validated:
    """report: as it was written, incomplete where something broke; None: there was nothing to write. fault: what broke
    on this device."""

    report: Report | None
    fault: CaloraError | None = None


def validate(
    package_path: Path, bundle_path: Path, device: str = "host", progress: Progress = silent, profile: str = ""
) -> Report:
    """Compare a package on a device with its bundle in torch, and write PACKAGE/report; bad input is refused first.

    What breaks on the device is raised; what was measured until then is in the report all the same.
    """
    (made,) = validate_each(package_path, bundle_path, (device,), progress, profile).values()
    if made.fault is not None or made.report is None:
        raise made.fault or DeviceError(f"{device}: it measured nothing")
    return made.report


def validate_each(
    package_path: Path, bundle_path: Path, where: Sequence[str], progress: Progress = silent, profile: str = ""
) -> dict[str, Validated]:
    """The same on several devices at once, each with its own PACKAGE/report/<device>; what goes wrong with one does not
    disturb the others. profile: a device profile that says how to run there, and what is fast enough."""
    package = packages.load(package_path)
    for device in where:
        devices.require(device)
    if profile:
        profiles.load(profile)
    bundle = bundles.load(bundle_path, deep=True)
    expected, found = package.manifest.base_fingerprint, bundle.manifest.base.fingerprint
    if expected != found:
        hint = "another bundle's package"
        raise FingerprintError(mismatch(bundle_path, "base.fingerprint", expected, found, hint))
    targets.require_installed(package.manifest.target)
    from calora_export import validation  # torch and transformers take seconds to import

    answers: dict[str, Validated] = {}
    for device, made in validation.validate(package, bundle, where, progress, profile).items():
        if made.report is not None:
            reports.write(made.report[0], report_directory(package_path, device, where), made.report[1])
        answers[device] = Validated(made.report[0] if made.report else None, made.fault)
    return answers


def report_directory(package_path: Path, device: str, where: Sequence[str]) -> Path:
    """Where the report of one of the devices of a validation is."""
    own = "" if len(where) == 1 else "".join(c if c.isalnum() or c in "@.-" else "-" for c in device)
    return package_path / "report" / own


@dataclass(frozen=True)
class _Export:
    """One export into a directory that is not yet in its place."""

    bundle: Bundle
    directory: Path
    recipe: Recipe
    recipe_name: str
    special: tuple[int | None, tuple[int, ...]]

    def run(self, lowering: targets.Target, progress: Progress) -> None:
        from calora_export import composing, golden, model  # torch and transformers take seconds to import
        from calora_export.graph import trace

        progress("composing the model")
        weights = Weights(self.bundle, self.recipe)
        context, activations = self.recipe.context, self.recipe.activations
        composed = composing.compose(self.bundle, weights, context=context, activations=activations)
        progress("tracing the graph")
        specs, columns = self.bundle.manifest.adapters, self.recipe.joint_basis
        recovery = any(branch.act == "gelu" for spec in specs for branch in spec.branches)
        last_only = self.recipe.logits == "last"
        wanted = self._slots(composed)
        extras = self._extras(wanted)
        traced = trace(composed, wanted, last_only=last_only, recovery=recovery, extras=extras)
        if columns is not UNSET:
            progress("compressing adapters")
        source = AdapterSource(self.bundle, None if columns is UNSET else joint_basis.compress(self.bundle, columns))
        if self.recipe.adapter_inputs == "functions":
            baked = {spec.id: model.Rows.of(source.rows(spec.id)) for spec in specs}
            traced = dataclasses.replace(traced, adapters=baked)
        progress("lowering")
        fingerprint = self.bundle.manifest.base.fingerprint
        author, licence = (str(self.bundle.manifest.provenance.get(key, "")) for key in ("author", "license"))
        origin = targets.Origin(self.bundle.manifest.name, fingerprint, *self.special, author, licence)
        slots = lowering.lower(traced, self.recipe, self.directory, origin)
        progress("encoding adapters")
        (self.directory / "adapters").mkdir()
        encoder = Encoder(self.directory, self.recipe.target, slots, fingerprint)
        entries = tuple(encoder.add(source, spec) for spec in specs)
        joint = encoder.share(source, entries)
        tokens.copy_tokenizer(self.bundle.path / "base", self.directory / "tokenizer")
        progress("lowering the router")
        router = self._router(lowering)
        progress("computing golden logits")
        shown = [source.rows(spec.id) for spec in specs[:GOLDEN_ADAPTERS]]
        golden.write(composed, shown, self.bundle, self.directory / "golden")
        manifest = self._manifest(composed, lowering.MODEL, weights, slots, entries, router, joint)
        lowering.accompany(manifest, self.directory)
        progress("hashing")
        files = packages.hash_files(self.directory)
        packages.write_manifest(self.directory, msgspec.structs.replace(manifest, files=files))

    def _slots(self, composed: SlotModel) -> tuple[graph.Slot, ...]:
        """A slot for every site that an adapter of the bundle names, in the order in which the model calls them."""
        from calora_export.graph import Slot

        branches = {branch.sites for spec in self.bundle.manifest.adapters for branch in spec.branches}
        used = {site for patterns in branches for site in expand_sites(patterns, self.bundle.adaptable)}
        sites = [site for group in composed.groups for site in group if site in used]
        return tuple(Slot(site, self.bundle.linears[site][1], self.bundle.linears[site][0]) for site in sites)

    def _extras(self, slots: Sequence[graph.Slot]) -> graph.Extras:
        """What adapters of the bundle have beside rows."""
        from calora_export.graph import Extras

        specs, linears = self.bundle.manifest.adapters, self.bundle.adaptable
        patterns = {branch.sites for spec in specs for branch in spec.branches if branch.role == "scale"}
        scaled = {site for sites in patterns for site in expand_sites(sites, linears)}
        found = {scope for spec in specs for scope in bundles.router_scopes(spec, linears, f"adapters: {spec.id}")}
        scopes = tuple(sorted(found, key=natural_key))
        experts = max((spec.experts for spec in specs if spec.token_router is not None), default=0)
        experts += len(found) > 0  # one that is nobody: all that a module weighs for an adapter without a router there
        features = self.bundle.hidden if scopes else 0
        return Extras(tuple(slot.site for slot in slots if slot.site in scaled), scopes, experts, features)

    def _router(self, lowering: targets.Target) -> RouterEntry | None:
        from calora_export import routers

        spec, router = self.bundle.manifest.router, routers.load(self.bundle)
        if spec is None or router is None:
            return None
        tokens.copy_tokenizer(self.bundle.path / "router", self.directory / "tokenizer" / "router")
        return RouterEntry(lowering.lower_router(router, self.directory), "tokenizer/router/tokenizer.json", spec)

    def _manifest(
        self,
        composed: SlotModel,
        file: str,
        weights: Weights,
        slots: Slots,
        entries: tuple[AdapterEntry, ...],
        router: RouterEntry | None,
        joint: JointBasis | UnsetType,
    ) -> Manifest:
        bos, eos = self.special
        architecture = composed.lm.config.model_type
        shape = composed.shape
        model = ModelInfo(
            file=file,
            architecture=architecture,
            layers=shape.layers,
            heads=_one_or_each(shape.heads),
            kv_heads=_one_or_each(shape.kv_heads),
            head_dim=shape.head_dim,
            hidden=shape.hidden,
            vocab=shape.vocab,
            context=shape.context,
            logits=self.recipe.logits,
            bos=bos,
            eos=eos,
        )
        return Manifest(
            schema_version=1,
            name=self.bundle.manifest.name,
            target=self.recipe.target,
            recipe=self.recipe_name,
            settings=self.recipe,
            base_fingerprint=self.bundle.manifest.base.fingerprint,
            model=model,
            represented=tuple(weights.represented.values()),
            slots=slots,
            adapters=entries,
            router=router,
            tasks=self.bundle.manifest.tasks,
            tokenizer="tokenizer/tokenizer.json",
            files={},
            versions=_versions(),
            joint_basis=joint,
            zeros=sparsity.total(weights.pruned.values(), self.recipe),
        )


def _one_or_each(by_layer: tuple[int, ...]) -> int | tuple[int, ...]:
    return by_layer[0] if len(set(by_layer)) == 1 else by_layer


def _versions() -> dict[str, str]:
    installed = {"calora-export": VERSION}
    for name in LIBRARIES:
        try:
            installed[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return installed
