"""Every check of `validate` must be able to fail: here each is made to, and the right line turns red.

Tampered packages list their own hashes, so that only the numbers can tell.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from pathlib import Path
from types import SimpleNamespace

import msgspec
import numpy as np
import pytest
from tokenizers import Tokenizer
from typer.testing import CliRunner

from calora_export import bundle as bundles
from calora_export import cli, devices, latency, pipeline, questions, runtimes, validation
from calora_export import package as packages
from calora_export import report as reports
from calora_export.compression import Activations
from calora_export.devices import host
from calora_export.errors import DeviceError, FingerprintError
from calora_export.jobs import Completion, InterruptedRun, Job, Trace
from calora_export.package import Package
from calora_export.report import Report
from calora_export.runtimes import Mix, onnx
from tests.bundles import copy_bundle, edit_json, tiny_bundle
from tests.packages import copy_package, refresh, validated
from tests.tampering import Arrays, adapter_file, edit_adapter, edit_router, edit_weight

ALPHA = {"adapter:alpha", "mix:alpha+beta", "route:alpha+beta", "sentence:1:alpha+beta"}
EVERY = {"base", "adapter:alpha", "adapter:beta", "mix:alpha+beta", "route:alpha+beta", "sentence:1:alpha+beta"}
SAFE = {"aba_bit_identical": True, "kv_isolated": True, "wrong_base_refused": True}


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """The device's own code, without a process of its own for each test, on one thread."""
    monkeypatch.setattr(latency, "threads", lambda profile: 1)
    monkeypatch.setattr(devices, "run", lambda device, package, job, progress: host.answer(package, job))


@pytest.fixture
def copy(package: Path, tmp_path: Path) -> Path:
    return copy_package(package, tmp_path / "package")


def red(report: Report, against: str) -> set[str]:
    return {row.case for row in report.parity if row.against == against and not row.passed}


def kinds(report: Report) -> set[str]:
    """The first word of every problem."""
    return {problem.replace(":", " ").split()[0] for problem in report.problems}


# ── a good package ────────────────────────────────────────────────────────────────────────────────


@pytest.mark.usefixtures("in_process")
def test_an_untouched_package_passes(copy: Path, tiny: Path) -> None:
    report = validated(copy, tiny)
    assert report.passed and report.problems == ()
    assert {(row.case, row.against) for row in report.parity} == {
        (case, against) for case in EVERY for against in ("source", "target")
    }
    assert report.router is not None and report.router.cases >= 50
    assert report.zeros is not None and report.zeros == packages.load(copy).manifest.zeros


@pytest.mark.usefixtures("in_process")
def test_fp32_needs_no_second_reference(package_fp32: Path, tiny: Path, tmp_path: Path) -> None:
    report = validated(copy_package(package_fp32, tmp_path / "package"), tiny)
    assert report.passed, report.problems
    assert {row.against for row in report.parity} == {"source"}


@pytest.mark.usefixtures("in_process")
def test_an_adapter_that_the_bundle_does_not_have_is_named(package_fp32: Path, tiny: Path, tmp_path: Path) -> None:
    package = copy_package(package_fp32, tmp_path / "package")
    copy_bundle(tiny / "adapters" / "beta", tmp_path / "late")
    pipeline.add_adapter(package, tmp_path / "late")
    report = validated(package, tiny)
    assert report.passed and report.added == ("late",)
    assert not any("late" in row.case for row in report.parity)
    reports.write(report, tmp_path / "report")
    page = (tmp_path / "report" / "report.html").read_text()
    assert "Not compared, since the bundle does not have them: late." in page


@pytest.mark.usefixtures("in_process")
def test_a_bundle_without_adapters_and_router_validates(tmp_path: Path) -> None:
    bundle = tiny_bundle(tmp_path / "bundle", adapters=(), router=False)
    pipeline.export(bundle, tmp_path / "package", "onnx-int4")
    report = validated(tmp_path / "package", bundle)
    assert report.passed, report.problems
    assert {row.case for row in report.parity} == {"base"}
    assert report.router is None and report.tasks == ()


