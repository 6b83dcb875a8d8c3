"""Two reports of `validate` or `bench`, and what the second does worse."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import msgspec

from calora_export import report as reports
from calora_export.errors import PackageError, mismatch
from calora_export.report import Bench, Latency, ParityRow, Report, Speed, TaskRow

SQNR_DB, EFFECT, POINTS = 1.0, 0.02, 1.0  # what parity and tasks may lose
LEAST_MS = 0.05  # a smaller difference of times is the clock's
RATES = ("prefill_tok_s", "decode_tok_s")


class Row(msgspec.Struct, frozen=True, kw_only=True):
    """One number or verdict of both. change: (B - A) / A. judged: whether a difference counts; then worse: too much."""

    name: str
    a: float | str | None
    b: float | str | None
    change: float | None = None
    judged: bool = True
    worse: bool = False


class Comparison(msgspec.Struct, frozen=True, kw_only=True):
    """The document of `compare --json`. a, b: the files. notes: what was not compared, and why. regressions: the names
    of the rows that are worse."""

    a: str
    b: str
    tolerances: dict[str, float]
    notes: tuple[str, ...]
    regressions: tuple[str, ...]
    rows: tuple[Row, ...]
    speeds: tuple[Speed | None, Speed | None]


@dataclass(frozen=True)
class _Side:
    """One file: what both kinds of document say of a run, and the whole report where it is one."""

    path: str
    device: str
    arch: str
    emulated: bool
    latency: Latency
    speed: Speed | None
    report: Report | None


def compare(a: str | Path, b: str | Path, tolerance: float) -> Comparison:
    """tolerance: the share by which latency and memory may grow, and rates may fall.

    Raises:
        PackageError: a file is neither a report.json nor what `bench --json` says.
    """
    first, second = _read(Path(a)), _read(Path(b))
    reasons = _differences(first, second)
    rows, notes = [], [f"latency is not judged: {', '.join(reasons)}"] if reasons else []
    if first.report and second.report:
        rows += _verdicts(first.report, second.report)
        notes += _other_examples(first.report, second.report)
    rows += _latency(first, second, tolerance, judged=not reasons)
    if (first.report is None) != (second.report is None):
        notes.append("parity and tasks are in one of the two only")
    return Comparison(
        a=str(a),
        b=str(b),
        tolerances={"latency": tolerance, "sqnr_db": SQNR_DB, "effect_ratio": EFFECT, "task_points": POINTS},
        notes=tuple(notes),
        regressions=tuple(row.name for row in rows if row.worse),
        rows=tuple(rows),
        speeds=(first.speed, second.speed),
    )


def write_page(made: Comparison, path: Path) -> None:
    """Both reports on one page."""
    from calora_export import report_page, speed_page

    sides = {name: speed for name, speed in zip("AB", made.speeds, strict=True) if speed is not None}
    template = report_page.environment().get_template("comparison.html.j2")
    reports.write_text(path, template.render(made=made, speed_plots=speed_page.plots(sides)))


def _read(path: Path) -> _Side:
    try:
        data = path.read_bytes()
        keys = json.loads(data).keys()
    except OSError as error:
        raise PackageError(f"{path}: a report can not be read: {error.strerror}") from error
    except (ValueError, AttributeError) as error:
        expected = "a report.json, or what `bench --json` says"
        raise PackageError(mismatch(path, "content", expected, "something else")) from error
    if "reports" in keys:
        raise PackageError(mismatch(path, "content", "the report of one device", "those of several"))
    if "parity" in keys:
        made = reports.read(path)
        device = made.device
        return _Side(str(path), device.name, device.arch, device.emulated, made.latency, made.speed, made)
    try:
        found = msgspec.json.decode(data, type=Bench)
    except msgspec.DecodeError as error:
        raise PackageError(f"{path}: not a report: {error}") from error
    return _Side(str(path), found.device, found.arch, found.emulated, found.latency, found.speed, None)


def _differences(a: _Side, b: _Side) -> list[str]:
    """Why times of these two say nothing of each other."""
    reasons = [f"{side} is of an emulated device" for side, made in (("A", a), ("B", b)) if made.emulated]
    if (a.device, a.arch) != (b.device, b.arch):
        reasons.append(f"A ran on {a.device} ({a.arch}), B on {b.device} ({b.arch})")
    if a.latency.threads != b.latency.threads:
        reasons.append(f"A used {a.latency.threads} threads, B {b.latency.threads}")
    if a.speed and b.speed and a.speed.cores != b.speed.cores:
        reasons.append("they might run on other processors")
    return reasons


# ── parity and tasks ──────────────────────────────────────────────────────────────────────────────────────────────────


def _verdicts(a: Report, b: Report) -> Iterator[Row]:
    yield Row(name="verdict", a=_word(a), b=_word(b), worse=a.passed and not b.passed)
    for name in a.safety.__struct_fields__:
        was, now = getattr(a.safety, name), getattr(b.safety, name)
        yield Row(name=name, a=_yes(was), b=_yes(now), worse=bool(was) and not now)
    found = {(row.case, row.against): row for row in b.parity}
    for row in a.parity:
        yield from _case(row, found.get((row.case, row.against)))
    others = {row.adapter: row for row in b.tasks}
    for task in a.tasks:
        yield _task(task, others.get(task.adapter))
    if a.router is not None:
        yield _lower("router accuracy", a.router.accuracy, b.router.accuracy if b.router else None, POINTS / 100)


def _case(a: ParityRow, b: ParityRow | None) -> Iterator[Row]:
    name = f"{a.case} against {a.against}"
    yield Row(name=name, a=_yes(a.passed), b=_yes(b.passed if b else None), worse=a.passed and not (b and b.passed))
    if b is not None:
        yield _lower(f"{name}, SQNR dB", _sqnr(a), _sqnr(b), SQNR_DB)
    if b is not None and a.effect_ratio is not None:
        off = [math.inf if value is None else abs(1 - value) for value in (a.effect_ratio, b.effect_ratio)]
        change = None if b.effect_ratio is None else b.effect_ratio / a.effect_ratio - 1 if a.effect_ratio else None
        worse = off[1] > off[0] + EFFECT
        yield Row(name=f"{name}, effect", a=a.effect_ratio, b=b.effect_ratio, change=change, worse=worse)


def _task(a: TaskRow, b: TaskRow | None) -> Row:
    """Scores over other examples say nothing of each other."""
    row = _lower(f"task {a.adapter}", a.device, b.device if b else None, POINTS)
    return row if b is None or a.examples == b.examples else msgspec.structs.replace(row, judged=False, worse=False)


def _other_examples(a: Report, b: Report) -> list[str]:
    """Why tasks are not judged: a line for each two numbers of examples that differ."""
    found = {row.adapter: row.examples for row in b.tasks}
    pairs = dict.fromkeys((row.examples, found[row.adapter]) for row in a.tasks if row.adapter in found)
    words = [[str(side or "not known") for side in pair] for pair in pairs if pair[0] != pair[1]]
    return [f"tasks are not judged: examples scored in A {one}, in B {other}" for one, other in words]


def _lower(name: str, a: float | None, b: float | None, most: float) -> Row:
    """A number that is worse when it falls by more than `most`, or is gone."""
    finite = a is not None and b is not None and math.isfinite(a) and math.isfinite(b) and a != 0
    worse = a is not None and (b is None or b < a - most)
    shown = [None if value is None else value if math.isfinite(value) else "identical" for value in (a, b)]
    return Row(
        name=name, a=shown[0], b=shown[1], change=b / a - 1 if finite and a and b is not None else None, worse=worse
    )


def _sqnr(row: ParityRow) -> float | None:
    """Infinite where the outputs are identical, which JSON says as null."""
    return math.inf if row.sqnr_db is None and row.prefill_max_abs == row.decode_max_abs == 0 else row.sqnr_db


def _word(made: Report) -> str:
    return "passed" if made.passed else "failed" if made.complete else "incomplete"


def _yes(value: bool | None) -> str:
    return "–" if value is None else "yes" if value else "no"


# ── latency ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def _latency(a: _Side, b: _Side, tolerance: float, *, judged: bool) -> Iterator[Row]:
    for name in a.latency.__struct_fields__:
        if name in ("threads", "samples", "swap_ms"):
            continue
        was, now = getattr(a.latency, name), getattr(b.latency, name)
        yield _timed(name, was, now, tolerance, rate=name in RATES, ms=name.endswith("_ms"), judged=judged)
    for part in ("p50", "p90"):
        was, now = getattr(a.latency.swap_ms, part), getattr(b.latency.swap_ms, part)
        yield _timed(f"swap_ms {part}", was, now, tolerance, rate=False, ms=True, judged=judged)
    if a.speed is None or b.speed is None:
        return
    yield _timed("mapped_mb", a.speed.mapped_mb, b.speed.mapped_mb, tolerance, rate=False, ms=False, judged=False)
    found = {row.tokens: row for row in b.speed.lengths}
    for row in a.speed.lengths:
        other = found.get(row.tokens)
        for name in RATES:
            was, now = getattr(row, name), getattr(other, name) if other else None
            yield _timed(f"{name} at {row.tokens}", was, now, tolerance, rate=True, ms=False, judged=judged)


def _timed(name: str, a: float | None, b: float | None, tolerance: float, *, rate: bool, ms: bool, judged: bool) -> Row:
    if a is None or b is None or a <= 0:
        return Row(name=name, a=a, b=b, judged=judged, worse=judged and a is not None and b is None)
    slower = b < a / (1 + tolerance) if rate else b > a * (1 + tolerance)
    return Row(
        name=name,
        a=a,
        b=b,
        change=b / a - 1,
        judged=judged,
        worse=judged and slower and not (ms and abs(b - a) < LEAST_MS),
    )
