"""The adapters of a package that a session has opened."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np
from safetensors import SafetensorError, safe_open

from calora_export import factors
from calora_export.adapters import Adapter
from calora_export.errors import PackageError, mismatch
from calora_export.package import Package, Slots

Rows = TypeVar("Rows")


class Shelf(Generic[Rows]):
    """read(path, slots) gives what a file holds, and the fingerprint of the base that it says it is for; lay(adapter,
    slots) makes the same of rows."""

    def __init__(
        self,
        package: Package,
        read: Callable[[Path, Slots], tuple[Rows, str]],
        lay: Callable[[Adapter, Slots], Rows],
    ) -> None:
        self._package, self._read, self._lay = package, read, lay
        self._found: dict[str, Rows] = {}
        self._bases: dict[str, Mapping[str, Any]] = {}

    def __getitem__(self, identifier: str) -> Rows:
        if identifier not in self._found:
            self._found[identifier] = self.admit(self._package.path / self._package.adapter(identifier).file)
        return self._found[identifier]

    def admit(self, path: Path) -> Rows:
        """Refuse what was not made for this base and these slots: the file itself says what it is."""
        if path.suffix == factors.SUFFIX:
            return self._multiplied(path)
        rows, fingerprint = self._read(path, self._package.manifest.slots)
        self._package.require_fingerprint(path.name, fingerprint)
        return rows

    def _multiplied(self, path: Path) -> Rows:
        """An adapter file that holds cores: rows are made of them and of what the package shares, once."""
        slots = self._package.manifest.slots
        adapter, fingerprint = factors.read(path, slots.fingerprint)
        self._package.require_fingerprint(path.name, fingerprint)
        basis = self._basis(adapter.layout.basis, path.name)
        factors.check(adapter, basis, slots.linears(), path.name)
        return self._lay(adapter.rows(basis), slots)

    def _basis(self, name: str | None, file: str) -> Mapping[str, Any]:
        if name is None:
            return {}
        if name not in self._bases:
            if name not in self._package.manifest.files:
                raise PackageError(mismatch(file, "basis", "a file of this package", name))
            self._bases[name] = factors.read_tensors(self._package.path / name)[0]
        return self._bases[name]


def in_order(adapter: Adapter, slots: Slots) -> list[np.ndarray]:
    """An adapter's matrices [R, features] as a file that holds them in one tensor has them: group by group, first the
    downs, then the ups; zeros at sites without rows."""
    matrices: list[np.ndarray] = []
    for group in slots.groups():
        found = [(slot, adapter.sites.get(slot.site)) for slot in group]
        matrices += [np.zeros((adapter.rank, slot.inputs)) if rows is None else rows.down for slot, rows in found]
        matrices += [np.zeros((adapter.rank, slot.outputs)) if rows is None else rows.up.T for slot, rows in found]
    return matrices


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
