"""A package on ExecuTorch's Python runtime, in this process."""

from __future__ import annotations

import ctypes
import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Protocol

import numpy as np
import torch
from safetensors.numpy import save
from torch import Tensor

from calora_export import native, quiet
from calora_export.adapters import Adapter
from calora_export.errors import PackageError, mismatch
from calora_export.package import Package, Slots
from calora_export.runtimes import Mix, _extras
from calora_export.runtimes._shelf import Shelf, in_order, read_safetensors, require_layout

DTYPES = {"fp32": torch.float32, "fp16": torch.float16}
STORED = {"fp32": np.dtype(np.float32), "fp16": np.dtype(np.float16)}
METHOD = "adapted"
NONE = Adapter("none", None, 0, np.zeros(0, bool), {})


def prepare(package: Package) -> None:
    """Register the operators that the runtime does not bring along; calora::slot is built on first use."""
    with quiet.libraries():
        import executorch.kernels.quantized
        import executorch.runtime  # noqa: F401
    if package.manifest.settings.kernels == "stock":
        return
    _register()


@functools.cache
def _register() -> None:
    """Once: an operator that is registered again ends the process."""
    kernels = native.kernels("executorch")
    with quiet.libraries():
        from executorch.extension.llm.custom_ops import custom_ops  # noqa: F401

        ctypes.CDLL(str(kernels), mode=ctypes.RTLD_GLOBAL)


def suffix() -> str:
    return ".safetensors"


def encode_adapter(adapter: Adapter, slots: Slots, fingerprint: str, path: Path) -> None:
    """Write `rows` [R · width] and `recovery` [R]. The same adapter gives the same bytes."""
    path.write_bytes(save(_arrays(adapter, slots), metadata={slots.fingerprint: fingerprint}))


def lay(adapter: Adapter, slots: Slots) -> Rows:
    """What a file of the adapter would hold."""
    return _rows({name: torch.from_numpy(array) for name, array in _arrays(adapter, slots).items()}, slots)


def _rows(tensors: Mapping[str, Tensor], slots: Slots) -> Rows:
    extras = {name: tensors[name].numpy() for name in _extras.flat_shapes(slots, 0)}
    gate = torch.ones(len(tensors["recovery"]))
    if _extras.SELECT in extras:
        gate = torch.from_numpy(_extras.always(extras[_extras.SELECT]))
    return Rows(tensors["rows"], gate, tensors["recovery"], extras)


def _arrays(adapter: Adapter, slots: Slots) -> dict[str, np.ndarray]:
    dtype = STORED[slots.dtype]
    parts = [np.ravel(matrix).astype(dtype) for matrix in in_order(adapter, slots)]
    rows = np.concatenate([np.zeros(0, dtype), *parts])
    return {"rows": rows, "recovery": adapter.recovery.astype(np.float32)} | _extras.flat(adapter, slots)


def _shapes(slots: Slots, rank: int) -> list[tuple[int, int]]:
    """The matrices of `rows`, one after the other."""
    return [
        shape
        for group in slots.groups()
        for shape in (*((rank, slot.inputs) for slot in group), *((rank, slot.outputs) for slot in group))
    ]


@dataclass(frozen=True)
class Rows:
    """An adapter or a mix: rows [R · width], gate fp32 [R], recovery fp32 [R]. extras: fp32 `extras` and `select`
    [E, R], if the program takes them."""

    rows: Tensor
    gate: Tensor
    recovery: Tensor
    extras: Mapping[str, np.ndarray] = field(default_factory=dict)


def blend(parts: Sequence[tuple[Rows, float]], slots: Slots) -> Rows:
    """Several adapters side by side in every matrix, each with its gate. A lone one stays where it is mapped."""
    none = torch.zeros(0)
    gate = torch.cat([none, *(rows.gate * gate for rows, gate in parts)])
    gated = [_extras.gated(rows.extras, gate) for rows, gate in parts]
    extras = _extras.joined(gated, slots) if parts else _extras.flat(NONE, slots)
    if len(parts) == 1:
        return Rows(parts[0][0].rows, gate, parts[0][0].recovery, extras)
    matrices = [_parts(rows, _shapes(slots, len(rows.gate))) for rows, _ in parts]
    joined = [torch.cat(alike).flatten() for alike in zip(*matrices, strict=True)]
    rows = torch.cat([none.to(DTYPES[slots.dtype]), *joined])
    return Rows(rows, gate, torch.cat([none, *(rows.recovery for rows, _ in parts)]), extras)


def adapter_inputs(rows: Rows, slots: Slots, kernels: str) -> list[Tensor]:
    """What the program takes of them: rows as a whole; or, to be multiplied where they are, every group's down
    [parts · R, in] and every site's up [1, R, out]."""
    more = [_strided(array[None] if array.ndim == 2 else array) for array in rows.extras.values()]
    if kernels == "calora":
        return [rows.rows, rows.gate, rows.recovery, *more]
    rank = len(rows.gate)
    shapes: list[tuple[int, ...]] = []
    for group in slots.groups():
        shapes += [(len(group) * rank, group[0].inputs), *((1, rank, slot.outputs) for slot in group)]
    return [*_parts(rows, shapes), rows.gate, rows.recovery, *more]


