"""The host device: a child process without torch, whose every failure is one line."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open

from calora_export import package as packages
from calora_export import runtimes
from calora_export.adapters import Adapter
from calora_export.devices import host
from calora_export.errors import DeviceError, PackageError
from calora_export.jobs import (
    Case,
    Completion,
    Job,
    Safety,
    SafetyTrace,
    Timing,
    TimingTrace,
    Trace,
    read_trace,
    write_job,
)
from calora_export.package import Package
from calora_export.runtimes import Mix
from tests.conftest import Export
from tests.packages import copy_package, refresh
from tests.tampering import adapter_file

IDS = tuple(range(40, 72))
SAFETY_IDS = tuple(range(64))
MIXES: dict[str, dict[str, float]] = {"base": {}, "alpha": {"alpha": 1.0}, "mix": {"alpha": 0.7, "beta": -0.4}}


def answered(package: Path, job: Job) -> Trace:
    return host.answer(packages.load(package), job)


# ── what it computes ────────────────────────────────────────────────────────────────────────────────


def test_logits_are_those_that_torch_left_in_the_package(package_fp32: Path) -> None:
    with safe_open(package_fp32 / "golden" / "golden.safetensors", "np") as file:
        golden = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        prefill = int(file.metadata()["prefill"])
    ids = tuple(int(token) for token in golden.pop("ids"))
    mixes: dict[str, dict[str, float]] = {"base": {}, "adapter:alpha": {"alpha": 1.0}, "adapter:beta": {"beta": 1.0}}
    assert set(mixes) == set(golden)
    job = Job(threads=1, cases=tuple(Case(name, mix, ids, prefill) for name, mix in mixes.items()))
    trace = answered(package_fp32, job)
    for name, expected in golden.items():
        assert trace.logits[name].shape == expected.shape == (len(ids) - prefill + 1, 256)
        np.testing.assert_allclose(trace.logits[name], expected, atol=2e-4)


def test_the_first_row_follows_the_prefill(package_fp32: Path) -> None:
    """Row 0 is the same whether the prompt is fed at once or was cut elsewhere."""
    cases = (Case("late", {}, IDS, 20), Case("early", {}, IDS, 10))
    logits = answered(package_fp32, Job(threads=1, cases=cases)).logits
    assert len(logits["late"]) == 13 and len(logits["early"]) == 23
    np.testing.assert_allclose(logits["late"], logits["early"][10:], atol=1e-4)


def test_gates_are_one_per_class_and_sum_to_one(package: Path) -> None:
    (gates,) = answered(package, Job(threads=1, routes=((65, 66, 67),))).answer.gates
    assert len(gates) == 2 and sum(gates) == pytest.approx(1, abs=1e-6)


def test_safety_is_measured(package: Path, tmp_path: Path) -> None:
    own = adapter_file(package, "alpha")
    job = Job(threads=1, safety=Safety({"alpha": 1.0}, {"beta": 1.0}, SAFETY_IDS, str(own)))
    seen = answered(package, job).answer.safety
    assert seen is not None and (seen.aba, seen.fresh, seen.stale) == (True, True, True)
    assert seen.refused is False, "its own adapter is no forgery"


def test_two_equal_mixes_cannot_prove_that_caches_are_apart(package: Path) -> None:
    same = {"alpha": 1.0}
    forged = str(package / "package.json")
    seen = answered(package, Job(threads=1, safety=Safety(same, same, SAFETY_IDS, forged))).answer.safety
    assert seen is not None and (seen.aba, seen.fresh, seen.stale, seen.refused) == (True, True, False, True)


def test_timing_has_the_asked_number_of_samples(package: Path) -> None:
    job = Job(threads=1, routes=((1, 2),), timing=Timing("alpha", "beta", IDS, decode=3, rounds=2, swaps=4))
    timing = answered(package, job).answer.timing
    assert timing is not None and timing.load > 0
    assert {name: len(samples) for name, samples in timing.decode.items()} == {"base": 6, "adapter": 6, "mix2": 6}
    assert (len(timing.prefill), len(timing.swap), len(timing.first_token), len(timing.router)) == (2, 4, 4, 4)


def test_timing_of_a_package_without_adapters(package: Path) -> None:
    job = Job(threads=1, timing=Timing("", "", IDS, decode=2, rounds=1, swaps=4))
    timing = answered(package, job).answer.timing
    assert timing is not None and set(timing.decode) == {"base"}
    assert timing.swap == timing.first_token == timing.router == ()


class Scripted:
    """A session that says the next token of a script whenever it is extended."""

    def __init__(self, script: Sequence[int]) -> None:
        self.script, self.fed, self.chosen, self.forgotten = list(script), [], {"other": 1.0}, 0

    @property
    def mix(self) -> Mix:
        return self.chosen

    @property
    def threads(self) -> int:
        return 1

    def select(self, mix: Mix, *, keep_cache: bool = False) -> None:
        self.chosen = dict(mix)

    def forget(self) -> None:
        self.forgotten += 1

    def extend(self, ids: Sequence[int]) -> np.ndarray:
        self.fed.append(tuple(ids))
        return np.eye(10)[[self.script.pop(0)]]

    def route(self, ids: Sequence[int]) -> np.ndarray:
        raise AssertionError

    def admit(self, path: Path) -> None:
        raise AssertionError


@pytest.mark.parametrize(
    ("script", "limit", "expected"),
    [([3, 4, 0, 9], 8, (3, 4, 0)), ([3, 4, 5, 9], 3, (3, 4, 5)), ([0, 9], 5, (0,))],
)
def test_completions_stop_at_an_end_token_or_their_limit(
    script: list[int], limit: int, expected: tuple[int, ...]
) -> None:
    session = Scripted(script)
    assert host._generate(session, Completion("mine", (1, 2), limit), {0}) == expected
    assert session.chosen == {"mine": 1.0} and session.forgotten == 1
    assert session.fed == [(1, 2), *((token,) for token in expected[:-1])]


# ── the child process ───────────────────────────────────────────────────────────────────────────────


def test_the_child_answers_as_this_process_does_and_never_imports_torch(package: Path, tmp_path: Path) -> None:
    job = Job(threads=1, cases=(Case("base", {}, IDS, 30),))
    write_job(tmp_path, job)
    program = (
        "import sys; from calora_export.devices import host; code = host.main(*sys.argv[1:]);"
        "assert code == 0; assert not {'torch', 'transformers', 'onnx_ir'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program, str(package), str(tmp_path)], check=True)
    child, here = read_trace(tmp_path, job), answered(package, job)
    assert np.array_equal(child.logits["base"], here.logits["base"])
    assert child.answer.peak_rss > 10_000_000


def test_run_goes_through_the_child(package: Path) -> None:
    job = Job(threads=1, cases=(Case("base", {}, IDS, 30),))
    trace = host.run("", packages.load(package), job)
    assert trace.logits["base"].shape == (3, 256) and trace.answer.runtime == "onnx"


def test_a_damaged_adapter_is_one_line(package: Path, tmp_path: Path) -> None:
    copy = copy_package(package, tmp_path / "package")
    adapter_file(copy, "alpha").write_bytes(b"no adapter at all")
    refresh(copy)
    job = Job(threads=1, cases=(Case("alpha", {"alpha": 1.0}, IDS, 30),))
    with pytest.raises(DeviceError, match=r"^host: alpha.onnx_adapter: not an adapter file: .+") as caught:
        host.run("", packages.load(copy), job)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["model.onnx", "router.onnx"])
def test_a_damaged_graph_is_one_line(package: Path, tmp_path: Path, name: str) -> None:
    copy = copy_package(package, tmp_path / "package")
    (copy / name).write_bytes(b"no graph at all")
    refresh(copy)
    with pytest.raises(PackageError, match=f"^{name}: ONNX Runtime refuses it: .+") as caught:
        answered(copy, Job(threads=1, routes=((1, 2),)))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("kill -9 $$", "host: exit code -9"),
        ("echo first >&2; echo last >&2; exit 7", "host: last"),
        ("sleep 5", "host: no answer after 0.5 s"),
        ("exit 0", "trace.json: file: expected a file, found nothing"),
    ],
)
def test_a_child_that_dies_hangs_or_says_nothing(
    package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, body: str, message: str
) -> None:
    program = tmp_path / "python"
    program.write_text(f"#!/bin/sh\n{body}\n")
    os.chmod(program, 0o755)
    monkeypatch.setattr(host.sys, "executable", str(program))
    monkeypatch.setattr(host, "LIMIT_S", 0.5)
    with pytest.raises(DeviceError) as caught:
        host.run("", packages.load(package), Job(threads=1))
    assert str(caught.value) == message


# ── the native runner ───────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def compiler() -> None:
    """What builds the native runners."""
    if not (shutil.which("c++") or shutil.which("g++")):
        pytest.skip("no C++ compiler")


@pytest.fixture
def native(package: Path, compiler: None) -> Package:
    """A package of a target that has a native runner, and a compiler to build it."""
    return packages.load(package)


# Recipe → how many dB the native runner's logits are from those of this process; None: they agree to rounding.
RECIPES = {
    "onnx-int4": None,
    "onnx-fp32": None,
    "onnx-web": None,
    "executorch-fp32": None,
    "executorch-8da4w": 30.0,
}


@pytest.mark.usefixtures("compiler")
@pytest.mark.parametrize("recipe", RECIPES)
def test_the_native_runner_answers_as_python_does(exported: Export, tmp_path: Path, recipe: str) -> None:
    """Base, adapters and mixes, gates, completions, safety, and as many samples of every timing."""
    target = recipe.partition("-")[0]
    pytest.importorskip(target if target == "executorch" else "onnxruntime")
    package, runtime = packages.load(exported(recipe)), runtimes.load(target)
    forged = tmp_path / f"forged{runtime.suffix()}"
    foreign = Adapter("foreign", None, 1, np.zeros(1, bool), {})
    runtime.encode_adapter(foreign, package.manifest.slots, "sha256:" + "5" * 64, forged)
    cases = tuple(Case(name, mix, IDS, 20) for name, mix in MIXES.items())
    job = Job(
        threads=1,
        cases=cases,
        routes=((65, 66, 67), tuple(range(1, 90))),
        completions=(Completion("alpha", (70, 71), 6), Completion("beta", (70, 71), 1)),
        safety=Safety({"alpha": 1.0}, {"beta": 1.0}, SAFETY_IDS, str(forged)),
        timing=Timing("alpha", "beta", IDS, decode=2, rounds=1, swaps=3),
    )
    made, expected = host.run("native", package, job), host.answer(package, job)
    for name, reference in expected.logits.items():
        assert made.logits[name].shape == reference.shape == (len(IDS) - 20 + 1, 256)
        least = RECIPES[recipe]
        if least is None:
            np.testing.assert_allclose(made.logits[name], reference, atol=1e-3)
            assert made.answer.completions == expected.answer.completions
        else:
            noise = np.linalg.norm(made.logits[name] - reference)
            assert 20 * np.log10(np.linalg.norm(reference) / max(noise, 1e-30)) > least
    np.testing.assert_allclose(made.answer.gates, expected.answer.gates, atol=1e-5)
    assert len(made.answer.completions) == 2 and all(made.answer.completions)
    assert made.answer.safety == expected.answer.safety == SafetyTrace(aba=True, fresh=True, stale=True, refused=True)
    assert made.answer.timing is not None and expected.answer.timing is not None
    assert counted(made.answer.timing) == counted(expected.answer.timing)
    assert 0 < made.answer.peak_rss < expected.answer.peak_rss, "no Python in it"
    assert (made.answer.runtime, made.answer.arch) == (target, platform.machine())
    assert made.answer.emulated is expected.answer.emulated is False


def counted(timing: TimingTrace) -> dict[str, int]:
    lines = {"swap": timing.swap, "first": timing.first_token, "prefill": timing.prefill, "router": timing.router}
    return {name: len(samples) for name, samples in (lines | timing.decode).items()}


def test_the_native_runners_errors_are_one_line(native: Package) -> None:
    job = Job(threads=1, cases=(Case("base", {"gamma": 1.0}, IDS, 30),))
    with pytest.raises(DeviceError, match=r"^host: .*gamma") as caught:
        host.run("native", native, job)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("address", ["nonsense", "Native", "native:1"])
def test_an_unknown_address_is_one_line(native: Package, address: str) -> None:
    with pytest.raises(DeviceError) as caught:
        host.run(address, native, Job(threads=1))
    assert str(caught.value).startswith(f"--device: host:{address}: expected host, or host:native for ")
    assert "\n" not in str(caught.value)


def test_a_target_without_a_native_runner_is_named(exported: Export) -> None:
    with pytest.raises(DeviceError, match=r"--device: host:native: .*found torch"):
        host.run("native", packages.load(exported("torch-fp32")), Job(threads=1))
