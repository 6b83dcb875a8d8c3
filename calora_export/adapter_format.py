"""The two files of one adapter directory: PEFT's adapter_config.json and adapter_model.safetensors.

CA-LoRA's recovery branch lies beside PEFT's keys as lora_a1 / lora_a2 (docs/bundle.md).
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Literal, TypeVar

import msgspec
from msgspec import Meta

from calora_export import strict_json
from calora_export.errors import BundleError, UnsupportedError, mismatch
from calora_export.manifest import FILE, Branch, Role, wrong
from calora_export.sites import expand_sites, natural_key
from calora_export.tensors import FLOATS, TensorIndex

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
PICKLED = "adapter_model.bin"

_PREFIX = "base_model.model."
_SUFFIXES: Mapping[Role, tuple[str, str]] = {
    "lora": ("lora_A.weight", "lora_B.weight"),
    "recovery": ("lora_a1.weight", "lora_a2.weight"),
    "expert": ("lora_expert_A", "lora_expert_B"),
    "scale": ("scale_in", "scale_out"),
}
_CORE, _ROUTER = "lora_core", "token_router"
SHARED = "shared"

Positive = Annotated[float, Meta(gt=0)]
Rank = Annotated[int, Meta(ge=1)]
_Number = TypeVar("_Number", int, float)


class _PeftType(msgspec.Struct, frozen=True):
    peft_type: str


class PeftConfig(msgspec.Struct, frozen=True):
    """What of PEFT's LoraConfig decides the result; the keys that only matter in training are not read."""

    r: Rank
    lora_alpha: Positive
    use_rslora: bool = False
    rank_pattern: dict[str, Rank] | None = None
    alpha_pattern: dict[str, Positive] | None = None
    bias: str = "none"
    init_lora_weights: bool | str | None = True
    use_dora: bool | None = None
    fan_in_fan_out: bool | None = None
    lora_bias: bool | None = None
    use_qalora: bool | None = None
    modules_to_save: list[str] | None = None
    layer_replication: list[list[int]] | None = None
    trainable_token_indices: object = None
    target_parameters: list[str] | None = None
    alora_invocation_tokens: list[int] | None = None
    use_bdlora: object = None
    arrow_config: object = None
    kasa_config: object = None
    monteclora_config: object = None

    def rank_at(self, site: str) -> int:
        """The rank that PEFT gives the module `site`."""
        return _at(self.rank_pattern or {}, site, self.r)

    def alpha_at(self, site: str) -> float:
        """The alpha that PEFT gives the module `site`."""
        return _at(self.alpha_pattern or {}, site, self.lora_alpha)

    def scale(self, alpha: float, r: int) -> float:
        """alpha / r, or alpha / sqrt(r) with rslora (arXiv 2312.03732)."""
        return alpha / math.sqrt(r) if self.use_rslora else alpha / r


# What changes the result in a way that slots cannot hold, and what the user can do instead.
_REFUSED = {
    "use_dora": "DoRA rescales the base's columns; train plain LoRA",
    "fan_in_fan_out": "weights stored [in, out]; use a model whose layers are torch.nn.Linear",
    "lora_bias": "slots have no bias; train with lora_bias false",
    "use_qalora": "QALoRA pools the input; train plain LoRA",
    "modules_to_save": "fully trained modules would replace parts of the shared base; train LoRA only",
    "layer_replication": "repeated layers are another base; save that model and train on it",
    "trainable_token_indices": "trained embeddings would change the shared base; train LoRA only",
    "target_parameters": "bare parameters have no linear layer to sit beside; use target_modules",
    "alora_invocation_tokens": "activated LoRA switches on inside a prompt; train plain LoRA",
    "use_bdlora": "block-diagonal LoRA; train plain LoRA",
    "arrow_config": "Arrow routes inside PEFT; export its LoRAs one by one",
    "kasa_config": "KaSA; train plain LoRA",
    "monteclora_config": "MonteCLoRA; train plain LoRA",
}
_OTHER_KEYS = {
    ".base_layer.": "a copy of the base's weight: save_pretrained it again with save_embedding_layers=False",
    ".lora_embedding_": "LoRA on an embedding: train it on linear layers only",
    f".{_CORE}": "a core without its basis: add it from its bundle, which has shared/",
    ".lora_expert_": "experts: add it from its bundle, which says how they are weighed",
    ".scale_": "scales of layers: add it from its bundle, which says so",
    f".{_ROUTER}.": "a router for tokens: add it from its bundle, which says so",
    ".coefficients": "NOLA: import nola makes A and B of it",
    ".seed": "NOLA: import nola makes A and B of it",
}
_CHANGES_BASE = ("pissa", "olora", "corda", "lora_ga")


