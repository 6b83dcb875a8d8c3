"""The native runner's trace as rounds of the benchmark."""

from __future__ import annotations

import pytest

from calora_export.jobs import TimingTrace

from .measure import PROMPT, Round
from .runner import rounds, timing


def test_a_trace_becomes_a_round_for_each_row() -> None:
    decode = {"mix2": (7.0, 8.0), "base": (4.0, 5.0), "adapter": (6.0,)}
    trace = TimingTrace(load=1.0, swap=(9.0,), first_token=(300.0, 400.0), prefill=(200.0,), decode=decode, router=())
    base, adapter, mix = rounds(trace, 0.25)
    assert base == Round(0.2, 0.25, (0.004, 0.005))
    assert adapter == Round(pytest.approx(0.35), 0.25, (0.006,))
    assert mix == Round(None, 0.25, (0.007, 0.008))


@pytest.mark.parametrize("adapters", [(), ("a",), ("a", "b")])
def test_a_job_names_the_adapters_that_there_are(adapters: tuple[str, ...]) -> None:
    wanted = timing(adapters)
    assert tuple(name for name in (wanted.adapter, wanted.other) if name) == adapters
    assert wanted.prompt == PROMPT
