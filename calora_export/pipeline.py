"""The flow: bundle → model with slots → graph → package, and packages afterwards."""

from __future__ import annotations

import importlib.metadata
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

import msgspec
import numpy as np

from calora_export import adapter_format, devices, runtimes, strict_json, targets
from calora_export import adapters as rows
from calora_export import bundle as bundles
from calora_export import package as packages
from calora_export import recipe as recipes
from calora_export.adapters import Adapter
from calora_export.bundle import Bundle
from calora_export.compression import DenseWeight, PackedWeight, read_weight
from calora_export.errors import BundleError, FingerprintError, PackageError, mismatch
from calora_export.manifest import check_id
from calora_export.package import AdapterEntry, Manifest, ModelInfo, Package, Represented, RouterEntry, Slots
from calora_export.recipe import Recipe
from calora_export.report import Report, Series
from calora_export.sites import natural_key
from calora_export.version import VERSION

LIBRARIES = ("torch", "transformers", "onnx-ir", "onnxruntime")
GOLDEN_ADAPTERS = 8
Progress = Callable[[str], None]


def export(bundle_path: Path, out: Path, recipe_name: str, progress: Progress = lambda stage: None) -> Package:
    """Lower a bundle into a package at `out`; everything is checked before the first slow step."""
    recipe = recipes.load(recipe_name)
    target = targets.names()
    if recipe.target not in target:
        raise recipes.RecipeError(mismatch(recipe_name, "target", f"one of {', '.join(target)}", recipe.target))
    progress("reading the bundle")
    bundle = bundles.load(bundle_path, deep=True)
    loaded = [rows.load_adapter(bundle, spec.id) for spec in bundle.manifest.adapters]
    _special_tokens(bundle)
    with packages.written(out, packages.FILE) as directory:
        _export(bundle, loaded, directory, recipe, Path(recipe_name).stem, progress)
    return packages.load(out)


def _export(
    bundle: Bundle, loaded: list[Adapter], directory: Path, recipe: Recipe, recipe_name: str, progress: Progress
) -> None:
    from calora_export import golden, graph, model, routers  # torch and transformers take seconds to import

    lowering = targets.load(recipe.target)
    weights = Weights(bundle, recipe)
    progress("composing the model")
    composed = model.compose(bundle, weights, context=recipe.context, round_activations=recipe.activations == "int8")
    progress("tracing the graph")
    used = {site for adapter in loaded for site in adapter.sites}
    sites = [site for group in composed.groups for site in group if site in used]
    slots = tuple(graph.Slot(site, bundle.linears[site][1], bundle.linears[site][0]) for site in sites)
    recovery = any(adapter.recovery.any() for adapter in loaded)
    traced = graph.trace(composed, slots, last_only=recipe.logits == "last", recovery=recovery)
    progress("lowering")
    layout = lowering.lower(traced, recipe, directory, bundle.manifest.base.fingerprint)
    progress("encoding adapters")
    (directory / "adapters").mkdir()
    entries = tuple(
        _encode(adapter, spec.task, spec.class_index, layout, directory, recipe.target, bundle.manifest.base.fingerprint)
        for adapter, spec in zip(loaded, bundle.manifest.adapters, strict=True)
    )
    _copy_tokenizer(bundle.path / "base", directory / "tokenizer")
    router = None
    reference = routers.load(bundle)
    if reference is not None and bundle.manifest.router is not None:
        progress("lowering the router")
        file = lowering.lower_router(reference, directory)
        _copy_tokenizer(bundle.path / "router", directory / "tokenizer" / "router")
        router = RouterEntry(file, "tokenizer/router/tokenizer.json", bundle.manifest.router)
    progress("computing golden logits")
    golden.write(composed, loaded[:GOLDEN_ADAPTERS], bundle, directory / "golden")
    bos, eos = _special_tokens(bundle)
    info = ModelInfo(
        file=lowering.MODEL,
        architecture=composed.lm.config.model_type,
        bos=bos,
        eos=eos,
        logits=recipe.logits,
        **asdict(composed.shape),
    )
    manifest = Manifest(
        schema_version=1,
        name=bundle.manifest.name,
        target=recipe.target,
        recipe=recipe_name,
        settings=recipe,
        base_fingerprint=bundle.manifest.base.fingerprint,
        model=info,
        represented=tuple(weights.represented.values()),
        slots=layout,
        adapters=entries,
        router=router,
        tasks=bundle.manifest.tasks,
        tokenizer="tokenizer/tokenizer.json",
        files={},
        versions=_versions(),
    )
    lowering.accompany(manifest, directory)
    progress("hashing")
    packages.write_manifest(directory, msgspec.structs.replace(manifest, files=packages.hash_files(directory)))


@dataclass
class Weights:
    """The weights of a base as a recipe holds them; `represented` notes each one that is not as the bundle has it."""

    bundle: Bundle
    recipe: Recipe
    represented: dict[str, Represented] = field(default_factory=dict)

    def __call__(self, module: str) -> DenseWeight | PackedWeight:
        stored = read_weight(self.bundle.base, module)
        made = recipes.represent(self.recipe, module, stored)
        if not made.exact:
            original = stored.dequantize()
            noise = float(np.square(original - made.weight.dequantize()).sum())
            sqnr = 10 * np.log10(max(float(np.square(original).sum()), 1e-30) / max(noise, 1e-30))
            scheme = self.recipe.rule(module).scheme
            self.represented[module] = Represented(module, scheme, round(float(sqnr), 2))
        return made.weight


