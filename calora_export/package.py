"""A package: what an app ships. package.json says what every file is for and what it must hash to."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

import msgspec
from msgspec import UNSET, Struct, UnsetType

from calora_export import strict_json
from calora_export.adapters import Kind, require_mixable
from calora_export.errors import FingerprintError, PackageError, mismatch, one_of
from calora_export.manifest import RouterSpec, TaskSpec
from calora_export.recipe import Recipe

FILE = "package.json"


class SlotTensor(Struct, frozen=True, forbid_unknown_fields=True):
    """Where one site's rows go.

    The tensor `down` [parts · R, inputs] holds the rows of `parts` sites that share an input, this site's at
    [part · R, (part + 1) · R); the tensor `up` is [R, outputs].
    """

    site: str
    down: str
    part: int
    parts: int
    up: str
    inputs: int
    outputs: int


class Routed(Struct, frozen=True, forbid_unknown_fields=True):
    """Modules by whose input, of that many features, each token weighs the experts of an adapter."""

    scopes: tuple[str, ...]
    experts: int
    features: int


class Slots(Struct, frozen=True, forbid_unknown_fields=True):
    """The slot contract as a target realised it.

    gate says what carries the gates. recovery names the input [R] that marks GELU rows, if rows may be non-linear;
    fingerprint the uint8 [32] input by which an adapter file tells its base. rows: the one input of an ONNX graph that
    holds all matrices [R, …] of an adapter one after the other, for each group every `down` and then every `up`; left
    out where they are inputs of their own. dtype int8: each row of a matrix is times a number of `scales`
    [matrices · R], in the same order. scaled: sites whose input and output an adapter may multiply; routed: what weighs
    experts by token. Both only where an adapter of the bundle has such.
    """

    rank: Literal["dynamic"] | int
    gate: str
    recovery: str | None
    fingerprint: str
    dtype: Literal["fp32", "fp16", "int8"]
    tensors: tuple[SlotTensor, ...]
    rows: str | UnsetType = UNSET
    scaled: tuple[str, ...] | UnsetType = UNSET
    routed: Routed | UnsetType = UNSET

    def linears(self) -> dict[str, tuple[int, int]]:
        """Site → (out, in)."""
        return {tensor.site: (tensor.outputs, tensor.inputs) for tensor in self.tensors}

    def row_bytes(self) -> int:
        """Of one row of every tensor, with its scales if it is int8."""
        size, scales = {"fp32": (4, 0), "fp16": (2, 0), "int8": (1, 8)}[self.dtype]
        return sum((slot.inputs + slot.outputs) * size + scales for slot in self.tensors)

    def groups(self) -> list[list[SlotTensor]]:
        """Slots that share an input, in the order of an adapter file."""
        return groups_of(self.tensors)


def groups_of(tensors: Sequence[SlotTensor]) -> list[list[SlotTensor]]:
    groups: list[list[SlotTensor]] = []
    for slot in tensors:
        if slot.part == 0:
            groups.append([])
        groups[-1].append(slot)
    return groups


class AdapterEntry(Struct, frozen=True, forbid_unknown_fields=True):
    """One adapter file. stated: its trainer said which base it is for; else that was assumed when it was added.
    shared: the file of what it shares with other adapters (`factors`). kind: left out for rows alone."""

    id: str
    task: str
    class_index: int
    file: str
    rank: int
    recovery_rows: int
    sites: int
    fingerprint: str
    stated: bool = True
    shared: str | UnsetType = UNSET
    kind: Kind | UnsetType = UNSET


class JointAdapter(Struct, frozen=True, forbid_unknown_fields=True):
    """error: ‖ΔW − U Σ Vᵀ‖ / ‖ΔW‖ over all sites. bytes: of its file; plain_bytes: of its rows as plain LoRA."""

    id: str
    error: float
    bytes: int
    plain_bytes: int


class JointBasis(Struct, frozen=True, forbid_unknown_fields=True):
    """What a recipe's joint_basis did. bytes: of the shared file; kept: adapters that are not linear, left as they
    are."""

    file: str
    bytes: int
    adapters: tuple[JointAdapter, ...]
    kept: tuple[str, ...]


class Represented(Struct, frozen=True, forbid_unknown_fields=True):
    """A weight that is not exactly as the bundle has it; sqnr_db is the signal-to-noise ratio of the change.

    stored and held: `float`, or bits and group size, such as `int8/32`, a group of 0 being a row; `uint4/32` has zero
    points, `nf4/64` a codebook.
    """

    module: str
    stored: str
    held: str
    sqnr_db: float


class Zeros(Struct, frozen=True, forbid_unknown_fields=True):
    """The zeros of pruned weights: of those of which, as the bundle has them, a mask and the other numbers take less.

    weights: how many those are; numbers: in them; zeros: of these. bytes: what the zeros take in the model's files,
    `dense` as numbers like the others, `sparse` as a mask of a bit a number.
    """

    weights: int
    numbers: int
    zeros: int
    stored: Literal["dense", "sparse"]
    bytes: int


class RouterEntry(Struct, frozen=True, forbid_unknown_fields=True):
    """The router's file, its tokenizer, and how the text gets to it."""

    file: str
    tokenizer: str
    spec: RouterSpec


