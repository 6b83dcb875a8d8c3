"""The goals follow from a run's own figures, round by round."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from .measure import TRIES, Round, Speed, Spread, quiet, quietest
from .process import Run
from .results import (
    BUILDER,
    BUILDER_ADAPTER,
    LLAMA,
    LLAMA_ADAPTER,
    LLAMA_Q4,
    LLAMA_Q4_ADAPTER,
    NATIVE,
    NATIVE_ADAPTER,
    NATIVE_MIX,
    OURS,
    OURS_ADAPTER,
    OURS_MIX,
    UPSTREAM,
    UPSTREAM_FEW,
    Goal,
    Memory,
    Results,
    executorch_goals,
    onnx_goals,
)
from .table import markdown, page


def _speed(*step_ms: float, prefill_ms: float | None = 100.0) -> Speed:
    prefill = None if prefill_ms is None else prefill_ms / 1e3
    rounds = tuple(Round(prefill, 0.02, (step / 1e3, step / 1e3, 9.9)) for step in step_ms)
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
        NATIVE: _speed(5, 20, 20, prefill_ms=80),
        NATIVE_ADAPTER: _speed(6, 24, 24, prefill_ms=125),
        NATIVE_MIX: _speed(9, 36, 36, prefill_ms=None),
        LLAMA: _speed(10, 40, 40),
        LLAMA_ADAPTER: _speed(12, 48, 48),
        LLAMA_Q4: _speed(10, 40, 40),
        LLAMA_Q4_ADAPTER: _speed(12, 48, 48),
    },
    exports={
        OURS: [Run(20.0, 30.0, 1_000_000_000)] * 2,
        BUILDER: [Run(16.0, 1, 1), Run(5.0, 1, 1)],
        NATIVE: [Run(10.0, 1, 1), Run(90.0, 1, 1)],
        UPSTREAM_FEW: [Run(40.0, 1, 1)],
    },
    swap_ms={OURS_ADAPTER: 0.25, NATIVE_ADAPTER: 2.5},
    model_bytes={NATIVE: 100_000_000},
    memory=Memory(peak_at_load=250_000_000, model=100_000_000, kv_cache=70_000_000),
    add_adapter=[Run(2.5, 1, 1)],
    changed_files=["model.onnx.data"],
)


def _found(rows: list[Goal]) -> dict[str, tuple[float | None, str]]:
    return {goal.text: (goal.found and round(goal.found.median, 4), goal.verdict) for goal in rows}


def test_each_goal_of_onnx_from_given_figures() -> None:
    assert _found(onnx_goals(RESULTS)) == {
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


def test_each_goal_of_executorch_from_given_figures() -> None:
    assert _found(executorch_goals(RESULTS)) == {
        "export time, of transformers' (extrapolated)": (0.25, "reached"),  # upstream was exported once
        "decode, base, of llama.cpp's": (2.0, "reached"),
        "decode, adapter, of llama.cpp's": (2.0, "reached"),
        "time of a token, adapter, of ours without": (1.2, "reached"),
        "time of a token, mix of two, of one": (1.5, "missed"),
        "prefill, base, of llama.cpp's": (1.25, "reached"),
        "prefill, adapter, of llama.cpp's": (0.8, "missed"),
        "swap, p50": (2.5, "missed"),
        "peak RSS at load, of 1.3 × the model's files + the KV cache": (1.25, "missed"),
    }


def test_an_export_of_all_layers_is_compared_where_there_is_one() -> None:
    full = replace(RESULTS, exports=RESULTS.exports | {UPSTREAM: [Run(20.0, 1, 1)]})
    assert _found(executorch_goals(full))["export time, of transformers'"] == (0.5, "missed")


def test_a_missing_peer_is_said_and_never_reached() -> None:
    speeds = {row: RESULTS.speeds[row] for row in (OURS, NATIVE_MIX)}
    alone = replace(RESULTS, speeds=speeds, exports={}, swap_ms={}, add_adapter=(), memory=None)
    assert {goal.verdict for goal in (*onnx_goals(alone), *executorch_goals(alone))} == {"not measured"}
    table = markdown(alone)
    assert "| llama.cpp + adapter | not measured |" in table
    assert "| ours | – | – | – | – | 200 | 1024 | 25.0 | – | – | 300 |" in table
    assert "| ours (ExecuTorch) + mix of two | – | – | – | – | 200 | – | 27.8 | – | – | 300 |" in table


def test_a_system_that_was_only_exported_has_its_costs() -> None:
    assert f"| {UPSTREAM_FEW} | 40.0 | 1.0 | 0 | – | – | – | – | – | – | – |" in markdown(RESULTS)


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


OTHERS = ((0.0, 0.5), (0.4, 0.0), (0.01, 0.02), (0.0, 0.0))


def test_a_disturbed_round_is_repeated() -> None:
    # Two rows that are measured together: what disturbs one of them disturbs both.
    answers = [tuple(Round(prefill, others, (0.1,)) for others in pair) for prefill, pair in enumerate(OTHERS)]
    assert quietest(iter(answers).__next__, deadline=math.inf) == answers[2]
    disturbed = [answers[0], answers[1], *[answers[0]] * (TRIES - 2)]
    assert quietest(iter(disturbed).__next__, deadline=math.inf) == answers[1]  # it gives up
    assert quietest(iter(answers).__next__, deadline=0.0) == answers[0]  # or has no time


def test_the_page_ends_with_the_tables() -> None:
    assert page(RESULTS).startswith("# Benchmarks\n")
    assert page(RESULTS).endswith(markdown(RESULTS))


def test_every_row_of_the_table_has_all_cells() -> None:
    lines = markdown(RESULTS).splitlines()
    assert lines[0] == "CPU abacus, cores 2"
    assert lines[2].startswith("From 36 of 36 rounds; in these, other processes used 2%")
    for block in "\n".join(lines[4:]).strip().split("\n\n"):
        assert len({row.count("|") for row in block.splitlines()}) == 1
