"""bundle.json: its types, exactly as docs/bundle.md has them, and the checks that need no other file."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Literal

import msgspec
from msgspec import Meta, Struct

from calora_export import strict_json
from calora_export.errors import BundleError, FingerprintError, mismatch, one_of

FILE = "bundle.json"

Fingerprint = Annotated[str, Meta(pattern="^sha256:[0-9a-f]{64}$")]
Count = Annotated[int, Meta(ge=1)]
Index = Annotated[int, Meta(ge=0)]
Positive = Annotated[float, Meta(gt=0)]
Name = Annotated[str, Meta(min_length=1)]
Role = Literal["lora", "recovery", "expert", "scale"]
Sites = Annotated[tuple[str, ...], Meta(min_length=1)]

_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_INT = ("group_size", "symmetric")
_STEP_PARAMETERS = {
    "prune": ("pattern",),
    "moefy": ("top_k",),
    "int4": _INT,
    "int8": (*_INT, "activations"),
    "nf4": ("group_size",),
}
_OPTIONAL = ("group_size", "activations")
_SELECT_PARAMETER = {"top_p": "p", "top_k": "k", "threshold": "threshold", "all": None}


class Branch(Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """One pair of matrices per site, y += scale · up(act(down x)), with down [r, in] and up [out, r].

    What is `tied` is one tensor for all sites: the file holds it at the first of them. `basis`: down [r, in] and up
    [out, c] lie in shared/<basis>, for all adapters, and the file holds a core [c, r] or its diagonal between them.
    The role `expert` is `experts` such pairs, weighed by the adapter's token_router or expert_weights. The role `scale`
    is no pair, but what multiplies the layer's input and output: y = out ⊙ (base + slots)(in ⊙ x).
    """

    role: Role
    sites: Sites
    r: Count
    alpha: Positive
    scale: Positive
    act: Literal["identity", "gelu"]
    tied: tuple[Literal["down", "up"], ...] = ()
    basis: str | None = None
    experts: Count | None = None


class AdapterSpec(Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """One adapter: its files are in adapters/<id>/.

    token_router: the modules by whose input each token weighs the experts of the layers below them. expert_weights:
    weights that do not change instead, one for each expert.
    """

    id: str
    task: Name
    class_index: Index
    base_fingerprint: Fingerprint
    branches: Annotated[tuple[Branch, ...], Meta(min_length=1)]
    token_router: Sites | None = None
    expert_weights: Annotated[tuple[float, ...], Meta(min_length=1)] | None = None

    @property
    def experts(self) -> int:
        """How many each of its expert branches has; 0 without any."""
        return next((branch.experts for branch in self.branches if branch.experts is not None), 0)


class CompressionStep(Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """Done to the base: int4, int8, nf4 with columns per scale (None: one per row), ints with zero points unless they
    are symmetric; int8 with int8 activations where layers round x to int8, too, at every token; prune with a pattern:
    `structured` took whole heads and neurons, so that widths are not those of config.json but those of the tensors;
    moefy made experts of a layer's neurons, top_k of which compute.
    """

    scheme: Literal["prune", "moefy", "int4", "int8", "nf4"]
    sites: Sites
    group_size: Count | None = None
    symmetric: bool | None = None
    pattern: Literal["2:4", "unstructured", "structured"] | None = None
    top_k: Count | None = None
    activations: Literal["int8"] | None = None


class BaseSpec(Struct, frozen=True, forbid_unknown_fields=True):
    """The base model, in base/."""

    fingerprint: Fingerprint
    compression: tuple[CompressionStep, ...]


class Selection(Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """From logits to gates: which classes, and with which weights; `temperature` divides the logits."""

    select: Literal["top_p", "top_k", "threshold", "all"]
    weights: Literal["softmax_probs", "softmax_logits", "renorm", "uniform"]
    temperature: Positive
    p: Annotated[float, Meta(gt=0, le=1)] | None = None
    k: Count | None = None
    threshold: Annotated[float, Meta(ge=0, le=1)] | None = None


class RouterSpec(Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """The router, in router/. `classes[i]` is the adapter whose class_index is i.

    special_tokens: the tokenizer puts its own around the text, and truncation keeps them.
    """

    kind: Literal["classifier", "retrieval", "task_id", "static"]
    granularity: Literal["prompt", "sentence"]
    template: str
    max_length: Count
    truncation: Literal["left", "right"]
    classes: Annotated[tuple[str, ...], Meta(min_length=1)]
    selection: Selection | None = None
    special_tokens: bool = False


class TaskSpec(Struct, frozen=True, forbid_unknown_fields=True):
    """A task to measure: `eval` is a .jsonl file of the bundle."""

    id: str
    adapter: str
    metric: Literal["exact_match"]
    eval: Name


class Manifest(Struct, frozen=True, forbid_unknown_fields=True):
    """All of bundle.json."""

    schema_version: Literal[1]
    name: Name
    base: BaseSpec
    adapters: tuple[AdapterSpec, ...]
    router: RouterSpec | None
    tasks: tuple[TaskSpec, ...]
    provenance: dict[str, object]


def read_manifest(bundle: Path) -> Manifest:
    """The checked bundle.json of the directory `bundle`; BundleError or FingerprintError in one line."""
    manifest = strict_json.read(bundle / FILE, Manifest, FILE)
    _check_ids("adapters", [adapter.id for adapter in manifest.adapters])
    _check_ids("tasks", [task.id for task in manifest.tasks])
    _check_bases(manifest.adapters)
    for index, adapter in enumerate(manifest.adapters):
        _check_kind(adapter, f"adapters[{index}]")
    _check_fingerprints(manifest)
    _check_compression(manifest.base)
    _check_class_indices(manifest.adapters)
    if manifest.router is not None:
        _check_router(manifest.router, manifest.adapters)
    known = {adapter.id: adapter for adapter in manifest.adapters}
    for index, task in enumerate(manifest.tasks):
        if task.adapter not in known:
            raise wrong(f"tasks[{index}].adapter", one_of(list(known)), task.adapter)
    return manifest


def write_manifest(bundle: Path, manifest: Manifest) -> None:
    """Write bundle.json into the directory `bundle`: indented, keys in a fixed order."""
    text = msgspec.json.format(msgspec.json.encode(manifest, order="deterministic"), indent=2)
    (bundle / FILE).write_bytes(text + b"\n")


def check_id(identifier: str, file: str, key: str) -> None:
    """BundleError unless `identifier` can be a directory's name everywhere."""
    if not _ID.fullmatch(identifier):
        expected = "a letter or digit, then letters, digits, `.`, `_` or `-`"
        raise BundleError(mismatch(file, key, expected, strict_json.show(identifier)))


