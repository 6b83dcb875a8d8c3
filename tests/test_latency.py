"""Latency lines from samples whose medians and percentiles the standard library knows too."""

from __future__ import annotations

import statistics
from pathlib import Path

import msgspec
import pytest

from calora_export import latency
from calora_export import package as packages
from calora_export.jobs import Answer, Job, Point, Timing, TimingTrace
from calora_export.profiles import Budget, Profile

SWAP = (5.0, 1.0, 4.0, 2.0, 3.0, 9.0, 7.0)
TIMING = Timing(adapter="a", other="b", prompt=(1,) * 100, decode=16, rounds=5, swaps=40)
TRACE = TimingTrace(
    load=12.5,
    swap=SWAP,
    first_token=(8.0, 6.0, 7.0),
    prefill=(40.0, 50.0, 1000.0),
    decode={"base": (2.0, 2.0, 30.0), "adapter": (3.0, 2.5, 3.5), "mix2": (6.0, 6.0, 6.0)},
    router=(0.1, 0.3, 0.2),
)


def answered(trace: TimingTrace | None) -> Answer:
    return Answer("d", "a", "o", "onnx", 8, (), (), None, trace, peak_rss=12_000_000, cores=(0, 3), mapped=7_000_000)


def summarised(trace: TimingTrace | None) -> latency.Latency:
    return latency.summarise(Job(threads=3, timing=TIMING), answered(trace))


def test_lines_are_medians_and_ratios_of_medians() -> None:
    made = summarised(TRACE)
    assert made.load_ms == 12.5
    assert made.swap_ms.p50 == statistics.median(SWAP)
    deciles = statistics.quantiles(SWAP, n=10, method="inclusive")
    assert made.swap_ms.p90 == pytest.approx(deciles[8])
    assert made.first_token_after_swap_ms == 7.0
    assert made.prefill_tok_s == pytest.approx(100 / 0.050)
    assert made.decode_tok_s == pytest.approx(1 / 0.002)
    assert made.adapter_tax == pytest.approx(3.0 / 2.0)
    assert made.mix2_tax == pytest.approx(6.0 / 3.0)
    assert made.router_ms == 0.2
    assert (made.peak_rss_mb, made.threads, made.samples) == (12.0, 3, 3)


def test_what_was_not_measured_has_no_number() -> None:
    made = summarised(TimingTrace(1.0, (), (), (50.0,), {"base": (2.0,)}, ()))
    values = (made.swap_ms.p50, made.swap_ms.p90, made.first_token_after_swap_ms)
    assert values == (None, None, None)
    assert (made.adapter_tax, made.mix2_tax, made.router_ms) == (None, None, None)
    assert made.decode_tok_s is not None and made.samples == 1


def test_percentiles_are_those_of_the_standard_library_and_p99_needs_a_hundred() -> None:
    many = tuple(float(i * i % 101) for i in range(100))
    found = latency.speed(answered(msgspec.structs.replace(TRACE, swap=many)))
    assert found is not None
    deciles = statistics.quantiles(many, n=100, method="inclusive")
    assert [found.swap_ms.p50, found.swap_ms.p90, found.swap_ms.p99] == pytest.approx(
        [deciles[i] for i in (49, 89, 98)]
    )
    assert found.swap_ms.samples == 100
    few = latency.speed(answered(msgspec.structs.replace(TRACE, swap=many[:99])))
    assert few is not None and few.swap_ms.p99 is None and few.swap_ms.p90 is not None


def test_curves_are_rates_and_medians_of_each_length() -> None:
    curve = (Point(16, (4.0, 2.0, 8.0), (1.0, 3.0)), Point(64, (), ()))
    found = latency.speed(answered(msgspec.structs.replace(TRACE, curve=curve)))
    assert found is not None
    first, second = found.lengths
    assert (first.tokens, first.prefill_tok_s, first.decode_ms.p50) == (16, 16 / 0.004, 2.0)
    assert (second.tokens, second.prefill_tok_s, second.decode_ms.p90) == (64, None, None)
    assert (found.cores, found.mapped_mb) == ((0, 3), 7.0)
    assert set(found.decode_ms) == {"base", "adapter", "mix2"}


def test_what_broke_before_the_timing_has_no_speed() -> None:
    assert latency.speed(answered(None)) is None
    assert summarised(None) == latency.UNMEASURED


BUDGET = Budget(swap_ms=8.0, router_ms=0.2, decode_tok_s=501.0, prefill_tok_s=1000.0, load_ms=12.5)


def judged(emulated: bool, profile: Profile, trace: TimingTrace = TRACE) -> dict[str, bool | None]:
    return {row.name: row.passed for row in latency.judge(profile, summarised(trace), emulated)}


def test_times_are_at_most_and_rates_at_least_their_budget() -> None:
    """Decode is 500 tok/s, prefill 2000; the p90 of swaps is 7.8 ms."""
    profile = Profile("adb", "d", (), memory_mb=11, budget=BUDGET)
    expected = {"load_ms": True, "swap_ms": True, "router_ms": True, "prefill_tok_s": True, "decode_tok_s": False}
    assert judged(False, profile) == expected | {"peak_rss_mb": False}, "12 MB of 11 MiB"
    tighter = Profile("adb", "d", (), budget=Budget(swap_ms=7.7))
    assert judged(False, tighter) == {"swap_ms": False}
    (line,) = latency.over(latency.judge(tighter, summarised(TRACE), False), "mine")
    assert line == "budget: swap_ms is 7.8, the budget of mine is 7.7"


def test_an_emulated_device_is_never_judged() -> None:
    profile = Profile("adb", "d", (), memory_mb=11, budget=BUDGET)
    assert set(judged(True, profile).values()) == {None}
    assert latency.over(latency.judge(profile, summarised(TRACE), True), "mine") == []


def test_what_was_not_measured_is_not_judged() -> None:
    nothing = TimingTrace(1.0, (), (), (50.0,), {"base": (2.0,)}, ())
    assert judged(False, Profile("adb", "d", (), budget=BUDGET), nothing)["router_ms"] is None


def test_a_profile_says_how_many_threads() -> None:
    assert latency.threads(Profile("adb", "d", (), threads=7)) == 7
    assert 1 <= latency.threads(Profile("adb", "d", ())) == latency.threads(None) <= 4


def test_a_package_is_timed_with_its_first_two_adapters(package: Path) -> None:
    asked = latency.timing(packages.load(package), (7,) * 1000)
    assert (asked.adapter, asked.other) == ("alpha", "beta")
    assert len(asked.prompt) == latency.PROMPT
    assert asked.lengths and max(asked.lengths) + asked.decode <= packages.load(package).manifest.model.context


def test_the_prompt_leaves_room_for_the_decode_steps(package: Path) -> None:
    opened = packages.load(package)
    model = msgspec.structs.replace(opened.manifest.model, context=40)
    adapters = opened.manifest.adapters[:1]
    small = packages.Package(package, msgspec.structs.replace(opened.manifest, model=model, adapters=adapters))
    asked = latency.timing(small, (7,) * 1000)
    assert len(asked.prompt) + asked.decode == 40
    assert (asked.adapter, asked.other) == ("alpha", "")
    assert asked.lengths == (16,), "longer ones do not fit"
