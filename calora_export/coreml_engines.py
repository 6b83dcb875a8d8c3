"""What computes a saved .mlpackage: Core ML itself on macOS, the reference runtime on any machine."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

import numpy as np

Arrays = Mapping[str, np.ndarray]


class Engine(Protocol):
    """One opened model with its state."""

    def run(self, inputs: Arrays) -> Arrays: ...


class Engines(Protocol):
    def open(self, path: Path) -> Engine: ...


class Reference:
    """The saved file, executed operator by operator. `peaks` collects the largest |value| of each model's operators."""

    def __init__(self, threads: int) -> None:
        import torch

        torch.set_num_threads(threads)
        self.peaks: dict[str, dict[str, float]] = {}

    def open(self, path: Path) -> Engine:
        return _Interpreted(path, self.peaks.setdefault(path.name, {}))


class _Interpreted:
    def __init__(self, path: Path, peaks: dict[str, float]) -> None:
        from calora_export import mil

        program = mil.load(path)
        self._function = program.functions[program.default]
        self._state, self._peaks = self._function.state(), peaks

    def run(self, inputs: Arrays) -> Arrays:
        return self._function.run(inputs, self._state, self._peaks)


class Predictions:
    """Core ML, through coremltools. units: one of coremltools' ComputeUnit by name, such as CPU_AND_GPU."""

    def __init__(self, units: str = "ALL") -> None:
        self._units = units

    def open(self, path: Path) -> Engine:
        return _Predicted(path, self._units)


class _Predicted:
    """Written from Apple's documentation and not yet run: it needs macOS 15."""

    def __init__(self, path: Path, units: str) -> None:
        import coremltools as ct

        self._model = ct.models.MLModel(str(path), compute_units=ct.ComputeUnit[units])
        self._state = self._model.make_state() if self._model.get_spec().description.state else None

    def run(self, inputs: Arrays) -> Arrays:
        return self._model.predict(dict(inputs), state=self._state)
