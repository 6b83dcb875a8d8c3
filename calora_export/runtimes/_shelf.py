"""The adapters of a package that a session has opened."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Generic, TypeVar

from calora_export.package import Package, Slots

Rows = TypeVar("Rows")


class Shelf(Generic[Rows]):
    """read(path, slots) gives what a file holds, and the fingerprint of the base that it says it is for."""

    def __init__(self, package: Package, read: Callable[[Path, Slots], tuple[Rows, str]]) -> None:
        self._package, self._read = package, read
        self._found: dict[str, Rows] = {}

    def __getitem__(self, identifier: str) -> Rows:
        if identifier not in self._found:
            self._found[identifier] = self.admit(self._package.path / self._package.adapter(identifier).file)
        return self._found[identifier]

    def admit(self, path: Path) -> Rows:
        """Refuse what was not made for this base and these slots: the file itself says what it is."""
        rows, fingerprint = self._read(path, self._package.manifest.slots)
        self._package.require_fingerprint(path.name, fingerprint)
        return rows
