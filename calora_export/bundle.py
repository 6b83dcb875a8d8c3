"""A bundle: the directory of docs/bundle.md, checked on load so that everything after it can trust it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from calora_export import adapter_format, layouts, moefied, router_config, strict_json
from calora_export.compression import DenseWeight, PackedWeight, WeightFormat, quantize_symmetric
from calora_export.errors import BundleError, FingerprintError, UnsupportedError, mismatch, one_of
from calora_export.layouts import Checkpoint
from calora_export.manifest import (
    FILE,
    AdapterSpec,
    BaseSpec,
    Branch,
    CompressionStep,
    Manifest,
    RouterSpec,
    Selection,
    TaskSpec,
    read_manifest,
    write_manifest,
    wrong,
)
from calora_export.moefied import Experts
from calora_export.router_config import EncoderConfig, TableConfig
from calora_export.sites import collapse_sites, expand_sites, owners
from calora_export.tensors import FLOATS, TensorIndex

__all__ = [
    "AdapterSpec",
    "BaseConfig",
    "BaseSpec",
    "Branch",
    "Bundle",
    "CompressionStep",
    "Manifest",
    "RouterSpec",
    "Selection",
    "TaskSpec",
    "collapse_sites",
    "expand_sites",
    "load",
    "open_base",
    "read_base",
    "read_base_config",
    "read_manifest",
    "write_manifest",
]

Size = Annotated[int, Meta(ge=1)]


class BaseConfig(msgspec.Struct, frozen=True):
    """What of a base's config.json every step needs; the rest is the model library's."""

    model_type: str
    vocab_size: Size
    hidden_size: Size
    quantization_config: dict[str, object] | None = None

    @property
    def layout(self) -> bytes | None:
        """What `layouts` reads: the quantization_config as JSON."""
        return None if self.quantization_config is None else msgspec.json.encode(self.quantization_config)


class _Tokenizer(msgspec.Struct, frozen=True):
    model: msgspec.Raw


class _TaskModel(msgspec.Struct, frozen=True):
    type: Literal["WordLevel"]
    vocab: dict[str, int]


class _TaskTokenizer(msgspec.Struct, frozen=True):
    model: _TaskModel


class _Example(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    prompt: str
    completion: str


@dataclass(frozen=True)
class Bundle:
    """A checked bundle. `weights`: every 2-D weight of the base; `embeddings`: which of them are lookups."""

    path: Path
    manifest: Manifest
    weights: Checkpoint
    embeddings: tuple[str, ...]

    @property
    def base(self) -> TensorIndex:
        """The tensors of the base as they lie in its files."""
        return self.weights.tensors

    @cached_property
    def linears(self) -> dict[str, tuple[int, int]]:
        """(out, in) of every 2-D weight of the base."""
        return {name: stored.shape for name, stored in self.weights.formats.items()}

    @cached_property
    def structured(self) -> frozenset[str]:
        """The modules whose widths are those of their tensors, whatever config.json says (LLM-Pruner)."""
        steps = [step for step in self.manifest.base.compression if step.pattern == "structured"]
        return frozenset(site for step in steps for site in expand_sites(step.sites, self.weights.formats))

    @cached_property
    def _top_k(self) -> dict[str, int]:
        steps = [(step.top_k, step) for step in self.manifest.base.compression if step.top_k is not None]
        return {site: top_k for top_k, step in steps for site in expand_sites(step.sites, self.weights.formats)}

    def experts(self, module: str) -> Experts | None:
        """The experts among a layer's neurons, None where it was not MoEfied."""
        top_k = self._top_k.get(module)
        return None if top_k is None else moefied.read(self.base, module, self.linears[module], top_k)

    @cached_property
    def w8a8(self) -> frozenset[str]:
        """The layers that read x rounded to int8, whatever a recipe says."""
        steps = [step for step in self.manifest.base.compression if step.activations is not None]
        return frozenset(site for step in steps for site in expand_sites(step.sites, self.weights.formats))

    def weight(self, module: str) -> DenseWeight | PackedWeight:
        """The weight of a module as it is stored. Where W8A8 was trained on floats, with scales of their type, it is
        what that training multiplied with: rounded to int8 rows.
        """
        stored = self.weights.read(module)
        if module not in self.w8a8:
            return stored
        if isinstance(stored, DenseWeight):
            stored = quantize_symmetric(stored.dequantize(), 8, stored.shape[1], stored.values.dtype.type)
        return replace(stored, activations="int8_absmax")

    @property
    def adaptable(self) -> dict[str, tuple[int, int]]:
        """The linears that can carry an adapter: all but the embeddings."""
        return {name: shape for name, shape in self.linears.items() if name not in self.embeddings}

    def adapter(self, identifier: str) -> AdapterSpec:
        """The manifest's entry of an adapter; BundleError when there is none of that id."""
        for adapter in self.manifest.adapters:
            if adapter.id == identifier:
                return adapter
        known = [adapter.id for adapter in self.manifest.adapters]
        raise wrong("adapters", one_of(known) if known else "none, the bundle has no adapters", identifier)

    @cached_property
    def hidden(self) -> int:
        """How wide what flows from layer to layer is."""
        return read_base_config(self.path / "base", "base").hidden_size

    @cached_property
    def bases(self) -> dict[str, TensorIndex]:
        """What adapters share, by the name of the basis."""
        named = {branch.basis for adapter in self.manifest.adapters for branch in adapter.branches}
        return {name: adapter_format.open_basis(self.path, name) for name in sorted(filter(None, named))}

    def adapter_dir(self, identifier: str) -> Path:
        """adapters/<id>, where the adapter's files are."""
        return self.path / "adapters" / self.adapter(identifier).id


