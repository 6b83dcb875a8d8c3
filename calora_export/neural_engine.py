"""Which operators the Neural Engine does not run, and who says so.

Apple publishes no list. A rule is `documented` where Apple's guides or engineers state it, `observed` where others
measured it (MLComputePlan, Xcode's performance report); what holds on one chip and OS may not on the next.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import prod
from typing import Literal

from msgspec import Struct

from calora_export.mil_program import Function, Operation, Value

Basis = Literal["documented", "observed"]
MULTIPLICATIONS = ("linear", "matmul", "conv")
LOOKUPS = ("gather", "gather_along_axis", "gather_nd", "topk")
RECURRENT = ("lstm", "gru", "rnn")
DEEPEST = 16_384
WIDTH = 32
STATE_WIDTH = "state width"


class Finding(Struct, frozen=True):
    """Operators that a rule says something of, with how many there are of each."""

    rule: str
    basis: Basis
    reason: str
    source: str
    operators: dict[str, int]


@dataclass(frozen=True)
class _Context:
    """What a rule may know beside the operator: weights with scales per block by name; whether a length is a range."""

    blocks: frozenset[str]
    ranged: bool


@dataclass(frozen=True)
class _Rule:
    name: str
    basis: Basis
    reason: str
    source: str
    applies: Callable[[Operation, _Context], bool]


def findings(functions: Sequence[Function]) -> list[Finding]:
    """What keeps operators off the Neural Engine; an operator can be in several."""
    counts: dict[str, Counter[str]] = {}
    for entry, rules in _judged(functions):
        for rule in rules:
            counts.setdefault(rule.name, Counter())[entry.type] += 1
    return [
        Finding(rule.name, rule.basis, rule.reason, rule.source, dict(counts[rule.name].most_common()))
        for rule in RULES
        if rule.name in counts
    ]


def off_engine(functions: Sequence[Function]) -> int:
    """How many operators at least one rule keeps off the Neural Engine."""
    return sum(bool(rules) for _, rules in _judged(functions))


def _judged(functions: Sequence[Function]) -> Iterator[tuple[Operation, list[_Rule]]]:
    for function in functions:
        context = _Context(frozenset(_blocks(function)), "range" in function.flexibility.values())
        for entry in executed(function):
            yield entry, [rule for rule in RULES if rule.applies(entry, context)]


def executed(function: Function) -> Iterator[Operation]:
    """The operators that run at a call: not those that only say how a weight is stored."""
    return (entry for entry in function.operations if not entry.type.startswith("constexpr_"))


def _blocks(function: Function) -> Iterator[str]:
    """Weights with more than one scale along an axis, but fewer than numbers."""
    for entry in function.operations:
        data, scale = entry.first("data"), entry.first("scale")
        if entry.type == "constexpr_blockwise_shift_scale" and data and scale:
            pairs = zip(scale.bound, data.bound, strict=False)  # of one rank, unless the file is damaged
            if any(1 < parts < size for parts, size in pairs):
                yield entry.outputs[0].name


def _ranged(entry: Operation, context: _Context) -> bool:
    return context.ranged and any(None in value.dims for value in entry.outputs)


def _float32(entry: Operation, context: _Context) -> bool:
    return entry.type != "cast" and any(value.dtype == "float32" for value in entry.outputs)


def _integers(entry: Operation, context: _Context) -> bool:
    return entry.type != "cast" and any(value.dtype == "int32" for value in entry.outputs)


def _lookup(entry: Operation, context: _Context) -> bool:
    return entry.type in LOOKUPS


def _recurrent(entry: Operation, context: _Context) -> bool:
    return entry.type in RECURRENT


def _blockwise(entry: Operation, context: _Context) -> bool:
    return entry.type in MULTIPLICATIONS and any(value.name in context.blocks for value in entry.values())


def _rank(entry: Operation, context: _Context) -> bool:
    return any(len(value.dims) > 4 for value in entry.outputs)


def _depth(entry: Operation, context: _Context) -> bool:
    x, weight = entry.first("x"), entry.first("weight")
    if entry.type == "conv" and weight:
        return prod(weight.bound[1:]) > DEEPEST
    if entry.type == "matmul" and x and len(x.bound) > 1:
        transposed = any(value.ints == (1,) for value in entry.inputs.get("transpose_x", ()))
        return x.bound[-2 if transposed else -1] > DEEPEST
    return bool(entry.type == "linear" and weight and weight.bound[-1:] > (DEEPEST,))


def _state_width(entry: Operation, context: _Context) -> bool:
    state: Value | None = entry.first("input")
    return bool(entry.type in ("read_state", "write_state") and state and state.bound[-1:] and state.bound[-1] % WIDTH)


RULES = (
    _Rule(
        "range",
        "documented",
        "a length is a range: the Neural Engine runs a range at its default only",
        "an Apple engineer in developer.apple.com/forums/thread/724930; with a state, no operator ran there at all: "
        "github.com/apple/coremltools/issues/2600",
        _ranged,
    ),
    _Rule(
        "float32",
        "documented",
        "float32 runs on the CPU and the GPU",
        "coremltools guide, Typed Execution Workflow Example",
        _float32,
    ),
    _Rule(
        "integers",
        "observed",
        "arithmetic on lengths and positions stays on the CPU",
        "MLComputePlan of SmolLM2-135M on M4, github.com/onnxsim/onnxsim/pull/1400",
        _integers,
    ),
    _Rule(
        "lookup",
        "observed",
        "looking up rows is not in the Neural Engine's set",
        "gather: compute plans published with WhisperKit's text decoders; topk and gather_along_axis: "
        "github.com/roboflow/rf-detr/pull/1495; github.com/hollance/neural-engine, unsupported-layers.md",
        _lookup,
    ),
    _Rule(
        "recurrent",
        "observed",
        "recurrent layers are not in the Neural Engine's set",
        "github.com/hollance/neural-engine, unsupported-layers.md",
        _recurrent,
    ),
    _Rule(
        "blocks",
        "observed",
        "weights have scales per block; Apple recommends scales per channel for the Neural Engine",
        "recommended: coremltools guide, Quantization Performance; seen on the CPU: alvaro-videla.com/ane-book, "
        "chapter 3 (one model of 24 layers stayed on the engine), github.com/kasper0406/stablehlo-coreml/pull/110",
        _blockwise,
    ),
    _Rule(
        "rank",
        "observed",
        "a tensor has more than 4 dimensions, with which the Neural Engine's compiler failed",
        "github.com/FluidInference/FluidAudio/pull/679",
        _rank,
    ),
    _Rule(
        "depth",
        "observed",
        f"a sum of products is longer than {DEEPEST}",
        "github.com/chrishayuk/larql/pull/312",
        _depth,
    ),
    _Rule(
        STATE_WIDTH,
        "observed",
        f"a state's last dimension is no multiple of {WIDTH}, with which models failed on the Neural Engine",
        "github.com/apple/coremltools/issues/2631",
        _state_width,
    ),
)
