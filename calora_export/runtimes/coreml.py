"""A Core ML package in this process: by Core ML where this is macOS, by the reference runtime elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from safetensors.numpy import save

from calora_export import mlpackage
from calora_export.adapters import Adapter
from calora_export.coreml_engines import Engine, Engines, Predictions, Reference
from calora_export.errors import DeviceError, PackageError, mismatch
from calora_export.package import Package, Slots
from calora_export.runtimes import Mix, _extras
from calora_export.runtimes._shelf import Shelf, in_order, read_safetensors, require_layout

HALF = np.dtype(np.float16)
UNITS = {"all": "ALL", "cpuAndGPU": "CPU_AND_GPU", "cpuAndNeuralEngine": "CPU_AND_NE", "cpuOnly": "CPU_ONLY"}
"""What Apple's MLComputeUnits has → what coremltools calls it."""
NONE = Adapter("none", None, 1, np.zeros(1, bool), {})
HIDDEN = HALF.type(np.finfo(HALF).min)


def prepare(package: Package) -> None:
    """DeviceError where there is no Core ML."""
    if sys.platform != "darwin":
        hint = "use --device reference, which runs the same file on any machine"
        raise DeviceError(mismatch("coreml", "system", "macOS", sys.platform, hint))


def suffix() -> str:
    return ".safetensors"


def encode_adapter(adapter: Adapter, slots: Slots, fingerprint: str, path: Path) -> None:
    """Write `rows` [sites' features, R] and `recovery` [R]. The same adapter gives the same bytes."""
    path.write_bytes(save(_arrays(adapter, slots), metadata={slots.fingerprint: fingerprint}))


def lay(adapter: Adapter, slots: Slots) -> Rows:
    """What a file of the adapter would hold."""
    arrays = _arrays(adapter, slots)
    return _rows(arrays, slots)


def _rows(arrays: Mapping[str, np.ndarray], slots: Slots) -> Rows:
    extras = {name: arrays[name] for name in _extras.flat_shapes(slots, 0)}
    return Rows(arrays["rows"], _gate(extras, len(arrays["recovery"])), arrays["recovery"], extras)


def _gate(extras: Mapping[str, np.ndarray], rank: int) -> np.ndarray:
    """fp16 [R]: 1, but 0 on rows whose gates are each token's own."""
    return _extras.always(extras[_extras.SELECT]).astype(HALF) if _extras.SELECT in extras else np.ones(rank, HALF)


def _arrays(adapter: Adapter, slots: Slots) -> dict[str, np.ndarray]:
    rows = np.concatenate([np.zeros((adapter.rank, 0)), *in_order(adapter, slots)], axis=1).T.astype(HALF, order="C")
    arrays = {"rows": rows, "recovery": adapter.recovery.astype(HALF)}
    return arrays | {name: array.astype(HALF) for name, array in _extras.flat(adapter, slots).items()}


@dataclass(frozen=True)
class Rows:
    """An adapter or a mix, as the model takes it: adapter [features, R], gate [R], recovery [R], all fp16. extras: the
    inputs `extras` and `select`, if the model has them."""

    adapter: np.ndarray
    gate: np.ndarray
    recovery: np.ndarray
    extras: Mapping[str, np.ndarray] = field(default_factory=dict)

    @property
    def rank(self) -> int:
        return len(self.gate)


def blend(parts: Sequence[tuple[Rows, float]], slots: Slots) -> Rows:
    """Several adapters side by side, each with its gate; none: one row of gate 0. A lone one stays where it is."""
    if not parts:
        features = sum(slot.inputs + slot.outputs for slot in slots.tensors)
        none = {name: array.astype(HALF) for name, array in _extras.flat(NONE, slots).items()}
        return Rows(np.zeros((features, 1), HALF), np.zeros(1, HALF), np.zeros(1, HALF), none)
    gate = np.concatenate([rows.gate * HALF.type(gate) for rows, gate in parts])
    if len(parts) == 1:
        return Rows(parts[0][0].adapter, gate, parts[0][0].recovery, _extras.gated(parts[0][0].extras, parts[0][1]))
    adapter = np.concatenate([rows.adapter for rows, _ in parts], axis=1)
    extras = _extras.joined([_extras.gated(rows.extras, gate) for rows, gate in parts], slots)
    return Rows(adapter, gate, np.concatenate([rows.recovery for rows, _ in parts]), extras)


def read_adapter(path: Path, slots: Slots) -> tuple[Rows, str]:
    """The rows of an adapter file, and the fingerprint of its base."""
    tensors, fingerprint = read_safetensors(path, slots, "np")
    rank = tensors["recovery"].size if "recovery" in tensors else 0
    features = sum(slot.inputs + slot.outputs for slot in slots.tensors)
    expected = {"rows": f"float16 {[features, rank]}", "recovery": f"float16 {[rank]}"}
    expected |= {name: f"float16 {list(shape)}" for name, shape in _extras.flat_shapes(slots, rank).items()}
    found = {name: f"{tensor.dtype} {list(tensor.shape)}" for name, tensor in tensors.items()}
    require_layout(path.name, expected, found)
    return _rows(tensors, slots), fingerprint