def load(path: Path, *, deep: bool = False) -> Bundle:
    """Read and check the bundle at `path`; only headers of the base are read.

    `deep` also reads all of the base: its fingerprint and NaN or Inf. Raises BundleError, FingerprintError or
    UnsupportedError with one line: file (relative to the bundle), key, expected, found.
    """
    if not path.is_dir():
        found = "a file" if path.exists() else "nothing"
        raise BundleError(mismatch(path, "bundle", f"a directory with {FILE}", found))
    if not (path / FILE).is_file():
        model = (path / "config.json").is_file()
        hint = "a model becomes a bundle by `calora-export import peft`" if model else ""
        raise BundleError(mismatch(FILE, "file", "a file", f"nothing in {path}", hint))
    manifest = read_manifest(path)
    bundle = Bundle(path, manifest, *open_base(path / "base", "base"))
    _check_compression(manifest, bundle.weights.formats)
    _check_experts(bundle)
    for index, adapter in enumerate(manifest.adapters):
        _check_adapter(bundle, adapter, f"adapters[{index}]")
    if manifest.router is not None:
        _check_router(path / "router", manifest.router)
    for index, task in enumerate(manifest.tasks):
        _check_eval(path, task, f"tasks[{index}].eval")
    if deep:
        check_bytes(bundle)
    return bundle


def read_base(directory: Path, label: str) -> tuple[TensorIndex, dict[str, WeightFormat], tuple[str, ...]]:
    """The tensors of a Hugging Face model directory, every 2-D weight's format, and which are embeddings."""
    weights, embeddings = open_base(directory, label)
    return weights.tensors, weights.formats, embeddings


def open_base(directory: Path, label: str) -> tuple[Checkpoint, tuple[str, ...]]:
    """The weights of a Hugging Face model directory, and which of them are embeddings."""
    config_file = f"{label}/config.json"
    config = read_base_config(directory, label)
    _read_tokenizer(directory, label)
    weights = layouts.checkpoint(TensorIndex.open(directory, label), config.layout, config_file)
    embeddings = tuple(name for name, stored in weights.formats.items() if _is_embedding(name, stored, config))
    if not embeddings:
        raise BundleError(mismatch(config_file, "vocab_size", "the rows of an embedding", config.vocab_size))
    return weights, embeddings


def read_base_config(directory: Path, label: str) -> BaseConfig:
    """config.json of a Hugging Face model directory; UnsupportedError for a layout that is not read."""
    config = strict_json.read(directory / "config.json", BaseConfig, f"{label}/config.json")
    if config.layout is not None:
        layouts.find(config.layout, f"{label}/config.json")
    return config


