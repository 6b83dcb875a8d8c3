"""A package on ONNX Runtime, in this process."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnxruntime as ort
from msgspec import UNSET

from calora_export import native
from calora_export.adapters import Adapter
from calora_export.errors import PackageError, UnsupportedError, mismatch
from calora_export.package import ModelInfo, Package, Slots
from calora_export.runtimes import Mix, _extras, _onnx_inputs
from calora_export.runtimes._shelf import Shelf, require_layout

VERSION = 1
ALWAYS = "always"
QUIET = 3
KINDS = {"fp32": "tensor(float)", "fp16": "tensor(float16)", "int8": "tensor(int8)"}


def prepare(package: Package) -> None:
    """Importing this module has brought in the library; operators of ours are built on first use."""
    if package.manifest.settings.kernels == "calora":
        native.kernels("onnx")


def suffix() -> str:
    return ".onnx_adapter"


def encode_adapter(adapter: Adapter, slots: Slots, fingerprint: str, path: Path) -> None:
    """Write an adapter in the layout of the graph's inputs. The same adapter gives the same bytes."""
    arrays = arrange(adapter, slots)
    arrays[slots.fingerprint] = np.frombuffer(bytes.fromhex(fingerprint.removeprefix("sha256:")), np.uint8)
    values = {name: ort.OrtValue.ortvalue_from_numpy(array) for name, array in arrays.items()}
    file = ort.AdapterFormat()
    file.set_adapter_version(VERSION)
    file.set_model_version(VERSION)
    file.set_parameters(values)
    try:
        file.export_adapter(str(path))  # type: ignore[arg-type]  # says PathLike, takes str
    except RuntimeError as error:  # ONNX Runtime does not say why the system refused
        hint = "is the disk full or read-only?"
        raise PackageError(f"adapters/{adapter.id}{suffix()}: cannot be written ({hint})") from error


def arrange(adapter: Adapter, slots: Slots) -> dict[str, np.ndarray]:
    """Input → array."""
    arrays = _onnx_inputs.arrange(adapter, slots)
    arrays |= _extras.arrays(adapter, slots)
    if slots.routed is not UNSET:
        arrays[ALWAYS] = _extras.always(arrays[_extras.SELECT])
    if slots.recovery is None and adapter.recovery.any():
        raise UnsupportedError(
            mismatch(
                adapter.id,
                "branches",
                "linear ones only",
                "recovery",
                "export again from a bundle with recovery",
            )
        )
    return arrays


@dataclass(frozen=True)
class Tensors:
    """Named tensors of the runtime, with what keeps their memory alive: an OrtValue does not own a numpy array."""

    values: Mapping[str, ort.OrtValue]
    owner: object

    @staticmethod
    def of(arrays: Mapping[str, np.ndarray]) -> Tensors:
        return Tensors({name: ort.OrtValue.ortvalue_from_numpy(array) for name, array in arrays.items()}, arrays)

    def arrays(self) -> dict[str, np.ndarray]:
        return {name: value.numpy() for name, value in self.values.items()}


def read_adapter(path: Path, slots: Slots) -> tuple[Tensors, str]:
    """The tensors of an adapter file, mapped, and the fingerprint of its base."""
    try:
        file = ort.AdapterFormat.read_adapter(str(path))  # type: ignore[arg-type]
        values = dict(file.get_parameters())
    except Exception as error:  # the binding raises bare RuntimeErrors for every kind of damage
        raise PackageError(f"{path.name}: not an adapter file: {str(error).splitlines()[0]}") from error
    if slots.fingerprint not in values:
        raise PackageError(mismatch(path.name, slots.fingerprint, "uint8 [32]", "nothing"))
    fingerprint = values.pop(slots.fingerprint).numpy().tobytes()
    _require_layout(path.name, values, slots)
    return Tensors(values, file), f"sha256:{fingerprint.hex()}"


