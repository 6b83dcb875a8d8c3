"""The steps of a function: what each reads and writes, when a value dies, when a state is written in its own memory."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from typing import Any

READ, WRITE = "read_state", "write_state"


@dataclass(frozen=True, slots=True)
class Step:
    """One operation: a function of slots. `outputs` has one slot per result, `names` their names in the program."""

    operator: str
    run: Callable[..., Any]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    names: tuple[str, ...]
    rounds: bool = False  # results are of float16 and were computed
    shares: bool = False  # results may lie in the memory of an input
    overwrite: Callable[..., Any] | None = None  # the same as `run`, into the memory of the first input
    state: str = ""  # which state it reads or writes
    dead: tuple[int, ...] = ()  # slots that nothing reads after it


def with_deaths(steps: Sequence[Step], kept: Set[int]) -> list[Step]:
    """The steps, each with the slots that are read there for the last time; `kept` slots never die."""
    last: dict[int, int] = {}
    for index, step in enumerate(steps):
        for slot in (*step.inputs, *step.outputs):
            last[slot] = index
    dead: list[list[int]] = [[] for _ in steps]
    for slot, index in last.items():
        if slot not in kept:
            dead[index].append(slot)
    return [replace(step, dead=tuple(slots)) for step, slots in zip(steps, dead, strict=True)]


def with_overwriting(steps: Sequence[Step], kept: Set[int]) -> list[Step]:
    """The steps, with a `slice_update` that goes back to its state done in the state's memory.

    That is right when its first input is the whole state, when nothing else that may lie in that memory is read at the
    step or later, and when its result (or what further such steps make of it) is the state's next value, written before
    anyone reads the state.
    """
    readers = _readers(steps)
    last = {slot: max(indices) for slot, indices in readers.items()}
    last.update(dict.fromkeys(kept, len(steps)))
    whole: dict[int, str] = {}  # slots that are a state's memory
    inside: dict[str, set[int]] = {}  # slots that may lie in it
    result: list[Step] = []
    for index, step in enumerate(steps):
        if step.operator == READ:
            whole[step.outputs[0]] = step.state
            inside.setdefault(step.state, set()).add(step.outputs[0])
        elif step.overwrite and step.inputs[0] in whole:
            state = whole[step.inputs[0]]
            if _only_reader(step, index, inside[state], last) and _goes_back(steps, index, state, readers):
                whole[step.outputs[0]] = state
                inside[state].add(step.outputs[0])
                step = replace(step, run=step.overwrite)
        elif step.shares:
            for members in inside.values():
                if members.intersection(step.inputs):
                    members.update(step.outputs)
        result.append(step)
    return result


def _readers(steps: Sequence[Step]) -> Mapping[int, list[int]]:
    readers: dict[int, list[int]] = {}
    for index, step in enumerate(steps):
        for slot in step.inputs:
            readers.setdefault(slot, []).append(index)
    return readers


def _only_reader(step: Step, index: int, inside: Set[int], last: Mapping[int, int]) -> bool:
    """Whether the step's first input is all of the state's memory that is still read at the step or later."""
    alive = {slot for slot in inside if last.get(slot, -1) >= index}
    return alive == {step.inputs[0]} and last[step.inputs[0]] == index and step.inputs.count(step.inputs[0]) == 1


def _goes_back(steps: Sequence[Step], index: int, state: str, readers: Mapping[int, list[int]]) -> bool:
    """Whether the result becomes the state before anyone reads or writes it otherwise."""
    slot = steps[index].outputs[0]
    touch = next((i for i in range(index + 1, len(steps)) if steps[i].state == state), None)
    if touch is None or steps[touch].operator != WRITE:
        return False
    while steps[touch].inputs[-1] != slot:
        onward = [i for i in readers.get(slot, ()) if i < touch and steps[i].overwrite and steps[i].inputs[0] == slot]
        if len(onward) != 1:
            return False
        slot = steps[onward[0]].outputs[0]
    return True
