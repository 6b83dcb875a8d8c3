"""From raw samples to the latency lines of a report."""

from __future__ import annotations

import os
from collections.abc import Sequence

import numpy as np
from msgspec import UNSET

from calora_export.jobs import Answer, Job, Timing
from calora_export.package import Package
from calora_export.profiles import Profile
from calora_export.report import BudgetRow, Latency, LengthRow, Speed, Spread, Swap

PROMPT, DECODE, ROUNDS, SWAPS = 128, 24, 5, 100
LENGTHS, REPEATS = (16, 64, 256, 1024), 3


def timing(package: Package, prompt: tuple[int, ...]) -> Timing:
    """What to time in a package: its first two adapters, a prompt that leaves room for the decode steps."""
    ids = [adapter.id for adapter in package.manifest.adapters if adapter.kind is UNSET]
    ids = ids or [adapter.id for adapter in package.manifest.adapters][:1]  # others may not mix
    if package.manifest.settings.adapter_inputs == "functions":
        ids = ids[:1]  # no two of them can be mixed
    room = package.manifest.model.context - DECODE
    return Timing(
        adapter=ids[0] if ids else "",
        other=ids[1] if len(ids) > 1 else "",
        prompt=prompt[: min(PROMPT, room)],
        decode=DECODE,
        rounds=ROUNDS,
        swaps=SWAPS,
        lengths=tuple(length for length in LENGTHS if length <= room),
        repeats=REPEATS,
    )


def threads(profile: Profile | None) -> int:
    """As many as the profile says, or the processors this process may use, at most four: more slows the decoding of
    small models."""
    if profile is not None and profile.threads is not None:
        return profile.threads
    if hasattr(os, "sched_getaffinity"):
        return min(4, len(os.sched_getaffinity(0)))
    return min(4, os.cpu_count() or 1)


def summarise(job: Job, answer: Answer) -> Latency:
    """Medians over interleaved rounds; taxes are ratios of medians within the same run."""
    made = answer.timing
    if made is None or job.timing is None:  # it did not come to that
        return UNMEASURED
    decode = {name: _median(samples) for name, samples in made.decode.items()}
    return Latency(
        load_ms=made.load,
        swap_ms=Swap(p50=_median(made.swap), p90=_percentile(made.swap, 90)),
        first_token_after_swap_ms=_median(made.first_token),
        prefill_tok_s=_rate(len(job.timing.prompt), _median(made.prefill)),
        decode_tok_s=_rate(1, decode.get("base")),
        adapter_tax=_ratio(decode.get("adapter"), decode.get("base")),
        mix2_tax=_ratio(decode.get("mix2"), decode.get("adapter")),
        router_ms=_median(made.router),
        peak_rss_mb=None if answer.peak_rss is None else answer.peak_rss / 1e6,
        threads=answer.threads or job.threads,
        samples=len(made.decode.get("base", ())),
    )


UNMEASURED = Latency(
    load_ms=None,
    swap_ms=Swap(p50=None, p90=None),
    first_token_after_swap_ms=None,
    prefill_tok_s=None,
    decode_tok_s=None,
    adapter_tax=None,
    mix2_tax=None,
    router_ms=None,
    peak_rss_mb=None,
    threads=0,
    samples=0,
)


def speed(answer: Answer) -> Speed | None:
    """What is behind the summary."""
    made = answer.timing
    if made is None:
        return None
    return Speed(
        prefill_ms=_spread(made.prefill),
        decode_ms={name: _spread(samples) for name, samples in made.decode.items()},
        swap_ms=_spread(made.swap),
        first_token_after_swap_ms=_spread(made.first_token),
        router_ms=_spread(made.router),
        lengths=tuple(
            LengthRow(
                tokens=point.length,
                prefill_ms=_spread(point.prefill),
                prefill_tok_s=_rate(point.length, _median(point.prefill)),
                decode_ms=_spread(point.decode),
                decode_tok_s=_rate(1, _median(point.decode)),
            )
            for point in made.curve
        ),
        cores=answer.cores,
        mapped_mb=answer.mapped / 1e6 if answer.mapped else None,
        before=made.before,
        after=made.after,
    )


def judge(profile: Profile, found: Latency, emulated: bool) -> tuple[BudgetRow, ...]:
    """The profile's budgets, and the memory that an app may use there; times of an emulated device are not judged."""
    rates = ("prefill_tok_s", "decode_tok_s")
    limits = {name: getattr(profile.budget, name) for name in profile.budget.__struct_fields__}
    if profile.memory_mb is not None:
        limits["peak_rss_mb"] = profile.memory_mb * 2**20 / 1e6
    rows = []
    for name, limit in limits.items():
        value = found.swap_ms.p90 if name == "swap_ms" else getattr(found, name)
        if limit is not None:
            passed = None if value is None or emulated else value >= limit if name in rates else value <= limit
            rows.append(BudgetRow(name=name, limit=limit, found=value, passed=passed))
    return tuple(rows)


def over(rows: Sequence[BudgetRow], profile: str) -> list[str]:
    """A line for each budget that was not kept."""
    return [
        f"budget: {row.name} is {row.found:.3g}, the budget of {profile} is {row.limit:.3g}"
        for row in rows
        if row.passed is False
    ]


def _spread(samples: Sequence[float]) -> Spread:
    return Spread(
        p50=_median(samples),
        p90=_percentile(samples, 90),
        p99=_percentile(samples, 99) if len(samples) >= 100 else None,
        samples=len(samples),
    )


def _percentile(samples: Sequence[float], q: float) -> float | None:
    return float(np.percentile(samples, q)) if samples else None


def _median(samples: Sequence[float]) -> float | None:
    return _percentile(samples, 50)


def _rate(tokens: int, milliseconds: float | None) -> float | None:
    return tokens / milliseconds * 1e3 if milliseconds else None


def _ratio(a: float | None, b: float | None) -> float | None:
    return a / b if a is not None and b else None