# ── adapters ──────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.usefixtures("in_process")
def test_one_corrupt_tensor_of_an_adapter_turns_its_rows_red_and_no_other(copy: Path, tiny: Path) -> None:
    edit_adapter(copy, "alpha", lambda arrays: negate(arrays["model.layers.0.self_attn.q_proj.up"]))
    report = validated(copy, tiny)
    assert not report.passed
    assert red(report, "source") <= red(report, "target") == ALPHA
    assert "adapter:alpha" in red(report, "source")
    assert kinds(report) <= {"adapter", "mix", "route", "sentence", "task"}


@pytest.mark.usefixtures("in_process")
def test_an_adapter_that_does_nothing_has_an_effect_ratio_of_zero(copy: Path, tiny: Path) -> None:
    def silence(arrays: Arrays) -> None:
        for name, array in arrays.items():
            if name.endswith(".up"):
                array[:] = 0

    edit_adapter(copy, "alpha", silence)
    report = validated(copy, tiny)
    assert red(report, "source") == red(report, "target") == ALPHA
    ratios = {row.effect_ratio for row in report.parity if row.case == "adapter:alpha"}
    assert ratios == {0.0}, "gate 0 is the base, bit for bit"
    assert any(line.startswith("adapter:alpha against source: effect_ratio 0 is") for line in report.problems)


@pytest.mark.usefixtures("in_process")
def test_two_swapped_adapters_are_both_red(copy: Path, tiny: Path) -> None:
    first, second = adapter_file(copy, "alpha"), adapter_file(copy, "beta")
    kept = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(kept)
    refresh(copy)
    report = validated(copy, tiny)
    for against in ("source", "target"):
        assert {"adapter:alpha", "adapter:beta"} <= red(report, against)
        assert "base" not in red(report, against)


@pytest.mark.usefixtures("in_process")
def test_a_nan_is_red_and_null(copy: Path, tiny: Path) -> None:
    edit_adapter(copy, "alpha", lambda arrays: arrays["model.layers.1.self_attn.v_proj.up"].fill(np.nan))
    report = validated(copy, tiny)
    assert red(report, "source") == red(report, "target") == ALPHA
    rows = json.loads(report.to_json())["parity"]
    broken = [row for row in rows if row["case"] == "adapter:alpha"]
    assert {row["decode_max_abs"] for row in broken} == {None}


# ── base ──────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.usefixtures("in_process")
def test_a_perturbed_base_weight_turns_the_base_red(copy: Path, tiny: Path) -> None:
    edit_weight(copy, "model.layers.0.mlp.down_proj.weight.q4", lambda q: roll(q))
    report = validated(copy, tiny)
    assert red(report, "source") >= {"base"} and red(report, "target") == EVERY
    assert "router" not in kinds(report) and "safety" not in kinds(report)


@pytest.mark.usefixtures("in_process")
def test_fp32_notices_one_number(package_fp32: Path, tiny: Path, tmp_path: Path) -> None:
    copy = copy_package(package_fp32, tmp_path / "package")

    def nudge(weight: np.ndarray) -> None:
        weight[5, 7] += 0.1

    edit_weight(copy, "model.layers.0.mlp.down_proj.weight.T", nudge)
    assert red(validated(copy, tiny), "source") == EVERY


# ── router ────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.usefixtures("in_process")
def test_a_router_with_shuffled_classes_decides_otherwise(copy: Path, tiny: Path) -> None:
    def shuffle(arrays: Arrays) -> None:
        for name in ("scores.layers.2.weight", "scores.layers.2.bias"):
            arrays[name][:] = arrays[name][::-1].copy()

    edit_router(copy, shuffle)
    assert_only_the_router_is_red(validated(copy, tiny))


