"""Two reports: each kind of loss is found, and what says nothing of the other is not judged."""

from __future__ import annotations

import json
from pathlib import Path

import msgspec
import pytest
from typer.testing import CliRunner

from calora_export import cli, comparison
from calora_export.errors import PackageError
from calora_export.report import Bench, Report, RouterRow, Safety, Sample, Swap
from tests.test_report import FAILED, MIX, PASSED, SPEED

replace = msgspec.structs.replace
DEVICE, LATENCY = PASSED.device, PASSED.latency
BENCH = Bench(package="p", device="board", arch="aarch64", emulated=False, runtime="onnx", latency=LATENCY, speed=SPEED)


def written(directory: Path, name: str, document: Report | Bench | str) -> Path:
    text = document if isinstance(document, str) else msgspec.json.encode(document).decode()
    (directory / name).write_text(text)
    return directory / name


def compared(directory: Path, b: Report | Bench, a: Report | Bench = PASSED, tolerance: float = 0.1):
    return comparison.compare(written(directory, "a.json", a), written(directory, "b.json", b), tolerance)


def test_a_report_is_not_worse_than_itself(tmp_path: Path) -> None:
    made = compared(tmp_path, PASSED)
    assert (made.regressions, made.notes) == ((), ())
    assert all(row.change in (0, None) and row.judged is (row.name != "mapped_mb") for row in made.rows)
    assert made.tolerances["latency"] == 0.1


WORSE = {
    "decode_tok_s": replace(PASSED, latency=replace(LATENCY, decode_tok_s=100.0)),
    "load_ms": replace(PASSED, latency=replace(LATENCY, load_ms=500.0)),
    "router_ms": replace(PASSED, latency=replace(LATENCY, router_ms=None)),
    "swap_ms p90": replace(PASSED, latency=replace(LATENCY, swap_ms=Swap(p50=0.62, p90=1.6))),
    "decode_tok_s at 64": replace(
        PASSED, speed=replace(SPEED, lengths=(SPEED.lengths[0], replace(SPEED.lengths[1], decode_tok_s=100.0)))
    ),
    "mix:reverse+sort against target": replace(PASSED, parity=PASSED.parity[:2]),
    "mix:reverse+sort against target, SQNR dB": replace(
        PASSED, parity=(*PASSED.parity[:2], replace(MIX, sqnr_db=97.0))
    ),
    "mix:reverse+sort against target, effect": replace(
        PASSED, parity=(*PASSED.parity[:2], replace(MIX, effect_ratio=0.95))
    ),
    "base against source, SQNR dB": replace(
        PASSED, parity=(replace(PASSED.parity[0], sqnr_db=90.0, prefill_max_abs=1e-6), *PASSED.parity[1:])
    ),
    "task reverse": replace(PASSED, tasks=()),
    "router accuracy": replace(
        PASSED, router=RouterRow(cases=40, decisions_equal=True, gates_max_abs=1e-7, accuracy=0.95)
    ),
}


@pytest.mark.parametrize("name", WORSE)
def test_each_loss_is_found(tmp_path: Path, name: str) -> None:
    made = compared(tmp_path, WORSE[name])
    assert name in made.regressions
    others = {"decode_tok_s at 256", "prefill_tok_s at 256"} if name == "decode_tok_s at 64" else set()
    assert set(made.regressions) == {name} | others
    assert name not in compared(tmp_path, PASSED, WORSE[name]).regressions, "the other way round it is a gain"


def test_a_failed_check_is_a_loss(tmp_path: Path) -> None:
    made = compared(tmp_path, FAILED)
    assert {"verdict", "kv_isolated", "adapter:reverse against source"} <= set(made.regressions)
    unmeasured = Safety(aba_bit_identical=None, kv_isolated=True, wrong_base_refused=True)
    begun = replace(PASSED, passed=False, complete=False, safety=unmeasured, problems=("gone",))
    made = compared(tmp_path, begun)
    assert made.regressions == ("verdict", "aba_bit_identical")
    assert made.rows[0].b == "incomplete"


