from __future__ import annotations

import errno
import html
import json
import math
import os
import re
import shutil
import subprocess
import zlib
from html.parser import HTMLParser
from pathlib import Path

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from calora_export.errors import PackageError
from calora_export.jobs import Conditions
from calora_export.latency import UNMEASURED
from calora_export.package import Zeros
from calora_export.report import (
    BudgetRow,
    DeviceInfo,
    Latency,
    LengthRow,
    ParityRow,
    Report,
    RouterRow,
    Safety,
    Sample,
    Series,
    Speed,
    Spread,
    Swap,
    TaskRow,
    read,
    write,
)
from calora_export.report_page import (
    Axis,
    curve,
    histogram,
    limits,
    milliseconds,
    number,
    percentile,
    render,
    share,
    time_axis,
)

# The keys of `validate --json`, typed off the design, in its order; from problems on they are the report's own.
SCHEMA = {
    "package": None,
    "target": None,
    "passed": None,
    "device": ["name", "kind", "arch", "os", "emulated"],
    "parity": [
        "case",
        "against",
        "prefill_max_abs",
        "decode_max_abs",
        "kl_max",
        "top1_agreement",
        "sqnr_db",
        "effect_ratio",
        "passed",
    ],
    "safety": ["aba_bit_identical", "kv_isolated", "wrong_base_refused"],
    "router": ["cases", "decisions_equal", "gates_max_abs", "accuracy"],
    "tasks": ["adapter", "metric", "reference", "device", "passed", "source", "target", "examples"],
    "latency": [
        "load_ms",
        "swap_ms",
        "first_token_after_swap_ms",
        "prefill_tok_s",
        "decode_tok_s",
        "adapter_tax",
        "mix2_tax",
        "router_ms",
        "peak_rss_mb",
        "threads",
        "samples",
    ],
    "problems": None,
    "versions": None,
    "recipe": None,
    "tolerances": None,
    "activations": None,
    "runtime": None,
    "sample": None,
    "added": None,
    "complete": None,
    "profile": None,
    "budget": ["name", "limit", "found", "passed"],
    "speed": [
        *("prefill_ms", "decode_ms", "swap_ms", "first_token_after_swap_ms", "router_ms"),
        *("lengths", "cores", "mapped_mb", "before", "after"),
    ],
    "represented": None,
    "zeros": ["weights", "numbers", "zeros", "stored", "bytes"],
}

