"""report.html: a report as one file that a person reads, on a phone or at a desk.

Plots are inline SVG whose horizontal positions are percentages: they take the width there is and keep the
size of their text. Their colours come from the page's style sheet, which follows the reader's light or dark
theme. Nothing is loaded and nothing runs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import jinja2
import msgspec

from calora_export import speed_page
from calora_export.axes import Axis, power_of_ten, round_up
from calora_export.report import ParityRow, Report, Series, Speed, Spread, is_finite

MAX_POINTS = 240  # a curve is at most some 700 px wide: more points cost bytes and show nothing
BINS = 40
MINUS = "\N{MINUS SIGN}"


@dataclass(frozen=True)
class Curve:
    """Error over position against one reference: an SVG path in a 100 × 100 box, and x where it broke."""

    against: str
    path: str
    broken: tuple[float, ...]


@dataclass(frozen=True)
class CurvePlot:
    """The curves of one case; `decode_at` is where the prompt ends (percent)."""

    case: str
    curves: tuple[Curve, ...]
    positions: int
    decode_at: float


@dataclass(frozen=True)
class Histogram:
    """Samples of a time in ms: bin heights in percent, percentiles, and how many lie beyond the axis."""

    name: str
    bars: tuple[float, ...]
    p50: float
    p90: float
    samples: int
    beyond: int


def render(report: Report, series: Series) -> str:
    """The whole page, the same whether the report comes from memory or from report.json. Its text is escaped.

    Raises:
        msgspec.ValidationError: a field of the report holds another type than it declares.
    """
    report = msgspec.json.decode(report.to_json(), type=Report)  # NaN and the infinities become None
    error, decode, swap = (
        error_axis(report, series),
        time_axis(series.decode_ms),
        time_axis({"": series.swap_ms}),
    )
    return (
        environment()
        .get_template("report.html.j2")
        .render(
            report=report,
            cases=rows_by_case(report),
            limits=lambda rows, metrics: limits(report, rows, metrics),
            error_axis=error,
            effect_axis=effect_axis(report),
            curve_plots=curve_plots(series, error),
            score_axis=score_axis(report),
            decode_axis=decode,
            decode_histograms=[histogram(name, times, decode) for name, times in series.decode_ms.items() if times],
            swap_axis=swap,
            swap_histograms=[histogram("swap", series.swap_ms, swap)] if series.swap_ms else [],
            speed_plots=speed_page.plots({"p50": report.speed}) if report.speed else (),
            spreads=spreads,
            conditions=conditions,
        )
    )


def spreads(speed: Speed) -> dict[str, Spread]:
    """Every time that was measured, by what it is."""
    decode = {f"decode, {name}": spread for name, spread in speed.decode_ms.items()}
    others = {"swap": speed.swap_ms, "first token after a swap": speed.first_token_after_swap_ms}
    return {"prefill": speed.prefill_ms} | decode | others | {"router": speed.router_ms}


def conditions(speed: Speed | None) -> list[tuple[str, float, float, str]]:
    """(what, before, after, unit) of every temperature and clock that the device told."""
    if speed is None or speed.before is None or speed.after is None:
        return []
    pairs = (
        (speed.before.temperature_c, speed.after.temperature_c, "°C"),
        (speed.before.clock_mhz, speed.after.clock_mhz, "MHz"),
    )
    return [
        (name, was[name], now[name], unit) for was, now, unit in pairs if was and now for name in was if name in now
    ]


def number(value: float | None) -> str:
    """Three significant digits; `not finite` for None."""
    if value is None:
        return "not finite"
    if value == 0:
        return "0"
    mantissa, power = f"{abs(value):.2e}".split("e")
    sign = MINUS if value < 0 else ""
    if not -3 <= int(power) < 6:
        return f"{sign}{mantissa}×{power_of_ten(int(power))}"
    return f"{sign}{float(f'{abs(value):.3g}'):,.{max(2 - int(power), 0)}f}"


def share(value: float | None) -> str:
    """A share of 1 in percent. Only the whole is written as 100 %."""
    if value is None:
        return "not finite"
    if 0.9995 <= value < 1:
        return "> 99.9 %"
    return "100 %" if value == 1 else f"{number(100 * value)} %"


def milliseconds(value: float | None) -> str:
    """A time: µs below 0.1 ms, s from 10 s; a dash for what was not measured."""
    if value is None:
        return "–"
    if value >= 10_000:
        return f"{number(value / 1000)} s"
    return f"{number(value)} ms" if value >= 0.1 or value == 0 else f"{number(value * 1000)} µs"


def factor(value: float | None) -> str:
    """A ratio of two times or two effects; a dash for what was not measured."""
    return "–" if value is None else f"{number(value)}×"


def decibel(row: ParityRow) -> str:
    """SQNR. Null is infinite when the outputs were identical, and a broken number otherwise."""
    if row.sqnr_db is not None:
        return f"{number(row.sqnr_db)} dB"
    return "∞" if row.prefill_max_abs == 0 and row.decode_max_abs == 0 else "not finite"


def package_name(path: str) -> str:
    """The last component of a package's path."""
    return path.rstrip("/").rsplit("/", 1)[-1] or path


