"""How compressed weights lie in a checkpoint: one module per layout, found by the base's `quant_method`.

reader(config, tensors, file) -> Reader       config: quantization_config of config.json, JSON; file: that file's name
MARKS                                         endings of tensor names that only this layout has
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import msgspec

from calora_export import strict_json
from calora_export.compression import DenseWeight, PackedWeight, WeightFormat
from calora_export.errors import BundleError, UnsupportedError, mismatch
from calora_export.tensors import FLOATS, TensorIndex

KEY = "quantization_config"


class Reader(Protocol):
    """Reads the packed weights of one checkpoint; raises BundleError or UnsupportedError in one line."""

    def modules(self) -> Sequence[str]:
        """The modules whose weights are packed."""
        ...

    def format(self, module: str) -> WeightFormat:
        """What headers and small tensors say of a weight."""
        ...

    def read(self, module: str) -> PackedWeight:
        """The weight of a module."""
        ...


class Layout(Protocol):
    """What every module of this package offers."""

    MARKS: Sequence[str]

    def reader(self, config: bytes, tensors: TensorIndex, file: str) -> Reader: ...


class _Method(msgspec.Struct, frozen=True):
    quant_method: str


@dataclass(frozen=True)
class Checkpoint:
    """The weights of a base: those that a layout packs, and dense ones."""

    tensors: TensorIndex
    reader: Reader | None

    @cached_property
    def formats(self) -> dict[str, WeightFormat]:
        """Every 2-D weight's format, by the module's name."""
        packed = {} if self.reader is None else {module: self.reader.format(module) for module in self.reader.modules()}
        dense: dict[str, WeightFormat] = {}
        for name, info in self.tensors.tensors.items():
            module = name.removesuffix(".weight")
            if module != name and len(info.shape) == 2 and module not in packed:
                dense[module] = self._dense(name)
        return dict(sorted({**packed, **dense}.items()))

    def read(self, module: str) -> DenseWeight | PackedWeight:
        """The weight of a module; BundleError when its tensors are missing or do not fit each other."""
        if self.reader is not None and module in self.formats and self.formats[module].bits is not None:
            return self.reader.read(module)
        self._dense(f"{module}.weight")
        return DenseWeight(self.tensors.array(f"{module}.weight"))

    def _dense(self, name: str) -> WeightFormat:
        info = self.tensors.info(name)
        if len(info.shape) != 2:
            raise BundleError(mismatch(self.tensors.file_of(name), name, "[out, in]", f"{list(info.shape)}"))
        if info.dtype not in FLOATS:
            hint = f"compressed weights are read as config.json's {KEY} says"
            raise UnsupportedError(mismatch(self.tensors.file_of(name), name, " or ".join(FLOATS), info.dtype, hint))
        return WeightFormat((info.shape[0], info.shape[1]), None, None)


def names() -> tuple[str, ...]:
    """The layouts that are read, by their module's name, without importing any of them."""
    return tuple(sorted(module.name for module in pkgutil.iter_modules(__path__) if not module.name.startswith("_")))


def load(name: str) -> Layout:
    """Import one layout."""
    return importlib.import_module(f"{__name__}.{name}")  # type: ignore[return-value]


def find(config: bytes, file: str) -> Layout:
    """The layout that a quantization_config names; UnsupportedError for one that is not read."""
    method = strict_json.decode(config, _Method, f"{file}: {KEY}").quant_method
    if method.replace("-", "_") not in names():
        known = ", ".join(name.replace("_", "-") for name in names())
        shown, hint = strict_json.plain(method), "or save it uncompressed"
        raise UnsupportedError(mismatch(file, f"{KEY}.quant_method", f"one of {known}", shown, hint))
    return load(method.replace("-", "_"))


def checkpoint(tensors: TensorIndex, config: bytes | None, file: str) -> Checkpoint:
    """The weights of a base whose config.json has `config` as its quantization_config."""
    if config is not None:
        return Checkpoint(tensors, find(config, file).reader(config, tensors, file))
    marks = tuple(mark for name in names() for mark in load(name).MARKS)
    if any(name.endswith(marks) for name in tensors.names()):
        raise BundleError(mismatch(file, KEY, "one for the packed weights", "nothing"))
    return Checkpoint(tensors, None)
