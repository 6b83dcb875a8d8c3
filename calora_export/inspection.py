"""What is in a bundle or a package, as values that the command line prints."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping
from math import prod
from pathlib import Path

from msgspec import UNSET, Struct

from calora_export import bundle as bundles
from calora_export import fitness, manifest, strict_json
from calora_export import package as packages
from calora_export.bundle import BaseConfig, CompressionStep
from calora_export.errors import PackageError, mismatch
from calora_export.package import AdapterEntry

_BESIDE_ROWS = {"scales": "scales of layers", "routed": "experts weighed by token"}


class PrunedView(Struct, frozen=True):
    """A prune step: bytes of its weights' numbers, and of how many of these at least are zeros, as the pattern says."""

    pattern: str
    weights: int
    bytes: int
    zero_bytes: int | None


class BaseView(Struct, frozen=True):
    architecture: str
    parameters: int
    bytes: int
    fingerprint: str
    compression: list[str]
    stored: dict[str, int]
    pruned: list[PrunedView]


class AdapterView(Struct, frozen=True):
    id: str
    task: str
    class_index: int
    branches: list[str]
    sites: int
    rank: int
    bytes: int


class RouterView(Struct, frozen=True):
    kind: str
    granularity: str
    classes: int
    selection: str
    bytes: int


class BundleView(Struct, frozen=True, tag_field="kind", tag="bundle"):
    path: str
    name: str
    base: BaseView
    adapters: list[AdapterView]
    router: RouterView | None
    tasks: int


class CoremlView(Struct, frozen=True):
    """What each .mlpackage needs, and what every device profile says of all of them together."""

    parts: dict[str, fitness.Fitness]
    devices: dict[str, fitness.Verdict]


class PackageView(Struct, frozen=True, tag_field="kind", tag="package"):
    path: str
    name: str
    target: str
    recipe: str
    base_fingerprint: str
    model: packages.ModelInfo
    represented: list[packages.Represented]
    zeros: packages.Zeros | None
    slots: int
    gate: str
    adapters: list[AdapterView]
    router: RouterView | None
    files: dict[str, packages.FileEntry]
    versions: dict[str, str]
    coreml: CoremlView | None


def inspect(path: Path) -> BundleView | PackageView:
    """Look at a bundle or a package; only headers of large files are read."""
    if (path / manifest.FILE).is_file():
        return _bundle(path)
    if (path / packages.FILE).is_file():
        return _package(path)
    found = "a directory without them" if path.is_dir() else "a file" if path.exists() else "nothing"
    raise PackageError(mismatch(path, "content", f"a directory with {manifest.FILE} or {packages.FILE}", found))


def _step(step: CompressionStep) -> str:
    group = f"group {step.group_size}" if step.group_size else ""
    zero = "zero points" if step.symmetric is False else ""
    return " ".join(filter(None, [step.scheme, step.pattern, group, zero]))


