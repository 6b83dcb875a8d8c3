"""Axes of the plots in a page: where a value is, and which round values are marked."""

from __future__ import annotations

import math
from dataclasses import dataclass

SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


@dataclass(frozen=True)
class Tick:
    """A mark on an axis: position in percent, text, and the text's SVG anchor."""

    at: float
    label: str
    anchor: str


@dataclass(frozen=True)
class Axis:
    """A linear axis, or a logarithmic one, whose `low` and `high` are then powers of ten."""

    low: float
    high: float
    log: bool = False

    def at(self, value: float) -> float:
        """Position of a value in percent, clamped to the axis: a logarithmic zero is at the low end."""
        if self.log:
            share = math.log10(max(value, self.low) / self.low) / math.log10(self.high / self.low)
        else:
            share = (value - self.low) / (self.high - self.low)
        return round(100 * min(max(share, 0.0), 1.0), 2)

    @property
    def ticks(self) -> tuple[Tick, ...]:
        """At most five marks, at round values."""
        if self.log:
            first, last = round(math.log10(self.low)), round(math.log10(self.high))
            powers = range(first, last + 1, math.ceil((last - first) / 4))
            return tuple(tick(self.at(10.0**power), power_of_ten(power)) for power in powers)
        step = round_up((self.high - self.low) / 4)
        values = [self.low + i * step for i in range(math.floor((self.high - self.low) / step + 1e-9) + 1)]
        return tuple(tick(self.at(value), f"{value:,.6g}") for value in values)


def power_of_ten(power: int) -> str:
    """`10⁻³`, and `1` for the zeroth."""
    return f"10{str(power).translate(SUPERSCRIPT)}" if power else "1"


def tick(at: float, label: str) -> Tick:
    """A mark whose text stays inside the plot."""
    return Tick(at, label, "start" if at < 8 else "end" if at > 92 else "middle")


def round_up(step: float) -> float:
    """The next of 1, 2, 5 times a power of ten."""
    power = 10.0 ** math.floor(math.log10(step))
    return next(round_step * power for round_step in (1, 2, 5, 10) if round_step * power >= step * (1 - 1e-9))