@pytest.mark.usefixtures("in_process")
def test_shuffled_names_of_the_classes_are_other_decisions(copy: Path, tiny: Path) -> None:
    edit_json(copy / "package.json", lambda manifest: manifest["router"]["spec"]["classes"].reverse())
    assert_only_the_router_is_red(validated(copy, tiny))


@pytest.mark.usefixtures("in_process")
@pytest.mark.parametrize("change", [{"template": "{text} please"}, {"max_length": 2}])
def test_a_router_that_reads_another_text_is_red(copy: Path, tiny: Path, change: dict[str, object]) -> None:
    edit_json(copy / "package.json", lambda manifest: manifest["router"]["spec"].update(change))
    report = validated(copy, tiny)
    assert kinds(report) == {"router"} and not report.passed


@pytest.mark.usefixtures("in_process")
def test_slightly_wrong_gates_are_red_though_the_decisions_are_equal(copy: Path, tiny: Path) -> None:
    def tilt(arrays: Arrays) -> None:
        arrays["scores.layers.2.bias"][0] += 0.003

    edit_router(copy, tilt)
    report = validated(copy, tiny)
    assert report.router is not None and report.router.decisions_equal
    assert [problem.split(" is ")[0][:21] for problem in report.problems] == ["router: gates_max_abs"]


def assert_only_the_router_is_red(report: Report) -> None:
    assert not report.passed and kinds(report) == {"router"}
    assert report.router is not None and not report.router.decisions_equal
    assert red(report, "source") == red(report, "target") == set()


# ── files ─────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.usefixtures("in_process")
def test_a_changed_file_is_named_even_when_no_number_changes(copy: Path, tiny: Path) -> None:
    file = copy / "golden" / "golden.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    report = validated(copy, tiny)
    assert not report.passed and red(report, "source") == red(report, "target") == set()
    (problem,) = report.problems
    assert problem.startswith("file: golden/golden.safetensors: sha256: expected ")


def test_another_bundle_is_refused_with_both_fingerprints(package: Path, tmp_path: Path) -> None:
    other = tiny_bundle(tmp_path / "other", compressed=False, router=False)
    prints = [json.loads((package / "package.json").read_text())["base_fingerprint"]]
    prints.append(json.loads((other / "bundle.json").read_text())["base"]["fingerprint"])
    with pytest.raises(FingerprintError) as caught:
        pipeline.validate(package, other, "host")
    assert prints[0] != prints[1] and all(one in str(caught.value) for one in prints)


def test_an_unknown_device_is_refused(package: Path, tiny: Path) -> None:
    with pytest.raises(DeviceError, match="--device: phone: expected one of .*host"):
        pipeline.validate(package, tiny, "phone")


# ── safety: sessions that misbehave ───────────────────────────────────────────────────────────────


class KeepsCache(onnx.OnnxSession):
    """Takes a conversation of one length along when the adapters change: the one that the check begins."""

    def select(self, mix: Mix, *, keep_cache: bool = False) -> None:
        begun = (questions.PREFILL + questions.DECODE) // 2
        super().select(mix, keep_cache=keep_cache or self._cache.length == begun)


class Gullible(onnx.OnnxSession):
    def admit(self, path: Path) -> None:
        pass


class WearsOut(onnx.OnnxSession):
    """Each swap changes the adapter that was active by a thousandth."""

    def select(self, mix: Mix, *, keep_cache: bool = False) -> None:
        if "alpha" in self.mix and "alpha" not in mix:
            arrays = self._shelf["alpha"].arrays()
            worn = {n: array * np.float32(1.001 if n.endswith(".up") else 1) for n, array in arrays.items()}
            self._shelf._found["alpha"] = onnx.Tensors.of(worn)
        super().select(mix, keep_cache=keep_cache)

    @property
    def mix(self) -> Mix:
        return self._mix if "_mix" in self.__dict__ else {}


