"""One module per target, found by its file name. A target only sees a Graph.

lower(graph, recipe, directory, origin) -> Slots           writes the model's files, says where adapters go
lower_router(router, directory) -> str                     writes the router, says its file's name
accompany(manifest, directory) -> None                     writes what the runtime's own tools look for
MODEL                                                      the model's file in the package
"""

from __future__ import annotations

import importlib
import importlib.util
import pkgutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import msgspec

from calora_export import quiet, resources
from calora_export.errors import RecipeError, UnsupportedError, mismatch

if TYPE_CHECKING:
    from calora_export.graph import Graph
    from calora_export.package import Manifest, Slots
    from calora_export.recipe import Recipe
    from calora_export.routers import Router


@dataclass(frozen=True)
class Origin:
    """What a model's files tell of where they come from: the base's fingerprint, its special tokens, whose it is."""

    name: str
    fingerprint: str
    bos: int | None
    eos: tuple[int, ...]
    author: str = ""
    licence: str = ""


class Target(Protocol):
    """What every module in this package offers."""

    def lower(self, graph: Graph, recipe: Recipe, directory: Path, origin: Origin) -> Slots: ...

    def lower_router(self, router: Router, directory: Path) -> str: ...

    def accompany(self, manifest: Manifest, directory: Path) -> None: ...

    @property
    def MODEL(self) -> str: ...


def names() -> tuple[str, ...]:
    """The targets that exist, without importing any of them."""
    return tuple(sorted(module.name for module in pkgutil.iter_modules(__path__) if not module.name.startswith("_")))


def require(name: str) -> None:
    """Refuse a target that does not exist, without importing one that does."""
    if name not in names():
        raise RecipeError(mismatch("recipe", "target", f"one of {', '.join(names())}", repr(name)))


def require_installed(name: str) -> None:
    """Refuse a target whose Python libraries are not installed, without importing any; the line names the extra."""
    require(name)
    for module in _libraries(name):
        if importlib.util.find_spec(module) is None:
            raise UnsupportedError(missing(module))


def missing(module: str) -> str:
    """The line for a Python library that is not installed: the extra that brings it."""
    extra = next((name for name in resources.targets() if module in _libraries(name)), "all")
    return f"{module} is not installed: pip install 'calora-export[{extra}]', or in a checkout '.[{extra}]'"


def _libraries(name: str) -> tuple[str, ...]:
    return msgspec.toml.decode((resources.target_dir(name) / "target.toml").read_bytes(), type=_Libraries).python


class _Libraries(msgspec.Struct, frozen=True):
    python: tuple[str, ...] = ()


def load(name: str) -> Target:
    """Import one target."""
    require(name)
    with quiet.libraries():
        return importlib.import_module(f"{__name__}.{name}")  # type: ignore[return-value]