BASE = ParityRow(
    case="base",
    against="source",
    prefill_max_abs=0.0,
    decode_max_abs=0.0,
    kl_max=0.0,
    top1_agreement=1.0,
    sqnr_db=math.inf,
    effect_ratio=None,
    passed=True,
)
ADAPTER = ParityRow(
    case="adapter:reverse",
    against="source",
    prefill_max_abs=1.234e-5,
    decode_max_abs=2e-4,
    kl_max=3e-9,
    top1_agreement=0.9996,
    sqnr_db=98.76,
    effect_ratio=1.002,
    passed=True,
)
MIX = msgspec.structs.replace(ADAPTER, case="mix:reverse+sort", against="target")
TIME = Spread(p50=7.0, p90=8.5, p99=None, samples=40)
SPEED = Speed(
    prefill_ms=TIME,
    decode_ms={"base": TIME, "adapter": msgspec.structs.replace(TIME, p50=8.0, p99=9.75, samples=120)},
    swap_ms=TIME,
    first_token_after_swap_ms=TIME,
    router_ms=Spread(p50=None, p90=None, p99=None, samples=0),
    lengths=tuple(
        LengthRow(tokens=tokens, prefill_ms=TIME, prefill_tok_s=rate, decode_ms=TIME, decode_tok_s=1000 / 7)
        for tokens, rate in ((16, 300.0), (64, 700.0), (256, 847.0))
    ),
    cores=(4, 5, 6, 7),
    mapped_mb=80.5,
    before=Conditions({"0 cpu-big": 41.25}, None),
    after=Conditions({"0 cpu-big": 55.5}, None),
)
PASSED = Report(
    package="/data/out/demo-int4",
    target="onnx",
    passed=True,
    device=DeviceInfo(name="board", kind="ssh", arch="aarch64", os="Linux 6.1", emulated=False),
    parity=(BASE, ADAPTER, MIX),
    safety=Safety(aba_bit_identical=True, kv_isolated=True, wrong_base_refused=True),
    router=RouterRow(cases=40, decisions_equal=True, gates_max_abs=1e-7, accuracy=0.975),
    tasks=(
        TaskRow(
            adapter="reverse",
            metric="exact_match",
            reference=0.93,
            device=0.925,
            passed=True,
            examples=Sample(checked=200, of=200),
        ),
    ),
    latency=Latency(
        load_ms=412.3,
        swap_ms=Swap(p50=0.62, p90=1.31),
        first_token_after_swap_ms=48.2,
        prefill_tok_s=847.3,
        decode_tok_s=119.04,
        adapter_tax=1.193,
        mix2_tax=None,
        router_ms=0.093,
        peak_rss_mb=None,
        threads=4,
        samples=200,
    ),
    versions={"torch": "2.13.0", "calora-export": "0.1.0"},
    recipe="onnx-int4",
    tolerances={"decode_max_abs": 0.01, "effect_ratio_min": 0.9},
    profile="pixel-8",
    budget=(BudgetRow(name="swap_ms", limit=50.0, found=1.31, passed=True),),
    speed=SPEED,
    zeros=Zeros(weights=2, numbers=4096, zeros=2100, stored="dense", bytes=1050),
)
NO_EFFECT = msgspec.structs.replace(MIX, effect_ratio=0.0, passed=False)
BROKEN = msgspec.structs.replace(ADAPTER, decode_max_abs=math.nan, kl_max=math.inf, sqnr_db=math.nan, passed=False)
FAILED = msgspec.structs.replace(
    PASSED,
    passed=False,
    parity=(BASE, BROKEN, NO_EFFECT),
    safety=Safety(aba_bit_identical=True, kv_isolated=False, wrong_base_refused=True),
    problems=(
        "mix:reverse+sort: effect_ratio: expected at least 0.9, found 0",
        "kv_isolated: a <cache> was read & reused",
    ),
)
SERIES = Series(
    error={
        ("base", "source"): [0.0] * 40,
        ("adapter:reverse", "source"): [1e-5] * 20 + [math.nan] + [2e-4] * 19,
    },
    prefill=8,
    decode_ms={"base": [7.0, 7.1, 7.2, 7.3], "adapter": [8.0, 8.1, 8.2, 80.0]},
    swap_ms=[0.6, 0.7, 1.3],
)


