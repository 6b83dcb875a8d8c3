"""What transformers' exporter would need for all layers, from a few."""

from __future__ import annotations

from .process import Run
from .upstream import extrapolate


def test_extrapolation_is_the_straight_line_through_two_runs() -> None:
    runs = {4: Run(50.0, 80.0, 1_400), 2: Run(30.0, 40.0, 1_200)}
    assert extrapolate(runs, 30) == Run(310.0, 600.0, 4_000)
    assert extrapolate(runs, 4) == runs[4]