def test_what_is_within_the_tolerance_is_none(tmp_path: Path) -> None:
    slower = replace(PASSED, latency=replace(LATENCY, decode_tok_s=119.04 / 1.15, load_ms=412.3 * 1.15))
    assert compared(tmp_path, slower).regressions == ("load_ms", "decode_tok_s")
    assert compared(tmp_path, slower, tolerance=0.2).regressions == ()
    tiny = replace(PASSED, latency=replace(LATENCY, router_ms=0.093 + comparison.LEAST_MS / 2))
    assert compared(tmp_path, tiny).regressions == (), "less than a clock can tell"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"device": replace(DEVICE, emulated=True)}, "B is of an emulated device"),
        ({"device": replace(DEVICE, name="other")}, "A ran on board (aarch64), B on other (aarch64)"),
        ({"latency": replace(LATENCY, threads=1)}, "A used 4 threads, B 1"),
        ({"speed": replace(SPEED, cores=(0,))}, "they might run on other processors"),
    ],
)
def test_times_that_say_nothing_of_each_other_are_not_judged(tmp_path: Path, change: dict, reason: str) -> None:
    slow = replace(change.get("latency", LATENCY), decode_tok_s=1.0)
    made = compared(tmp_path, replace(PASSED, **change | {"latency": slow}))
    assert made.regressions == () and made.notes == (f"latency is not judged: {reason}",)
    (row,) = (row for row in made.rows if row.name == "decode_tok_s")
    assert row.judged is False and row.change is not None


def test_scores_over_other_examples_are_not_judged(tmp_path: Path) -> None:
    (task,) = PASSED.tasks
    few = replace(PASSED, tasks=(replace(task, device=0.0, examples=Sample(checked=4, of=200)),))
    made = compared(tmp_path, few)
    assert made.regressions == ()
    assert made.notes == ("tasks are not judged: examples scored in A 200, in B 4 of 200",)
    (row,) = (row for row in made.rows if row.name == "task reverse")
    assert (row.b, row.judged, row.worse) == (0.0, False, False)
    assert compared(tmp_path, few, replace(few, tasks=(replace(few.tasks[0], device=1.5),))).regressions == (row.name,)


def test_bench_with_bench_and_with_a_report(tmp_path: Path) -> None:
    slow = replace(BENCH, latency=replace(LATENCY, prefill_tok_s=1.0))
    assert compared(tmp_path, slow, BENCH).regressions == ("prefill_tok_s",)
    made = compared(tmp_path, slow)
    assert made.regressions == ("prefill_tok_s",) and "one of the two only" in made.notes[0]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "content: expected a report.json, or what `bench --json` says, found something else"),
        ("[]", "content: expected a report.json"),
        ("{}", "not a report: Object missing required field"),
        ('{"reports": {}}', "expected the report of one device, found those of several"),
        ('{"parity": []}', "not a report: Object missing required field"),
    ],
)
def test_what_is_no_report_is_one_line(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(PackageError) as caught:
        comparison.compare(written(tmp_path, "a.json", PASSED), written(tmp_path, "b.json", text), 0.1)
    line = str(caught.value)
    assert line.startswith(f"{tmp_path / 'b.json'}: ") and said in line and "\n" not in line


def test_the_command(tmp_path: Path) -> None:
    a, b = written(tmp_path, "a.json", PASSED), written(tmp_path, "b.json", WORSE["load_ms"])
    same = CliRunner().invoke(cli.app, ["compare", str(a), str(a)])
    assert same.exit_code == 0 and "NOT WORSE" in same.output
    page = tmp_path / "pages" / "both.html"
    worse = CliRunner().invoke(cli.app, ["compare", str(a), str(b), "--html", str(page), "--json"])
    document = json.loads(worse.stdout)
    assert worse.exit_code == 3 and document["regressions"] == ["load_ms"]
    text = page.read_text("utf-8")
    assert "✗ WORSE" in text and "<li>load_ms</li>" in text and 'class="curve second"' in text
    gone = CliRunner().invoke(cli.app, ["compare", str(a), str(tmp_path / "none.json")])
    assert gone.exit_code == 1 and gone.output == f"error: {tmp_path}/none.json: a report can not be read: " + (
        "No such file or directory\n"
    )
    loose = CliRunner().invoke(cli.app, ["compare", str(a), str(b), "--tolerance", "0.3"])
    assert loose.exit_code == 0 and "latency 0.3" in loose.output


def test_reports_of_before_there_was_a_speed(tmp_path: Path) -> None:
    made = compared(tmp_path, replace(PASSED, speed=None))
    assert "decode_tok_s at 16" not in {row.name for row in made.rows} and made.regressions == ()