def _read_tokenizer(directory: Path, label: str) -> None:
    file = directory / "tokenizer.json"
    if not file.is_file() and (directory / "tokenizer.model").is_file():
        hint = "AutoTokenizer.from_pretrained(…).save_pretrained(…) writes it"
        raise BundleError(mismatch(f"{label}/tokenizer.json", "file", "a file", "only tokenizer.model", hint))
    _check_tokenizer(strict_json.read_bytes(file, f"{label}/tokenizer.json"), f"{label}/tokenizer.json")


def _check_tokenizer(data: bytes, file: str) -> None:
    # Decoded as Raw: a vocabulary of many megabytes is scanned, not built.
    try:
        msgspec.json.decode(data, type=_Tokenizer)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as problem:
        raise BundleError(
            mismatch(file, "JSON", "a tokenizers document with a model", f"an error: {problem}")
        ) from None


def _is_embedding(name: str, stored: WeightFormat, config: BaseConfig) -> bool:
    # An embedding stands outside of the numbered layers; lm_head has its shape but is a linear.
    parts = name.split(".")
    return stored.shape[0] == config.vocab_size and parts[-1] != "lm_head" and not any(map(str.isdecimal, parts))


def _check_compression(manifest: Manifest, formats: dict[str, WeightFormat]) -> None:
    """Every step that packs must describe what is stored, and everything stored packed must be described."""
    described: set[str] = set()
    for index, step in enumerate(manifest.base.compression):
        key = f"base.compression[{index}]"
        sites = expand_sites(step.sites, formats, FILE, f"{key}.sites")
        if step.scheme in ("prune", "moefy"):
            continue
        for site in sites:
            stored = formats[site]
            if step.activations and (stored.bits is None or not stored.symmetric or stored.codebook):
                if stored.bits is None and step.group_size is None and step.symmetric:
                    continue  # W8A8 of floats: rounded at inference, as in training
                raise wrong(f"{key}.activations", f"symmetric int8 rows, or floats, of {site}", stored.scheme)
            if stored.scheme != step.scheme:
                raise wrong(f"{key}.scheme", f"{stored.scheme}, as {site} is stored", step.scheme)
            group_size = step.group_size or stored.shape[1]
            if group_size != stored.group_size:
                raise wrong(f"{key}.group_size", f"{stored.group_size}, as {site} is stored", step.group_size)
            if step.symmetric is not None and step.symmetric != stored.symmetric:
                shown = str(stored.symmetric).lower()
                raise wrong(f"{key}.symmetric", f"{shown}, as {site} is stored", str(step.symmetric).lower())
        described.update(sites)
    for name, stored in formats.items():
        if stored.bits is not None and name not in described:
            raise wrong("base.compression", f"an {stored.scheme} step with {name}, which is stored packed", "none")


def _check_experts(bundle: Bundle) -> None:
    """Every MoEfied layer has its experts, and nothing else has any."""
    declared = {site for site in bundle.linears if bundle.experts(site) is not None}
    if extra := sorted(set(moefied.sites(bundle.base)) - declared):
        raise wrong("base.compression", f"a moefy step with {extra[0]}, which has experts", "none")


def _check_adapter(bundle: Bundle, adapter: AdapterSpec, key: str) -> None:
    directory, label = bundle.path / "adapters" / adapter.id, f"adapters/{adapter.id}"
    linears = bundle.adaptable
    config = adapter_format.read_config(directory, label)
    branches = adapter_format.declared_branches(adapter.branches, config, linears, key, label)
    tensors, scopes = adapter_format.open_weights(directory, label), router_scopes(adapter, linears, key)
    adapter_format.check_tensors(tensors, branches, linears, bundle.bases, scopes)
    features = {tensors.info(adapter_format.router_tensors(scope)[0]).shape[1] for scope in scopes}
    if features - {bundle.hidden}:
        raise BundleError(mismatch(tensors.label, "token_router", f"{bundle.hidden} features", sorted(features)))
    biased = [b.site for b in branches if b.role == "scale" and f"{b.site}.bias" in bundle.base.tensors]
    if biased:
        hint = "FLoRA's formula has no bias"
        raise UnsupportedError(mismatch(label, biased[0], "scales of a layer without bias", "one with a bias", hint))