def wrong(key: str, expected: object, found: object, hint: str = "") -> BundleError:
    """The error about a value of bundle.json."""
    return BundleError(mismatch(FILE, key, expected, strict_json.plain(str(found)), hint))


def _check_ids(key: str, ids: Iterable[str]) -> None:
    seen: set[str] = set()
    for index, identifier in enumerate(ids):
        check_id(identifier, FILE, f"{key}[{index}].id")
        if identifier in seen:
            raise wrong(f"{key}[{index}].id", "an id of its own", f"{identifier} again")
        seen.add(identifier)


def _check_bases(adapters: tuple[AdapterSpec, ...]) -> None:
    for at, adapter in enumerate(adapters):
        for index, branch in enumerate(adapter.branches):
            key = f"adapters[{at}].branches[{index}]"
            if branch.basis is None:
                continue
            check_id(branch.basis, FILE, f"{key}.basis")
            if (branch.role, branch.act, branch.tied) != ("lora", "identity", ()):
                raise wrong(f"{key}.basis", "a lora branch with act identity, not tied", f"{branch.role}, {branch.act}")


def _check_kind(adapter: AdapterSpec, key: str) -> None:
    """Experts and scales: what of them bundle.json alone tells."""
    for index, branch in enumerate(adapter.branches):
        at = f"{key}.branches[{index}]"
        if branch.role in ("expert", "scale") and (branch.act, branch.tied) != ("identity", ()):
            raise wrong(at, f"act identity, not tied, with {branch.role}", f"{branch.act}, {list(branch.tied)}")
        if branch.role == "scale" and (branch.r, branch.alpha) != (1, 1.0):
            raise wrong(f"{at}.r", "r 1 and alpha 1 with scale", f"{branch.r} and {branch.alpha:g}")
        if (branch.role == "expert") != (branch.experts is not None):
            expected = "this key with expert" if branch.role == "expert" else f"no such key with {branch.role}"
            raise wrong(f"{at}.experts", expected, branch.experts or "nothing")
        if branch.experts not in (None, adapter.experts):
            raise wrong(f"{at}.experts", f"{adapter.experts}, as the branch before it", branch.experts)
    weighed = [adapter.token_router is not None, adapter.expert_weights is not None]
    if sum(weighed) != (1 if adapter.experts else 0):
        expected = "one of token_router and expert_weights" if adapter.experts else "neither without experts"
        found = "both" if all(weighed) else "one" if any(weighed) else "neither"
        raise wrong(f"{key}.token_router, expert_weights", expected, found)
    if adapter.expert_weights is not None and len(adapter.expert_weights) != adapter.experts:
        expected = f"{adapter.experts} weights, one for each expert"
        raise wrong(f"{key}.expert_weights", expected, len(adapter.expert_weights))


