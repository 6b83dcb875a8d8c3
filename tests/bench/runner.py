"""Our ExecuTorch package through the native runner, as on a phone: every measurement is a job in a fresh process."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from calora_export import native
from calora_export.jobs import Answer, Job, Timing, TimingTrace, read_trace, write_job

from .measure import PROMPT, STEPS, Round
from .process import Run, run

MIXES = ("base", "adapter", "mix2")  # what the runner times, by its names


@dataclass(frozen=True)
class Done:
    """A finished job: what it answered and what it cost."""

    answer: Answer
    cost: Run

    @property
    def timing(self) -> TimingTrace:
        assert self.answer.timing is not None  # every job but `peak_at_load`'s asks for it
        return self.answer.timing


class Runner:
    """Implements Subject for three rows: the base, with one adapter, with a mix of two."""

    def __init__(self, rows: tuple[str, str, str], package: Path, adapters: tuple[str, str], threads: int, work: Path):
        self.rows = rows
        self.package, self.adapters, self.threads, self.work = package, adapters, threads, work
        self.program = native.runner("executorch")  # compiled on first use
        work.mkdir(parents=True, exist_ok=True)

    def load(self) -> float:
        """Seconds, of the runner's own clock."""
        return [self._run(timing(())).timing.load / 1e3 for _ in range(2)][-1]

    def round(self) -> tuple[Round, ...]:
        psutil.cpu_percent()  # the next call counts from here
        done = self._run(timing(self.adapters))
        used = done.cost.cpu_seconds / done.cost.seconds / (psutil.cpu_count() or 1)
        return rounds(done.timing, max(psutil.cpu_percent() / 100 - used, 0.0))

    def peaks(self) -> tuple[int, ...]:
        """Of three processes, each with one adapter more than the one before."""
        used = [self.adapters[:count] for count in range(3)]
        return tuple(self._run(timing(adapters)).answer.peak_rss for adapters in used)

    def peak_at_load(self) -> int:
        """Bytes, of a process that opens the package and does nothing with it."""
        return self._run(None).answer.peak_rss

    def close(self) -> None:
        """Nothing is kept between jobs."""

    def _run(self, wanted: Timing | None) -> Done:
        job = Job(threads=self.threads, timing=wanted)
        write_job(self.work, job)
        cost = run([self.program, self.package, self.work], self.work / "runner.log")
        return Done(read_trace(self.work, job).answer, cost)


def timing(adapters: Sequence[str]) -> Timing:
    """One round over the base, the first adapter and a mix with the second one, as far as there are any."""
    adapter, other = (*adapters, "", "")[:2]
    return Timing(adapter=adapter, other=other, prompt=PROMPT, decode=STEPS, rounds=1, swaps=2)


def rounds(found: TimingTrace, others: float) -> tuple[Round, ...]:
    """A round of the base, of an adapter, whose prefill holds a swap, and of a mix, whose prefill is not timed."""
    prefills = [statistics.median(samples) / 1e3 for samples in (found.prefill, found.first_token)]
    steps = [tuple(step / 1e3 for step in found.decode[mix]) for mix in MIXES]
    return tuple(Round(prefill, others, step) for prefill, step in zip((*prefills, None), steps, strict=True))
