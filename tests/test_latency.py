"""Latency lines from samples whose medians and percentiles the standard library knows too."""

from __future__ import annotations

import statistics
from pathlib import Path

import msgspec
import pytest

from calora_export import latency
from calora_export import package as packages
from calora_export.jobs import Answer, Job, Timing, TimingTrace

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


def summarised(trace: TimingTrace) -> latency.Latency:
    answer = Answer("d", "a", "o", "onnx", 8, (), (), None, trace, peak_rss=12_000_000)
    return latency.summarise(Job(threads=3, timing=TIMING), answer)


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


def test_a_package_is_timed_with_its_first_two_adapters(package: Path) -> None:
    asked = latency.timing(packages.load(package), (7,) * 1000)
    assert (asked.adapter, asked.other) == ("alpha", "beta")
    assert len(asked.prompt) == latency.PROMPT


def test_the_prompt_leaves_room_for_the_decode_steps(package: Path) -> None:
    opened = packages.load(package)
    model = msgspec.structs.replace(opened.manifest.model, context=40)
    adapters = opened.manifest.adapters[:1]
    small = packages.Package(package, msgspec.structs.replace(opened.manifest, model=model, adapters=adapters))
    asked = latency.timing(small, (7,) * 1000)
    assert len(asked.prompt) + asked.decode == 40
    assert (asked.adapter, asked.other) == ("alpha", "")
