"""From the protobuf message of a MIL function to its steps: names become slots, and what is constant is taken out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

import torch

from calora_export.errors import PackageError, UnsupportedError, mismatch
from calora_export.mil.kernels import Constant, Given, Kernel, half, telling
from calora_export.mil.ops import OPERATORS
from calora_export.mil.steps import READ, WRITE, Step, with_deaths, with_overwriting
from calora_export.mil.values import Constants, TensorSpec, described_tensor, tensor_type

STATES = 0  # the slot that holds the states by name
_GENERATION = "CoreML"


@dataclass(frozen=True)
class Code:
    """A function, ready to run: its steps work on numbered slots, some of which hold constants from the beginning."""

    inputs: Mapping[str, TensorSpec]
    outputs: Mapping[str, TensorSpec]
    states: Mapping[str, TensorSpec]
    steps: Sequence[Step]
    slots: Mapping[str, int]  # of the inputs and the outputs
    constants: Mapping[Constant, int]
    size: int


@dataclass
class Reader:
    """Reads functions of one program, which share their constants."""

    constants: Constants
    _folded: dict[Any, list[Constant]] = field(default_factory=dict)

    def function(self, label: str, message: Any, description: Any) -> Code:
        """The code of a Function message; PackageError when it is damaged or is not what the description says."""
        block = message.block_specializations.get(message.opset)
        generation = message.opset.removeprefix(_GENERATION)
        if block is None or not generation.isdigit():
            raise PackageError(mismatch(label, "opset", f"{_GENERATION}5 or later, with a block", message.opset))
        draft = _Draft(label, int(generation), self.constants, self._folded)
        inputs = draft.take_inputs(message.inputs, {feature.name: feature for feature in description.input})
        for operation in block.operations:
            draft.take(operation)
        outputs = {name: draft.slot(name, f"{label}: outputs") for name in block.outputs}
        code = Code(
            inputs=inputs,
            outputs={name: TensorSpec(*draft.types[name]) for name in outputs},
            states=draft.states,
            steps=_finished(draft, set(outputs.values())),
            slots={name: draft.slots[name] for name in inputs} | outputs,
            constants=draft.held,
            size=draft.size,
        )
        for what in ("input", "state", "output"):
            _compare(label, what, getattr(description, what), getattr(code, what + "s"))
        return code


def _finished(draft: _Draft, outputs: set[int]) -> list[Step]:
    steps = with_overwriting(draft.steps, outputs)
    return with_deaths(steps, outputs | set(draft.held.values()) | {STATES})


def _compare(label: str, what: str, described: Any, found: Mapping[str, TensorSpec]) -> None:
    names = {feature.name for feature in described}
    if names != set(found):
        told = ", ".join(sorted(names)) or "none"
        raise PackageError(mismatch(label, f"{what}s", f"{told} (the description)", ", ".join(sorted(found)) or "none"))


@dataclass
class _Draft:
    """A function while it is being read: what each name stands for, a constant or a slot."""

    label: str
    generation: int
    constants: Constants
    folded: dict[Any, list[Constant]]
    known: dict[str, Constant] = field(default_factory=dict)
    types: dict[str, tuple[str, tuple[int | None, ...]]] = field(default_factory=dict)
    slots: dict[str, int] = field(default_factory=dict)
    states: dict[str, TensorSpec] = field(default_factory=dict)
    steps: list[Step] = field(default_factory=list)
    held: dict[Constant, int] = field(default_factory=dict)
    size: int = STATES + 1

    def take_inputs(self, messages: Any, described: Mapping[str, Any]) -> dict[str, TensorSpec]:
        """The function's tensors and states."""
        inputs = {}
        for message in messages:
            kind = tensor_type(message.type, f"{self.label}: input {message.name}")
            self.types[message.name] = kind
            if message.type.WhichOneof("type") == "stateType":
                self.states[message.name] = TensorSpec(*kind)
                continue
            inputs[message.name] = described_tensor(*kind, described.get(message.name))
            self._new_slot(message.name)
        return inputs

    def take(self, operation: Any) -> None:
        """One operation: a constant, what can be computed from constants, or a step."""
        names = tuple(output.name for output in operation.outputs)
        place = f"{self.label}: {operation.type} ({', '.join(names)})"
        for output in operation.outputs:
            if output.name in self.types:  # Core ML would not load it
                raise PackageError(mismatch(place, "output", "a name of its own", f"{output.name} again"))
            self.types[output.name] = tensor_type(output.type, place)
        if operation.type not in ("const", READ, WRITE, *OPERATORS):
            found = f"{operation.type} ({', '.join(names)})"
            raise UnsupportedError(mismatch("coreml", "operator", "one of the reference runtime", found))
        with telling(place):
            if operation.type == "const":
                self.known[names[0]] = self.constants.of(operation.attributes["val"], place)
            elif operation.type in (READ, WRITE):
                self._take_state(operation, names, place)
            else:
                self._take_operator(operation, names, place)

    def _take_state(self, operation: Any, names: tuple[str, ...], place: str) -> None:
        state = operation.inputs["input"].arguments[0].name
        if state not in self.states:
            raise PackageError(mismatch(place, "state", ", ".join(self.states) or "no state", state))
        if operation.type == READ:
            self._step(Step(READ, _reader(state), (STATES,), (), names, state=state))
        else:
            value = self.slot(operation.inputs["data"].arguments[0].name, place)
            self._step(Step(WRITE, _writer(state), (STATES, value), (), names, state=state))

    def _take_operator(self, operation: Any, names: tuple[str, ...], place: str) -> None:
        parameters: dict[str, list[Constant | str]] = {
            name: [self._binding(binding, place) for binding in argument.arguments]
            for name, argument in operation.inputs.items()
        }
        for name, value in operation.attributes.items():  # where operators of iOS 16 have their constants
            if name != "name":
                parameters.setdefault(name, [self.constants.of(value, place)])
        dtypes = [self.types[name][0] for name in names]
        known = {name: [v if isinstance(v, Constant) else None for v in values] for name, values in parameters.items()}
        given = Given(operation.type, names[0], self.generation, known, dtypes)
        kernel = OPERATORS[operation.type](given)
        for name in sorted(parameters.keys() - given.asked - set(kernel.inputs)):
            raise given.refusal("parameters", "those of the reference runtime", name)
        for name in kernel.inputs:
            if not parameters.get(name):
                raise PackageError(mismatch(place, name, "a value", "nothing"))
        if all(isinstance(value, Constant) for values in parameters.values() for value in values):
            self.known.update(zip(names, self._fold(given, kernel, parameters, place), strict=True))
            return
        self._step(
            Step(
                operation.type,
                kernel.run,
                tuple(self._value_slot(value) for name in kernel.inputs for value in parameters[name]),
                (),
                names,
                rounds=dtypes[0] == "float16" and not kernel.exact,
                shares=kernel.shares,
                overwrite=kernel.overwrite,
            )
        )

    def _fold(
        self, given: Given, kernel: Kernel, parameters: Mapping[str, list[Any]], place: str
    ) -> Sequence[Constant]:
        """The results of an operation on constants, computed when first used; equal operations share them."""
        ids = tuple(sorted((name, *map(id, values)) for name, values in parameters.items()))
        key = (given.operator, given.generation, tuple(given.outputs), ids)
        if key not in self.folded:
            inputs = [value for name in kernel.inputs for value in parameters[name]]

            @cache
            def compute() -> tuple[torch.Tensor, ...]:
                with torch.inference_mode(), telling(place):
                    result = kernel.run(*[value.tensor for value in inputs])
                    results = result if isinstance(result, tuple) else (result,)
                    rounds = given.outputs[0] == "float16" and not kernel.exact
                    return tuple(half(value) if rounds else value for value in results)

            self.folded[key] = [Constant(lambda at=at: compute()[at]) for at in range(len(given.outputs))]
        return self.folded[key]

    def _step(self, step: Step) -> None:
        self.steps.append(replace(step, outputs=tuple(self._new_slot(name) for name in step.names)))

    def _binding(self, binding: Any, place: str) -> Constant | str:
        """A constant, or the name of a value that is computed at run time."""
        if binding.WhichOneof("binding") == "value":
            return self.constants.of(binding.value, place)
        if binding.name in self.known:
            return self.known[binding.name]
        if binding.name not in self.slots:
            raise PackageError(mismatch(place, "input", "a value that is defined before", binding.name))
        return binding.name

    def slot(self, name: str, place: str) -> int:
        """Where a named value is at run time."""
        if name in self.known:
            return self._value_slot(self.known[name])
        if name not in self.slots:
            raise PackageError(mismatch(place, "value", "one that is defined before", name))
        return self.slots[name]

    def _value_slot(self, value: Constant | str) -> int:
        if isinstance(value, str):
            return self.slots[value]
        if value not in self.held:
            self.held[value] = self.size
            self.size += 1
        return self.held[value]

    def _new_slot(self, name: str) -> int:
        self.slots[name] = self.size
        self.size += 1
        return self.slots[name]


def _reader(state: str) -> Callable[..., torch.Tensor]:
    return lambda states: states[state]


def _writer(state: str) -> Callable[..., tuple[()]]:
    def write(states: dict[str, torch.Tensor], value: torch.Tensor) -> tuple[()]:
        if value is not states[state]:  # it is, when the steps before wrote in the state's memory
            states[state] = value.clone()
        return ()

    return write
