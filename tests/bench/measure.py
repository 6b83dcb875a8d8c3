"""Interleaved rounds over several subjects: the machine's drift hits all of them and cancels in the ratios.

A round in which something else used the processors is repeated, and left out of the figures when there are
enough others: thread pools that spin suffer from company, and not all alike.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

PROMPT = tuple(range(10, 138))
STEPS = 64
WARM_UP_STEPS = 4
QUIET = 0.03  # the share of the processors that others may have used in a round
TRIES = 3
FEWEST = 3  # rounds that figures are made of
PATIENCE = 180.0  # seconds after which nothing is repeated any more


@dataclass(frozen=True)
class Round:
    """Seconds of a prefill (None: not timed), the share of the processors that others used, seconds of each token."""

    prefill_s: float | None
    others: float
    steps_s: tuple[float, ...]

    @property
    def step_s(self) -> float:
        return statistics.median(self.steps_s)


@dataclass(frozen=True)
class Speed:
    """One row: `load_s` to open it when library and files are warm, `peak_rss` of its process in bytes."""

    load_s: float
    peak_rss: int
    rounds: tuple[Round, ...]

    @property
    def prefill_s(self) -> float | None:
        """Seconds of a prefill: the median of the quiet rounds."""
        found = [one.prefill_s for (one,) in quiet(self) if one.prefill_s is not None]
        return statistics.median(found) if found else None

    @property
    def step_s(self) -> float:
        """Seconds of a token: the median of the quiet rounds."""
        return statistics.median(one.step_s for (one,) in quiet(self))


@dataclass(frozen=True)
class Spread:
    """Least, middle and largest of so many numbers."""

    low: float
    median: float
    high: float
    count: int


class Subject(Protocol):
    """What is measured in one process: one row of the table, or several that share a loaded model."""

    @property
    def rows(self) -> tuple[str, ...]:
        """Their names."""
        ...

    def load(self) -> float:
        """Open it twice: the seconds of the second time. Called once, before the rounds."""
        ...

    def round(self) -> tuple[Round, ...]:
        """One for each row."""
        ...

    def peaks(self) -> tuple[int, ...]:
        """For each row the peak memory of a process that ran it, in bytes. Called after the rounds."""
        ...

    def close(self) -> None:
        """End its process."""
        ...


def spread(values: Sequence[float]) -> Spread:
    """The spread of `values`, which must not be empty."""
    return Spread(min(values), statistics.median(values), max(values), len(values))


def quiet(*speeds: Speed) -> list[tuple[Round, ...]]:
    """The rounds of all `speeds` side by side: those that were quiet for each, or all when these are too few."""
    together = list(zip(*(speed.rounds for speed in speeds), strict=True))
    undisturbed = [rounds for rounds in together if all(one.others <= QUIET for one in rounds)]
    return undisturbed if len(undisturbed) >= FEWEST else together


def interleave(subjects: Sequence[Subject], rounds: int, say: Callable[[str], None]) -> dict[str, Speed]:
    """Measure all side by side, A B C, C B A, A B C … for `rounds` rounds; `say` gets progress. They end up closed."""
    try:
        loads = [subject.load() for subject in subjects]
        samples: dict[str, list[Round]] = {row: [] for subject in subjects for row in subject.rows}
        deadline = time.monotonic() + PATIENCE
        for index in range(rounds):
            for subject in subjects if index % 2 == 0 else reversed(subjects):
                for row, found in zip(subject.rows, quietest(subject.round, deadline), strict=True):
                    samples[row].append(found)
            others = statistics.mean(made[-1].others for made in samples.values())
            say(f"round {index + 1} of {rounds}, {others:.0%} of the processors used by others")
        return {
            row: Speed(load, peak, tuple(samples[row]))
            for subject, load in zip(subjects, loads, strict=True)
            for row, peak in zip(subject.rows, subject.peaks(), strict=True)
        }
    finally:
        for subject in subjects:
            subject.close()


def quietest(measure: Callable[[], tuple[Round, ...]], deadline: float) -> tuple[Round, ...]:
    """The first quiet answer of a few, else the quietest of them; no repeats after `deadline` (monotonic)."""
    answers: list[tuple[Round, ...]] = []
    while not answers or (len(answers) < TRIES and time.monotonic() < deadline):
        answers.append(measure())
        if _others(answers[-1]) <= QUIET:
            break
    return min(answers, key=_others)


def _others(rounds: tuple[Round, ...]) -> float:
    return max(one.others for one in rounds)