@dataclass(frozen=True)
class SiteBranch:
    """One branch at one site: `down` [r, in] and `up` [out, r] are the names of its tensors.

    A tied matrix lies at another site: `down_at` and `up_at` say which. With a basis, `core` is the only tensor.
    """

    site: str
    role: Role
    r: int
    alpha: float
    scale: float
    act: Literal["identity", "gelu"]
    down_at: str | None = None
    up_at: str | None = None
    basis: str | None = None
    experts: int | None = None

    @property
    def core(self) -> str:
        """Between the down and the up of the basis."""
        return f"{_PREFIX}{self.site}.{_CORE}"

    @property
    def down(self) -> str:
        """lora_A or lora_a1"""
        return f"{_PREFIX}{self.down_at or self.site}.{_SUFFIXES[self.role][0]}"

    @property
    def up(self) -> str:
        """lora_B or lora_a2"""
        return f"{_PREFIX}{self.up_at or self.site}.{_SUFFIXES[self.role][1]}"


def read_config(directory: Path, label: str) -> PeftConfig:
    """adapter_config.json of `directory`; UnsupportedError, with the reason, for what is not plain LoRA."""
    file = f"{label}/{CONFIG}"
    content = strict_json.read_bytes(directory / CONFIG, file)
    kind = strict_json.decode(content, _PeftType, file).peft_type
    if kind != "LORA":
        hint = "train LoRA, or convert it to LoRA"
        raise UnsupportedError(mismatch(file, "peft_type", "LORA", strict_json.plain(kind), hint))
    config = strict_json.decode(content, PeftConfig, file)
    if config.bias != "none":
        hint = "slots have no bias; train with bias none"
        raise UnsupportedError(mismatch(file, "bias", "none", strict_json.plain(config.bias), hint))
    for key, why in _REFUSED.items():
        if value := getattr(config, key):
            raise UnsupportedError(mismatch(file, key, "null or false", strict_json.show(value), why))
    initial = config.init_lora_weights
    if isinstance(initial, str) and initial.startswith(_CHANGES_BASE):
        hint = "it changed the base; save it with PEFT's path_initial_model_for_weight_conversion"
        expected = "an initialisation that keeps the base"
        raise UnsupportedError(mismatch(file, "init_lora_weights", expected, strict_json.plain(initial), hint))
    for key, patterns in (("rank_pattern", config.rank_pattern), ("alpha_pattern", config.alpha_pattern)):
        for pattern in patterns or {}:
            _check_regex(pattern, file, key)
    return config


def open_weights(directory: Path, label: str) -> TensorIndex:
    """adapter_model.safetensors of `directory`; pickles are refused with the way out."""
    if not (directory / WEIGHTS).is_file():
        pickled = (directory / PICKLED).is_file()
        found = PICKLED if pickled else "nothing"
        hint = "pickles are not loaded: import peft makes safetensors of it" if pickled else ""
        raise BundleError(mismatch(f"{label}/{WEIGHTS}", "file", "a safetensors file", found, hint))
    return TensorIndex.open(directory, label)


def open_basis(bundle: Path, name: str) -> TensorIndex:
    """What adapters share: <site>.down [r, in] and <site>.up [out, c]; BundleError for NaN or Inf."""
    basis = TensorIndex.open(bundle / SHARED / name, f"{SHARED}/{name}")
    if (bad := basis.first_nonfinite()) is not None:
        raise BundleError(mismatch(basis.file_of(bad), bad, "finite values", "NaN or Inf"))
    return basis