def _check_fingerprints(manifest: Manifest) -> None:
    base = manifest.base.fingerprint
    for index, adapter in enumerate(manifest.adapters):
        if adapter.base_fingerprint != base:
            key, hint = f"adapters[{index}].base_fingerprint", f"{adapter.id} was trained for another base"
            raise FingerprintError(mismatch(FILE, key, base, adapter.base_fingerprint, hint))


def _check_compression(base: BaseSpec) -> None:
    for index, step in enumerate(base.compression):
        key, needed = f"base.compression[{index}]", _STEP_PARAMETERS[step.scheme]
        values = {
            "group_size": step.group_size,
            "symmetric": step.symmetric,
            "pattern": step.pattern,
            "top_k": step.top_k,
            "activations": step.activations,
        }
        for name, value in values.items():
            if value is not None and name not in needed:
                raise wrong(f"{key}.{name}", f"only {' and '.join(needed)} with {step.scheme}", f"{value}")
            if value is None and name in needed and name not in _OPTIONAL:
                raise wrong(f"{key}.{name}", f"this key with {step.scheme}", "nothing")


def _check_class_indices(adapters: tuple[AdapterSpec, ...]) -> None:
    owners: dict[int, str] = {}
    for index, adapter in enumerate(adapters):
        if adapter.class_index in owners:
            found = f"{adapter.class_index}, which {owners[adapter.class_index]} has"
            raise wrong(f"adapters[{index}].class_index", "an index of its own", found)
        owners[adapter.class_index] = adapter.id


def _check_router(router: RouterSpec, adapters: tuple[AdapterSpec, ...]) -> None:
    if router.template.count("{text}") != 1:
        raise wrong("router.template", "{text} exactly once", strict_json.show(router.template))
    by_class = {adapter.class_index: adapter.id for adapter in adapters}
    for index, name in enumerate(router.classes):
        if by_class.get(index) != name:
            owner = by_class.get(index, "no such class")
            raise wrong(f"router.classes[{index}]", f"{owner} (by class_index {index})", name)
    for index, adapter in enumerate(adapters):
        if adapter.class_index >= len(router.classes):
            expected = f"less than {len(router.classes)}, the number of router.classes"
            raise wrong(f"adapters[{index}].class_index", expected, adapter.class_index)
    scored = router.kind in ("classifier", "retrieval")
    if scored and router.selection is None:
        raise wrong("router.selection", f"this key with {router.kind}", "nothing")
    if not scored and router.selection is not None:
        raise wrong("router.selection", f"no such key with {router.kind}", strict_json.show(router.selection))
    if router.selection is not None:
        _check_selection(router.selection, len(router.classes))


def _check_selection(selection: Selection, classes: int) -> None:
    needed = _SELECT_PARAMETER[selection.select]
    for name, value in {"p": selection.p, "k": selection.k, "threshold": selection.threshold}.items():
        if value is None and name == needed:
            raise wrong(f"router.selection.{name}", f"this key with {selection.select}", "nothing")
        if value is not None and name != needed:
            raise wrong(f"router.selection.{name}", f"no such key with {selection.select}", value)
    if selection.k is not None and selection.k > classes:
        raise wrong("router.selection.k", f"at most {classes}, the number of classes", selection.k)
