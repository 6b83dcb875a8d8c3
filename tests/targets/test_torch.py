"""The null target: the whole flow where no device's runtime is installed."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open

from calora_export import devices, latency, pipeline, resources
from calora_export import package as packages
from calora_export.devices import host
from calora_export.jobs import Job, Trace
from calora_export.package import Package
from calora_export.runtimes import torch as runtime
from tests.bundles import LAYERS, copy_bundle, tiny_bundle
from tests.conftest import Export

DEVICE_RUNTIMES = ("onnx", "onnx_ir", "onnxruntime", "onnxscript", "executorch", "coremltools")


def test_the_flow_needs_no_device_runtime(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Export, add an adapter and validate, all in this process, in which importing any of them fails."""

    def here(device: str, package: Package, job: Job, progress: object) -> Trace:
        return host.answer(package, job)

    for name in [*sys.modules]:
        parts = name.split(".")
        if parts[0] in DEVICE_RUNTIMES or (parts[:1] == ["calora_export"] and parts[-1] in ("onnx", "executorch")):
            monkeypatch.setitem(sys.modules, name, None)
    for name in DEVICE_RUNTIMES:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setattr(devices, "run", here)
    monkeypatch.setattr(latency, "threads", lambda profile: 1)  # PyTorch's are those of this whole process
    package = pipeline.export(tiny, tmp_path / "package", "torch-fp32").path
    copy_bundle(tiny / "adapters" / "alpha", tmp_path / "late")
    pipeline.add_adapter(package, tmp_path / "late")
    report = pipeline.validate(package, tiny)
    assert report.passed, report.problems
    assert {row.case for row in report.parity} >= {"base", "adapter:alpha", "adapter:beta", "mix:alpha+beta"}
    assert all(row.sqnr_db is None or row.sqnr_db > 90 for row in report.parity)
    assert report.router is not None and report.router.decisions_equal


def test_every_file_of_tensors_is_safetensors(exported: Export) -> None:
    package = packages.load(exported("torch-fp32"))
    names = {name for name in package.manifest.files if not name.startswith("tokenizer/")}
    adapters = {f"adapters/{identifier}.safetensors" for identifier in ("alpha", "beta")}
    assert names == {"model.safetensors", "router.safetensors", "golden/golden.safetensors"} | adapters
    for name in names:
        with safe_open(package.path / name, "np") as file:
            assert len(file.metadata()) == 1


def test_the_model_holds_the_weights_in_fp32_and_names_its_inputs(exported: Export) -> None:
    path = exported("torch-fp32") / "model.safetensors"
    with safe_open(path, "np") as file:
        kinds = {name: file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118
    assert {kind for name, kind in kinds.items() if name.endswith("_proj.weight")} == {"F32"}
    assert len([name for name in kinds if name.endswith("_proj.weight")]) == 7 * LAYERS


def test_fp16_adapters_are_half_the_size(tiny: Path, exported: Export, tmp_path: Path) -> None:
    text = resources.recipes()["torch-fp32"].read_text().replace('adapters = "fp32"', 'adapters = "fp16"')
    (tmp_path / "half.toml").write_text(text)
    half = pipeline.export(tiny, tmp_path / "package", str(tmp_path / "half.toml"))
    whole = packages.load(exported("torch-fp32"))
    sizes = [sum(p.manifest.files[entry.file].size for entry in p.manifest.adapters) for p in (half, whole)]
    assert sizes[0] < 0.7 * sizes[1]
    sessions = [runtime.open_session(package, 1) for package in (half, whole)]
    for session in sessions:
        session.select({"alpha": 0.5, "beta": 0.5})
    logits = [session.extend(list(range(20))) for session in sessions]
    assert 0 < np.abs(logits[0] - logits[1]).max() < 0.05


def test_linear_adapters_make_a_package_without_recovery(tmp_path: Path) -> None:
    bundle = tiny_bundle(tmp_path / "bundle", adapters=("plain",), router=False, recovery=False)
    made = pipeline.export(bundle, tmp_path / "package", "torch-fp32")
    assert made.manifest.slots.recovery is None and made.manifest.router is None
