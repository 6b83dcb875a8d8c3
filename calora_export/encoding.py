"""How adapters get into a package: one file each, and what several share once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from msgspec import UNSET, UnsetType
from msgspec.structs import replace

from calora_export import adapters, factors, joint_basis, runtimes
from calora_export.adapters import Adapter
from calora_export.bundle import Bundle
from calora_export.factors import Factored, Tensors
from calora_export.joint_basis import Joint
from calora_export.manifest import AdapterSpec
from calora_export.package import AdapterEntry, JointAdapter, JointBasis, Slots


@dataclass(frozen=True)
class AdapterSource:
    """The adapters of a bundle, as a recipe has them: one at a time, since a thousand need not fit into memory."""

    bundle: Bundle
    joint: Joint | None

    def rows(self, identifier: str) -> Adapter:
        return self.both(identifier)[0]

    def both(self, identifier: str) -> tuple[Adapter, Factored | None]:
        """An adapter, and what of it is its own, if it shares anything."""
        opened = adapters.opened(self.bundle, identifier)
        if self.joint is not None and identifier in self.joint.adapters:
            return self.joint.rows(opened), self.joint.adapters[identifier]
        named = sorted({branch.basis for branch in opened.branches if branch.basis is not None})
        return opened.rows(), factors.of(opened, factors.basis_file(named[0]) if named else None)

    def basis(self, file: str) -> Tensors:
        """What adapters share in a file of the package."""
        if self.joint is not None and file == joint_basis.FILE:
            return self.joint.basis
        (name,) = (name for name in self.bundle.bases if factors.basis_file(name) == file)
        return self.bundle.bases[name].all_float32()


@dataclass(frozen=True)
class Encoder:
    """Writes into the package at `directory`, for the base of that fingerprint."""

    directory: Path
    target: str
    slots: Slots
    fingerprint: str

    def add(self, source: AdapterSource, spec: AdapterSpec) -> AdapterEntry:
        """An adapter of a bundle."""
        rows, factored = source.both(spec.id)
        if factored is None:
            return self.rows(rows, spec.task, spec.class_index)
        return self.factors(factored, rows, spec.task, spec.class_index)

    def share(self, source: AdapterSource, entries: Sequence[AdapterEntry]) -> JointBasis | UnsetType:
        """Write what the adapters share, each file once; what a recipe's joint basis did, if it asked for one."""
        for file in sorted({entry.shared for entry in entries if entry.shared is not UNSET}):
            self._placed(file, partial(factors.write_basis, source.basis(file), self.slots.dtype))
        joint = source.joint
        if joint is None:
            return UNSET
        row = self.slots.row_bytes()
        made = [
            JointAdapter(entry.id, joint.errors[entry.id], self._size(entry.file), joint.ranks[entry.id] * row)
            for entry in entries
            if entry.id in joint.errors
        ]
        return JointBasis(joint_basis.FILE, self._size(joint_basis.FILE), tuple(made), joint.kept)

    def _size(self, file: str) -> int:
        return (self.directory / file).stat().st_size

    def rows(self, adapter: Adapter, task: str, index: int) -> AdapterEntry:
        """An adapter as the target's runtime reads it in place."""
        runtime = runtimes.load(self.target)
        file = f"adapters/{adapter.id}{runtime.suffix()}"
        self._placed(file, lambda path: runtime.encode_adapter(adapter, self.slots, self.fingerprint, path))
        return self._entry(adapter, task, index, file)

    def factors(self, adapter: Factored, rows: Adapter, task: str, index: int) -> AdapterEntry:
        """An adapter of which only its own factors are stored; rows: what they are multiplied out."""
        file, slots = f"adapters/{adapter.id}{factors.SUFFIX}", self.slots
        self._placed(file, lambda path: factors.write(adapter, slots.dtype, slots.fingerprint, self.fingerprint, path))
        entry = self._entry(rows, task, index, file)
        return entry if adapter.layout.basis is None else replace(entry, shared=adapter.layout.basis)

    def _placed(self, file: str, write: Callable[[Path], None]) -> None:
        path = self.directory / file
        path.parent.mkdir(exist_ok=True)
        temporary = path.with_name(f".{path.stem}.tmp")
        try:
            write(temporary)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)

    def _entry(self, adapter: Adapter, task: str, index: int, file: str) -> AdapterEntry:
        made = AdapterEntry(
            id=adapter.id,
            task=task,
            class_index=index,
            file=file,
            rank=adapter.rank,
            recovery_rows=int(adapter.recovery.sum()),
            sites=len(adapter.sites.keys() | adapter.scales.keys()),
            fingerprint=self.fingerprint,
            stated=adapter.fingerprint is not None,
        )
        return made if adapter.kind == "rows" else replace(made, kind=adapter.kind)
