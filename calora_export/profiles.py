"""Device profiles: what is known of a device, one TOML file each, in devices/. Unknown facts are left out."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from calora_export import bundle as bundles
from calora_export import recipe as recipes
from calora_export import resources
from calora_export.errors import RecipeError, UnsupportedError, mismatch

ComputeUnits = Literal["all", "cpuAndGPU", "cpuAndNeuralEngine", "cpuOnly"]
System = Literal["Android", "Linux", "iOS", "iPadOS", "macOS"]
Version = Annotated[str, Meta(pattern=r"^[0-9]+(\.[0-9]+)*$")]
Megabytes = Annotated[int, Meta(ge=1)]


class Profile(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One device. targets are those that run there; sources: field → where its value was published.

    memory_mb is what an app may use, ram_mb what is built in, both in 2^20 bytes. os_floor is the oldest version of the
    OS that the app supports there. compute_units is what Core ML may use, as MLComputeUnits names them.
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
    if profile.memory_mb is None:
        return
    bundle = bundles.load(bundle_path)
    needed = sum(_bytes(recipe, name, shape) for name, shape in bundle.linears.items()) / 1e6
    if needed > profile.memory_mb:
        raise UnsupportedError(
            mismatch(device, "memory_mb", f"at most {profile.memory_mb} MB of weights", f"{needed:.0f} MB")
        )


def _bytes(recipe: recipes.Recipe, module: str, shape: tuple[int, int]) -> float:
    """Bytes of a weight of shape (out, in), with one fp32 scale per group."""
    rule = recipe.rule(module)
    bits = {"fp32": 32.0, "int8": 8 + 32 / rule.group_size, "int4": 4 + 32 / rule.group_size}[rule.scheme]
    return shape[0] * shape[1] * bits / 8
