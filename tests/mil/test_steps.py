"""Writing in a state's own memory never changes a result: random programs of state operations, done both ways."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from calora_export.mil import Function
from calora_export.mil.reader import STATES, Code
from calora_export.mil.steps import READ, WRITE, Step, with_deaths, with_overwriting
from calora_export.mil.values import TensorSpec

SIZE = 4
SPEC = TensorSpec("float32", (SIZE,))
STATE_NAMES = ("a", "b")


def set_first(x: torch.Tensor, update: torch.Tensor) -> torch.Tensor:
    x[:1] = update[-1:]
    return x


def step(kind: str, state: str, inputs: tuple[int, ...], output: int) -> Step:
    """One of the operations that matter: state in and out, an update, a view, a computation."""
    names = (f"v{output}",)
    if kind == READ:
        return Step(READ, lambda states: states[state], (STATES,), (output,), names, state=state)
    if kind == WRITE:
        return Step(WRITE, lambda states, value: _write(states, state, value), (STATES, inputs[0]), (), (), state=state)
    if kind == "update":
        changed = lambda x, update: set_first(x.clone(), update)  # noqa: E731
        return Step("slice_update", changed, inputs[:2], (output,), names, overwrite=set_first)
    if kind == "view":
        return Step("slice_by_index", lambda x: x.view(2, 2).view(SIZE), inputs[:1], (output,), names, shares=True)
    return Step("add", lambda x, y: x + 2 * y, inputs[:2], (output,), names)


def _write(states: dict[str, torch.Tensor], state: str, value: torch.Tensor) -> tuple[()]:
    if value is not states[state]:
        states[state] = value.clone()
    return ()


@st.composite
def programs(draw: st.DrawFn) -> tuple[list[Step], int, set[int]]:
    """Steps, the number of slots, and the slots that are outputs. Slot 1 is the input."""
    steps: list[Step] = []
    slots = [1]
    for _ in range(draw(st.integers(1, 12))):
        kind = draw(st.sampled_from([READ, READ, WRITE, WRITE, "update", "update", "update", "view", "add"]))
        recent = st.sampled_from([*slots, slots[-1], slots[-1]])
        made = step(kind, draw(st.sampled_from(STATE_NAMES)), (draw(recent), draw(recent)), slots[-1] + 1)
        steps.append(made)
        slots += made.outputs
    return steps, slots[-1] + 1, set(draw(st.lists(st.sampled_from(slots), max_size=3)))


def run(steps: list[Step], size: int, outputs: set[int]) -> dict[str, np.ndarray]:
    """Outputs and states after two runs."""
    names = {f"v{slot}": slot for slot in outputs}
    states = dict.fromkeys(STATE_NAMES, SPEC)
    deaths = with_deaths(steps, outputs | {STATES})
    code = Code({"x": SPEC}, dict.fromkeys(names, SPEC), states, deaths, names | {"x": 1}, {}, size)
    function = Function("random", code)
    state = function.state()
    for name in STATE_NAMES:
        state[name] += 10 if name == "a" else 20
    results: dict[str, Any] = {}
    for turn in range(2):
        found = function.run({"x": np.arange(SIZE, dtype=np.float32) + turn}, state)
        results |= {f"{name}_{turn}": value for name, value in found.items()}
    return results | {name: value.numpy() for name, value in state.items()}


@settings(max_examples=200, deadline=None)
@given(programs())
def test_overwriting_changes_no_result(program: tuple[list[Step], int, set[int]]) -> None:
    steps, size, outputs = program
    expected = run(steps, size, outputs)
    found = run(with_overwriting(steps, outputs), size, outputs)
    for name, value in expected.items():
        np.testing.assert_array_equal(found[name], value, err_msg=name)


def test_a_cache_is_written_in_its_memory() -> None:
    """Two layers of one cache, as a decoder has them: read, update, view, use, update, write."""
    steps = [
        step(READ, "a", (), 2),
        step("update", "", (2, 1), 3),
        step("view", "", (3,), 4),
        step("add", "", (4, 1), 5),
        step("update", "", (3, 5), 6),
        step(WRITE, "a", (6,), 7),
        step(READ, "a", (), 7),
        step("add", "", (7, 1), 8),
    ]
    overwriting = with_overwriting(steps, {8})
    assert [s.run is s.overwrite for s in overwriting if s.overwrite] == [True, True]
    assert [replace(s, run=print) for s in overwriting] == [replace(s, run=print) for s in steps]


@pytest.mark.parametrize("read_later", [2, 3])
def test_a_value_that_lives_on_is_left_alone(read_later: int) -> None:
    """The state as it was before, or a view of it."""
    steps = [
        step(READ, "a", (), 2),
        step("view", "", (2,), 3),
        step("update", "", (2, 1), 4),
        step(WRITE, "a", (4,), 5),
        step("add", "", (read_later, 1), 5),
    ]
    assert [s.run is s.overwrite for s in with_overwriting(steps, {5}) if s.overwrite] == [False]


def test_a_value_dies_after_its_last_reader() -> None:
    steps = [step("add", "", (1, 1), 2), step("add", "", (2, 1), 3), step("view", "", (3,), 4)]
    assert [set(s.dead) for s in with_deaths(steps, {3})] == [set(), {1, 2}, {4}]
