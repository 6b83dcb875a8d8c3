"""A package of the null target on PyTorch, in this process."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.numpy import save
from torch import Tensor

from calora_export import program
from calora_export.adapters import Adapter
from calora_export.errors import UnsupportedError, mismatch
from calora_export.package import Package, Slots
from calora_export.runtimes import Mix, _extras
from calora_export.runtimes._shelf import Shelf, read_safetensors, require_layout

DTYPES = {"fp32": np.dtype(np.float32), "fp16": np.dtype(np.float16)}


def prepare(package: Package) -> None:
    """Nothing: importing this module has brought in the library."""


def suffix() -> str:
    return ".safetensors"


def encode_adapter(adapter: Adapter, slots: Slots, fingerprint: str, path: Path) -> None:
    """Write an adapter in the layout of the slots. The same adapter gives the same bytes."""
    path.write_bytes(save(arrange(adapter, slots), metadata={slots.fingerprint: fingerprint}))


def arrange(adapter: Adapter, slots: Slots) -> dict[str, np.ndarray]:
    """Tensor name → array: per site `down` [R, in] and `up` [R, out], zeros where the adapter has no rows."""
    dtype, rank = DTYPES[slots.dtype], adapter.rank
    arrays: dict[str, np.ndarray] = {}
    for tensor in slots.tensors:
        rows = adapter.sites.get(tensor.site)
        down = np.zeros((rank, tensor.inputs)) if rows is None else rows.down
        up = np.zeros((rank, tensor.outputs)) if rows is None else rows.up.T
        arrays[tensor.down], arrays[tensor.up] = down.astype(dtype, order="C"), up.astype(dtype, order="C")
    if slots.recovery is not None:
        arrays[slots.recovery] = adapter.recovery
    elif adapter.recovery.any():
        hint = "export again from a bundle with recovery"
        raise UnsupportedError(mismatch(adapter.id, "branches", "linear ones only", "recovery", hint))
    return arrays | _extras.arrays(adapter, slots)


def lay(adapter: Adapter, slots: Slots) -> Mapping[str, Tensor]:
    """What a file of the adapter would hold."""
    return {name: torch.from_numpy(array) for name, array in arrange(adapter, slots).items()}


def read_adapter(path: Path, slots: Slots) -> tuple[Mapping[str, Tensor], str]:
    """The tensors of an adapter file, mapped, in the type and for one rank of the slots; its base's fingerprint."""
    tensors, fingerprint = read_safetensors(path, slots, "pt")
    rank = next((len(tensors[slot.up]) for slot in slots.tensors if slot.up in tensors and tensors[slot.up].dim()), 0)
    dtype = DTYPES[slots.dtype].name
    expected = {slot.down: f"{dtype} {[rank, slot.inputs]}" for slot in slots.tensors}
    expected |= {slot.up: f"{dtype} {[rank, slot.outputs]}" for slot in slots.tensors}
    expected |= {slots.recovery: f"bool {[rank]}"} if slots.recovery else {}
    expected |= {name: f"float32 {list(shape)}" for name, shape in _extras.shapes(slots, rank).items()}
    found = {name: f"{str(t.dtype).removeprefix('torch.')} {list(t.shape)}" for name, t in tensors.items()}
    require_layout(path.name, expected, found)
    return tensors, fingerprint


@dataclass(frozen=True)
class _Rows:
    """What the program takes after its cache: downs [R, in] and ups [out, R] by site, gate [R], recovery bool [R]."""

    downs: Sequence[Tensor]
    ups: Sequence[Tensor]
    gate: Tensor
    recovery: Tensor
    extras: Sequence[Tensor]

    @staticmethod
    def blended(parts: Sequence[tuple[Mapping[str, Tensor], float]], slots: Slots) -> _Rows:
        """Several adapters' rows side by side, each with its gate; rank 0 without any."""

        def stacked(name: str, width: int) -> Tensor:
            return torch.cat([torch.zeros(0, width), *(tensors[name].float() for tensors, _ in parts)])

        ranks = [len(tensors[slots.tensors[0].up]) if slots.tensors else 0 for tensors, _ in parts]
        gate = torch.tensor([gate for (_, gate), rank in zip(parts, ranks, strict=True) for _ in range(rank)])
        recovery = torch.zeros(sum(ranks), dtype=torch.bool)
        if slots.recovery is not None and parts:
            recovery = torch.cat([tensors[slots.recovery] for tensors, _ in parts])
        downs = [stacked(slot.down, slot.inputs) for slot in slots.tensors]
        ups = [stacked(slot.up, slot.outputs).T for slot in slots.tensors]
        extras = _extras.blended([{n: t.numpy() for n, t in tensors.items()} for tensors, _ in parts], slots)
        if _extras.SELECT in extras:
            select = extras[_extras.SELECT]
            extras[_extras.SELECT], gate = select * gate.numpy(), gate * torch.from_numpy(_extras.always(select))
        return _Rows(downs, ups, gate, recovery, [torch.from_numpy(array) for array in extras.values()])


def open_session(package: Package, threads: int) -> TorchSession:
    """On one thread whatever `threads` allows, as is the rest of the process then: several wait for each other at every
    operator of a small model, ten times as long as they compute when the machine is busy.
    """
    torch.set_num_threads(1)
    return TorchSession(package)


class TorchSession:
    """Implements Session."""

    def __init__(self, package: Package) -> None:
        self._package, self._manifest = package, package.manifest
        self._model = program.read(package.path / self._manifest.model.file)
        self._router: program.Program | None = None
        self._shelf: Shelf[Mapping[str, Tensor]] = Shelf(package, read_adapter, lay)
        self._cache: list[Tensor] = []
        self._mix: dict[str, float] = {}
        self.select({})

    @property
    def mix(self) -> Mix:
        return dict(self._mix)

    @property
    def threads(self) -> int | None:
        return torch.get_num_threads()

    def select(self, mix: Mix, *, keep_cache: bool = False) -> None:
        self._package.require_mixable(mix)
        parts = [(self._shelf[identifier], gate) for identifier, gate in mix.items() if gate != 0.0]
        self._rows = _Rows.blended(parts, self._manifest.slots)
        self._mix = dict(mix)
        if not keep_cache:
            self.forget()

    def forget(self) -> None:
        self._cache = [torch.zeros(shape) for shape in self._manifest.model.caches(0).values()]

    def extend(self, ids: Sequence[int]) -> np.ndarray:
        self._package.require_room(self._cache[0].shape[2] + len(ids))
        rows = self._rows
        logits, *self._cache = self._model(
            torch.tensor([list(ids)]), *self._cache, *rows.downs, *rows.ups, rows.gate, rows.recovery, *rows.extras
        )
        return logits[0].numpy()

    def route(self, ids: Sequence[int]) -> np.ndarray:
        router = self._package.require_router()
        if self._router is None:
            self._router = program.read(self._package.path / router.file)
        return self._router(torch.tensor([list(ids)]))[0].numpy()

    def admit(self, path: Path) -> None:
        self._shelf.admit(path)
