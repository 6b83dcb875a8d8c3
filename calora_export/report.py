"""What a validation found: the document of `validate --json`, and its way to disk and back.

The keys and their order are a public contract. Numbers are plain floats; NaN and the infinities become null.
A report that calls itself passed while one of its parts failed can not be constructed.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import msgspec

from calora_export.errors import PackageError
from calora_export.jobs import Conditions
from calora_export.package import Zeros

DeviceKind = Literal["host", "adb", "ssh", "browser", "apple", "reference"]


class DeviceInfo(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Where the package ran; `emulated` says that its times mean nothing."""

    name: str
    kind: DeviceKind
    arch: str
    os: str
    emulated: bool


class ParityRow(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One case against one reference, teacher-forced.

    `case` is `base`, `adapter:ID`, `mix:ID+ID`, `route:ID` or, of a router that reads every sentence of an answer,
    `sentence:N:ID`. The max abs values are in logits, `kl_max` in
    nats, `top1_agreement` is a share of positions in [0, 1]. `sqnr_db` is infinite (null) when the outputs
    are identical, `effect_ratio` is null where the reference runs the base.

    Raises:
        ValueError: `passed` although a measured number is missing, NaN or infinite.
    """

    case: str
    against: Literal["source", "target"]
    prefill_max_abs: float | None
    decode_max_abs: float | None
    kl_max: float | None
    top1_agreement: float | None
    sqnr_db: float | None
    effect_ratio: float | None
    passed: bool

    def __post_init__(self) -> None:
        # NaN compares false with every tolerance, so `error > limit` would let it through.
        measured = {
            "prefill_max_abs": self.prefill_max_abs,
            "decode_max_abs": self.decode_max_abs,
            "kl_max": self.kl_max,
            "top1_agreement": self.top1_agreement,
        }
        # A route may end at the base, which has no effect to compare.
        if self.case.startswith(("adapter:", "mix:")):
            measured["effect_ratio"] = self.effect_ratio
        for name, value in measured.items():
            if self.passed and not is_finite(value):
                raise ValueError(f"{self.case} against {self.against} can not have passed: {name} is {value}")


class Safety(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What must hold whatever the numbers are. None: an incomplete report did not come to it."""

    aba_bit_identical: bool | None
    kv_isolated: bool | None
    wrong_base_refused: bool | None


class RouterRow(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The router on `cases` texts: equal choices in all, largest error of a gate, share of right choices."""

    cases: int
    decisions_equal: bool
    gates_max_abs: float | None
    accuracy: float | None


class Sample(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Of very many some were looked at, evenly spaced; no other was."""

    checked: int
    of: int

    def __str__(self) -> str:
        return str(self.of) if self.checked == self.of else f"{self.checked} of {self.of}"


class TaskRow(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One adapter's task score with the reference model and on the device, over the same `examples`.

    `source` is torch's score with the bundle as trained, `target` that with what the recipe rounded, None where it
    rounded nothing: between the two is what the recipe costs. `reference` is the one that the device is judged by.
    """

    adapter: str
    metric: str
    reference: float | None
    device: float | None
    passed: bool
    source: float | None = None
    target: float | None = None
    examples: Sample | None = None


class Swap(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Percentiles of the time to change the adapter."""

    p50: float | None
    p90: float | None


class Latency(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Speed and memory: milliseconds, tokens per second, MB of 10^6 bytes.

    A tax is the time of a decode step with one adapter divided by the base's, or of a mix of two by one's. None is
    what was not measured: no second adapter, no router, no memory figure from a browser.
    """

    load_ms: float | None
    swap_ms: Swap
    first_token_after_swap_ms: float | None
    prefill_tok_s: float | None
    decode_tok_s: float | None
    adapter_tax: float | None
    mix2_tax: float | None
    router_ms: float | None
    peak_rss_mb: float | None
    threads: int
    samples: int


class Spread(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Percentiles of a time in ms. None: not measured, and p99 of fewer than 100 samples."""

    p50: float | None
    p90: float | None
    p99: float | None
    samples: int


class LengthRow(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Reading so many tokens at once, and decoding behind them: the base alone."""

    tokens: int
    prefill_ms: Spread
    prefill_tok_s: float | None
    decode_ms: Spread
    decode_tok_s: float | None


class Speed(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What is behind `latency`.

    decode_ms: `base`, `adapter`, `mix2`, where they were measured. lengths: one row per length, none from an emulated
    device. cores: the processors on which it might run. mapped_mb: files in its memory at the end, of 10^6 bytes.
    before, after: the device's temperatures and clocks around the measurement. None: the device does not say.
    """

    prefill_ms: Spread
    decode_ms: dict[str, Spread]
    swap_ms: Spread
    first_token_after_swap_ms: Spread
    router_ms: Spread
    lengths: tuple[LengthRow, ...]
    cores: tuple[int, ...] | None
    mapped_mb: float | None
    before: Conditions | None
    after: Conditions | None


class BudgetRow(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A budget of a device's profile: what `latency` holds by this name, or its p90, is at most `limit`, a rate at
    least. `passed` is None where nothing was measured, or on an emulated device."""

    name: str
    limit: float
    found: float | None
    passed: bool | None


class Report(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One validation of one package on one device.

    `activations` is the largest |value| in each layer, from a device that sees them: float16 ends at 65504.
    `problems` holds one line per failure. `tolerances` is what was judged against, by name: a metric
    (`kl_max`) or one reference's metric (`target.kl_max`); `effect_ratio_min` and `effect_ratio_max`
    bound the effect. `runtime` is what ran it, in words. `sample`: how many adapters were compared, if not all.
    `added`: adapters of the package that the bundle does not have, so that there was nothing to compare them with.
    `complete` is false when the device went away before the end; what was measured until then is here, and nothing
    passed. `profile` is the device profile whose `budget` was judged. `represented` says
    of how many weights the package has another form than the bundle, by both forms; `zeros` what those of pruned
    weights take in it.

    Raises:
        ValueError: the verdict contradicts a part or `problems`, or nothing was compared.
    """

    package: str
    target: str
    passed: bool
    device: DeviceInfo
    parity: tuple[ParityRow, ...]
    safety: Safety
    router: RouterRow | None
    tasks: tuple[TaskRow, ...]
    latency: Latency
    problems: tuple[str, ...] = ()
    versions: dict[str, str] = {}
    recipe: str = ""
    tolerances: dict[str, float] = {}
    activations: Mapping[str, float | None] = {}
    runtime: str = ""
    sample: Sample | None = None
    added: tuple[str, ...] = ()
    complete: bool = True
    profile: str = ""
    budget: tuple[BudgetRow, ...] = ()
    speed: Speed | None = None
    represented: dict[str, int] = {}
    zeros: Zeros | None = None

    def __post_init__(self) -> None:
        failed = failed_parts(self)
        if self.passed and not self.complete:
            raise ValueError("the report can not have passed: it is not complete")
        if self.passed and not self.parity:
            raise ValueError("the report can not have passed: nothing was compared")
        if self.passed and (failed or self.problems):
            raise ValueError(f"the report can not have passed: {', '.join((*failed, *self.problems))}")
        if not self.passed and not self.problems:
            raise ValueError("the report failed and names no problem")

    def to_json(self) -> str:
        """The document of `validate --json`: keys in the schema's order, indented, no newline at the end."""
        return msgspec.json.format(msgspec.json.encode(self, order="deterministic"), indent=2).decode()


class Bench(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The document of `bench --json`: one package's latency on one device."""

    package: str
    device: str
    arch: str
    emulated: bool
    runtime: str
    latency: Latency
    speed: Speed | None = None
    profile: str = ""
    budget: tuple[BudgetRow, ...] = ()


@dataclass(frozen=True)
class Series:
    """What the plots of report.html show beyond report.json.

    error: (case, against) -> max abs error at every position, the prompt's `prefill` positions first.
    decode_ms: what was decoding (`base`, `adapter` …) -> milliseconds of every step; drawn on one axis.
    swap_ms: milliseconds of every swap.
    """

    error: Mapping[tuple[str, str], Sequence[float]] = field(default_factory=dict)
    prefill: int = 0
    decode_ms: Mapping[str, Sequence[float]] = field(default_factory=dict)
    swap_ms: Sequence[float] = ()


def is_finite(value: float | None) -> bool:
    """False for None, NaN and the infinities, which JSON does not tell apart."""
    return value is not None and math.isfinite(value)


def failed_parts(report: Report) -> tuple[str, ...]:
    """The names of the rows and checks of a report that did not pass."""
    parity = [f"{row.case} against {row.against}" for row in report.parity if not row.passed]
    safety = [name for name in report.safety.__struct_fields__ if not getattr(report.safety, name)]
    router = ["decisions_equal"] if report.router is not None and not report.router.decisions_equal else []
    tasks = [f"task of {row.adapter}" for row in report.tasks if not row.passed]
    budget = [f"budget of {row.name}" for row in report.budget if row.passed is False]
    return (*parity, *safety, *router, *tasks, *budget)


def read(path: str | Path) -> Report:
    """Read a report.json.

    Raises:
        PackageError: there is no such file, it is not JSON, or a key is unknown, missing or wrong.
    """
    try:
        return msgspec.json.decode(Path(path).read_bytes(), type=Report)
    except OSError as error:
        raise PackageError(f"{path}: a report can not be read: {error.strerror}") from error
    except msgspec.DecodeError as error:
        raise PackageError(f"{path}: not a report: {error}") from error


def write(report: Report, directory: str | Path, series: Series | None = None) -> None:
    """Write report.json and report.html; each appears whole or not at all.

    Raises:
        PackageError: the directory can not be written.
        msgspec.ValidationError: a field holds another type than it declares, so nobody could read it back.
    """
    # Most commands write no report and must not pay for importing jinja2.
    from calora_export.report_page import render

    page = render(report, series or Series())
    directory = Path(directory)
    write_text(directory / "report.html", page)
    write_text(directory / "report.json", report.to_json() + "\n")


def write_text(path: Path, text: str) -> None:
    """A file that appears whole or not at all, with its directory; PackageError when it can not be written."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _replace(temporary, path, text)
    except OSError as error:
        raise PackageError(f"{path.parent}: the report can not be written: {error.strerror}") from error


def _replace(temporary: Path, path: Path, text: str) -> None:
    try:
        with temporary.open("w", encoding="utf-8", newline="\n") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
