"""Low-rank adapters in memory: their arithmetic, and how they become an adapter directory.

y += scale · up(act(down x))        act = identity for LoRA, GELU or identity for recovery
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import msgspec
import numpy as np

from calora_export import adapter_format
from calora_export.adapter_format import SiteBranch
from calora_export.importers._checkpoint import peft_directory
from calora_export.manifest import Branch, Role
from calora_export.sites import collapse_sites, natural_key

Act = Literal["identity", "gelu"]


@dataclass(frozen=True)
class Pair:
    """`down` float32 [r, in], `up` float32 [out, r]; `scale` is not yet in them."""

    down: np.ndarray
    up: np.ndarray
    scale: float

    @property
    def r(self) -> int:
        return self.down.shape[0]


@dataclass(frozen=True)
class Core:
    """What an adapter has between the matrices of a basis: core [c, r], or its diagonal [r]; `scale` is not in it."""

    core: np.ndarray
    scale: float

    @property
    def r(self) -> int:
        return self.core.shape[-1]


@dataclass(frozen=True)
class Experts:
    """`downs` float32 [E, r, in], `ups` float32 [E, out, r]; `scale` is not yet in them."""

    downs: np.ndarray
    ups: np.ndarray
    scale: float

    @property
    def r(self) -> int:
        return self.downs.shape[1]

    @staticmethod
    def of(pairs: Sequence[Pair | None]) -> Experts:
        """One expert per pair, of the highest rank; None is an expert that adds nothing. Scales are in the ups."""
        known = [pair for pair in pairs if pair is not None]
        r = max(pair.r for pair in known)
        downs = np.zeros((len(pairs), r, known[0].down.shape[1]), np.float32)
        ups = np.zeros((len(pairs), known[0].up.shape[0], r), np.float32)
        for expert, pair in enumerate(pairs):
            if pair is not None:
                downs[expert, : pair.r], ups[expert, :, : pair.r] = pair.down, pair.up * np.float32(pair.scale)
        return Experts(downs, ups, 1.0)


@dataclass(frozen=True)
class LowRank:
    """One adapter: pairs by site. `act` is the recovery branch's.

    routers: module → weight [E, features] and bias [2, E] that weigh the experts below it (`ops.token_gates`).
    scales: site → what multiplies the layer's input [in] and output [out].
    """

    lora: Mapping[str, Pair]
    recovery: Mapping[str, Pair] = field(default_factory=dict)
    act: Act = "gelu"
    experts: Mapping[str, Experts] = field(default_factory=dict)
    routers: Mapping[str, tuple[np.ndarray, np.ndarray]] = field(default_factory=dict)
    scales: Mapping[str, tuple[np.ndarray, np.ndarray]] = field(default_factory=dict)

    def matrices(self, branch: SiteBranch) -> tuple[np.ndarray, np.ndarray]:
        """The two tensors of a branch."""
        if branch.role == "scale":
            return self.scales[branch.site]
        if branch.role == "expert":
            return self.experts[branch.site].downs, self.experts[branch.site].ups
        pair = (self.lora if branch.role == "lora" else self.recovery)[branch.site]
        return pair.down, pair.up


def concatenate(pairs: Sequence[Pair]) -> Pair:
    """One pair whose delta is the sum of theirs, exactly: ranks side by side, at the first one's scale."""
    scale = pairs[0].scale
    ups = [pair.up * np.float32(pair.scale / scale) if pair.scale != scale else pair.up for pair in pairs]
    return Pair(np.concatenate([pair.down for pair in pairs]), np.concatenate(ups, axis=1), scale)


def add(adapters: Sequence[Mapping[str, Pair]]) -> dict[str, Pair]:
    """The sum of several LoRAs, site by site; a site may miss in some of them."""
    sites = sorted({site for adapter in adapters for site in adapter}, key=natural_key)
    return {site: concatenate([adapter[site] for adapter in adapters if site in adapter]) for site in sites}


def read(directory: Path, linears: Mapping[str, tuple[int, int]]) -> dict[str, Pair]:
    """The plain LoRA of a PEFT directory, checked against the base's layers."""
    label = str(directory)
    config = adapter_format.read_config(directory, label)
    with peft_directory(directory) as place:
        tensors = adapter_format.open_weights(place, label)
        branches = adapter_format.stored_branches(tensors, config)
        adapter_format.check_tensors(tensors, branches, linears)
        return {b.site: Pair(tensors.float32(b.down), tensors.float32(b.up), b.scale) for b in branches}


def write(adapter: LowRank, directory: Path, linears: Mapping[str, tuple[int, int]]) -> tuple[Branch, ...]:
    """PEFT's two files in `directory`, recovery beside LoRA; the branches that describe them."""
    from safetensors.numpy import save_file

    branches = [_branch(site, "lora", pair, "identity") for site, pair in adapter.lora.items()]
    branches += [_branch(site, "recovery", pair, adapter.act) for site, pair in adapter.recovery.items()]
    branches = _tie(branches, adapter)
    for site, experts in adapter.experts.items():
        branches.append(replace(_branch(site, "expert", experts, "identity"), experts=len(experts.downs)))
    branches += [SiteBranch(site, "scale", 1, 1.0, 1.0, "identity") for site in adapter.scales]
    tensors: dict[str, np.ndarray] = {}
    for branch in branches:
        names = branch.down, branch.up
        tensors |= {name: np.ascontiguousarray(m) for name, m in zip(names, adapter.matrices(branch), strict=True)}
    for scope, router in adapter.routers.items():
        tensors |= dict(zip(adapter_format.router_tensors(scope), map(np.ascontiguousarray, router), strict=True))
    save_file(tensors, directory / adapter_format.WEIGHTS, {"format": "pt"})
    _write_config(branches, directory)
    return collapse(branches, linears)


