"""What a device is asked to run, and what it answers: the same two files for every transport and language.

A job is job.json. A trace is trace.json and logits.bin, which holds fp32 [steps + 1, vocab] for each case in order.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np
from msgspec import Struct

from calora_export import strict_json
from calora_export.compression import Activations
from calora_export.errors import DeviceError, mismatch

JOB, TRACE, LOGITS = "job.json", "trace.json", "logits.bin"


class Case(Struct, frozen=True, forbid_unknown_fields=True):
    """Teacher-forced: `ids[:prefill]` at once, then one by one. The answer is the last logits of each call."""

    name: str
    mix: dict[str, float]
    ids: tuple[int, ...]
    prefill: int


class Completion(Struct, frozen=True, forbid_unknown_fields=True):
    """Greedy generation under one adapter, until an end token or `limit` new ones."""

    adapter: str
    ids: tuple[int, ...]
    limit: int


class Safety(Struct, frozen=True, forbid_unknown_fields=True):
    """A→B→A and stale-cache checks between two mixes; `forged` is an adapter file that must be refused."""

    first: dict[str, float]
    second: dict[str, float]
    ids: tuple[int, ...]
    forged: str


class Timing(Struct, frozen=True, forbid_unknown_fields=True):
    """What to time: one adapter, another to swap with, a mix; empty strings and mixes are left out. `lengths`: the base
    reads so many tokens, the prompt over and over, and decodes behind them; each length `repeats` times."""

    adapter: str
    other: str
    prompt: tuple[int, ...]
    decode: int
    rounds: int
    swaps: int
    lengths: tuple[int, ...] = ()
    repeats: int = 0


class Job(Struct, frozen=True, forbid_unknown_fields=True):
    """cores: the processors on which alone it runs, by their numbers; none: where the system puts it."""

    threads: int
    cases: tuple[Case, ...] = ()
    routes: tuple[tuple[int, ...], ...] = ()
    completions: tuple[Completion, ...] = ()
    safety: Safety | None = None
    timing: Timing | None = None
    cores: tuple[int, ...] = ()


class SafetyTrace(Struct, frozen=True, forbid_unknown_fields=True):
    """aba: the first mix gave the same bits before and after the second. fresh: a selected mix never saw the other's
    cache. stale: reading it on purpose changed the answer, so that `fresh` could have failed, or can not be done.
    refused: the forgery."""

    aba: bool
    fresh: bool
    stale: bool
    refused: bool


class Point(Struct, frozen=True, forbid_unknown_fields=True):
    """Samples in milliseconds: reading `length` tokens at once, and each decode step behind them."""

    length: int
    prefill: tuple[float, ...]
    decode: tuple[float, ...]


class Conditions(Struct, frozen=True, forbid_unknown_fields=True):
    """Degrees Celsius by thermal zone, MHz by processor; None where the system does not say."""

    temperature_c: dict[str, float] | None = None
    clock_mhz: dict[str, float] | None = None


class TimingTrace(Struct, frozen=True, forbid_unknown_fields=True):
    """Samples in milliseconds. decode: name → one per token; prefill: one per prompt. curve: a point for each of the
    job's lengths, none from a device whose times mean nothing. before, after: how the device was."""

    load: float
    swap: tuple[float, ...]
    first_token: tuple[float, ...]
    prefill: tuple[float, ...]
    decode: dict[str, tuple[float, ...]]
    router: tuple[float, ...]
    curve: tuple[Point, ...] = ()
    before: Conditions | None = None
    after: Conditions | None = None


class Answer(Struct, frozen=True, forbid_unknown_fields=True):
    """trace.json. runtime: the target, or what ran it, in words. peak_rss is in bytes, of the process that ran the job;
    None: unknown. peaks: operator → its largest |value|, in the
    order in which they run, from a runtime that sees them. emulated: the times mean nothing. rounding: how kernels of
    this processor round what packed weights read, where that is not the recipe's `activations`. threads: how many it
    used, where not as many as the job allows. cores: the processors on which it might run. mapped: bytes of files that
    were in its memory when it ended, weights and adapters above all: the system can drop them at no cost."""

    device: str
    arch: str
    os: str
    runtime: str
    vocab: int
    gates: tuple[tuple[float, ...], ...]
    completions: tuple[tuple[int, ...], ...]
    safety: SafetyTrace | None
    timing: TimingTrace | None
    peak_rss: int | None
    peaks: dict[str, float] | None = None
    emulated: bool = False
    threads: int | None = None
    rounding: Activations | None = None
    cores: tuple[int, ...] | None = None
    mapped: int | None = None


