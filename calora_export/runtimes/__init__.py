"""How a package is opened where this process runs: one module per target, found by its file name.

prepare(package) -> None                                    brings in the libraries
open_session(package, threads) -> Session
encode_adapter(adapter, slots, fingerprint, path) -> None
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np

from calora_export.errors import PackageError, mismatch

if TYPE_CHECKING:
    from calora_export.adapters import Adapter
    from calora_export.package import Package, Slots

Mix = Mapping[str, float]
"""Adapter id → gate. Empty: the base."""


class Session(Protocol):
    """A loaded package. It holds one KV cache, which belongs to the mix that is active when it is filled."""

    @property
    def mix(self) -> Mix: ...

    @property
    def threads(self) -> int | None:
        """How many it computes on; None where the runtime does not tell."""
        ...

    def select(self, mix: Mix, *, keep_cache: bool = False) -> None:
        """Activate a mix of adapters. The KV cache is emptied unless the caller asks to read it under the new mix."""
        ...

    def forget(self) -> None:
        """Empty the KV cache."""
        ...

    def extend(self, ids: Sequence[int]) -> np.ndarray:
        """Append tokens to the cache; logits fp32 [1 or len(ids), vocab], as the package was exported."""
        ...

    def route(self, ids: Sequence[int]) -> np.ndarray:
        """Gates fp32 [classes] for a prompt's router ids."""
        ...

    def admit(self, path: Path) -> None:
        """Check that an adapter file may run on this base; FingerprintError or PackageError when it may not."""
        ...


class Runtime(Protocol):
    """What every module in this package offers."""

    def prepare(self, package: Package) -> None:
        """Bring in what a package needs of this machine, so that it does not count as time to load a package."""
        ...

    def open_session(self, package: Package, threads: int) -> Session: ...

    def encode_adapter(self, adapter: Adapter, slots: Slots, fingerprint: str, path: Path) -> None: ...

    def suffix(self) -> str:
        """The ending of an adapter file's name."""
        ...


def load(target: str) -> Runtime:
    """Import the runtime of one target; PackageError when there is none."""
    known = sorted(module.name for module in pkgutil.iter_modules(__path__) if not module.name.startswith("_"))
    if target not in known:
        raise PackageError(mismatch("package.json", "target", f"one of {', '.join(known)}", target))
    return importlib.import_module(f"{__name__}.{target}")  # type: ignore[return-value]
