"""This machine: the job runs in a process of its own, so that its memory and load time are the package's alone.

host           the runtime's Python package
host:native    the target's native runner, as on a phone
host:PROFILE   for Core ML: with the compute units that a device's profile names
"""

from __future__ import annotations

import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import cycle, islice
from pathlib import Path

import numpy as np
from msgspec.structs import replace

from calora_export import machine, native, profiles, runtimes, targets
from calora_export import package as packages
from calora_export.devices import Progress, silent
from calora_export.errors import CaloraError, DeviceError, PackageError, mismatch
from calora_export.jobs import (
    Answer,
    Case,
    Completion,
    InterruptedRun,
    Job,
    Point,
    Record,
    Safety,
    SafetyTrace,
    Timing,
    TimingTrace,
    Trace,
    read_begun,
    read_job,
    read_trace,
    write_job,
)
from calora_export.package import Package
from calora_export.runtimes import Session

LIMIT_S = 3600


def run(address: str, package: Package, job: Job, progress: Progress = silent) -> Trace:
    """Run the job in a child process; its one-line errors come back as DeviceError."""
    return ask(_program(address, package), "host", package, job)


def ask(program: Sequence[str], label: str, package: Package, job: Job) -> Trace:
    """Run the job by a program of this machine that takes the package's and the job's directory."""
    with tempfile.TemporaryDirectory(prefix="calora-job-") as name:
        directory = Path(name)
        write_job(directory, job)
        command = [*program, str(package.path), name]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S)
        except subprocess.TimeoutExpired as error:
            raise InterruptedRun(f"{label}: no answer after {LIMIT_S} s", read_begun(directory, job)) from error
        if done.returncode:
            lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
            raise InterruptedRun(f"{label}: {lines[-1]}", read_begun(directory, job))
        return read_trace(directory, job)


def _program(address: str, package: Package) -> list[str]:
    if address != "native":
        targets.require_installed(package.manifest.target)
    if not address:
        return [sys.executable, "-m", __name__]
    target = package.manifest.target
    if target == "coreml":
        return [sys.executable, "-m", __name__, profiles.load(address).compute_units or "all"]
    if address != "native" or not native.has_runner(target):
        expected = "host, or host:native for a package of a target that has a native runner"
        raise DeviceError(mismatch("--device", f"host:{address}", expected, target))
    return [str(native.runner(target))]


def main(*arguments: str) -> int:
    """The child: job.json in, trace.json and logits.bin out. Compute units may come before the two directories."""
    *units, package, directory = arguments
    return serve(Path(package), Path(directory), partial(answer, units=units[0]) if units else answer)


def serve(package: Path, directory: Path, answer: Callable[[Package, Job, Record], Trace]) -> int:
    """Read the job, write what it gave, or one line on stderr; the exit code."""
    try:
        job = read_job(directory)
        if job.cores:
            machine.pin(job.cores)
        record = Record(directory)
        record.say(answer(packages.load(package), job, record).answer)
    except CaloraError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


def answer(package: Package, job: Job, record: Record | None = None, units: str = "") -> Trace:
    """Run a job in this process, on the target's runtime; units: a profile's compute_units, for Core ML."""
    runtime = runtimes.load(package.manifest.target)
    runtime.prepare(package)
    if not units:
        return work(package, job, runtime.open_session, record)
    from calora_export.runtimes import coreml

    return work(package, job, lambda package, _: coreml.predicting(package, units), record)


def work(
    package: Package, job: Job, open_session: Callable[[Package, int], Session], record: Record | None = None
) -> Trace:
    """Do all that a job asks of a session, and record it as it comes."""
    record = record or Record()
    start = time.perf_counter()
    processors = machine.cores()
    session = open_session(package, min(job.threads, len(processors)) if processors else job.threads)
    load = _milliseconds(start)
    made = Answer(
        device=platform.node() or "host",
        arch=platform.machine(),
        os=f"{platform.system()} {platform.release()}",
        runtime=package.manifest.target,
        vocab=package.manifest.model.vocab,
        gates=(),
        completions=(),
        safety=None,
        timing=None,
        peak_rss=machine.peak_rss(),
        emulated=machine.is_emulated(),
        threads=session.threads,
        cores=processors,
    )
    record.say(made)
    for case in job.cases:
        record.add(case.name, _forced(session, case))
    gates = tuple(tuple(float(g) for g in session.route(ids)) for ids in job.routes)
    record.say(made := replace(made, gates=gates))
    ends = set(package.manifest.model.eos)
    completions = tuple(_generate(session, completion, ends) for completion in job.completions)
    safety = _check_safety(session, job.safety) if job.safety else None
    record.say(made := replace(made, completions=completions, safety=safety))
    timing = _measure(session, job.timing, load, job.routes[:1], made.emulated) if job.timing else None
    made = replace(made, timing=timing, peak_rss=machine.peak_rss(), mapped=machine.mapped())
    return Trace(made, record.logits)


