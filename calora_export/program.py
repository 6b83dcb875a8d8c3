"""A traced program as data: its calls as JSON beside its tensors, in one safetensors file.

torch.export.load unpickles what a file asks it to, and the program that it gives takes no cache length or rank but the
example's. This form holds only names of operators, numbers and tensors, and leaves lengths to the operators.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec
import torch
from msgspec import Struct
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save
from torch import Tensor
from torch._ops import OpOverload
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind
from torch.fx import Node

from calora_export import ops  # noqa: F401  # registers torch.ops.calora
from calora_export.errors import PackageError, UnsupportedError, mismatch

KEY = "program"
LENGTHS = {f"operator.{name}": getattr(operator, name) for name in ("getitem", "add", "sub", "mul", "floordiv")}
TEXTS = {"approximate", "rounding_mode"}  # what an ATen operator may be told in words; file names are words too
CONSTANTS = (torch.dtype, torch.layout, torch.memory_format)
HELD = (InputKind.PARAMETER, InputKind.BUFFER, InputKind.CONSTANT_TENSOR)


class Call(Struct, frozen=True, forbid_unknown_fields=True):
    """value = operator(*args, **options).

    Arguments are plain JSON, but {"value": name}, {"torch": dtype}, {"device": name} and {"float": "-inf"}.
    """

    value: str
    operator: str
    args: list[object]
    options: dict[str, object]


class Listing(Struct, frozen=True, forbid_unknown_fields=True):
    """inputs and results in order; tensors: value → name in the file, where equal ones are stored once."""

    inputs: list[str]
    tensors: dict[str, str]
    calls: list[Call]
    results: list[str]


# ── writing ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def write(program: ExportedProgram, path: Path) -> None:
    """Write a program; the same one gives the same bytes. UnsupportedError for calls that could not be read again."""
    held: dict[str, str] = {}
    inputs: list[str] = []
    for spec in program.graph_signature.input_specs:
        if spec.kind in HELD:
            held[spec.arg.name] = str(spec.target)
        elif spec.kind is InputKind.USER_INPUT:
            inputs.append(spec.arg.name)
        else:
            raise UnsupportedError(mismatch("torch", spec.arg.name, "a tensor or an input", spec.kind.name))
    results = [str(_argument(arg)["value"]) for arg in program.graph.output_node().args[0]]  # type: ignore[union-attr]
    calls = [_call(node) for node in _needed(program)]
    tensors = {name: _tensor(program, name) for name in held.values()}
    stored = _once(tensors)
    listing = Listing(inputs, {value: stored[name] for value, name in held.items()}, calls, results)
    arrays = {name: tensors[name].contiguous().numpy() for name in sorted(set(stored.values()))}
    # save_file raises its own error on a full disk, not OSError. One key: the order of several would vary.
    path.write_bytes(save(arrays, metadata={KEY: msgspec.json.encode(listing).decode()}))


def _needed(program: ExportedProgram) -> list[Node]:
    """The calls that lead to a result: transformers also prepares masks, which attention here does not read."""
    live: set[Node] = set(program.graph.output_node().all_input_nodes)
    calls: list[Node] = []
    for node in reversed(program.graph.nodes):
        if node.op == "call_function" and node in live:
            calls.append(node)
            live.update(node.all_input_nodes)
    return calls[::-1]


def _tensor(program: ExportedProgram, name: str) -> Tensor:
    tensor = program.state_dict.get(name, program.constants.get(name))
    assert isinstance(tensor, Tensor), name
    return tensor.detach()


def _once(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Name → the first name whose tensor has the same memory: a tied table is stored once."""
    first: dict[object, str] = {}
    places = {name: (t.data_ptr(), t.shape, t.dtype) if t.numel() else name for name, t in tensors.items()}
    return {name: first.setdefault(place, name) for name, place in places.items()}


def _call(node: Node) -> Call:
    functions = {function: name for name, function in LENGTHS.items()}
    name = str(node.target) if isinstance(node.target, OpOverload) else functions.get(node.target, "")  # type: ignore[arg-type]
    if _operator(name) is None:
        raise UnsupportedError(mismatch("torch", "operator", "one of aten or calora without side effects", node.target))
    options = {key: _argument(value) for key, value in node.kwargs.items()}
    return Call(node.name, name, [_argument(arg) for arg in node.args], options)