def declared_branches(
    branches: Sequence[Branch],
    config: PeftConfig,
    linears: Mapping[str, tuple[int, int]],
    key: str,
    label: str,
) -> tuple[SiteBranch, ...]:
    """The manifest's branches site by site; BundleError when they contradict themselves or PEFT's config.

    `key` is the manifest's key of the adapter (`adapters[0]`), `label` its directory, as errors name it.
    """
    placed: dict[tuple[str, str], SiteBranch] = {}
    for index, branch in enumerate(branches):
        at = f"{key}.branches[{index}]"
        expected = config.scale(branch.alpha, branch.r)
        if not math.isclose(branch.scale, expected, rel_tol=1e-6):
            formula = "alpha / sqrt(r)" if config.use_rslora else "alpha / r"
            raise wrong(f"{at}.scale", f"{formula} = {expected:g}", f"{branch.scale:g}")
        sites = expand_sites(branch.sites, linears, FILE, f"{at}.sites")
        down_at, up_at = (sites[0] if which in branch.tied else None for which in ("down", "up"))
        for site in sites:
            if (site, branch.role) in placed:
                raise wrong(f"{at}.sites", f"{site} in one {branch.role} branch", "it in two")
            numbers = branch.r, branch.alpha, branch.scale, branch.act
            own = SiteBranch(site, branch.role, *numbers, down_at, up_at, branch.basis, branch.experts)
            placed[site, branch.role] = own
            if branch.role == "lora":
                _check_against_config(own, config, f"{label}/{CONFIG}")
    for (site, role), branch in placed.items():
        if role != "recovery":
            continue
        scale = placed.get((site, "lora"), branch).scale
        if not math.isclose(branch.scale, scale, rel_tol=1e-6):
            expected = f"{scale:g} of the lora branch at {site}"
            raise wrong(f"{key}.branches: recovery scale", expected, f"{branch.scale:g}")
    return tuple(sorted(placed.values(), key=lambda branch: (natural_key(branch.site), branch.role)))


def sites_of(tensors: TensorIndex) -> set[str]:
    """The sites that the tensors' names imply; UnsupportedError for a name that is none of ours."""
    known = (_CORE, *_SUFFIXES["expert"], *_SUFFIXES["scale"])
    sites: set[str] = set()
    for name in sorted(tensors.names(), key=_late):
        suffix = next((suffix for suffix in known if name.endswith(f".{suffix}")), None)
        if suffix is not None:
            sites.add(name[len(_PREFIX) : -len(suffix) - 1])
        elif f".{_ROUTER}." not in name:
            sites.add(_parse_key(name, tensors)[0])
    return sites


def router_tensors(scope: str) -> tuple[str, str]:
    """Names of the weight [experts, features] and bias [2, experts] that weigh the experts below a module."""
    return f"{_PREFIX}{scope}.{_ROUTER}.weight", f"{_PREFIX}{scope}.{_ROUTER}.bias"


def stored_branches(tensors: TensorIndex, config: PeftConfig) -> tuple[SiteBranch, ...]:
    """The branches that the tensors' names imply, with PEFT's rank, alpha and scale per site.

    lora_a1 / lora_a2 make a GELU recovery branch: its rank is lora_a1's, its scale that of the site's LoRA.
    """
    branches = [_stored_branch(site, role, tensors, config) for site, role in _placed(tensors)]
    return tuple(sorted(branches, key=lambda branch: (natural_key(branch.site), branch.role)))


def check_tensors(
    tensors: TensorIndex,
    branches: Sequence[SiteBranch],
    linears: Mapping[str, tuple[int, int]],
    bases: Mapping[str, TensorIndex] = MappingProxyType({}),
    scopes: Sequence[str] = (),
) -> None:
    """BundleError unless `tensors` are exactly those of `branches`, with their shapes, float and finite, and of routers
    for the modules `scopes`."""
    shapes: dict[str, tuple[int, ...]] = {}
    experts = next((branch.experts for branch in branches if branch.experts), 0)
    for scope in scopes:
        weight, bias = router_tensors(scope)
        features = (*tensors.info(weight).shape, 0)[1]
        shapes |= {weight: (experts, features), bias: (2, experts)}
    for branch in branches:
        if branch.site not in linears:
            hint = "a tied lm_head has no weight of its own" if branch.site.endswith("lm_head") else ""
            file, expected = tensors.file_of(branch.down), "a linear layer of the base"
            raise BundleError(mismatch(file, branch.down, expected, branch.site, hint))
        rows, columns = linears[branch.site]
        if branch.basis is not None:
            shapes[branch.core] = _core_shape(branch, tensors, bases[branch.basis], rows, columns)
            continue
        pair = (branch.r, columns), (rows, branch.r)
        if branch.role == "scale":
            pair = (columns,), (rows,)
        elif branch.experts is not None:
            pair = (branch.experts, *pair[0]), (branch.experts, *pair[1])
        for name, shape in zip((branch.down, branch.up), pair, strict=True):
            if shapes.setdefault(name, shape) != shape:
                raise BundleError(mismatch(FILE, f"tied at {branch.site}", f"{list(shapes[name])}", f"{list(shape)}"))
    file = f"{tensors.label}/{WEIGHTS}"
    for name, shape in shapes.items():
        if name not in tensors.tensors:
            raise BundleError(mismatch(file, name, f"a tensor {list(shape)}", "nothing"))
        info = tensors.info(name)
        if info.shape != shape:
            hint = "was it trained for another base?" if len(info.shape) == len(shape) else ""
            raise BundleError(mismatch(tensors.file_of(name), name, f"{list(shape)}", f"{list(info.shape)}", hint))
        if info.dtype not in FLOATS:
            raise BundleError(mismatch(tensors.file_of(name), name, " or ".join(FLOATS), info.dtype))
    for name in tensors.names():
        if name not in shapes:
            expected = "only tensors of the declared branches"
            raise BundleError(mismatch(tensors.file_of(name), name, expected, "this one"))
    if (name := tensors.first_nonfinite()) is not None:
        raise BundleError(mismatch(tensors.file_of(name), name, "finite values", "NaN or Inf"))