def add_adapter(package_path: Path, adapter_path: Path) -> AdapterEntry:
    """Encode one more adapter into a package. Only its own file and package.json are written."""
    package = packages.load(package_path)
    manifest = package.manifest
    _require_slots(adapter_path, manifest.slots)
    adapter = rows.load_adapter_dir(adapter_path, manifest.slots.linears())
    check_id(adapter.id, str(adapter_path), "id")
    if adapter.id in {entry.id for entry in manifest.adapters}:
        raise PackageError(mismatch(packages.FILE, "adapters", "an id of its own", f"{adapter.id} again"))
    if adapter.fingerprint is not None:
        package.require_fingerprint(str(adapter_path), adapter.fingerprint)
    index = max((entry.class_index for entry in manifest.adapters), default=-1) + 1
    try:
        entry = _encode(
            adapter, adapter.id, index, manifest.slots, package.path, manifest.target, manifest.base_fingerprint
        )
        files = {**manifest.files, entry.file: packages.hash_file(package.path / entry.file)}
        packages.write_manifest(
            package.path, msgspec.structs.replace(manifest, adapters=(*manifest.adapters, entry), files=files)
        )
    except OSError as error:
        raise PackageError(f"{package.path}: cannot be written: {error.strerror or error}") from error
    return entry


def _require_slots(adapter_path: Path, slots: Slots) -> None:
    """Slots were placed at export, where its adapters have rows: another adapter may need others."""
    if not (adapter_path / adapter_format.WEIGHTS).is_file():
        return  # load_adapter_dir says what is missing
    label = str(adapter_path)
    config = adapter_format.read_config(adapter_path, label)
    branches = adapter_format.stored_branches(adapter_format.open_weights(adapter_path, label), config)
    if unknown := sorted({branch.site for branch in branches} - set(slots.linears()), key=natural_key):
        hint = "export again from a bundle with such an adapter"
        raise PackageError(mismatch(adapter_path, unknown[0], "a site with a slot in this package", "none", hint))


def validate(
    package_path: Path, bundle_path: Path, device: str, progress: Progress = lambda stage: None
) -> tuple[Report, Series]:
    """Compare a package on a device with its bundle in torch; bad input is refused before the slow part."""
    package = packages.load(package_path)
    devices.require(device)
    bundle = bundles.load(bundle_path, deep=True)
    expected, found = package.manifest.base_fingerprint, bundle.manifest.base.fingerprint
    if expected != found:
        hint = "another bundle's package"
        raise FingerprintError(mismatch(bundle_path, "base.fingerprint", expected, found, hint))
    from calora_export import validation  # torch and transformers take seconds to import

    return validation.validate(package, bundle, device, progress)


def _encode(
    adapter: Adapter, task: str, index: int, slots: Slots, directory: Path, target: str, fingerprint: str
) -> AdapterEntry:
    runtime = runtimes.load(target)
    file = f"adapters/{adapter.id}{runtime.suffix()}"
    temporary = directory / "adapters" / f".{adapter.id}.tmp"
    try:
        runtime.encode_adapter(adapter, slots, fingerprint, temporary)
        temporary.replace(directory / file)
    finally:
        temporary.unlink(missing_ok=True)
    return AdapterEntry(
        id=adapter.id,
        task=task,
        class_index=index,
        file=file,
        rank=adapter.rank,
        recovery_rows=int(adapter.recovery.sum()),
        sites=len(adapter.sites),
        fingerprint=fingerprint,
        stated=adapter.fingerprint is not None,
    )


def _copy_tokenizer(source: Path, out: Path) -> None:
    """Tokenizer files only, in the form that the tokenizers library and the runtimes read."""
    out.mkdir(parents=True)
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja"):
        if (source / name).is_file():
            shutil.copyfile(source / name, out / name)


class _Generation(msgspec.Struct, frozen=True):
    bos_token_id: int | None = None
    eos_token_id: int | tuple[int, ...] | None = None


def _special_tokens(bundle: Bundle) -> tuple[int | None, tuple[int, ...]]:
    """bos and eos ids: generation_config.json has the last word, as in transformers."""
    base = bundle.path / "base"
    found: Mapping[str, _Generation] = {
        name: strict_json.read(base / name, _Generation, f"base/{name}")
        for name in ("generation_config.json", "config.json")
        if (base / name).is_file()
    }
    eos = next((g.eos_token_id for g in found.values() if g.eos_token_id is not None), None)
    if eos is None:
        raise BundleError(mismatch("base/config.json", "eos_token_id", "the token that ends an answer", "nothing"))
    bos = next((g.bos_token_id for g in found.values() if g.bos_token_id is not None), None)
    return bos, (eos,) if isinstance(eos, int) else tuple(eos)


def _versions() -> dict[str, str]:
    installed = {"calora-export": VERSION}
    for name in LIBRARIES:
        try:
            installed[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return installed