class ModelInfo(Struct, frozen=True, forbid_unknown_fields=True):
    """Sizes of the base that a runtime must know; context in positions.

    heads and kv_heads: of every layer, or a list by layer where they are not alike.
    """

    file: str
    architecture: str
    layers: int
    heads: int | tuple[int, ...]
    kv_heads: int | tuple[int, ...]
    head_dim: int
    hidden: int
    vocab: int
    context: int
    logits: Literal["last", "all"]
    bos: int | None
    eos: tuple[int, ...]

    def caches(self, length: int) -> dict[str, tuple[int, int, int, int]]:
        """`<layer>.key` and `<layer>.value` → [1, KV, length, D], in order."""
        heads = (self.kv_heads,) * self.layers if isinstance(self.kv_heads, int) else self.kv_heads
        shapes = [(1, count, length, self.head_dim) for count in heads]
        return {f"{i}.{part}": shape for i, shape in enumerate(shapes) for part in ("key", "value")}


class FileEntry(Struct, frozen=True, forbid_unknown_fields=True):
    sha256: str
    size: int


class Manifest(Struct, frozen=True, forbid_unknown_fields=True):
    """All of package.json."""

    schema_version: Literal[1]
    name: str
    target: str
    recipe: str
    settings: Recipe
    base_fingerprint: str
    model: ModelInfo
    represented: tuple[Represented, ...]
    slots: Slots
    adapters: tuple[AdapterEntry, ...]
    router: RouterEntry | None
    tasks: tuple[TaskSpec, ...]
    tokenizer: str
    files: dict[str, FileEntry]
    versions: dict[str, str]
    joint_basis: JointBasis | UnsetType = UNSET
    zeros: Zeros | UnsetType = UNSET

    @property
    def nbytes(self) -> int:
        """Of all files."""
        return sum(entry.size for entry in self.files.values())

    @property
    def quantised(self) -> bool:
        """Whether the recipe quantised weights, or compressed adapters, that the bundle holds as floats."""
        return self.joint_basis is not UNSET or any(entry.stored == "float" for entry in self.represented)


@dataclass(frozen=True)
class Package:
    """An opened package."""

    path: Path
    manifest: Manifest

    def adapter(self, identifier: str) -> AdapterEntry:
        """The entry of one adapter, or an error that names those there are."""
        known = self._adapters
        if identifier not in known:
            raise PackageError(mismatch(FILE, "adapters", one_of(list(known)), identifier))
        return known[identifier]

    @cached_property
    def _adapters(self) -> dict[str, AdapterEntry]:
        """By id: a swap looks its adapter up."""
        return {adapter.id: adapter for adapter in self.manifest.adapters}

    def altered(self) -> list[str]:
        """One line per file that is missing or no longer has the bytes that package.json lists. Reads all of them."""
        lines = []
        for name, entry in self.manifest.files.items():
            path = self.path / name
            if not path.is_file():
                lines.append(mismatch(name, "file", "a file", "nothing"))
            elif (found := hash_file(path)).sha256 != entry.sha256:
                lines.append(mismatch(name, "sha256", entry.sha256, found.sha256))
        return lines

    def require_router(self) -> RouterEntry:
        """The router, or one line that says there is none."""
        if self.manifest.router is None:
            raise PackageError(mismatch(FILE, "router", "a router", "none", "name an adapter instead"))
        return self.manifest.router

    def require_room(self, total: int) -> None:
        """Refuse more tokens than the model has positions."""
        if total > self.manifest.model.context:
            expected = f"at most {self.manifest.model.context} tokens of prompt and answer"
            raise PackageError(mismatch(FILE, "model.context", expected, total))

    def require_rank(self, rank: int) -> None:
        """Refuse a mix of more rows than the model was made for."""
        if rank > self.manifest.settings.rank_budget:
            expected, hint = f"at least {rank}", "export with a higher one"
            budget = self.manifest.settings.rank_budget
            raise PackageError(mismatch(FILE, "settings.rank_budget", expected, budget, hint))

    def require_mixable(self, mix: Mapping[str, float]) -> None:
        """Refuse a mix of adapters that no formula adds up."""
        on = {identifier: gate for identifier, gate in mix.items() if gate != 0.0}
        kinds: dict[str, Kind] = {}
        for identifier in on:
            kind = self.adapter(identifier).kind
            kinds[identifier] = "rows" if isinstance(kind, UnsetType) else kind
        require_mixable(kinds, on)

    def require_fingerprint(self, adapter: str, fingerprint: str) -> None:
        """Refuse an adapter that was trained for another base."""
        if fingerprint != self.manifest.base_fingerprint:
            raise FingerprintError(
                mismatch(adapter, "base_fingerprint", self.manifest.base_fingerprint, fingerprint, "another base")
            )


