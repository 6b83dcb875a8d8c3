"""A driver in a process of its own (thread pool, memory), which sleeps while another one is measured."""

from __future__ import annotations

import multiprocessing
import resource
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

import psutil

from .drivers import Driver, ExecutorchDriver, GenaiDriver, LlamaDriver
from .measure import PROMPT, STEPS, WARM_UP_STEPS, Round
from .process import BenchError

DRIVERS: dict[str, Callable[[Path, Path | None, int], Driver]] = {
    "genai": GenaiDriver,
    "llama": LlamaDriver,
    "executorch": ExecutorchDriver,
}


@dataclass(frozen=True)
class System:
    """What a worker opens: the runtime (a key of DRIVERS), the model's path, the adapter's file or none."""

    runtime: str
    model: Path
    adapter: Path | None = None


class Worker:
    """Implements Subject for one row: the parent's side of its process."""

    def __init__(self, name: str, system: System, threads: int) -> None:
        context = multiprocessing.get_context("spawn")
        self.rows = (name,)
        self.connection, other = context.Pipe()
        self.process = context.Process(target=_serve, args=(other, system, threads), daemon=True)
        self.process.start()
        other.close()

    def load(self) -> float:
        return self._ask("load")[0]

    def round(self) -> tuple[Round, ...]:
        prefill, others, *steps = self._ask("round")
        return (Round(prefill, others, tuple(steps)),)

    def peaks(self) -> tuple[int, ...]:
        return (int(self._ask("memory")[0]),)

    def close(self) -> None:
        self.connection.close()
        self.process.join()

    def _ask(self, request: str) -> tuple[float, ...]:
        """Have one request of `_serve` answered."""
        try:
            self.connection.send(request)
            return self.connection.recv()
        except (EOFError, BrokenPipeError) as error:
            raise BenchError(f"{self.rows[0]}: its process died (its own message is above)") from error


def _serve(connection: Connection, system: System, threads: int) -> None:
    """Answer `load` (seconds), then each `round` (see `_round`) and `memory` (peak bytes)."""
    open_driver = DRIVERS[system.runtime]
    with suppress(EOFError):  # the parent has closed its end
        connection.recv()  # only now: the others are being loaded before
        open_driver(system.model, system.adapter, threads)  # once for the library's import and the page cache
        begin = time.perf_counter()
        driver = open_driver(system.model, system.adapter, threads)
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
