"""What every device does alike: one suite for the host, a native runner, ssh, adb and a browser."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from calora_export import devices, pipeline, runtimes
from calora_export import package as packages
from calora_export.adapters import Adapter
from calora_export.devices import host
from calora_export.errors import DeviceError
from calora_export.jobs import Case, Completion, Job, Safety, SafetyTrace, Timing, TimingTrace
from calora_export.package import Package
from tests.conftest import Export
from tests.packages import copy_package

IDS = tuple(range(40, 60))
MIXES = {"base": {}, "alpha": {"alpha": 1.0}, "mix": {"alpha": 0.7, "beta": -0.4}, "none": {"alpha": 0.0}}
CASES = tuple(Case(name, mix, IDS, 16) for name, mix in MIXES.items())


@dataclass(frozen=True)
class Place:
    """A device as `--device` names it, and a package that runs there."""

    device: str
    package: Path

    @property
    def opened(self) -> Package:
        return packages.load(self.package)


@pytest.fixture(
    params=[
        ("host", "onnx-int4"),
        ("browser", "onnx-web"),
        ("ssh", "onnx-int4"),
        ("ssh", "executorch-8da4w"),
        pytest.param(("host:native", "onnx-int4"), marks=pytest.mark.heavy),
        pytest.param(("adb", "onnx-int4"), marks=pytest.mark.phone),
        pytest.param(("adb", "executorch-8da4w"), marks=pytest.mark.phone),
    ],
    ids="-".join,
)
def place(request: pytest.FixtureRequest, exported: Export, monkeypatch: pytest.MonkeyPatch) -> Place:
    kind, recipe = request.param
    monkeypatch.setattr("calora_export.latency.threads", lambda _: 1)  # several wait for each other under emulation
    package = exported(recipe)
    device = kind if kind.startswith("host") else request.getfixturevalue(f"{kind}_bed").device
    return Place(device, package)


def test_a_package_is_validated_there(tiny: Path, tmp_path: Path, place: Place) -> None:
    """Base, every adapter, the mix, the router's own choices, safety, tasks."""
    copy = copy_package(place.package, tmp_path / "package")
    report = pipeline.validate(copy, tiny, place.device, lambda _: None)
    assert report.passed, report.problems
    assert {row.case.partition(":")[0] for row in report.parity} >= {"base", "adapter", "mix", "route"}
    emulated = place.device.startswith("adb")
    assert report.device.kind == place.device.partition(":")[0]
    assert report.device.emulated is emulated and (report.device.arch == "aarch64") is emulated
    assert (report.latency.peak_rss_mb or 0) > 1
    assert report.runtime


def test_everything_in_a_job_is_answered(place: Place, tmp_path: Path) -> None:
    package = place.opened
    runtime = runtimes.load(package.manifest.target)
    forged = tmp_path / f"forged{runtime.suffix()}"
    foreign = Adapter("foreign", None, 1, np.zeros(1, bool), {})
    runtime.encode_adapter(foreign, package.manifest.slots, "sha256:" + "5" * 64, forged)
    job = Job(
        threads=1,
        cases=CASES,
        routes=((65, 66, 67), tuple(range(1, 90))),
        completions=(Completion("alpha", (70, 71), 6), Completion("beta", (70, 71), 1)),
        safety=Safety({"alpha": 1.0}, {"beta": 1.0}, IDS, str(forged)),
        timing=Timing("alpha", "beta", IDS, decode=2, rounds=1, swaps=3),
    )
    made, expected = devices.run(place.device, package, job), host.answer(package, job)
    assert list(made.logits) == list(expected.logits)
    for name, reference in expected.logits.items():
        assert made.logits[name].shape == reference.shape
        assert np.linalg.norm(made.logits[name] - reference) < 0.05 * np.linalg.norm(reference)
    assert np.array_equal(made.logits["none"], made.logits["base"]), "bit for bit"
    assert np.abs(made.logits["alpha"] - made.logits["base"]).max() > 0.1
    np.testing.assert_allclose(made.answer.gates, expected.answer.gates, atol=1e-5)
    assert [len(ids) > 0 for ids in made.answer.completions] == [True, True]
    assert made.answer.safety == SafetyTrace(aba=True, fresh=True, stale=True, refused=True)
    assert made.answer.timing is not None and expected.answer.timing is not None
    assert counted(made.answer.timing) == counted(expected.answer.timing)


def counted(timing: TimingTrace) -> dict[str, int]:
    lines = {"swap": timing.swap, "first": timing.first_token, "prefill": timing.prefill, "router": timing.router}
    return {name: len(samples) for name, samples in (lines | timing.decode).items()}


def test_what_it_refuses_is_one_line(place: Place) -> None:
    with pytest.raises(DeviceError) as caught:
        devices.run(place.device, place.opened, Job(threads=1, cases=(Case("base", {"gamma": 1.0}, IDS, 16),)))
    line = str(caught.value)
    assert line.startswith(f"{place.device.removesuffix(':native')}: ") and "\n" not in line
    assert "expected one of alpha, beta, found gamma" in line