def _require_layout(file: str, values: Mapping[str, ort.OrtValue], slots: Slots) -> None:
    """Refuse tensors that are not those of the slots, in their type and for one rank: the runtime would fail late."""
    shapes = {name: list(value.shape()) for name, value in values.items()}
    inputs = _onnx_inputs.inputs(slots)
    rank = next((math.prod(shapes[each.name]) // each.width for each in inputs if each.name in shapes), 0)
    expected = {each.name: f"{KINDS[each.dtype]} {each.shape(rank)}" for each in inputs}
    expected |= {name: f"{KINDS['fp32']} {list(shape)}" for name, shape in _extras.shapes(slots, rank).items()}
    expected |= {} if slots.routed is UNSET else {ALWAYS: f"{KINDS['fp32']} {[rank]}"}
    found = {name: f"{value.data_type()} {shapes[name]}" for name, value in values.items()}
    require_layout(file, expected, found)


def blend(parts: Sequence[tuple[dict[str, np.ndarray], float]], slots: Slots) -> dict[str, np.ndarray]:
    """Several adapters' arrays as one."""
    blended = _onnx_inputs.blended(parts, slots)
    blended |= _extras.blended([arrays for arrays, _ in parts], slots)
    if slots.routed is not UNSET:
        blended[ALWAYS] = _extras.always(blended[_extras.SELECT])
    return blended


def open_session(package: Package, threads: int) -> OnnxSession:
    return OnnxSession(package, threads)


class OnnxSession:
    """Implements Session. Cache and adapter tensors are bound once and stay where they are, token after token."""

    def __init__(self, package: Package, threads: int) -> None:
        self._package, self._manifest, self._threads = package, package.manifest, threads
        self._model = _open(package.path / self._manifest.model.file, threads, self._manifest.settings.kernels)
        self._router: ort.InferenceSession | None = None
        self._shelf = Shelf(package, read_adapter, lambda adapter, slots: Tensors.of(arrange(adapter, slots)))
        self._cache = _Cache(self._manifest.model)
        self._mix: dict[str, float] = {}
        self.select({})

    @property
    def mix(self) -> Mix:
        return dict(self._mix)

    @property
    def threads(self) -> int | None:
        return self._threads

    def select(self, mix: Mix, *, keep_cache: bool = False) -> None:
        self._package.require_mixable(mix)
        parts = [(self._shelf[identifier], gate) for identifier, gate in mix.items() if gate != 0.0]
        self._rows = self._combine(parts)
        self._binding = self._model.io_binding()
        self._binding.bind_output("logits")  # the first to be bound is the first of get_outputs()
        for name, tensor in self._rows.values.items():
            self._binding.bind_ortvalue_input(name, tensor)
        self._cache.bind(self._binding)
        self._mix = dict(mix)
        if not keep_cache:
            self.forget()

    def forget(self) -> None:
        self._cache.length = 0

    def extend(self, ids: Sequence[int]) -> np.ndarray:
        total = self._cache.length + len(ids)
        self._package.require_room(total)
        self._binding.bind_cpu_input("input_ids", np.array([ids], np.int64))
        self._binding.bind_cpu_input("attention_mask", np.ones((1, total), np.int64))
        self._binding.bind_output("logits")
        self._model.run_with_iobinding(self._binding)
        self._cache.length = total
        return self._binding.get_outputs()[0].numpy()[0]

    def route(self, ids: Sequence[int]) -> np.ndarray:
        router = self._package.require_router()
        if self._router is None:
            self._router = _open(self._package.path / router.file, self._threads)
        return np.asarray(self._router.run(["gates"], {"ids": np.array([ids], np.int64)})[0])

    def admit(self, path: Path) -> None:
        self._shelf.admit(path)

    def _combine(self, parts: Sequence[tuple[Tensors, float]]) -> Tensors:
        slots, settings = self._manifest.slots, self._manifest.settings
        if len(parts) == 1 and parts[0][1] == 1.0:
            return parts[0][0]
        if parts:
            return Tensors.of(blend([(tensors.arrays(), gate) for tensors, gate in parts], slots))
        if settings.adapter_inputs == "optional":
            return Tensors.of({})
        return Tensors.of(arrange(Adapter("none", None, 0, np.zeros(0, bool), {}), slots))


class _Cache:
    """Keys and values [1, KV, context, D] that the runtime reads and writes in place; `length` positions are valid."""

    def __init__(self, model: ModelInfo) -> None:
        shapes = model.caches(model.context)
        self._buffers = Tensors.of({name: np.zeros(shape, np.float32) for name, shape in shapes.items()})
        self.length = 0

    def bind(self, binding: ort.IOBinding) -> None:
        for name, buffer in self._buffers.values.items():
            binding.bind_ortvalue_input(f"past_key_values.{name}", buffer)
            binding.bind_ortvalue_output(f"present.{name}", buffer)


def _open(path: Path, threads: int, kernels: str = "stock") -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.log_severity_level = QUIET  # one warning per overridable initializer otherwise
    options.intra_op_num_threads = threads
    if kernels == "calora":
        options.register_custom_ops_library(str(native.kernels("onnx")))
    try:
        return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:
        hint = "export again, if another version of this tool wrote it"
        reason = textwrap.shorten(str(error).splitlines()[0], 200, placeholder=" …")
        raise PackageError(f"{path.name}: ONNX Runtime refuses it: {reason} ({hint})") from error
