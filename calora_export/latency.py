"""From raw samples to the latency lines of a report."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from msgspec import UNSET

from calora_export.jobs import Answer, Job, Timing
from calora_export.package import Package
from calora_export.report import Latency, Swap

PROMPT, DECODE, ROUNDS, SWAPS = 128, 16, 5, 40


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
    )


def summarise(job: Job, answer: Answer) -> Latency:
    """Medians over interleaved rounds; taxes are ratios of medians within the same run."""
    assert job.timing is not None and answer.timing is not None
    made = answer.timing
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


def _percentile(samples: Sequence[float], q: float) -> float | None:
    return float(np.percentile(samples, q)) if samples else None


def _median(samples: Sequence[float]) -> float | None:
    return _percentile(samples, 50)


def _rate(tokens: int, milliseconds: float | None) -> float | None:
    return tokens / milliseconds * 1e3 if milliseconds else None


def _ratio(a: float | None, b: float | None) -> float | None:
    return a / b if a is not None and b else None
