"""What computes a saved .mlpackage: Core ML itself on macOS, the reference runtime on any machine."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np

from calora_export import mlpackage

if TYPE_CHECKING:
    from calora_export import mil

Arrays = Mapping[str, np.ndarray]


class Engine(Protocol):
    """One opened model with its state."""

    def run(self, inputs: Arrays) -> Arrays: ...


class Engines(Protocol):
    def open(self, path: Path, function: str | None = None) -> Engine:
        """function: None for the one that runs by default."""
        ...


class Reference:
    """The saved file, executed operator by operator; watched, `peaks` collects the largest |value| of each operator, by
    the file's name.

    On one thread, as is the rest of the process then: several wait for each other at every operator of a small model.
    """

    def __init__(self, *, watched: bool = False) -> None:
        import torch

        torch.set_num_threads(1)
        self._watched = watched
        self.peaks: dict[str, dict[str, float]] = {}
        self._programs: dict[Path, mil.Program] = {}

    def open(self, path: Path, function: str | None = None) -> Engine:
        from calora_export import mil

        if path not in self._programs:
            self._programs[path] = mil.load(path)
        program = self._programs[path]
        chosen = program.functions[function or program.default]
        return _Interpreted(chosen, self.peaks.setdefault(path.name, {}) if self._watched else None)


class _Interpreted:
    def __init__(self, function: mil.Function, peaks: dict[str, float] | None) -> None:
        self._function, self._state, self._peaks = function, function.state(), peaks

    def run(self, inputs: Arrays) -> Arrays:
        return self._function.run(inputs, self._state, self._peaks)


class Predictions:
    """Core ML, through coremltools. units: one of coremltools' ComputeUnit by name, such as CPU_AND_GPU."""

    def __init__(self, units: str = "ALL") -> None:
        self._units = units

    def open(self, path: Path, function: str | None = None) -> Engine:
        return _Predicted(path, self._units, function)


class _Predicted:
    """Written from Apple's documentation and not yet run: it needs macOS 15."""

    def __init__(self, path: Path, units: str, function: str | None) -> None:
        import coremltools as ct

        self._model = ct.models.MLModel(str(path), compute_units=ct.ComputeUnit[units], function_name=function)
        self._state = self._model.make_state() if mlpackage.states(path, function) else None

    def run(self, inputs: Arrays) -> Arrays:
        return self._model.predict(dict(inputs), state=self._state)