def write_basis(basis: Mapping[str, np.ndarray], bundle: Path, name: str) -> None:
    """What several adapters of a bundle share: <site>.down [r, in] and <site>.up [out, c]."""
    from safetensors.numpy import save_file

    directory = bundle / adapter_format.SHARED / name
    directory.mkdir(parents=True)
    save_file({key: np.ascontiguousarray(array) for key, array in basis.items()}, directory / "basis.safetensors")


def write_cores(
    cores: Mapping[str, Core], basis: str, directory: Path, linears: Mapping[str, tuple[int, int]]
) -> tuple[Branch, ...]:
    """An adapter that is cores in a basis, as PEFT's two files; the branches that describe it."""
    from safetensors.numpy import save_file

    branches = [replace(_branch(site, "lora", core, "identity"), basis=basis) for site, core in cores.items()]
    tensors = {branch.core: np.ascontiguousarray(cores[branch.site].core) for branch in branches}
    save_file(tensors, directory / adapter_format.WEIGHTS, {"format": "pt"})
    _write_config(branches, directory)
    return collapse(branches, linears)


def collapse(branches: Sequence[SiteBranch], linears: Mapping[str, tuple[int, int]]) -> tuple[Branch, ...]:
    """One branch per distinct role, rank, alpha, scale and activation; LoRA before recovery."""
    groups: dict[tuple[object, ...], list[SiteBranch]] = {}
    for branch in sorted(branches, key=lambda branch: branch.role):
        tied = (branch.down_at, branch.up_at, branch.basis, branch.experts)
        key = (branch.role, branch.r, branch.alpha, branch.scale, branch.act, *tied)
        groups.setdefault(key, []).append(branch)
    collapsed: list[Branch] = []
    for members in groups.values():
        first, sites = members[0], collapse_sites([member.site for member in members], linears)
        down: tuple[Literal["down"], ...] = ("down",) if first.down_at else ()
        up: tuple[Literal["up"], ...] = ("up",) if first.up_at else ()
        shares: tuple[Literal["down", "up"], ...] = (*down, *up)
        parts = first.role, sites, first.r, first.alpha, first.scale, first.act
        collapsed.append(Branch(*parts, shares, first.basis, first.experts))
    return tuple(collapsed)


def _tie(branches: Sequence[SiteBranch], adapter: LowRank) -> list[SiteBranch]:
    """A matrix that is the same at several sites lies at the first of them, once."""
    groups: dict[tuple[object, ...], list[SiteBranch]] = {}
    seen = Counter(key for branch in branches for key in _digests(branch, adapter))
    for branch in sorted(branches, key=lambda branch: natural_key(branch.site)):
        down, up = (key if seen[key] > 1 else None for key in _digests(branch, adapter))
        alone = branch.site if down is None and up is None else None
        groups.setdefault((branch.role, branch.r, branch.scale, down, up, alone), []).append(branch)
    tied: list[SiteBranch] = []
    for (_, _, _, down, up, _), members in groups.items():
        first = members[0].site if len(members) > 1 else None
        at = {"down_at": first if down else None, "up_at": first if up else None}
        tied += [replace(branch, **at) for branch in members]
    return tied


def _digests(branch: SiteBranch, adapter: LowRank) -> tuple[str, str]:
    names = zip(("down", "up"), adapter.matrices(branch), strict=True)
    return tuple(  # type: ignore[return-value]
        f"{branch.role} {name} {matrix.shape} {hashlib.sha256(matrix.tobytes()).hexdigest()}" for name, matrix in names
    )


def _branch(site: str, role: Role, pair: Pair | Core | Experts, act: Act) -> SiteBranch:
    alpha = pair.scale * pair.r
    return SiteBranch(site, role, pair.r, alpha, alpha / pair.r, act)


def _write_config(branches: Sequence[SiteBranch], directory: Path) -> None:
    text = msgspec.json.format(msgspec.json.encode(_config(branches)), indent=2)
    (directory / adapter_format.CONFIG).write_bytes(text + b"\n")


def _config(branches: Sequence[SiteBranch]) -> dict[str, object]:
    """A LoraConfig with the commonest rank and alpha, and patterns for the sites that differ."""
    lora = [branch for branch in branches if branch.role == "lora"] or list(branches)
    r = Counter(branch.r for branch in lora).most_common(1)[0][0]
    alpha = Counter(branch.alpha for branch in lora).most_common(1)[0][0]
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "inference_mode": True,
        "r": r,
        "lora_alpha": alpha,
        "rank_pattern": {re.escape(branch.site): branch.r for branch in lora if branch.r != r},
        "alpha_pattern": {re.escape(branch.site): branch.alpha for branch in lora if branch.alpha != alpha},
        "target_modules": sorted({branch.site.rsplit(".", 1)[-1] for branch in branches}),
        "bias": "none",
        "use_rslora": False,
    }
