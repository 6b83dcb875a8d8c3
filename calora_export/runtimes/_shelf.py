"""The adapters of a package that a session has opened."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Generic, TypeVar

from safetensors import SafetensorError, safe_open

from calora_export.errors import PackageError, mismatch
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


def read_safetensors(path: Path, slots: Slots, framework: str) -> tuple[dict[str, Any], str]:
    """The tensors of an adapter file as `np` or, mapped, as `pt` has them, and the fingerprint of its base."""
    try:
        with safe_open(path, framework) as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # not a dict
    except (OSError, SafetensorError) as error:
        raise PackageError(f"{path.name}: not an adapter file: {str(error).splitlines()[0]}") from error
    if slots.fingerprint not in metadata:
        raise PackageError(mismatch(path.name, slots.fingerprint, "sha256:<hex>", "nothing"))
    return tensors, metadata[slots.fingerprint]


def require_layout(file: str, expected: Mapping[str, str], found: Mapping[str, str]) -> None:
    """Refuse tensors that are not those of the slots; both map a name to type and shape, in words."""
    for name in sorted(expected.keys() | found.keys()):
        if expected.get(name) != found.get(name):
            wanted = expected.get(name, "no such tensor")
            raise PackageError(mismatch(file, name, wanted, found.get(name, "nothing")))