@pytest.mark.usefixtures("in_process")
@pytest.mark.parametrize(
    ("double", "flag", "line"),
    [
        (KeepsCache, "kv_isolated", "a KV cache filled under one adapter was read under another"),
        (Gullible, "wrong_base_refused", "an adapter that says it is for another base was not refused"),
        (WearsOut, "aba_bit_identical", "the first adapter's logits changed after a swap to another and back"),
    ],
)
def test_a_session_that_misbehaves_is_caught(
    copy: Path,
    tiny: Path,
    monkeypatch: pytest.MonkeyPatch,
    double: type[onnx.OnnxSession],
    flag: str,
    line: str,
) -> None:
    runtime = SimpleNamespace(
        prepare=onnx.prepare, open_session=double, suffix=onnx.suffix, encode_adapter=onnx.encode_adapter
    )
    monkeypatch.setattr(runtimes, "load", lambda target: runtime)
    report = validated(copy, tiny)
    assert not report.passed and report.problems == (f"safety: {line}",)
    flags = json.loads(report.to_json())["safety"]
    assert flags == SAFE | {flag: False}


# ── a device that breaks ──────────────────────────────────────────────────────────────────────────


def breaking(monkeypatch: pytest.MonkeyPatch, keep: int) -> None:
    """A device that goes away after so many cases."""

    def run(device: str, package: Package, job: Job, progress: devices.Progress) -> Trace:
        whole = host.answer(package, msgspec.structs.replace(job, cases=job.cases[:keep], timing=None, completions=()))
        answer = msgspec.structs.replace(whole.answer, gates=(), safety=None)
        raise InterruptedRun(f"{device}: run: killed by SIGSEGV", Trace(answer, whole.logits) if keep else None)

    monkeypatch.setattr(devices, "run", run)


