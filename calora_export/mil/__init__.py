"""The reference runtime of Core ML: loads a saved .mlpackage and executes functions of its MIL program, on any machine.

A function becomes a flat list of steps once; a run is one loop over them. Operators compute in float32, and each result
is rounded to the type that the program declares: a float16 program gives what float16 storage with float32 accumulation
gives.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from calora_export import mlpackage
from calora_export.errors import PackageError, UnsupportedError, mismatch
from calora_export.mil.kernels import FAULTS, fault, half, working, working_type
from calora_export.mil.reader import STATES, Code, Reader
from calora_export.mil.steps import Step
from calora_export.mil.values import Constants, TensorSpec
from calora_export.mil.weights import storage

__all__ = ["Function", "Program", "TensorSpec", "load"]

Inputs = Mapping[str, "np.ndarray | torch.Tensor"]


@dataclass(frozen=True)
class Program:
    """The functions of a package, by name, and which of them runs when none is named."""

    functions: Mapping[str, Function]
    default: str


def load(package: Path) -> Program:
    """Read a package; PackageError when it is damaged, UnsupportedError when an operator is not known here."""
    try:
        return _load(package)
    except (PackageError, UnsupportedError) as error:
        if str(error).isprintable():
            raise
        line = "".join(
            letter if letter.isprintable() else " " for letter in str(error)
        )  # a damaged name may be anything
        raise type(error)(line) from error


def _load(package: Path) -> Program:
    spec: Any = mlpackage.read_spec(package)
    reader = Reader(Constants(package.name, mlpackage.model_file(package).parent))
    described = {function.name: function for function in spec.description.functions}
    functions = {}
    for name, message in sorted(spec.mlProgram.functions.items()):
        label = f"{package.name}: function {name}" if len(spec.mlProgram.functions) > 1 else package.name
        functions[name] = Function(label, reader.function(label, message, described.get(name, spec.description)))
    default = spec.description.defaultFunctionName or "main"
    if default not in functions:
        raise PackageError(mismatch(package.name, "default function", default, ", ".join(functions) or "no function"))
    return Program(functions, default)


@dataclass(frozen=True)
class Function:
    """One function of a program: what it takes, gives and keeps, and how to run it."""

    label: str  # for errors: the package, and the function where there are several
    code: Code = field(repr=False)

    @property
    def inputs(self) -> Mapping[str, TensorSpec]:
        """What it takes."""
        return self.code.inputs

    @property
    def outputs(self) -> Mapping[str, TensorSpec]:
        """What it gives."""
        return self.code.outputs

    @property
    def states(self) -> Mapping[str, TensorSpec]:
        """What it keeps between runs."""
        return self.code.states

    @cached_property
    def _start(self) -> list[Any]:
        """The slots before a run. Constants are decoded here, once."""
        values: list[Any] = [None] * self.code.size
        for constant, slot in self.code.constants.items():
            values[slot] = constant.tensor
        return values

    def state(self) -> dict[str, torch.Tensor]:
        """The states at their beginning, zeros. A run writes into these tensors: clone them to keep or to branch."""
        return {
            name: torch.zeros([size or 0 for size in spec.shape], dtype=working_type(spec.dtype))
            for name, spec in self.states.items()
        }

    def hold(self, inputs: Inputs) -> dict[str, torch.Tensor]:
        """Inputs checked and converted once, to be given to many runs; PackageError as in `run`."""
        return {name: self._input(name, value) for name, value in inputs.items()}

    def run(
        self, inputs: Inputs, state: dict[str, torch.Tensor], peaks: dict[str, float] | None = None
    ) -> dict[str, np.ndarray]:
        """Execute the function: outputs by name, in their declared types. `state` is updated in place.

        A torch tensor among the inputs is one that `hold` returned. In `peaks` the largest |value| of each floating
        result is kept by the result's name, taken before it is rounded; what is not a number counts as inf.
        PackageError when an input or a state is missing, unknown or of a type or shape that the package does not
        declare, or when an operator refuses a shape.
        """
        with torch.inference_mode():
            values = self._start.copy()
            values[STATES] = self._checked(state)
            for name, value in self._all_inputs(inputs).items():
                values[self.code.slots[name]] = value
            if peaks is None:
                self._execute(values)
            else:
                self._measure(values, peaks)
            return {name: self._output(values[self.code.slots[name]], spec) for name, spec in self.outputs.items()}

    def _execute(self, values: list[Any]) -> None:
        step = None
        try:
            for step in self.code.steps:
                result = step.run(*[values[slot] for slot in step.inputs])
                if type(result) is tuple:
                    for slot, part in zip(step.outputs, result, strict=True):
                        values[slot] = half(part) if step.rounds else part
                else:
                    values[step.outputs[0]] = result.half().float() if step.rounds else result
                for slot in step.dead:
                    values[slot] = None
        except FAULTS as error:
            raise self._failure(step, error) from error

    def _measure(self, values: list[Any], peaks: dict[str, float]) -> None:
        """As `_execute`, with the peaks between computing and rounding."""
        step = None
        try:
            for step in self.code.steps:
                result = step.run(*[values[slot] for slot in step.inputs])
                results = result if type(result) is tuple else (result,)
                for slot, name, value in zip(step.outputs, step.names, results, strict=True):
                    if value.dtype == torch.float32 and value.numel():
                        peaks[name] = max(peaks.get(name, 0.0), _peak(value))
                    values[slot] = half(value) if step.rounds else value
                for slot in step.dead:
                    values[slot] = None
        except FAULTS as error:
            raise self._failure(step, error) from error

    def _failure(self, step: Step | None, error: Exception) -> PackageError:
        place = f": {step.operator} ({', '.join(step.names)})" if step else ""
        return fault(self.label + place, error)

    def _checked(self, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        if state.keys() != self.states.keys():
            expected, found = ", ".join(sorted(self.states)) or "none", ", ".join(sorted(state)) or "none"
            raise PackageError(mismatch(self.label, "states", expected, found))
        for name, spec in self.states.items():
            found, expected = _kind(state[name]), f"{_name(working_type(spec.dtype))} {list(spec.shape)}"
            if found != expected:
                raise PackageError(mismatch(self.label, f"state {name}", expected, found))
        return state

    def _all_inputs(self, inputs: Inputs) -> dict[str, torch.Tensor]:
        values = self.hold(inputs)
        for name, spec in self.inputs.items():
            if name in values:
                continue
            if spec.default is None or None in spec.shape:
                raise PackageError(mismatch(self.label, f"input {name}", spec, "nothing"))
            shape = [size or 0 for size in spec.shape]
            values[name] = torch.full(shape, spec.default, dtype=working_type(spec.dtype))
        return values

    def _input(self, name: str, value: np.ndarray | torch.Tensor) -> torch.Tensor:
        spec = self.inputs.get(name)
        if spec is None:
            raise PackageError(mismatch(self.label, "inputs", ", ".join(self.inputs) or "none", name))
        if not spec.allows(tuple(value.shape)):
            raise PackageError(mismatch(self.label, f"input {name}", spec, _kind(value)))
        if isinstance(value, torch.Tensor):
            return value
        if not np.can_cast(value.dtype, storage(spec.dtype), "same_kind"):
            raise PackageError(mismatch(self.label, f"input {name}", spec, _kind(value)))
        return working(value.astype(storage(spec.dtype), copy=False))

    def _output(self, value: torch.Tensor, spec: TensorSpec) -> np.ndarray:
        return value.numpy().astype(storage(spec.dtype))  # a copy: the value may be a constant, an input or a state


def _peak(value: torch.Tensor) -> float:
    peak = value.abs().max().item()
    return math.inf if math.isnan(peak) else peak


def _kind(value: np.ndarray | torch.Tensor) -> str:
    return f"{_name(value.dtype)} {list(value.shape)}"


def _name(dtype: np.dtype | torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