def _core_shape(
    branch: SiteBranch, tensors: TensorIndex, basis: TensorIndex, rows: int, columns: int
) -> tuple[int, ...]:
    """[c, r], or [r] where the file has a diagonal; BundleError unless the basis has matrices for the site."""
    down, up = f"{branch.site}.down", f"{branch.site}.up"
    c = (*basis.info(up).shape, 0, 0)[1]
    for name, shape in ((down, (branch.r, columns)), (up, (rows, c))):
        info = basis.info(name)
        if info.shape != shape or info.dtype not in FLOATS:
            found = f"{info.dtype} {list(info.shape)}"
            raise BundleError(mismatch(basis.file_of(name), name, f"{' or '.join(FLOATS)} {list(shape)}", found))
    stored = tensors.tensors.get(branch.core)
    return (branch.r,) if c == branch.r and stored is not None and len(stored.shape) == 1 else (c, branch.r)


def _at(patterns: Mapping[str, _Number], site: str, default: _Number) -> _Number:
    # As peft.utils.other.get_pattern_key: the first pattern that matches a suffix of dotted components.
    for pattern, value in patterns.items():
        if re.match(rf"(.*\.)?({pattern})$", site):
            return value
    return default


def _check_regex(pattern: str, file: str, key: str) -> None:
    try:
        re.compile(rf"(.*\.)?({pattern})$")
    except re.error as problem:
        raise BundleError(mismatch(file, key, "regular expressions", f"{pattern!r}: {problem}")) from None


def _check_against_config(branch: SiteBranch, config: PeftConfig, file: str) -> None:
    for key, expected, found in (
        ("r", branch.r, config.rank_at(branch.site)),
        ("lora_alpha", branch.alpha, config.alpha_at(branch.site)),
    ):
        if expected != found:
            raise BundleError(mismatch(file, key, f"{expected:g} at {branch.site}, as in {FILE}", f"{found:g}"))


def _placed(tensors: TensorIndex) -> set[tuple[str, Literal["lora", "recovery"]]]:
    """Site and role of every tensor."""
    return {_parse_key(name, tensors) for name in sorted(tensors.names(), key=_late)}


def _late(name: str) -> bool:
    """The copied weight of an embedding comes last: the embedding's LoRA is the better reason to refuse."""
    return ".base_layer." in name


def _parse_key(name: str, tensors: TensorIndex) -> tuple[str, Literal["lora", "recovery"]]:
    """Of what PEFT and CA-LoRA save; other roles only a bundle can tell."""
    roles: tuple[Literal["lora", "recovery"], ...] = ("lora", "recovery")
    for role in roles:
        for suffix in _SUFFIXES[role]:
            if name.startswith(_PREFIX) and name.endswith(f".{suffix}"):
                return name[len(_PREFIX) : -len(suffix) - 1], role
    expected = f"{_PREFIX}<site>.lora_A.weight, lora_B, lora_a1 or lora_a2"
    hint = next((why for part, why in _OTHER_KEYS.items() if part in name), "")
    raise UnsupportedError(mismatch(tensors.file_of(name), name, expected, "another key", hint))


def _stored_branch(
    site: str, role: Literal["lora", "recovery"], tensors: TensorIndex, config: PeftConfig
) -> SiteBranch:
    r, alpha = config.rank_at(site), config.alpha_at(site)
    scale = config.scale(alpha, r)
    if role == "lora":
        return SiteBranch(site, role, r, alpha, scale, "identity")
    shape = tensors.info(f"{_PREFIX}{site}.{_SUFFIXES[role][0]}").shape
    r = shape[0] if shape and shape[0] else r
    return SiteBranch(site, role, r, scale / config.scale(1.0, r), scale, "gelu")