@dataclass(frozen=True)
class Trace:
    """An answer with its logits: case name → fp32 [decode steps + 1, vocab]."""

    answer: Answer
    logits: Mapping[str, np.ndarray]


class InterruptedRun(DeviceError):
    """A job that did not come to its end; `begun` is what was measured until then, if anything was."""

    def __init__(self, line: str, begun: Trace | None) -> None:
        super().__init__(line)
        self.begun = begun


def write_job(directory: Path, job: Job) -> None:
    (directory / JOB).write_bytes(msgspec.json.encode(job))


def read_job(directory: Path) -> Job:
    return strict_json.read(directory / JOB, Job, JOB, DeviceError)


class Record:
    """A trace in the making. In a directory it is there as far as it has come, whatever happens to the process next."""

    def __init__(self, directory: Path | None = None) -> None:
        self._directory = directory
        self.logits: dict[str, np.ndarray] = {}
        if directory is not None:
            (directory / LOGITS).write_bytes(b"")

    def add(self, case: str, rows: np.ndarray) -> None:
        """The next case's logits, fp32 [decode steps + 1, vocab]."""
        self.logits[case] = rows
        if self._directory is not None:
            with (self._directory / LOGITS).open("ab") as file:
                file.write(np.ascontiguousarray(rows, np.float32).tobytes())

    def say(self, answer: Answer) -> None:
        """The answer as far as it is known."""
        if self._directory is not None:
            new = self._directory / f".{TRACE}"
            new.write_bytes(msgspec.json.encode(answer))
            new.replace(self._directory / TRACE)


def write_trace(directory: Path, trace: Trace) -> None:
    record = Record(directory)
    for case, rows in trace.logits.items():
        record.add(case, rows)
    record.say(trace.answer)


def read_trace(directory: Path, job: Job) -> Trace:
    """Raises DeviceError when the device did not answer all of the job."""
    answer = strict_json.read(directory / TRACE, Answer, TRACE, DeviceError)
    data = strict_json.read_bytes(directory / LOGITS, LOGITS, DeviceError)
    sizes = [(len(case.ids) - case.prefill + 1) * answer.vocab for case in job.cases]
    for file, key, expected, found in (
        (LOGITS, "bytes", 4 * sum(sizes), len(data)),
        (TRACE, "gates", len(job.routes), len(answer.gates)),
        (TRACE, "completions", len(job.completions), len(answer.completions)),
        (TRACE, "safety", job.safety is not None, answer.safety is not None),
        (TRACE, "timing", job.timing is not None, answer.timing is not None),
    ):
        if expected != found:
            raise DeviceError(mismatch(file, key, expected, found, "the device did not answer all of the job"))
    return Trace(answer, _logits(job, answer, data))


def read_begun(directory: Path, job: Job) -> Trace | None:
    """What a device measured before something broke: whole cases, and what else it had said; None: nothing."""
    try:
        answer = strict_json.read(directory / TRACE, Answer, TRACE, DeviceError)
        data = strict_json.read_bytes(directory / LOGITS, LOGITS, DeviceError)
    except DeviceError:
        return None
    logits = _logits(job, answer, data)
    return Trace(answer, logits) if logits else None


def _logits(job: Job, answer: Answer, data: bytes) -> dict[str, np.ndarray]:
    """By case, as far as they are whole."""
    logits: dict[str, np.ndarray] = {}
    start = 0
    for case in job.cases:
        end = start + 4 * (len(case.ids) - case.prefill + 1) * answer.vocab
        if end > len(data):
            break
        logits[case.name] = np.frombuffer(data[start:end], np.float32).reshape(-1, answer.vocab)
        start = end
    return logits