def _strided(array: np.ndarray) -> Tensor:
    """A copy, with the strides that the runtime wants of a tensor without elements too: numpy's are 0."""
    return torch.zeros(array.shape).copy_(torch.from_numpy(array))


def _parts(rows: Rows, shapes: Sequence[tuple[int, ...]]) -> list[Tensor]:
    """Views of the rows, one after the other."""
    parts = rows.rows.split([math.prod(shape) for shape in shapes])
    return [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]


def read_adapter(path: Path, slots: Slots) -> tuple[Rows, str]:
    """The rows of an adapter file, mapped, and the fingerprint of its base."""
    tensors, fingerprint = read_safetensors(path, slots, "pt")
    rank = len(tensors["recovery"]) if "recovery" in tensors and tensors["recovery"].dim() else 0
    size = sum(a * b for a, b in _shapes(slots, rank))
    expected = {"rows": f"{DTYPES[slots.dtype]} {[size]}", "recovery": f"{torch.float32} {[rank]}"}
    shapes = _extras.flat_shapes(slots, rank)
    expected |= {name: f"{torch.float32} {list(shape)}" for name, shape in shapes.items()}
    found = {name: f"{tensor.dtype} {list(tensor.shape)}" for name, tensor in tensors.items()}
    require_layout(path.name, expected, found)
    return _rows(tensors, slots), fingerprint


def open_session(package: Package, threads: int) -> ExecutorchSession:
    """The runtime's thread pool, which all of this process shares, has so many threads from now on."""
    prepare(package)
    with quiet.libraries():
        _pool()._unsafe_reset_threadpool(threads)
    return ExecutorchSession(package)


def _pool() -> ModuleType:
    from executorch.extension.pybindings import portable_lib

    return portable_lib


class ExecutorchSession:
    """Implements Session. The KV cache lives in the program; what it holds behind `_length` is never read."""

    def __init__(self, package: Package) -> None:
        self._package, self._manifest = package, package.manifest
        self._model = _open(package.path / self._manifest.model.file, METHOD)
        self._router: Method | None = None
        self._shelf = Shelf(package, read_adapter, lay)
        self._length = 0
        self._mix: dict[str, float] = {}
        self.select({})

    @property
    def mix(self) -> Mix:
        return dict(self._mix)

    @property
    def threads(self) -> int | None:
        return _pool()._threadpool_get_thread_count()

    def select(self, mix: Mix, *, keep_cache: bool = False) -> None:
        parts = [(self._shelf[identifier], gate) for identifier, gate in mix.items() if gate != 0.0]
        self._package.require_mixable(mix)
        rows = blend(parts, self._manifest.slots)
        self._package.require_rank(len(rows.gate))
        self._adapter_inputs = adapter_inputs(rows, self._manifest.slots, self._manifest.settings.kernels)
        self._mix = dict(mix)
        if not keep_cache:
            self.forget()

    def forget(self) -> None:
        self._length = 0

    def extend(self, ids: Sequence[int]) -> np.ndarray:
        total = self._length + len(ids)
        self._package.require_room(total)
        logits = np.zeros(0)
        for start in range(0, len(ids), self._manifest.settings.chunk):
            part = ids[start : start + self._manifest.settings.chunk]
            inputs = [torch.tensor([list(part)]), torch.tensor([self._length + start]), *self._adapter_inputs]
            logits = self._model.execute(inputs)[0].numpy()[0]
        self._length = total
        return logits

    def route(self, ids: Sequence[int]) -> np.ndarray:
        router = self._package.require_router()
        if self._router is None:
            self._router = _open(self._package.path / router.file, "forward")
        return self._router.execute([torch.tensor([list(ids)])])[0].numpy()

    def admit(self, path: Path) -> None:
        self._shelf.admit(path)


class Method(Protocol):
    """A loaded method of a program, as executorch.runtime has it."""

    def execute(self, inputs: Sequence[Tensor]) -> Sequence[Tensor]: ...


def _open(path: Path, method: str) -> Method:
    """ExecuTorch's errors are codes; its log says more, on stderr."""
    from executorch.runtime import Runtime

    try:
        with quiet.libraries():
            program = Runtime.get().load_program(path)
            loaded = program.load_method(method) if method in program.method_names else None
    except RuntimeError as error:
        raise PackageError(f"{path.name}: ExecuTorch refuses it: {str(error).splitlines()[0]}") from error
    if loaded is None:
        raise PackageError(mismatch(path.name, "method", method, ", ".join(sorted(program.method_names))))
    return loaded
