"""One module per format that trainers publish, found by its file name.

run(base, …, out, …) -> Imported      writes the bundle `out`. Its parameters, with the numbers that the files do not
                                      hold among them, are the command line's; its docstring begins with its help
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol


@dataclass(frozen=True)
class Imported:
    """What an importer wrote."""

    bundle: Path
    adapters: tuple[str, ...]


class Importer(Protocol):
    """What every module in this package offers."""

    run: Callable[..., Imported]


def names() -> tuple[str, ...]:
    """The formats as the command line spells them, without importing any."""
    modules = [module.name for module in pkgutil.iter_modules(__path__) if not module.name.startswith("_")]
    return tuple(sorted(name.replace("_", "-") for name in modules))


def load(name: str) -> Importer:
    """Import one format's module."""
    return importlib.import_module(f"{__name__}.{name.replace('-', '_')}")  # type: ignore[return-value]
