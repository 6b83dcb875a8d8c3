"""The results as Markdown."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from .measure import PROMPT, Spread
from .results import SYSTEMS, Goal, Results, goals


def markdown(results: Results) -> str:
    """The environment in a line, a table of systems, a table of goals."""
    environment = ", ".join(f"{key} {value}" for key, value in results.environment.items())
    others = statistics.mean(one.others for speed in results.speeds.values() for one in speed.rounds)
    company = f"Medians of rounds in which other processes used {others:.0%} of the processors."
    return "\n".join([environment, "", company, "", *_systems(results), "", *_goals(goals(results)), ""])


def _systems(results: Results) -> list[str]:
    costs = ("export s", "export peak MB", "load ms")
    speeds = ("prefill tok/s", "decode tok/s", "adapter tax", "swap ms", "peak MB")
    return _table(("system", *costs, *speeds), [(name, *_system(results, name)) for name in SYSTEMS])


def _system(results: Results, name: str) -> Sequence[str]:
    speed, runs, tax = results.speeds.get(name), results.exports.get(name), results.tax(name)
    if speed is None:
        return ("not installed", *[""] * 7)
    return (
        f"{statistics.median(run.seconds for run in runs):.1f}" if runs else "–",
        f"{statistics.median(run.peak_rss for run in runs) / 1e6:.0f}" if runs else "–",
        f"{speed.load_s * 1e3:.0f}",
        f"{len(PROMPT) / statistics.median(speed.prefill_s):.0f}",
        f"{1 / statistics.median(speed.step_s):.1f}",
        f"{tax.median:.2f}×" if tax else "–",
        f"{results.swap_ms[name]:.3f}" if name in results.swap_ms else "–",
        f"{speed.peak_rss / 1e6:.0f}",
    )


def _goals(rows: Sequence[Goal]) -> list[str]:
    header = ("goal", "bound", "median", "min – max of rounds", "verdict")
    cells = [(goal.text, _bound(goal), *_found(goal.found, goal.unit), goal.verdict) for goal in rows]
    return _table(header, cells)


def _bound(goal: Goal) -> str:
    return f"{'≥' if goal.at_least else '≤'} {goal.bound:g}{goal.unit}"


def _found(found: Spread | None, unit: str) -> tuple[str, str]:
    if found is None:
        return "–", "–"
    return f"{found.median:.3g}{unit}", f"{found.low:.3g} – {found.high:.3g}"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return ["| " + " | ".join(cells) + " |" for cells in (header, ["---"] * len(header), *rows)]
