"""Plots of speed over length, of one report or of several in one box."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from calora_export.axes import Axis, Tick, round_up, tick
from calora_export.report import LengthRow, Speed

KINDS = ("first", "second")


@dataclass(frozen=True)
class Point:
    """x and y in percent of the box; label: its value in words."""

    x: float
    y: float
    label: str


@dataclass(frozen=True)
class Line:
    name: str
    kind: str
    dashed: bool
    points: tuple[Point, ...]

    @property
    def path(self) -> str:
        """In a box of 100 × 100 whose y grows downwards."""
        return "M" + "L".join(f"{point.x} {round(100 - point.y, 2)}" for point in self.points)


@dataclass(frozen=True)
class LinePlot:
    """marks: the lengths below the box."""

    title: str
    unit: str
    axis: Axis
    lines: tuple[Line, ...]
    marks: tuple[Tick, ...]


def plots(sides: Mapping[str, Speed]) -> tuple[LinePlot, ...]:
    """Prefill and decode over length: each side's median as a line, and of a single side the 90th percentile too."""
    lengths = sorted({row.tokens for speed in sides.values() for row in speed.lengths})
    if not lengths:
        return ()
    prefill = _plot(sides, lengths, "Prefill of so many tokens", "tok/s", lambda row: row.prefill_tok_s, None)
    decode = _plot(
        sides,
        lengths,
        "A decode step behind so many tokens",
        "ms",
        lambda row: row.decode_ms.p50,
        (lambda row: row.decode_ms.p90) if len(sides) == 1 else None,
    )
    return prefill, decode


Value = Callable[[LengthRow], float | None]


def _plot(
    sides: Mapping[str, Speed], lengths: list[int], title: str, unit: str, value: Value, more: Value | None
) -> LinePlot:
    drawn = [(name, kind, False, value) for name, kind in zip(sides, KINDS, strict=False)]
    drawn += [("p90", KINDS[1], True, more)] if more is not None else []
    speeds = {name: speed for name, speed in sides.items()} | {"p90": next(iter(sides.values()))}
    found = [number for name, _, _, of in drawn for row in speeds[name].lengths if (number := of(row)) is not None]
    step = round_up(max([*found, 1e-6]) / 4)
    axis = Axis(0.0, step * math.ceil(max([*found, 1e-6]) / step))
    spots = {length: round(14 + 82 * i / max(len(lengths) - 1, 1), 2) for i, length in enumerate(lengths)}
    lines = tuple(
        Line(
            name,
            kind,
            dashed,
            tuple(
                Point(spots[row.tokens], axis.at(number), f"{row.tokens} tokens {number:.3g} {unit}")
                for row in speeds[name].lengths
                if (number := of(row)) is not None
            ),
        )
        for name, kind, dashed, of in drawn
    )
    marks = tuple(tick(at, str(length)) for length, at in spots.items())
    return LinePlot(title, unit, axis, tuple(line for line in lines if line.points), marks)