def _forced(session: Session, case: Case) -> np.ndarray:
    session.select(case.mix)
    rows = [session.extend(case.ids[: case.prefill])[-1]]
    rows += [session.extend([token])[-1] for token in case.ids[case.prefill :]]
    return np.stack(rows)


def _generate(session: Session, completion: Completion, ends: set[int]) -> tuple[int, ...]:
    if session.mix != {completion.adapter: 1.0}:
        session.select({completion.adapter: 1.0})
    session.forget()
    made: list[int] = []
    fed: tuple[int, ...] = completion.ids
    while len(made) < completion.limit and not (made and made[-1] in ends):
        made.append(int(session.extend(fed)[-1].argmax()))
        fed = (made[-1],)
    return tuple(made)


def _check_safety(session: Session, safety: Safety) -> SafetyTrace:
    half = len(safety.ids) // 2
    head, tail = safety.ids[:half], safety.ids[half:]

    def fresh(mix: runtimes.Mix) -> np.ndarray:
        session.select(mix)
        return session.extend(safety.ids)[-1]

    first, second, again = fresh(safety.first), fresh(safety.second), fresh(safety.first)
    session.select(safety.first)
    session.extend(head)
    session.select(safety.second)
    switched = session.extend(safety.ids)[-1]
    session.select(safety.first)
    session.extend(head)
    try:
        session.select(safety.second, keep_cache=True)
        stale = not np.array_equal(session.extend(tail)[-1], second)
    except PackageError:  # there is no way to read it
        stale = True
    try:
        session.admit(Path(safety.forged))
        refused = False
    except CaloraError:
        refused = True
    return SafetyTrace(
        aba=np.array_equal(first, again),
        fresh=np.array_equal(switched, second),
        stale=stale,
        refused=refused,
    )


def _measure(
    session: Session, timing: Timing, load: float, routes: tuple[tuple[int, ...], ...], emulated: bool
) -> TimingTrace:
    """Rounds are interleaved, so that a machine whose speed drifts slows every line alike."""
    before = machine.conditions()
    mixes: dict[str, dict[str, float]] = {"base": {}}
    if timing.adapter:
        mixes["adapter"] = {timing.adapter: 1.0}
    if timing.other:
        mixes["mix2"] = {timing.adapter: 0.5, timing.other: 0.5}
    prefill: list[float] = []
    decode: dict[str, list[float]] = {name: [] for name in mixes}
    for turn in range(timing.rounds + 1):  # the first round warms up
        for name, mix in mixes.items():
            session.select(mix)
            with _timed(prefill if turn and name == "base" else []):
                session.extend(timing.prompt)
            for _ in range(timing.decode):
                with _timed(decode[name] if turn else []):
                    session.extend(timing.prompt[:1])
    swap: list[float] = []
    first_token: list[float] = []
    pair = [mixes["adapter"], {timing.other: 1.0} if timing.other else {}] if timing.adapter else []
    for i in range(timing.swaps if pair else 0):
        with _timed(swap):
            session.select(pair[i % 2])
    for i in range(min(timing.swaps, 10) if pair else 0):
        with _timed(first_token):
            session.select(pair[i % 2])
            session.extend(timing.prompt)
    router: list[float] = []
    for ids in routes * (timing.swaps + 1):
        with _timed(router):
            session.route(ids)
    return TimingTrace(
        load=load,
        swap=tuple(swap),
        first_token=tuple(first_token),
        prefill=tuple(prefill),
        decode={name: tuple(samples) for name, samples in decode.items()},
        router=tuple(router[1:]),
        curve=() if emulated else tuple(_trace_curve(session, timing)),
        before=before,
        after=machine.conditions(),
    )


def _trace_curve(session: Session, timing: Timing) -> Iterator[Point]:
    """The base, at each length. Its kernels are warm."""
    for length in timing.lengths:
        ids = tuple(islice(cycle(timing.prompt), length))
        prefill: list[float] = []
        decode: list[float] = []
        for _ in range(timing.repeats):
            session.select({})
            with _timed(prefill):
                session.extend(ids)
            for _ in range(timing.decode):
                with _timed(decode):
                    session.extend(ids[:1])
        yield Point(length, tuple(prefill), tuple(decode))


@contextmanager
def _timed(samples: list[float]) -> Iterator[None]:
    start = time.perf_counter()
    yield
    samples.append(_milliseconds(start))


def _milliseconds(start: float) -> float:
    return (time.perf_counter() - start) * 1e3


if __name__ == "__main__":
    raise SystemExit(main(*sys.argv[1:]))