def load(path: Path) -> Package:
    """Open a package: package.json is checked, and that every file it lists is there with its size."""
    if not (path / FILE).is_file():
        found = "a directory without one" if path.is_dir() else "a file" if path.exists() else "nothing"
        raise PackageError(mismatch(path, "package", f"a directory with {FILE}", found))
    manifest = strict_json.read(path / FILE, Manifest, FILE, PackageError)
    for name, entry in manifest.files.items():
        file = path / name
        size = file.stat().st_size if file.is_file() else "nothing"
        if size != entry.size:
            raise PackageError(mismatch(name, "size", entry.size, size, "the package is incomplete or was changed"))
    return Package(path, manifest)


def write_manifest(directory: Path, manifest: Manifest) -> None:
    """Write package.json so that it appears whole or not at all."""
    text = msgspec.json.format(msgspec.json.encode(manifest, order="deterministic"), indent=2)
    temporary = directory / f".{FILE}.{os.getpid()}"
    try:
        with temporary.open("wb") as file:
            file.write(text + b"\n")
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(directory / FILE)
    finally:
        temporary.unlink(missing_ok=True)


def hash_file(path: Path) -> FileEntry:
    with path.open("rb") as file:
        return FileEntry(hashlib.file_digest(file, "sha256").hexdigest(), path.stat().st_size)


def hash_files(directory: Path) -> dict[str, FileEntry]:
    """Every file below the directory but package.json and report/, by its relative name."""
    files = sorted(path for path in directory.rglob("*") if path.is_file())
    names = {path.relative_to(directory).as_posix(): path for path in files}
    return {n: hash_file(p) for n, p in names.items() if n != FILE and not n.startswith("report/")}


@contextmanager
def written(path: Path, marker: str) -> Iterator[Path]:
    """A temporary directory beside `path` that takes its place when the block ends well, and vanishes when it does not.

    An old directory is replaced only if it is empty or its `marker` is ours, so that a wrong -o destroys nothing.
    """
    if path.name in ("", ".."):
        raise PackageError(mismatch(path, "output", "a directory by its own name", "where it is"))
    try:
        if path.exists() and not (path.is_dir() and (_is_ours(path / marker) or not any(path.iterdir()))):
            expected = f"a new or empty directory, or one with a {marker} of this tool"
            found = "one with other content" if path.is_dir() else "a file"
            raise PackageError(mismatch(path, "output", expected, found, "choose another name"))
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    except OSError as error:
        raise PackageError(f"{path}: cannot be written: {error.strerror}") from error
    try:
        temporary.chmod(0o755)
        yield temporary
        _replace(path, temporary)
    except OSError as error:
        raise PackageError(f"{path}: cannot be written: {error.strerror or error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _is_ours(marker: Path) -> bool:
    """Tell package.json from npm's: ours has a schema_version."""
    try:
        document = msgspec.json.decode(marker.read_bytes())
    except (OSError, msgspec.MsgspecError, UnicodeDecodeError):
        return False
    return isinstance(document, dict) and "schema_version" in document


def _replace(path: Path, temporary: Path) -> None:
    """Put the new directory where the old one is; the old one is moved aside first, and back if that fails."""
    if not path.exists():
        temporary.replace(path)
        return
    aside = Path(tempfile.mkdtemp(prefix=f".{path.name}.old.", dir=path.parent))
    path.replace(aside / path.name)
    try:
        temporary.replace(path)
    except BaseException:  # Ctrl-C too
        (aside / path.name).replace(path)
        raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)
