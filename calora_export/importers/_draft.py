"""A bundle under construction: it appears whole, and passes the bundle's own checks, or not at all."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from calora_export import adapter_format, moefied, strict_json
from calora_export.bundle import load, read_base, read_base_config
from calora_export.compression import WeightFormat
from calora_export.errors import BundleError, UnsupportedError, mismatch
from calora_export.manifest import (
    AdapterSpec,
    BaseSpec,
    Branch,
    CompressionStep,
    Manifest,
    RouterSpec,
    check_id,
    write_manifest,
)
from calora_export.sites import collapse_sites, owners, starred

_SMALL = (".json", ".txt", ".model", ".jinja")
_SMALL_BYTES = 64 << 20  # the largest tokenizer.json in use has about half of that


class _WeightsIndex(msgspec.Struct, frozen=True):
    weight_map: dict[str, str]


@dataclass
class Draft:
    """The base is there and checked; `linears`: (out, in) of every layer that can carry an adapter."""

    path: Path
    linears: Mapping[str, tuple[int, int]]
    formats: Mapping[str, WeightFormat]
    fingerprint: str
    adapters: list[AdapterSpec] = field(default_factory=list)
    router: RouterSpec | None = None

    def adapter_dir(self, identifier: str) -> Path:
        """The new, empty directory of an adapter."""
        directory = self.path / "adapters" / identifier
        directory.mkdir(parents=True)
        return directory

    def add(self, identifier: str, branches: tuple[Branch, ...], scopes: Sequence[str] = ()) -> None:
        """The next adapter: its class_index is its place. scopes: the modules that weigh its experts."""
        router = collapse_sites(scopes, owners(self.linears)) or None
        numbers = len(self.adapters), self.fingerprint
        self.adapters.append(AdapterSpec(identifier, identifier, *numbers, branches, token_router=router))


@contextmanager
def draft(base: Path, out: Path, name: str | None, source: str, top_k: int | None = None) -> Iterator[Draft]:
    """Copy and check the model directory `base`, let the caller add adapters, then put the bundle at `out`.

    `source` is the format's name, for the provenance; top_k is how many experts of MoEfied layers compute. BundleError
    or UnsupportedError in one line.
    """
    _check_out(out)
    if not base.is_dir():
        hint = "" if base.exists() else "nothing is downloaded: a model of a hub must be on this disk"
        raise BundleError(mismatch(base, "base", "a model directory", "a file" if base.exists() else "nothing", hint))
    read_base_config(base, str(base))  # refuse what is not read before copying gigabytes
    with _staged(out) as staging:
        _copy_base(base, staging / "base")
        tensors, formats, embeddings = read_base(staging / "base", "base")
        if (bad := tensors.first_nonfinite()) is not None:
            raise BundleError(mismatch(tensors.file_of(bad), bad, "finite values", "NaN or Inf"))
        experts = _experts_step(moefied.sites(tensors), formats, top_k)
        linears = {module: stored.shape for module, stored in formats.items() if module not in embeddings}
        made = Draft(staging, linears, formats, tensors.fingerprint())
        yield made
        manifest = Manifest(
            schema_version=1,
            name=name or out.resolve().name,
            base=BaseSpec(made.fingerprint, (*experts, *_compression_steps(formats))),
            adapters=tuple(made.adapters),
            router=made.router,
            tasks=(),
            provenance={"imported_from": source, "base": base.resolve().name},
        )
        write_manifest(staging, manifest)
        load(staging)


def adapter_id(path: Path, taken: Sequence[str]) -> str:
    """A directory's or a file's name without its suffix, if it can be an id and is not `taken`."""
    identifier = path.resolve().name if path.is_dir() else path.stem
    key = "directory name" if path.is_dir() else "file name"
    check_id(identifier, str(path), key)
    if identifier in taken:
        raise BundleError(mismatch(path, key, "an id of its own", f"{identifier} again"))
    return identifier


def directory_ids(adapters: Sequence[Path]) -> list[str]:
    """The ids of adapter directories; BundleError for one that is none."""
    ids: list[str] = []
    for path in adapters:
        if not path.is_dir():
            hint = "import ca-lora, mtl-lora, multilora and lots read state dicts" if path.exists() else ""
            raise BundleError(mismatch(path, "adapter", "a directory", "a file" if path.exists() else "nothing", hint))
        if (path / "config.json").is_file() and not (path / adapter_format.CONFIG).is_file():
            hint = "merging can not be undone: save every LoRA before merge_and_unload"
            found = "a whole model, its LoRAs merged into it"
            raise UnsupportedError(mismatch(path, "adapter", f"{adapter_format.CONFIG} with its A and B", found, hint))
        ids.append(adapter_id(path, ids))
    return ids


def _check_out(out: Path) -> None:
    if out.is_dir() and not any(out.iterdir()):
        return
    if out.exists() or out.is_symlink():
        hint = "remove it, or choose another name"
        raise BundleError(mismatch(out, "output", "a new or empty directory", "one with content", hint))


@contextmanager
def _staged(out: Path) -> Iterator[Path]:
    """A sibling of `out` to write into, renamed to `out` at the end; an error leaves nothing behind."""
    target = out.resolve()
    staging: Path | None = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
        staging.chmod(0o755)
        yield staging
        os.rename(staging, target)
    except OSError as problem:
        raise BundleError(mismatch(out, "output", "a bundle that can be written", problem.strerror)) from None
    finally:
        if staging is not None:
            shutil.rmtree(staging, ignore_errors=True)


def _copy_base(base: Path, destination: Path) -> None:
    destination.mkdir()
    for name in _weight_files(base):
        shutil.copyfile(base / name, destination / name)
    for file in sorted(base.iterdir()):
        small = file.suffix in _SMALL and file.is_file() and file.stat().st_size <= _SMALL_BYTES
        if small and not file.name.startswith("adapter_"):
            shutil.copyfile(file, destination / file.name)


def _weight_files(base: Path) -> list[str]:
    """The safetensors files that hold the model: some repositories carry a second copy in another layout."""
    index = base / "model.safetensors.index.json"
    if index.is_file():
        shards = sorted(set(strict_json.read(index, _WeightsIndex, str(index)).weight_map.values()))
        for shard in shards:
            if Path(shard).name != shard or not (base / shard).is_file():
                raise BundleError(mismatch(index, "weight_map", "files beside it", f"{shard}, which is not there"))
        return shards
    if (base / "model.safetensors").is_file():
        return ["model.safetensors"]
    files = sorted(file.name for file in base.glob("*.safetensors"))
    if not files:
        pickles = sorted(file.name for file in base.glob("*.bin"))
        hint = "pickles are not loaded: save_pretrained the model again as safetensors" if pickles else ""
        raise BundleError(mismatch(base, "*.safetensors", "at least one file", pickles[0] if pickles else "none", hint))
    return files


def _experts_step(
    sites: Sequence[str], formats: Mapping[str, WeightFormat], top_k: int | None
) -> tuple[CompressionStep, ...]:
    if sites and top_k is None:
        raise BundleError(mismatch("base/", "--top-k", f"how many experts of {sites[0]} compute", "nothing"))
    return (CompressionStep("moefy", collapse_sites(sites, formats), top_k=top_k),) if sites else ()


def _compression_steps(formats: Mapping[str, WeightFormat]) -> tuple[CompressionStep, ...]:
    """Pruning where layers have widths of their own, then one step per form that is stored; a group as wide as the row
    is one scale per row."""
    shapes: dict[str, set[tuple[int, int]]] = {}
    for module, stored in formats.items():
        shapes.setdefault(starred(module), set()).add(stored.shape)
    uneven = [module for module in formats if len(shapes[starred(module)]) > 1]
    steps = [CompressionStep("prune", collapse_sites(uneven, formats), pattern="structured")] if uneven else []
    forms: dict[tuple[str, int, bool, bool], list[str]] = {}
    for module, stored in formats.items():
        if stored.bits is not None and stored.group_size is not None:
            per_row = stored.group_size == stored.shape[1]
            form = (stored.scheme, 0 if per_row else stored.group_size, stored.symmetric, stored.int8_activations)
            forms.setdefault(form, []).append(module)
    steps += [
        CompressionStep(
            scheme=scheme,  # type: ignore[arg-type]
            sites=collapse_sites(modules, formats),
            group_size=group_size or None,
            symmetric=None if scheme == "nf4" else symmetric,
            activations="int8" if int8 else None,
        )
        for (scheme, group_size, symmetric, int8), modules in sorted(forms.items())
    ]
    return tuple(steps)