def router_scopes(adapter: AdapterSpec, linears: Mapping[str, tuple[int, int]], key: str) -> tuple[str, ...]:
    """The modules by whose input an adapter's experts are weighed; BundleError for experts below none of them."""
    if adapter.token_router is None:
        return ()
    scopes = expand_sites(adapter.token_router, owners(linears), FILE, f"{key}.token_router")
    for index, branch in enumerate(adapter.branches):
        sites = expand_sites(branch.sites, linears, FILE, f"{key}.branches[{index}].sites")
        outside = [site for site in sites if not site.startswith(tuple(f"{scope}." for scope in scopes))]
        if branch.role == "expert" and outside:
            raise wrong(f"{key}.branches[{index}].sites", "layers below a module of token_router", outside[0])
    return scopes


def _check_router(directory: Path, router: RouterSpec) -> None:
    file = "router/config.json"
    config = router_config.read(directory, "router", router.kind)
    if config.num_classes != len(router.classes):
        expected = f"{len(router.classes)}, the number of router.classes"
        raise BundleError(mismatch(file, "num_classes", expected, config.num_classes))
    if isinstance(config, EncoderConfig) and router.max_length > config.positions - config.position_offset:
        expected = f"at most {config.positions - config.position_offset}, the encoder's positions"
        raise wrong("router.max_length", expected, router.max_length)
    _read_tokenizer(directory, "router")
    if isinstance(config, TableConfig) and router.kind == "task_id":
        _check_tasks(directory / "tokenizer.json", config.rows)
    _check_exact(TensorIndex.open(directory, "router"), config.shapes())


def _check_tasks(tokenizer: Path, rows: int) -> None:
    file = "router/tokenizer.json"
    found = sorted(strict_json.read(tokenizer, _TaskTokenizer, file).model.vocab.values())
    if found != list(range(rows)):
        shown = f"rows {', '.join(map(str, found[:9]))}"
        raise BundleError(mismatch(file, "model.vocab", f"a task for each of {rows} rows", shown))


def _check_exact(tensors: TensorIndex, expected: dict[str, tuple[int, ...]]) -> None:
    for name, shape in expected.items():
        info = tensors.info(name)
        if info.shape != shape or info.dtype not in FLOATS:
            wanted, found = f"{' or '.join(FLOATS)} {list(shape)}", f"{info.dtype} {list(info.shape)}"
            raise BundleError(mismatch(tensors.file_of(name), name, wanted, found))
    for name in tensors.names():
        if name not in expected:
            wanted = f"only {', '.join(list(expected)[:9])}{' …' if len(expected) > 9 else ''}"
            raise BundleError(mismatch(tensors.file_of(name), name, wanted, "this tensor"))
    if (name := tensors.first_nonfinite()) is not None:
        raise BundleError(mismatch(tensors.file_of(name), name, "finite values", "NaN or Inf"))


def _check_eval(bundle: Path, task: TaskSpec, key: str) -> None:
    parts = PurePosixPath(task.eval).parts
    if task.eval.startswith("/") or ".." in parts or not task.eval.isprintable():
        raise wrong(key, "a path inside the bundle", strict_json.show(task.eval))
    try:
        lines = strict_json.read_bytes(bundle / task.eval, task.eval).splitlines()
    except BundleError as problem:
        raise BundleError(f"{problem} (named by {FILE}: {key})") from None
    if not lines:
        raise BundleError(mismatch(task.eval, "file", "at least one line", "none"))
    for number, line in enumerate(lines, start=1):
        strict_json.decode(line, _Example, f"{task.eval}:{number}")


def check_bytes(bundle: Bundle) -> None:
    """What `load` does not, unless it is to be deep: read all of the base."""
    stored = bundle.base.fingerprint()
    if stored != bundle.manifest.base.fingerprint:
        hint = "base/ is not the base that the adapters were trained for"
        raise FingerprintError(mismatch(FILE, "base.fingerprint", stored, bundle.manifest.base.fingerprint, hint))
    if (name := bundle.base.first_nonfinite()) is not None:
        raise BundleError(mismatch(bundle.base.file_of(name), name, "finite values", "NaN or Inf"))
