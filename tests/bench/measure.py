"""Interleaved rounds over several systems: the machine's drift hits all of them and cancels in the ratios.

Each system lives in a process of its own (thread pool, memory) and sleeps while another one is measured.
"""

from __future__ import annotations

import multiprocessing
import resource
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

from .drivers import Driver, GenaiDriver, LlamaDriver
from .process import BenchError

PROMPT = tuple(range(10, 138))
STEPS = 64
WARM_UP_STEPS = 4


@dataclass(frozen=True)
class System:
    """What a worker opens: the runtime ("genai" or "llama"), the model's path, the adapter's file or none."""

    runtime: str
    model: Path
    adapter: Path | None = None


@dataclass(frozen=True)
class Speed:
    """One system: per round the seconds of a prefill of `PROMPT` and the median of a token's seconds.

    `load_s` is the time of opening it when library and files are warm, `peak_rss` its process's in bytes.
    """

    load_s: float
    peak_rss: int
    prefill_s: tuple[float, ...]
    step_s: tuple[float, ...]


@dataclass(frozen=True)
class Spread:
    """Least, middle and largest of some numbers."""

    low: float
    median: float
    high: float


def spread(values: Sequence[float]) -> Spread:
    """The spread of `values`, which must not be empty."""
    return Spread(min(values), statistics.median(values), max(values))


def ratio(above: Sequence[float], below: Sequence[float]) -> Spread:
    """The spread of above / below, round by round."""
    return spread([a / b for a, b in zip(above, below, strict=True)])


def interleave(systems: Mapping[str, System], rounds: int, threads: int) -> dict[str, Speed]:
    """Measure all `systems` side by side: A B C, C B A, A B C … for `rounds` rounds."""
    workers = {name: _Worker(name, system, threads) for name, system in systems.items()}
    try:
        loads = {name: worker.ask("load")[0] for name, worker in workers.items()}
        samples: dict[str, list[tuple[float, ...]]] = {name: [] for name in workers}
        for index in range(rounds):
            for name in list(workers) if index % 2 == 0 else reversed(workers):
                samples[name].append(workers[name].ask("round"))
        return {
            name: Speed(
                load_s=loads[name],
                peak_rss=int(worker.ask("memory")[0]),
                prefill_s=tuple(prefill for prefill, _ in samples[name]),
                step_s=tuple(step for _, step in samples[name]),
            )
            for name, worker in workers.items()
        }
    finally:
        for worker in workers.values():
            worker.close()


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
    """Answer `load` (seconds), `round` (seconds of a prefill, of a token) and `memory` (peak bytes)."""
    driver = open_driver(system, threads)  # once for the library's import and the page cache
    while True:
        try:
            request = connection.recv()
        except EOFError:
            return
        if request == "load":
            del driver
            begin = time.perf_counter()
            driver = open_driver(system, threads)
            connection.send((time.perf_counter() - begin,))
        elif request == "round":
            connection.send(_round(driver))
        else:
            connection.send((float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024),))


def _round(driver: Driver) -> tuple[float, float]:
    """Seconds of one prefill, and the median of the seconds of `STEPS` steps after it."""
    driver.reset()
    driver.prefill(PROMPT[:WARM_UP_STEPS])  # wakes the threads
    driver.reset()
    begin = time.perf_counter()
    driver.prefill(PROMPT)
    prefill = time.perf_counter() - begin
    steps = []
    for _ in range(WARM_UP_STEPS + STEPS):
        begin = time.perf_counter()
        driver.step()
        steps.append(time.perf_counter() - begin)
    return prefill, statistics.median(steps[WARM_UP_STEPS:])