def test_what_was_measured_before_a_fault_is_kept_and_never_passes(
    copy: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    breaking(monkeypatch, 2)
    done = CliRunner().invoke(cli.app, ["validate", str(copy), "--bundle", str(tiny)])
    kept = copy / "report" / "report.html"
    assert (done.exit_code, done.stdout) == (1, "")
    assert done.stderr.splitlines() == [
        f"note: host: what was measured before is in {kept}, marked as incomplete",
        "error: host: run: killed by SIGSEGV",
    ]
    made = reports.read(copy / "report" / "report.json")
    assert (made.passed, made.complete) == (False, False)
    assert made.problems == ("host: run: killed by SIGSEGV",)
    assert {row.case for row in made.parity} == {"base", "adapter:alpha"} and all(row.passed for row in made.parity)
    assert (made.router, made.tasks, made.speed, made.safety.kv_isolated) == (None, (), None, None)


def test_before_anything_was_measured_there_is_no_report(
    copy: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    breaking(monkeypatch, 0)
    done = CliRunner().invoke(cli.app, ["validate", str(copy), "--bundle", str(tiny)])
    assert (done.exit_code, done.stderr) == (1, "error: host: run: killed by SIGSEGV\n")
    assert not (copy / "report").exists()


@pytest.mark.usefixtures("in_process")
def test_a_budget_that_is_not_kept_fails(copy: Path, tiny: Path, tmp_path: Path) -> None:
    profile = tmp_path / "phone.toml"
    text = 'kind = "adb"\ndescription = "d"\ntargets = ["onnx"]\nthreads = 1\n[budget]\n'
    profile.write_text(f"{text}decode_tok_s = 1e9\nswap_ms = 1e9\n")
    made = pipeline.validate(copy, tiny, profile=str(profile))
    assert [(row.name, row.passed) for row in made.budget] == [("swap_ms", True), ("decode_tok_s", False)]
    (line,) = made.problems
    assert not made.passed and line.startswith("budget: decode_tok_s is ")
    assert made.latency.threads == 1
    done = CliRunner().invoke(cli.app, ["bench", str(copy), "--profile", str(profile)])
    assert done.exit_code == 3 and "OVER" in done.output


@pytest.mark.usefixtures("in_process")
def test_a_profile_says_how_many_examples_are_scored(tiny: Path, package: Path, tmp_path: Path) -> None:
    """Of three, of which the middle one is wrong: the device and the reference are scored over the same ones."""
    prompts = ("alpha one", "alpha two", "alpha three")
    bundle, copy = copy_bundle(tiny, tmp_path / "bundle"), copy_package(package, tmp_path / "package")
    tokenizer = Tokenizer.from_file(str(bundle / "base" / "tokenizer.json"))
    asked = tuple(Completion("alpha", tuple(tokenizer.encode(prompt).ids), 1) for prompt in prompts)
    answer = host.answer(packages.load(copy), Job(threads=1, completions=asked)).answer
    (first,), (middle,), (last,) = answer.completions
    assert middle not in (first, last)
    edit_json(copy / "package.json", lambda manifest: manifest["model"].update(eos=[first, last]))  # right: at once
    lines = [json.dumps({"prompt": prompt, "completion": ""}) + "\n" for prompt in prompts]
    (bundle / "eval" / "alpha.jsonl").write_text("".join(lines))
    profile = tmp_path / "slow.toml"
    for examples, score, said in ((2, 100.0, "2 of 3"), (3, 200 / 3, "3"), (1, 100.0, "1 of 3")):
        profile.write_text(f'kind = "ssh"\ndescription = "d"\ntargets = ["onnx"]\nexamples = {examples}\n')
        made = pipeline.validate(copy, bundle, profile=str(profile))
        assert made.passed and [str(row.examples) for row in made.tasks] == [said, said], made.problems
        alpha = made.tasks[0]
        assert (alpha.reference, alpha.source, alpha.device) == pytest.approx((score,) * 3)
        assert made.router is not None and made.router.cases >= 50, "all else is as complete as ever"
        assert {row.case for row in made.parity} >= EVERY - {"route:alpha+beta", "sentence:1:alpha+beta"}
        page = (copy / "report" / "report.html").read_text()
        assert f"exact_match, {said} examples: " in page
    done = CliRunner().invoke(cli.app, ["validate", str(copy), "--bundle", str(bundle), "--profile", str(profile)])
    assert done.exit_code == 0 and "1 of 3" in done.stdout


# ── the command ───────────────────────────────────────────────────────────────────────────────────

PARITY = {
    "case",
    "against",
    "prefill_max_abs",
    "decode_max_abs",
    "kl_max",
    "top1_agreement",
    "sqnr_db",
    "effect_ratio",
    "passed",
}
LATENCY = {
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
}


def test_validate_json_is_the_documented_document(copy: Path, tiny: Path) -> None:
    """In the host's own process, as a user runs it."""
    done = CliRunner().invoke(cli.app, ["validate", str(copy), "--bundle", str(tiny), "--json"])
    assert done.exit_code == 0, done.stderr
    document = json.loads(done.stdout)
    keys = {"package", "target", "passed", "device", "parity", "safety", "router", "tasks", "latency"}
    assert keys <= set(document)
    assert document["target"] == "onnx" and document["passed"] is True
    assert set(document["device"]) == {"name", "kind", "arch", "os", "emulated"}
    assert document["device"]["kind"] == "host" and document["device"]["emulated"] is False
    assert all(set(row) == PARITY for row in document["parity"])
    assert {row["case"] for row in document["parity"]} == EVERY
    assert document["safety"] == SAFE
    assert set(document["router"]) == {"cases", "decisions_equal", "gates_max_abs", "accuracy"}
    assert {row["adapter"] for row in document["tasks"]} == {"alpha", "beta"}
    task = {"adapter", "metric", "reference", "device", "passed", "source", "target", "examples"}
    assert all(set(row) == task and row["reference"] == row["source"] for row in document["tasks"])
    assert all(row["examples"] == {"checked": 3, "of": 3} for row in document["tasks"])
    assert set(document["latency"]) == LATENCY and set(document["latency"]["swap_ms"]) == {"p50", "p90"}
    numbers = {name: value for name, value in document["latency"].items() if name != "swap_ms"}
    assert all(value is not None and value > 0 for value in numbers.values()), numbers
    assert json.loads((copy / "report" / "report.json").read_text()) == document


@pytest.mark.usefixtures("in_process")
def test_a_failed_validation_exits_with_3_and_still_writes_its_report(copy: Path, tiny: Path) -> None:
    edit_json(copy / "package.json", lambda manifest: manifest["router"]["spec"]["classes"].reverse())
    command = ["validate", str(copy), "--bundle", str(tiny)]
    plain = CliRunner().invoke(cli.app, command)
    assert plain.exit_code == 3
    assert "FAILED" in plain.stdout and "router: the device chose other adapters" in plain.stdout
    written = json.loads((copy / "report" / "report.json").read_text())
    assert written["passed"] is False and written["router"]["decisions_equal"] is False
    assert "<html" in (copy / "report" / "report.html").read_text()


def negate(array: np.ndarray) -> None:
    array *= -1


def roll(array: np.ndarray) -> None:
    array[:] = np.roll(array, 1, axis=0)


def rounded(rounding: Activations | None, package: Package, job: Job) -> Trace:
    """A trace of this machine that says what its kernels do."""
    trace = host.answer(package, job)
    return dataclasses.replace(trace, answer=msgspec.structs.replace(trace.answer, rounding=rounding))


def test_the_reference_rounds_as_the_device_does(package: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A device whose kernels do not round, as on a 64-bit ARM without dot products, is compared with what does not."""
    opened, bundle = packages.load(package), bundles.load(tiny)
    assert opened.manifest.settings.activations == "int8_block"
    found = {}
    kinds: tuple[Activations | None, ...] = (None, "int8_block", "float", "int8_token")
    for rounding in kinds:
        trace = functools.partial(rounded, rounding)
        monkeypatch.setattr(devices, "run", lambda device, package, job, progress, trace=trace: trace(package, job))
        made = validation.validate(opened, bundle, ("host",), pipeline.silent)["host"]
        assert made.report is not None
        found[rounding] = [row.sqnr_db for row in made.report[0].parity if row.against == "target"]
    assert found[None] == found["int8_block"]
    assert min(found[None]) > max(*found["float"], *found["int8_token"]), "this processor rounds per block"
    assert found["float"] != found["int8_token"]


# ── sentences ───────────────────────────────────────────────────────────────────────────────────────────────


def test_a_sentence_is_compared_under_what_the_router_reads_at_its_first_token(tiny: Path, tmp_path: Path) -> None:
    """DLP-LoRA's rule: it reads the prompt and the answer so far; all of that is prefilled under its choice."""
    bundle = copy_bundle(tiny, tmp_path / "bundle")
    task = bundles.read_manifest(bundle).tasks[0]
    line = {"prompt": "Say it.", "completion": " One is 1.5. Two! Three"}
    (bundle / task.eval).write_text(json.dumps(line) + "\n")
    found = questions.sentences(bundles.load(bundle), 200)
    tokenizer = Tokenizer.from_file(str(bundle / "base" / "tokenizer.json"))
    read = ["Say it.", "Say it. One is 1.5. ", "Say it. One is 1.5. Two! "]
    assert [sentence.text for sentence in found[:3]] == read
    for sentence, following in zip(found, found[1:], strict=False):
        assert tokenizer.decode(sentence.ids[: sentence.start]) == sentence.text
        assert following.start == len(sentence.ids) and following.ids[: following.start] == sentence.ids
    assert questions.sentences(bundles.load(bundle), 10) == []
