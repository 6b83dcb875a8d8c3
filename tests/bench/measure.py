"""Interleaved rounds over several systems: the machine's drift hits all of them and cancels in the ratios.

Each system lives in a process of its own (thread pool, memory) and sleeps while another one is measured.
A round in which something else used the processors is repeated, and left out of the figures when there are
enough others: thread pools that spin suffer from company, and not all alike.
"""

from __future__ import annotations

import multiprocessing
import resource
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path

import psutil

from .drivers import Driver, GenaiDriver, LlamaDriver
from .process import BenchError

PROMPT = tuple(range(10, 138))
STEPS = 64
WARM_UP_STEPS = 4
QUIET = 0.03  # the share of the processors that others may have used in a round
TRIES = 3
FEWEST = 3  # rounds that figures are made of
PATIENCE = 180.0  # seconds after which nothing is repeated any more


@dataclass(frozen=True)
class System:
    """What a worker opens: the runtime ("genai" or "llama"), the model's path, the adapter's file or none."""

    runtime: str
    model: Path
    adapter: Path | None = None


@dataclass(frozen=True)
class Round:
    """Seconds of a prefill, the share of the processors that others used, seconds of each token."""

    prefill_s: float
    others: float
    steps_s: tuple[float, ...]

    @property
    def step_s(self) -> float:
        return statistics.median(self.steps_s)


@dataclass(frozen=True)
class Speed:
    """One system: `load_s` to open it when library and files are warm, `peak_rss` of its process in bytes."""

    load_s: float
    peak_rss: int
    rounds: tuple[Round, ...]

    @property
    def prefill_s(self) -> float:
        """Seconds of a prefill: the median of the quiet rounds."""
        return statistics.median(one.prefill_s for (one,) in quiet(self))

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


def spread(values: Sequence[float]) -> Spread:
    """The spread of `values`, which must not be empty."""
    return Spread(min(values), statistics.median(values), max(values), len(values))


def quiet(*speeds: Speed) -> list[tuple[Round, ...]]:
    """The rounds of all `speeds` side by side: those that were quiet for each, or all when these are too few."""
    together = list(zip(*(speed.rounds for speed in speeds), strict=True))
    undisturbed = [rounds for rounds in together if all(one.others <= QUIET for one in rounds)]
    return undisturbed if len(undisturbed) >= FEWEST else together


def interleave(
    systems: Mapping[str, System], rounds: int, threads: int, say: Callable[[str], None]
) -> dict[str, Speed]:
    """Measure all `systems` side by side: A B C, C B A, A B C … for `rounds` rounds; `say` gets progress."""
    workers = {name: _Worker(name, system, threads) for name, system in systems.items()}
    try:
        loads = {name: worker.ask("load")[0] for name, worker in workers.items()}
        samples: dict[str, list[Round]] = {name: [] for name in workers}
        deadline = time.monotonic() + PATIENCE
        for index in range(rounds):
            for name in list(workers) if index % 2 == 0 else reversed(workers):
                samples[name].append(quietest(partial(workers[name].ask, "round"), deadline))
            others = statistics.mean(made[-1].others for made in samples.values())
            say(f"round {index + 1} of {rounds}, {others:.0%} of the processors used by others")
        return {
            name: Speed(loads[name], int(worker.ask("memory")[0]), tuple(samples[name]))
            for name, worker in workers.items()
        }
    finally:
        for worker in workers.values():
            worker.close()


def quietest(measure: Callable[[], tuple[float, ...]], deadline: float) -> Round:
    """The first quiet round of a few, else the quietest of them; no repeats after `deadline` (monotonic)."""
    rounds: list[Round] = []
    while not rounds or (len(rounds) < TRIES and time.monotonic() < deadline):
        prefill, others, *steps = measure()
        rounds.append(Round(prefill, others, tuple(steps)))
        if others <= QUIET:
            break
    return min(rounds, key=lambda one: one.others)


class _Worker:
    """The parent's side of one system's process."""

    def __init__(self, name: str, system: System, threads: int) -> None:
        context = multiprocessing.get_context("spawn")
        self.name = name
        self.connection, other = context.Pipe()
        self.process = context.Process(target=_serve, args=(other, system, threads), daemon=True)
        self.process.start()
        other.close()

    def ask(self, request: str) -> tuple[float, ...]:
        """Have one request of `_serve` answered."""
        try:
            self.connection.send(request)
            return self.connection.recv()
        except (EOFError, BrokenPipeError) as error:
            raise BenchError(f"{self.name}: its process died (its own message is above)") from error

    def close(self) -> None:
        self.connection.close()
        self.process.join()


def open_driver(system: System, threads: int) -> Driver:
    """Load a system in this process."""
    if system.runtime == "genai":
        return GenaiDriver(system.model, system.adapter, threads)
    return LlamaDriver(system.model, system.adapter, threads)


def _serve(connection: Connection, system: System, threads: int) -> None:
    """Answer `load` (seconds), then each `round` (see `_round`) and `memory` (peak bytes)."""
    with suppress(EOFError):  # the parent has closed its end
        connection.recv()  # only now: the others are being loaded before
        open_driver(system, threads)  # once for the library's import and the page cache
        begin = time.perf_counter()
        driver = open_driver(system, threads)
        connection.send((time.perf_counter() - begin,))
        while True:
            if connection.recv() == "round":
                connection.send(_round(driver))
            else:
                connection.send((float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024),))


def _round(driver: Driver) -> tuple[float, ...]:
    """Seconds of a prefill, the share of others, seconds of each of `STEPS` tokens."""
    driver.reset()
    driver.prefill(PROMPT[:WARM_UP_STEPS])  # wakes the threads
    driver.reset()
    psutil.cpu_percent()  # the next call counts from here
    own, begin = time.process_time(), time.perf_counter()
    driver.prefill(PROMPT)
    prefill = time.perf_counter() - begin
    steps = []
    for _ in range(WARM_UP_STEPS + STEPS):
        before = time.perf_counter()
        driver.step()
        steps.append(time.perf_counter() - before)
    seconds = (time.perf_counter() - begin) * (psutil.cpu_count() or 1)
    others = psutil.cpu_percent() / 100 - (time.process_time() - own) / seconds
    return prefill, max(others, 0.0), *steps[WARM_UP_STEPS:]