class Page(HTMLParser):
    """Tags with attributes, and the text outside of the style sheet."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self._style = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._style = tag == "style"

    def handle_endtag(self, tag: str) -> None:
        self._style = False

    def handle_data(self, data: str) -> None:
        self.text += "" if self._style else data


def strict_json(text: str) -> dict:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    return json.loads(text, parse_constant=refuse)


# The document


def test_keys_are_those_of_the_schema_in_its_order():
    document = strict_json(PASSED.to_json())
    assert list(document) == list(SCHEMA)
    for key, inner in SCHEMA.items():
        if inner is not None:
            rows = document[key] if isinstance(document[key], list) else [document[key]]
            assert rows and all(list(row) == inner for row in rows), key
    assert list(document["latency"]["swap_ms"]) == ["p50", "p90"]


def test_values_are_written_unrounded_and_null_where_nothing_was_measured():
    document = strict_json(PASSED.to_json())
    assert document["parity"][1]["prefill_max_abs"] == 1.234e-5
    assert document["latency"]["mix2_tax"] is None
    assert document["parity"][0]["effect_ratio"] is None
    assert strict_json(msgspec.structs.replace(PASSED, router=None).to_json())["router"] is None


def test_nan_and_infinity_are_null():
    base, broken, _ = strict_json(FAILED.to_json())["parity"]
    assert base["sqnr_db"] is None
    assert [broken[key] for key in ("decode_max_abs", "kl_max", "sqnr_db")] == [None] * 3
    assert broken["prefill_max_abs"] == 1.234e-5


def test_round_trip(tmp_path: Path):
    for report in (PASSED, FAILED):
        write(report, tmp_path)
        again = read(tmp_path / "report.json")
        assert again.to_json() == report.to_json()
        assert again.parity[2] == report.parity[2] and again.tolerances == report.tolerances


def test_json_does_not_depend_on_the_order_of_insertion():
    other = msgspec.structs.replace(PASSED, versions=dict(reversed(PASSED.versions.items())))
    assert list(other.versions) != list(PASSED.versions)
    assert other.to_json() == PASSED.to_json()


@pytest.mark.parametrize(
    "change",
    [
        {"parity": (BASE, NO_EFFECT)},
        {"parity": ()},
        {"safety": Safety(aba_bit_identical=True, kv_isolated=True, wrong_base_refused=False)},
        {"router": RouterRow(cases=40, decisions_equal=False, gates_max_abs=0.0, accuracy=None)},
        {"tasks": (TaskRow(adapter="reverse", metric="exact_match", reference=1.0, device=0.1, passed=False),)},
        {"problems": ("something is wrong",)},
        {"budget": (BudgetRow(name="swap_ms", limit=50.0, found=60.0, passed=False),)},
        {"complete": False},
        {"safety": Safety(aba_bit_identical=None, kv_isolated=True, wrong_base_refused=True)},
        {"passed": False},
    ],
)
def test_a_verdict_that_its_parts_contradict_is_refused(change: dict):
    with pytest.raises(ValueError, match="can not have passed|names no problem"):
        msgspec.structs.replace(PASSED, **change)


@pytest.mark.parametrize("field", ["prefill_max_abs", "decode_max_abs", "kl_max", "top1_agreement", "effect_ratio"])
@pytest.mark.parametrize("value", [None, math.nan, math.inf])
def test_a_row_without_a_number_can_not_pass(field: str, value: float | None):
    with pytest.raises(ValueError, match=f"adapter:reverse .*{field}"):
        msgspec.structs.replace(ADAPTER, **{field: value})
    msgspec.structs.replace(ADAPTER, **{field: value}, passed=False)


@pytest.mark.parametrize(
    ("old", "new", "named"),
    [
        ('"kl_max": 3e-9', '"kl_max": "small"', "kl_max"),
        ('"kl_max": 3e-9', '"kl_maximum": 3e-9', "kl_maximum"),
        ('"recipe"', '"receipt"', "receipt"),
        ('"kind": "ssh"', '"kind": "telnet"', "telnet"),
        ('"kv_isolated": true', '"kv_isolated": false', "kv_isolated"),
        ('{\n  "package"', '{\n  "package', "not a report"),
    ],
)
def test_a_wrong_file_is_one_clear_line(tmp_path: Path, old: str, new: str, named: str):
    path = tmp_path / "report.json"
    text = PASSED.to_json()
    assert old in text
    path.write_text(text.replace(old, new, 1))
    with pytest.raises(PackageError) as caught:
        read(path)
    assert str(path) in str(caught.value) and named in str(caught.value) and "\n" not in str(caught.value)


def test_a_missing_file_is_one_clear_line(tmp_path: Path):
    with pytest.raises(PackageError, match=r"nothing\.json: .*No such file"):
        read(tmp_path / "nothing.json")


# Writing


def test_a_full_disk_leaves_the_old_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    write(PASSED, tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def no_space(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", no_space)
    with pytest.raises(PackageError, match="No space left"):
        write(FAILED, tmp_path)
    assert (
        {path.name: path.read_bytes() for path in tmp_path.iterdir()}
        == before
        == {name: before[name] for name in ("report.html", "report.json")}
    )


def test_an_existing_file_is_replaced_and_not_rewritten(tmp_path: Path):
    write(FAILED, tmp_path / "new" / "directory")
    path = tmp_path / "new" / "directory" / "report.json"
    with path.open() as reader:  # who reads while we write sees the old report to its end
        write(PASSED, path.parent)
        assert strict_json(reader.read())["passed"] is False
    assert read(path).passed
    assert sorted(p.name for p in path.parent.iterdir()) == ["report.html", "report.json"]


def test_a_value_that_could_not_be_read_back_is_not_written(tmp_path: Path):
    with pytest.raises(msgspec.ValidationError, match="samples"):
        write(
            msgspec.structs.replace(PASSED, latency=msgspec.structs.replace(PASSED.latency, samples=1.5)),
            tmp_path,
        )
    assert not any(tmp_path.iterdir())


# The page


def test_the_page_loads_and_runs_nothing(tmp_path: Path):
    write(FAILED, tmp_path, SERIES)
    text = (tmp_path / "report.html").read_text("utf-8")
    page = Page(text)
    assert "://" not in text and "url(" not in text and "@import" not in text
    assert not {"script", "img", "iframe", "object", "embed", "audio", "video", "base", "form"} & {
        tag for tag, _ in page.tags
    }
    loads = [
        a[key] for _, a in page.tags for key in ("src", "href", "xlink:href", "srcset", "action", "data") if key in a
    ]
    assert loads == ["data:,"]
    assert not [key for _, attributes in page.tags for key in attributes if key.startswith("on")]
    policy = next(
        a["content"] for tag, a in page.tags if tag == "meta" and a.get("http-equiv") == "Content-Security-Policy"
    )
    assert policy and policy.startswith("default-src 'none'")


def test_the_page_names_every_case_problem_and_version():
    text = Page(render(FAILED, SERIES)).text
    cases = [a["data-case"] for tag, a in Page(render(FAILED, SERIES)).tags if tag == "tr" and "data-case" in a]
    assert cases == [row.case for row in FAILED.parity]
    for line in (
        *FAILED.problems,
        *FAILED.versions.values(),
        *FAILED.tolerances,
        "board",
        "onnx-int4",
        "/data/out/demo-int4",
        "2100 of 4096 numbers, stored dense: 1050 bytes",
    ):
        assert line in text
    assert "reverse+sort" in text


def test_a_failed_report_says_so_and_marks_its_red_rows():
    page = Page(render(FAILED, Series()))
    red = [a["data-case"] for tag, a in page.tags if tag == "tr" and a.get("class") == "bad"]
    assert red == ["adapter:reverse", "mix:reverse+sort"]
    assert "✗ FAILED" in page.text and "PASSED" not in page.text
    assert "not finite" in page.text
    assert page.text.index("✗ FAILED") < page.text.index(FAILED.problems[0]) < page.text.index("Do the numbers match?")


def test_a_passed_report_has_nothing_red():
    page = Page(render(PASSED, Series()))
    assert "✓ PASSED" in page.text and "FAILED" not in page.text
    assert not [a for tag, a in page.tags if "bad" in (a.get("class") or "").split()]


def test_text_of_the_report_is_escaped():
    evil = '"><script>alert(1)</script>'
    row = msgspec.structs.replace(NO_EFFECT, case=f"adapter:{evil}")
    report = msgspec.structs.replace(
        FAILED,
        package=evil,
        parity=(row,),
        problems=(evil,),
        versions={evil: evil},
        device=msgspec.structs.replace(FAILED.device, name=evil, os=evil),
        tasks=(msgspec.structs.replace(FAILED.tasks[0], adapter=evil, metric=evil),),
    )
    text = render(report, Series(error={(row.case, "target"): [1.0]}, decode_ms={evil: [1.0]}))
    assert "<script" not in text and html.escape("<script>") in text
    assert "script" not in {tag for tag, _ in Page(text).tags}
    assert row.case in [a.get("data-case") for _, a in Page(text).tags]


def test_the_page_shows_curves_percentiles_budget_and_conditions():
    page = Page(render(PASSED, Series()))
    for text in ("Prefill of so many tokens", "behind so many tokens", "9.75 ms", "Against the budget of pixel-8"):
        assert text in page.text
    for text in ("0 cpu-big", "41.2 → 55.5 °C", "4, 5, 6, 7", "80.5 MB", "swap_ms: 1.31 of 50.0"):
        assert text in page.text, text
    curves = [attrs for tag, attrs in page.tags if tag == "path" and "first" in (attrs.get("class") or "")]
    assert len(curves) == 2 and all((attrs["d"] or "").count("L") == 2 for attrs in curves)
    silent = msgspec.structs.replace(SPEED, before=Conditions(), after=Conditions(), lengths=())
    page = Page(render(msgspec.structs.replace(PASSED, speed=silent), Series()))
    assert "tells neither temperatures nor clocks" in page.text and "Prefill of so many" not in page.text


def test_an_incomplete_report_says_so_and_what_it_lacks():
    begun = msgspec.structs.replace(
        PASSED,
        passed=False,
        complete=False,
        safety=Safety(aba_bit_identical=None, kv_isolated=None, wrong_base_refused=None),
        router=None,
        problems=("adb:R5C: run: killed by SIGSEGV",),
        budget=(BudgetRow(name="swap_ms", limit=50.0, found=None, passed=None),),
        speed=None,
    )
    page = Page(render(begun, Series()))
    assert "Incomplete." in page.text and page.text.count("not measured") == 5
    assert "It did not come to that" in page.text


def test_an_emulated_device_is_marked():
    emulated = msgspec.structs.replace(PASSED, device=msgspec.structs.replace(PASSED.device, emulated=True))
    assert "mulated" not in Page(render(PASSED, Series())).text.split("Device, recipe")[0]
    text = Page(render(emulated, Series())).text
    assert "Emulated device." in text and "emulated: not comparable" in text


def test_the_least_report_renders():
    nothing = msgspec.structs.replace(UNMEASURED, threads=1)
    least = msgspec.structs.replace(
        PASSED, parity=(BASE,), router=None, tasks=(), latency=nothing, versions={}, tolerances={}
    )
    text = Page(render(least, Series())).text
    assert "no router" in text and "None" not in text and "nan" not in text


def test_the_page_from_memory_is_the_page_from_the_file(tmp_path: Path):
    write(FAILED, tmp_path / "a")
    write(read(tmp_path / "a" / "report.json"), tmp_path / "b")
    assert (tmp_path / "a" / "report.html").read_bytes() == (tmp_path / "b" / "report.html").read_bytes()


# Numbers and plots


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0, "0"),
        (1.0, "1.00"),
        (0.0123456, "0.0123"),
        (0.001, "0.00100"),
        (119.04, "119"),
        (1184.2, "1,180"),
        (999.9, "1,000"),
        (9.996, "10.0"),
        (1.234e-5, "1.23×10⁻⁵"),
        (1_500_000.0, "1.50×10⁶"),
        (-2.5e12, "−2.50×10¹²"),
        (-0.5, "−0.500"),
        (None, "not finite"),
    ],
)
def test_number(value: float | None, text: str):
    assert number(value) == text


@given(st.floats(min_value=1e-30, max_value=1e30))
def test_number_keeps_three_digits(value: float):
    text = number(value).replace(",", "")
    mantissa, _, power = text.partition("×10")
    digits = power.translate(str.maketrans("⁻⁰¹²³⁴⁵⁶⁷⁸⁹", "-0123456789")) or "0"
    assert float(f"{mantissa}e{digits}") == pytest.approx(value, rel=5.01e-3)


def test_shares_and_times():
    assert [share(v) for v in (1.0, 0.99996, 0.984, 0.0)] == ["100 %", "> 99.9 %", "98.4 %", "0 %"]
    assert [milliseconds(v) for v in (None, 0.093, 0.62, 48.2, 12_345.0)] == [
        "–",
        "93.0 µs",
        "0.620 ms",
        "48.2 ms",
        "12.3 s",
    ]


@given(st.lists(st.floats(min_value=0, max_value=1e3), min_size=1, max_size=50), st.sampled_from([50, 90, 99]))
def test_percentile_is_numpy_s(samples: list[float], q: int):
    assert percentile(samples, q) == np.percentile(samples, q, method="inverted_cdf")


def test_limits_are_those_of_a_reference_and_those_of_all():
    given = {
        "target.decode_max_abs": 1e-4,
        "source.decode_max_abs": 5e-2,
        "prefill_max_abs": 1e-3,
        "kl_max": 1.0,
    }
    report = msgspec.structs.replace(PASSED, tolerances=given)
    metrics = ["prefill_max_abs", "decode_max_abs"]
    assert limits(report, [ADAPTER], metrics) == [("source", 5e-2), ("", 1e-3)]
    assert limits(report, [ADAPTER, MIX], metrics) == [("source", 5e-2), ("target", 1e-4), ("", 1e-3)]
    drawn = [
        a["class"] for tag, a in Page(render(report, Series())).tags if tag == "line" and "limit" in (a["class"] or "")
    ]
    assert drawn.count("limit target") == 1 and drawn.count("limit source") == 2


def test_axes():
    log = Axis(1e-6, 1e-2, log=True)
    assert [log.at(v) for v in (0.0, 1e-6, 1e-4, 1e-2, 5.0)] == [0, 0, 50, 100, 100]
    assert [tick.label for tick in log.ticks] == ["10⁻⁶", "10⁻⁵", "10⁻⁴", "10⁻³", "10⁻²"]
    assert [tick.label for tick in Axis(0.0, 1.5).ticks] == ["0", "0.5", "1", "1.5"]
    assert all(len(Axis(0.0, high).ticks) <= 5 for high in np.geomspace(1e-3, 1e3, 97))


def test_histogram_counts_every_sample_and_says_what_it_leaves_out():
    samples = [1.0, 1.0, 1.0, 2.0, 2.1, 2.2, 2.3, 2.4, 2.5, 50.0]
    axis = time_axis({"decode": samples})
    found = histogram("decode", samples, axis)
    assert found.beyond == 1 and found.samples == 10
    counts = [bar * 3 / 100 for bar in found.bars]  # the fullest bar holds the three samples at 1.0
    assert sum(counts) == pytest.approx(9, abs=0.1)
    assert time_axis({"decode": [3.0, 3.0]}).high > 3.0 > 0.0 <= time_axis({}).low


def test_a_long_curve_keeps_its_peaks_and_shows_where_it_broke():
    errors = [1e-6] * 5000
    errors[4321] = 1e-2
    peak = curve("source", errors, Axis(1e-6, 1e-2, log=True))
    heights = [float(y) for y in re.findall(r"[ML][\d.]+ ([\d.]+)", peak.path)]
    assert len(heights) <= 240 and min(heights) == 0.0 and sorted(heights)[1] == 100.0
    errors[100] = math.nan
    broken = curve("source", errors, Axis(1e-6, 1e-2, log=True))
    assert broken.path.count("M") == 2 and broken.broken == pytest.approx((100 / 50,), abs=0.25)


# In a browser

CHROMIUM = next(
    (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))),
    None,
)
FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--hide-scrollbars",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
MEASURE = """<!doctype html><body>{frames}<script>
onload = () => {{ document.title = [...document.querySelectorAll('iframe')].map(frame => {{
  const page = frame.contentDocument;
  page.querySelectorAll('details').forEach(part => part.open = true);
  const texts = page.createTreeWalker(page.body, NodeFilter.SHOW_TEXT), sizes = [];
  while (texts.nextNode()) if (texts.currentNode.data.trim())
    sizes.push(parseFloat(getComputedStyle(texts.currentNode.parentElement).fontSize));
  return [page.documentElement.scrollWidth, Math.min(...sizes)].join(' ');
}}).join(';'); }};
</script>"""


@pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")
def test_the_page_fits_a_phone(tmp_path: Path):
    assert CHROMIUM
    write(FAILED, tmp_path, SERIES)
    page = html.escape((tmp_path / "report.html").read_text("utf-8"))
    frames = "".join(
        f'<iframe width="{width}" height="800" style="border:0" srcdoc="{page}"></iframe>' for width in (360, 390)
    )
    (tmp_path / "measure.html").write_text(MEASURE.format(frames=frames), "utf-8")
    start = [CHROMIUM, *FLAGS, f"--user-data-dir={tmp_path / 'profile'}"]
    seen = subprocess.run(
        [*start, "--dump-dom", f"file://{tmp_path}/measure.html"],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    ).stdout
    title = re.search(r"<title>([\d. ;]+)</title>\s*</head>\s*<body>", seen)
    assert title, seen[:500]
    measured = [[float(part) for part in frame.split()] for frame in title[1].split(";")]
    assert [width for width, _ in measured] == [360, 390]
    assert all(size >= 16 for _, size in measured)

    picture = tmp_path / "picture.png"
    subprocess.run(
        [*start, f"--screenshot={picture}", "--window-size=390,1200", f"file://{tmp_path}/report.html"],
        capture_output=True,
        timeout=60,
        check=True,
    )
    assert len(set(_pixels(picture))) > 50  # a blank page has its filter bytes and one colour


def _pixels(png: Path) -> bytes:
    data, at, packed = png.read_bytes(), 8, b""
    while at < len(data):
        length, kind = int.from_bytes(data[at : at + 4], "big"), data[at + 4 : at + 8]
        packed += data[at + 8 : at + 8 + length] if kind == b"IDAT" else b""
        at += length + 12
    return zlib.decompress(packed)