def rows_by_case(report: Report) -> dict[str, list[ParityRow]]:
    """The rows of every case, in the report's order."""
    cases: dict[str, list[ParityRow]] = {}
    for row in report.parity:
        cases.setdefault(row.case, []).append(row)
    return cases


def limits(report: Report, rows: Sequence[ParityRow], metrics: Sequence[str]) -> list[tuple[str, float]]:
    """(against, tolerance) of every tolerance of these metrics; `against` is empty if it holds for all."""
    given = report.tolerances
    found = [(row.against, given.get(f"{row.against}.{metric}")) for row in rows for metric in metrics]
    found += [("", given.get(metric)) for metric in metrics]
    return [(against, value) for against, value in dict.fromkeys(found) if value is not None]


def error_axis(report: Report, series: Series) -> Axis:
    """Whole decades around every error and tolerance that is drawn, at least two."""
    shown = [value for row in report.parity for value in (row.prefill_max_abs, row.decode_max_abs)]
    shown += [value for errors in series.error.values() for value in errors]
    shown += [value for name, value in report.tolerances.items() if name.endswith("_max_abs")]
    powers = [math.log10(value) for value in shown if value is not None and math.isfinite(value) and value > 0]
    first, last = math.floor(min(powers, default=-6)), math.ceil(max(powers, default=-6))
    return Axis(10.0**first, 10.0 ** max(last, first + 2), log=True)


def effect_axis(report: Report) -> Axis:
    """From zero, with the full effect (1) well inside."""
    return Axis(0.0, max([1.5, *(row.effect_ratio for row in report.parity if row.effect_ratio is not None)]))


def score_axis(report: Report) -> Axis:
    """From zero to one, or to the best score of a metric that exceeds it."""
    scores = [score for task in report.tasks for score in (task.source, task.reference, task.target, task.device)]
    return Axis(0.0, max([1.0, *(score for score in scores if score is not None)]))


def time_axis(samples: Mapping[str, Sequence[float]]) -> Axis:
    """From the fastest sample to the slowest, but no further than 1.5 times a 90th percentile."""
    measured = [times for times in samples.values() if times]
    low = min((min(times) for times in measured), default=0.0)
    high = max((min(max(times), 1.5 * percentile(times, 90)) for times in measured), default=1.0)
    step = round_up(max(high - low, 0.05 * high, 1e-6) / 4)
    return Axis(math.floor(low / step) * step, (math.floor(high / step) + 1) * step)


def percentile(samples: Sequence[float], q: int) -> float:
    """The nearest-rank percentile."""
    return sorted(samples)[max(math.ceil(len(samples) * q / 100) - 1, 0)]


def histogram(name: str, samples: Sequence[float], axis: Axis) -> Histogram:
    """Counts of samples over `BINS` equal parts of the axis, the fullest at 100 %."""
    inside = [value for value in samples if value <= axis.high]
    counts = [0] * BINS
    for value in inside:
        counts[min(int(axis.at(value) / 100 * BINS), BINS - 1)] += 1
    return Histogram(
        name=name,
        bars=tuple(round(100 * count / max(1, *counts), 1) for count in counts),
        p50=percentile(samples, 50),
        p90=percentile(samples, 90),
        samples=len(samples),
        beyond=len(samples) - len(inside),
    )


def curve_plots(series: Series, axis: Axis) -> tuple[CurvePlot, ...]:
    """One plot per case, its references in one box."""
    cases = dict.fromkeys(case for case, _ in series.error)
    plots = []
    for case in cases:
        errors = {against: values for (name, against), values in series.error.items() if name == case and values}
        positions = max((len(values) for values in errors.values()), default=0)
        curves = tuple(curve(against, values, axis) for against, values in errors.items())
        plots.append(CurvePlot(case, curves, positions, round(100 * min(series.prefill / max(positions, 1), 1.0), 2)))
    return tuple(plots)


def curve(against: str, errors: Sequence[float], axis: Axis) -> Curve:
    """The largest error of each of at most `MAX_POINTS` runs of positions, broken where one is not finite."""
    width = math.ceil(len(errors) / MAX_POINTS)
    path, broken, pen = "", [], "M"
    for start in range(0, len(errors), width):
        run = errors[start : start + width]
        x = round(100 * (start + len(run) / 2) / len(errors), 2)
        if all(is_finite(value) for value in run):
            path += f"{pen}{x} {round(100 - axis.at(max(run)), 2)}" + ("h0" if pen == "M" else "")
            pen = "L"
        else:
            broken.append(x)
            pen = "M"
    return Curve(against, path, tuple(broken))


def environment() -> jinja2.Environment:
    """The templates of this package, with the filters of its pages."""
    made = jinja2.Environment(
        loader=jinja2.PackageLoader("calora_export"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    filters = {
        "number": number,
        "share": share,
        "milliseconds": milliseconds,
        "factor": factor,
        "decibel": decibel,
    }
    made.filters.update(filters, name=package_name)
    return made
