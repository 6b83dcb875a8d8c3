"""The goals follow from a run's own figures, round by round."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from .measure import TRIES, Round, Speed, Spread, quiet, quietest
from .process import Run
from .results import BUILDER, BUILDER_ADAPTER, LLAMA_ADAPTER, OURS, OURS_ADAPTER, OURS_MIX, Results, goals
from .table import markdown, page


def _speed(*step_ms: float, prefill_ms: float = 100.0) -> Speed:
    rounds = tuple(Round(prefill_ms / 1e3, 0.02, (step / 1e3, step / 1e3, 9.9)) for step in step_ms)
    return Speed(load_s=0.2, peak_rss=300_000_000, rounds=rounds)


RESULTS = Results(
    environment={"CPU": "abacus", "cores": "2"},
    fp32_bytes=500_000_000,
    # The machine becomes four times slower after the first round: per-round ratios do not notice.
    speeds={
        OURS: _speed(10, 40, 40, prefill_ms=125),
        OURS_ADAPTER: _speed(12, 48, 48),
        OURS_MIX: _speed(15, 60, 60),
        BUILDER: _speed(8, 32, 32),
        BUILDER_ADAPTER: _speed(18, 72, 72),
        LLAMA_ADAPTER: _speed(12, 48, 48),
    },
    exports={OURS: [Run(20.0, 30.0, 1_000_000_000)] * 2, BUILDER: [Run(16.0, 1, 1), Run(5.0, 1, 1)]},
    swap_ms={OURS_ADAPTER: 0.25},
    add_adapter=[Run(2.5, 1, 1)],
    changed_files=["model.onnx.data"],
)


def test_each_goal_from_given_figures() -> None:
    found = {goal.text: (goal.found and round(goal.found.median, 4), goal.verdict) for goal in goals(RESULTS)}
    assert found == {
        "decode, base, of the builder's": (0.8, "missed"),
        "decode, adapter, of the builder's": (1.5, "reached"),
        "decode, adapter, of llama.cpp's": (1.0, "reached"),
        "time of a token, adapter, of ours without": (1.2, "reached"),
        "time of a token, mix of two, of one": (1.25, "missed"),
        "swap, p50": (0.25, "reached"),
        "prefill, base, of the builder's": (0.8, "missed"),
        "prefill, adapter, of the builder's": (1.0, "reached"),
        "export time, of the builder's base": (2.625, "missed"),  # the median of 20 / 16 and 20 / 5
        "peak RSS of export, of the fp32 weights": (2.0, "reached"),
        "add-adapter with Python's start": (2.5, "reached"),
        "files add-adapter changed besides package.json": (1.0, "missed"),
    }


def test_a_missing_peer_is_said_and_never_reached() -> None:
    alone = replace(RESULTS, speeds={OURS: RESULTS.speeds[OURS]}, exports={}, swap_ms={}, add_adapter=())
    assert {goal.verdict for goal in goals(alone)} == {"not measured"}
    table = markdown(alone)
    assert "| llama.cpp + adapter | not installed |" in table
    assert "| ours | – | – | – | 200 | 1024 | 25.0 | – | – | 300 |" in table


def test_rounds_are_compared_pairwise() -> None:
    speeds = {OURS: _speed(1, 30, 2), BUILDER: _speed(1, 10, 1)}
    assert replace(RESULTS, speeds=speeds).decode(BUILDER, OURS) == Spread(1, 2, 3, 3)
    with pytest.raises(ValueError):
        quiet(_speed(1), _speed(1, 2))


def test_disturbed_rounds_are_left_out_where_three_remain() -> None:
    calm, busy = Round(1, 0.0, (1.0,)), Round(1, 0.5, (9.0,))
    speed = Speed(0, 0, (calm, busy, calm, calm))
    assert (len(quiet(speed)), speed.step_s) == (3, 1.0)
    assert len(quiet(speed, Speed(0, 0, (calm, calm, calm, busy)))) == 4  # two are too few


def test_a_disturbed_round_is_repeated() -> None:
    rounds = [(1.0, 0.5, 0.1), (2.0, 0.4, 0.1), (3.0, 0.01, 0.1), (4.0, 0.0, 0.1)]
    assert quietest(iter(rounds).__next__, deadline=math.inf) == Round(3.0, 0.01, (0.1,))
    assert quietest(iter(rounds[:1] * TRIES).__next__, deadline=math.inf).others == 0.5  # it gives up
    assert quietest(iter(rounds).__next__, deadline=0.0).prefill_s == 1.0  # or has no time


def test_the_page_ends_with_the_tables() -> None:
    assert page(RESULTS).startswith("# Benchmarks\n")
    assert page(RESULTS).endswith(markdown(RESULTS))


def test_every_row_of_the_table_has_all_cells() -> None:
    lines = markdown(RESULTS).splitlines()
    assert lines[0] == "CPU abacus, cores 2"
    assert lines[2].startswith("From 18 of 18 rounds; in these, other processes used 2%")
    for block in "\n".join(lines[4:]).strip().split("\n\n"):
        assert len({row.count("|") for row in block.splitlines()}) == 1