def open_session(package: Package, threads: int) -> CoremlSession:
    """`threads` changes nothing: Core ML chooses for itself, and the reference runtime has one."""
    return CoremlSession(package, Predictions() if sys.platform == "darwin" else Reference())


def predicting(package: Package, units: str) -> CoremlSession:
    """A session of Core ML itself; units: a profile's compute_units."""
    return CoremlSession(package, Predictions(UNITS[units]))


class CoremlSession:
    """Implements Session. The KV cache lives in the model's state; what it holds behind `_length` is never read."""

    def __init__(self, package: Package, engines: Engines) -> None:
        self._package, self._manifest, self._engines = package, package.manifest, engines
        self._shelf = Shelf(package, read_adapter, lay)
        self._functions: dict[str, Engine] = {}
        self._router: Engine | None = None
        self._length = 0
        self._mix: dict[str, float] = {}
        self.select({})

    @property
    def mix(self) -> Mix:
        return dict(self._mix)

    @property
    def threads(self) -> int | None:
        return None

    def select(self, mix: Mix, *, keep_cache: bool = False) -> None:
        if self._manifest.settings.adapter_inputs == "functions":
            if keep_cache:
                expected = "a cache of its own for each function"
                raise PackageError(mismatch("package.json", "settings.adapter_inputs", expected, "one to be kept"))
            self._model, self._rows = self._function(mix), None
        else:
            parts = [(self._shelf[identifier], gate) for identifier, gate in mix.items() if gate != 0.0]
            self._package.require_mixable(mix)
            self._package.require_rank(sum(rows.rank for rows, _ in parts))
            self._model = self._opened(None)
            self._rows = blend(parts, self._manifest.slots) if self._manifest.slots.tensors else None
        self._mix = dict(mix)
        if not keep_cache:
            self.forget()

    def forget(self) -> None:
        self._length = 0

    def extend(self, ids: Sequence[int]) -> np.ndarray:
        self._package.require_room(self._length + len(ids))
        logits = []
        while ids:
            count = self._next_length(len(ids))
            logits.append(self._model.run(self._inputs(ids[:count]))["logits"][0])
            self._length += count
            ids = ids[count:]
        found = logits[-1] if self._manifest.model.logits == "last" else np.concatenate(logits)
        return found.astype(np.float32)

    def route(self, ids: Sequence[int]) -> np.ndarray:
        router = self._package.require_router()
        if self._router is None:
            self._router = self._engines.open(self._package.path / router.file)
        return self._router.run({"ids": np.array([ids], np.int32)})["gates"].astype(np.float32)

    def admit(self, path: Path) -> None:
        self._shelf.admit(path)

    def _function(self, mix: Mix) -> Engine:
        """The function that has the mix's only adapter baked in."""
        active = {identifier: gate for identifier, gate in mix.items() if gate != 0.0}
        if len(active) > 1 or any(gate != 1.0 for gate in active.values()):
            shown = ", ".join(f"{identifier}={gate:g}" for identifier, gate in active.items())
            expected, hint = "one at weight 1, as each is a function", "export with a recipe whose adapters are inputs"
            raise PackageError(mismatch("package.json", "adapters", expected, shown, hint))
        for identifier in active:
            self._package.adapter(identifier)
        names = mlpackage.function_names(entry.id for entry in self._manifest.adapters)
        return self._opened(names[next(iter(active), mlpackage.BASE)])

    def _opened(self, function: str | None) -> Engine:
        key = function or ""
        if key not in self._functions:
            self._functions[key] = self._engines.open(self._package.path / self._manifest.model.file, function)
        return self._functions[key]

    def _next_length(self, left: int) -> int:
        settings = self._manifest.settings
        return max((size for size in settings.lengths if size <= left), default=min(left, settings.chunk))

    def _inputs(self, ids: Sequence[int]) -> dict[str, np.ndarray]:
        settings, start, end = self._manifest.settings, self._length, self._length + len(ids)
        positions = self._manifest.model.context if settings.lengths else end
        inputs = {"inputIds": np.array([ids], np.int32), "causalMask": _mask(start, end, positions)}
        if settings.lengths:
            inputs["position"] = np.array([start], np.int32)
        if self._rows is not None:
            inputs |= {"adapter": self._rows.adapter, "gate": self._rows.gate, "recovery": self._rows.recovery}
            inputs |= self._rows.extras
        return inputs


def _mask(start: int, end: int, positions: int) -> np.ndarray:
    """fp16 [1, 1, end - start, positions]: a token sees all before it and itself."""
    seen = np.arange(positions)[None, :] <= np.arange(start, end)[:, None]
    return np.where(seen, HALF.type(0), HIDDEN)[None, None]
