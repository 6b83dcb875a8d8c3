"""Run a command, time it and take its peak memory."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

Result = TypeVar("Result")


class BenchError(Exception):
    """A part of the benchmark failed; the message says which and where its log is."""


@dataclass(frozen=True)
class Run:
    """What a finished command cost: seconds on the wall, on all processors, bytes of its largest process."""

    seconds: float
    cpu_seconds: float
    peak_rss: int


def run(command: Sequence[str | Path], log: Path) -> Run:
    """Run `command` to its end, stdout into `log` and stderr beside it; BenchError when it fails.

    Linux counts a child's peak from its parent's size, so the caller has to stay small: no torch, no weights.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    errors = log.with_suffix(".err")
    offline = os.environ | {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
    begin = time.perf_counter()
    with log.open("wb") as out, errors.open("wb") as err:
        process = subprocess.Popen([str(part) for part in command], stdout=out, stderr=err, env=offline)
        _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - begin
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode != 0:
        last = (errors.read_text(errors="replace").strip().splitlines() or ["nothing on stderr"])[-1]
        raise BenchError(f"{log.stem} ended with {process.returncode}: {last} ({errors})")
    return Run(seconds, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024)


def apart(function: Callable[..., Result], *arguments: object) -> Result:
    """Call an importable function in a process of its own, so that what it loads leaves this one small."""
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(max_workers=1, mp_context=spawn) as pool:
        return pool.submit(function, *arguments).result()