def _pruned(bundle: bundles.Bundle, step: CompressionStep) -> PrunedView:
    formats = bundle.weights.formats
    sites = bundles.expand_sites(step.sites, formats)
    size = sum(_nbytes(bundle, site) for site in sites)
    return PrunedView(step.pattern or "", len(sites), size, size // 2 if step.pattern == "2:4" else None)


def _nbytes(bundle: bundles.Bundle, site: str) -> int:
    """Of a weight's numbers as they are stored, without scales."""
    kept = bundle.weights.formats[site]
    if kept.bits is not None:
        return prod(kept.shape) * kept.bits // 8
    info = bundle.base.info(f"{site}.weight")
    return info.end - info.start


def _is_part(tensor: str, packed: Collection[str]) -> bool:
    """Whether a tensor is part of how a module's weight is packed."""
    owner, _, leaf = tensor.rpartition(".")
    while owner and owner not in packed:
        owner = owner.rpartition(".")[0]
    return bool(owner) and leaf != "bias"


def _bundle(path: Path) -> BundleView:
    bundle = bundles.load(path)
    config = strict_json.read(path / "base" / "config.json", BaseConfig, "base/config.json")
    formats = bundle.weights.formats
    packed = {name for name, kept in formats.items() if kept.bits}
    other = sum(prod(bundle.base.info(name).shape) for name in bundle.base.names() if not _is_part(name, packed))
    linear = sum(prod(formats[name].shape) for name in packed)
    steps = [_step(step) for step in bundle.manifest.base.compression]
    stored = Counter(kept.scheme for kept in formats.values())
    base = BaseView(
        config.model_type,
        linear + other,
        bundle.base.nbytes,
        bundle.manifest.base.fingerprint,
        steps,
        dict(stored),
        [_pruned(bundle, step) for step in bundle.manifest.base.compression if step.pattern in ("2:4", "unstructured")],
    )
    spec = bundle.manifest.router
    return BundleView(
        str(path),
        bundle.manifest.name,
        base,
        [_adapter(bundle, adapter) for adapter in bundle.manifest.adapters],
        _router(spec, _size(path / "router")) if spec else None,
        len(bundle.manifest.tasks),
    )


def _adapter(bundle: bundles.Bundle, adapter: manifest.AdapterSpec) -> AdapterView:
    branches = [f"{branch.role} r{branch.r}{_times(branch)} {branch.act}" for branch in adapter.branches]
    sites = {s for branch in adapter.branches for s in bundles.expand_sites(branch.sites, bundle.adaptable)}
    ranks = [(branch.act, branch.r * (branch.experts or 1)) for branch in adapter.branches]
    kinds = {act: max((r for own, r in ranks if own == act), default=0) for act in ("identity", "gelu")}
    size = _size(bundle.adapter_dir(adapter.id))
    return AdapterView(adapter.id, adapter.task, adapter.class_index, branches, len(sites), sum(kinds.values()), size)


def _times(branch: manifest.Branch) -> str:
    return f" × {branch.experts}" if branch.experts else ""


def _held(entry: AdapterEntry) -> list[str]:
    """What an adapter's file gives to the slots."""
    held = [f"{entry.rank - entry.recovery_rows} identity rows", f"{entry.recovery_rows} gelu rows"]
    if entry.shared is not UNSET:
        held.append(f"cores in {entry.shared}")
    return held if entry.kind is UNSET else [*held, _BESIDE_ROWS[entry.kind]]


def _package(path: Path) -> PackageView:
    package = packages.load(path)
    made = package.manifest
    adapters = [
        AdapterView(
            entry.id,
            entry.task,
            entry.class_index,
            _held(entry),
            entry.sites,
            entry.rank,
            _stored(made.files, entry.file),
        )
        for entry in made.adapters
    ]
    router = _router(made.router.spec, _stored(made.files, made.router.file)) if made.router else None
    parts = fitness.of_package(path)
    return PackageView(
        str(path),
        made.name,
        made.target,
        made.recipe,
        made.base_fingerprint,
        made.model,
        list(made.represented),
        made.zeros or None,
        len(made.slots.tensors),
        made.slots.gate,
        adapters,
        router,
        made.files,
        made.versions,
        CoremlView(parts, fitness.by_device(parts)) if parts else None,
    )


def _stored(files: Mapping[str, packages.FileEntry], name: str) -> int:
    """Bytes of a file, or of all in a directory."""
    return sum(entry.size for file, entry in files.items() if file == name or file.startswith(f"{name}/"))


def _router(spec: manifest.RouterSpec, size: int) -> RouterView:
    chosen = spec.selection
    if chosen is None:
        return RouterView(spec.kind, spec.granularity, len(spec.classes), "fixed gates", size)
    parameter = {
        "top_p": f" p={chosen.p}",
        "top_k": f" k={chosen.k}",
        "threshold": f" {chosen.threshold}",
        "all": "",
    }
    selection = f"{chosen.select}{parameter[chosen.select]}, weights {chosen.weights}"
    return RouterView(spec.kind, spec.granularity, len(spec.classes), selection, size)


def _size(directory: Path) -> int:
    return sum(file.stat().st_size for file in directory.rglob("*") if file.is_file())
