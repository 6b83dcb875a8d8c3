"""Device profiles: what is known of a device, one TOML file each, in devices/. Unknown facts are left out."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from calora_export import bundle as bundles
from calora_export import recipe as recipes
from calora_export import resources, strict_json
from calora_export.errors import RecipeError, UnsupportedError, mismatch

ComputeUnits = Literal["all", "cpuAndGPU", "cpuAndNeuralEngine", "cpuOnly"]
System = Literal["Android", "Linux", "iOS", "iPadOS", "macOS"]
Version = Annotated[str, Meta(pattern=r"^[0-9]+(\.[0-9]+)*$")]
Megabytes = Annotated[int, Meta(ge=1)]


Limit = Annotated[float, Meta(gt=0)]


class Budget(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What users are meant to wait for at most, in ms, and the rates they are meant to see at least, in tokens per
    second: the names of a report's `latency`. swap_ms is its p90."""

    load_ms: Limit | None = None
    swap_ms: Limit | None = None
    first_token_after_swap_ms: Limit | None = None
    router_ms: Limit | None = None
    prefill_tok_s: Limit | None = None
    decode_tok_s: Limit | None = None


class Profile(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One device. targets are those that run there; sources: field → where its value was published.

    memory_mb is what an app may use, ram_mb what is built in, both in 2^20 bytes. os_floor is the oldest version of the
    OS that the app supports there. compute_units is what Core ML may use, as MLComputeUnits names them. threads and
    cores are what a runner uses there: how many, and on which processors alone. examples are how many of each task a
    validation scores there.
    """

    kind: str
    description: str
    targets: tuple[str, ...]
    soc: str | None = None
    ram_mb: Megabytes | None = None
    memory_mb: Megabytes | None = None
    os: System | None = None
    os_floor: Version | None = None
    compute_units: ComputeUnits | None = None
    threads: Annotated[int, Meta(ge=1)] | None = None
    cores: tuple[Annotated[int, Meta(ge=0)], ...] = ()
    examples: Annotated[int, Meta(ge=1)] | None = None
    budget: Budget = Budget()
    sources: Mapping[str, str] = {}

    @property
    def room(self) -> int | None:
        """Bytes that an app may use; without a published limit, all that is built in."""
        known = self.memory_mb or self.ram_mb
        return None if known is None else known * 2**20


def load(name: str) -> Profile:
    """A profile by its name or by the path of its file; `kind:address` is looked up by its kind."""
    known = resources.devices()
    path = known.get(name) or known.get(name.partition(":")[0]) or Path(name)
    if not path.is_file():
        raise RecipeError(mismatch("--device", name, f"a file or one of {', '.join(sorted(known))}", "neither"))
    try:
        return msgspec.toml.decode(path.read_bytes(), type=Profile)
    except (msgspec.ValidationError, msgspec.DecodeError) as error:
        raise RecipeError(f"{path.name}: {error}") from error


def catalogue() -> Mapping[str, Profile]:
    return {name: load(name) for name in sorted(resources.devices())}


def check(device: str, bundle_path: Path, recipe_name: str) -> None:
    """Refuse, before any work, what a device cannot run or hold."""
    profile, recipe = load(device), recipes.load(recipe_name)
    if recipe.target not in profile.targets:
        raise UnsupportedError(
            mismatch(recipe_name, "target", f"one that {device} runs ({', '.join(profile.targets)})", recipe.target)
        )
    needed = _oldest(recipe.target, profile)
    if needed is not None and profile.os_floor is not None and version(needed) > version(profile.os_floor):
        raise UnsupportedError(mismatch(device, "os_floor", f"{profile.os} {needed} or newer", profile.os_floor))
    if profile.room is None:
        return
    memory = _memory(bundles.load(bundle_path), recipe)
    if sum(memory.values()) > profile.room:
        raise UnsupportedError(too_much(device, profile, memory))


def too_much(device: str, profile: Profile, memory: Mapping[str, float]) -> str:
    """The line that says that what needs `memory`, in bytes by purpose, does not fit."""
    field, room = "memory_mb" if profile.memory_mb else "ram_mb", (profile.room or 0) / 2**20
    shares = ", ".join(f"{name} {size / 2**20:.1f}" for name, size in memory.items())
    return mismatch(device, field, f"at most {room:.0f} MB", f"{sum(memory.values()) / 2**20:.1f} MB", shares)


def version(text: str) -> tuple[int, ...]:
    """Comparable: 9 is before 17.6."""
    return tuple(int(part) for part in text.split("."))


def _oldest(target: str, profile: Profile) -> str | None:
    """The oldest version of the profile's OS on which the target runs; None when its target.toml says nothing of it."""
    folder = resources.targets().get(target)
    said = () if folder is None else msgspec.toml.decode((folder / "target.toml").read_bytes(), type=_Target).os
    entries = (entry.split() for entry in said)
    return next((words[1] for words in entries if words[0] == profile.os and words[1:]), None)


class _Target(msgspec.Struct, frozen=True):
    os: tuple[str, ...]


class _CacheConfig(msgspec.Struct, frozen=True):
    """What of a base's config.json a KV cache is sized by; absent where the family has another layout."""

    num_hidden_layers: int = 0
    num_attention_heads: int = 0
    num_key_value_heads: int | None = None
    hidden_size: int = 0
    head_dim: int | None = None
    max_position_embeddings: int | None = None


def _memory(bundle: bundles.Bundle, recipe: recipes.Recipe) -> dict[str, float]:
    """Bytes of the weights as the recipe holds them, of a full KV cache, and of the largest adapter."""
    config = strict_json.read(bundle.path / "base" / "config.json", _CacheConfig, "base/config.json")
    heads = config.num_key_value_heads or config.num_attention_heads
    head_dim = config.head_dim or config.hidden_size // max(config.num_attention_heads, 1)
    numbers = 2 * config.num_hidden_layers * heads * head_dim  # keys and values of one position
    if bundle.structured:
        cached = (".k_proj", ".v_proj")
        numbers = sum(shape[0] for name, shape in bundle.linears.items() if name.endswith(cached))
    positions = min(recipe.context, config.max_position_embeddings or recipe.context)
    return {
        "weights": sum(_bytes(recipe, name, shape) for name, shape in bundle.linears.items()),
        "cache": positions * numbers * (2 if recipe.target == "coreml" else 4),
        "adapter": max((_adapter(bundle, spec, recipe) for spec in bundle.manifest.adapters), default=0),
    }


def _adapter(bundle: bundles.Bundle, spec: bundles.AdapterSpec, recipe: recipes.Recipe) -> int:
    rows = sum(
        branch.r * sum(bundle.adaptable[site])
        for branch in spec.branches
        for site in bundles.expand_sites(branch.sites, bundle.adaptable)
    )
    return rows * {"fp32": 4, "fp16": 2}[recipe.adapters]


def _bytes(recipe: recipes.Recipe, module: str, shape: tuple[int, int]) -> float:
    """Bytes of a weight of shape (out, in); one scale per group, in fp32, or in fp16 where Core ML holds it."""
    rule = recipe.rule(module)
    scale = (16 if recipe.target == "coreml" else 32) / (rule.group_size or shape[1])
    bits = {"fp32": 32.0, "fp16": 16.0, "int8": 8 + scale, "int4": 4 + scale}[rule.scheme]
    return shape[0] * shape[1] * bits / 8