def _argument(value: object) -> object:
    match value:
        case Node():
            return {"value": value.name}
        case list() | tuple():
            return [_argument(item) for item in value]
        case float() if not math.isfinite(value):
            return {"float": str(value)}
        case None | bool() | int() | float() | str():
            return value
        case torch.device():
            return {"device": str(value)}
        case torch.dtype() | torch.layout() | torch.memory_format():
            return {"torch": str(value).removeprefix("torch.")}
    raise UnsupportedError(mismatch("torch", "argument", "a tensor, a number or a constant of torch", repr(value)))


# ── reading and running ───────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class _Value:
    name: str


@dataclass(frozen=True)
class _Step:
    value: str
    function: Callable[..., object]
    args: list[object]
    options: dict[str, object]


@dataclass(frozen=True)
class Program:
    """A program that can be called: its inputs in order, one tensor each, and its results in order."""

    file: str
    inputs: Sequence[str]
    tensors: Mapping[str, Tensor]
    steps: Sequence[_Step]
    results: Sequence[str]

    def __call__(self, *inputs: Tensor) -> list[Tensor]:
        """PackageError when an operator does not take its arguments: the file was changed, or the operator since."""
        values: dict[str, object] = {**self.tensors, **dict(zip(self.inputs, inputs, strict=True))}
        with torch.no_grad():
            for step in self.steps:
                options = {key: _filled(value, values) for key, value in step.options.items()}
                args = [_filled(arg, values) for arg in step.args]
                try:
                    values[step.value] = step.function(*args, **options)
                except (RuntimeError, TypeError, ValueError, LookupError) as error:
                    raise PackageError(f"{self.file}: {step.value}: {str(error).partition(chr(10))[0]}") from error
        return [values[name] for name in self.results]  # type: ignore[misc]


def _filled(argument: object, values: Mapping[str, object]) -> object:
    if isinstance(argument, _Value):
        return values[argument.name]
    return [_filled(item, values) for item in argument] if isinstance(argument, list) else argument


def read(path: Path) -> Program:
    """Read what `write` wrote; PackageError for anything else. Tensors are mapped, not copied."""
    try:
        with safe_open(path, "pt") as file:
            text = (file.metadata() or {}).get(KEY, "")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # not a dict
        listing = msgspec.json.decode(text, type=Listing)
    except (OSError, SafetensorError, msgspec.MsgspecError, RecursionError) as error:
        raise PackageError(f"{path.name}: not a program: {str(error).splitlines()[0]}") from error
    if missing := sorted(set(listing.tensors.values()) - set(tensors)):
        raise PackageError(mismatch(path.name, missing[0], "a tensor", "nothing"))
    steps: list[_Step] = []
    known = {*listing.inputs, *listing.tensors}
    for call in listing.calls:
        function = _operator(call.operator)
        if function is None:
            wanted = "an operator of aten or calora without side effects"
            raise PackageError(mismatch(path.name, call.value, wanted, call.operator))
        args = [_decoded(arg, known, path.name) for arg in call.args]
        options = {key: _decoded(value, known, path.name) for key, value in call.options.items()}
        steps.append(_Step(call.value, function, args, options))
        known.add(call.value)
    for name in listing.results:
        _decoded({"value": name}, known, path.name)
    held = {value: tensors[name] for value, name in listing.tensors.items()}
    return Program(path.name, listing.inputs, held, steps, listing.results)


def _operator(name: str) -> Callable[..., object] | None:
    """The operator of that name, unless there is none or it could do more than compute: write, print, open files."""
    if name in LENGTHS:
        return LENGTHS[name]
    match name.split("."):
        case ["aten" | "calora" as namespace, packet, str(overload)] if overload:
            found = getattr(getattr(getattr(torch.ops, namespace), packet, None), overload, None)
        case _:
            return None
    if not isinstance(found, OpOverload) or found._schema.is_mutable:
        return None
    words = {argument.name for argument in found._schema.arguments if "str" in str(argument.type)}
    return found if namespace == "calora" or words <= TEXTS else None


def _decoded(argument: object, known: set[str], file: str) -> object:
    """An argument as it is given to an operator, but with names of values still to be filled in."""
    if isinstance(argument, list):
        return [_decoded(item, known, file) for item in argument]
    if not isinstance(argument, dict):
        return argument
    match list(argument.items()):
        case [("value", str(name))] if name in known:
            return _Value(name)
        case [("torch", str(name))] if isinstance(getattr(torch, name, None), CONSTANTS):
            return getattr(torch, name)
        case [("device", "cpu")]:
            return torch.device("cpu")
        case [("float", ("inf" | "-inf" | "nan") as text)]:
            return float(text)
    raise PackageError(mismatch(file, "argument", "an earlier value or a constant of torch", argument))
