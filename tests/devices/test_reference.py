from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

pytest.importorskip("coremltools", reason="the coreml extra is not installed")

from calora_export import devices, latency, mlpackage
from calora_export import package as packages
from calora_export.devices import reference
from calora_export.errors import DeviceError, PackageError
from calora_export.jobs import Case, Job
from calora_export.report import Report
from tests.conftest import Export
from tests.mlpackage_file import MlpackageFile
from tests.packages import copy_package, refresh, validated

INT4 = "coreml-int4"
ROWS = {"base", "adapter:alpha", "adapter:beta", "mix:alpha+beta", "route:alpha+beta", "sentence:1:alpha+beta"}


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """The device's own code, without a process of its own for each test."""
    monkeypatch.setattr(latency, "threads", lambda profile: 2)
    monkeypatch.setattr(devices, "run", lambda device, package, job, progress: reference.answer(package, job))


@pytest.fixture
def copy(exported: Export, tmp_path: Path) -> Path:
    return copy_package(exported(INT4), tmp_path / "package")


def red(report: Report) -> set[str]:
    return {row.case for row in report.parity if not row.passed}


def edit_spec(package: Path, edit: Callable[[Any], None]) -> None:
    spec: Any = mlpackage.read_spec(package / "model.mlpackage")
    edit(spec)
    mlpackage.model_file(package / "model.mlpackage").write_bytes(spec.SerializeToString())
    refresh(package)


def scale_of(package: Path, name: str) -> tuple[Path, int]:
    """The weight file, and where the scales of one compressed weight lie in it."""
    file = MlpackageFile(package)
    found = next(
        operation for operation in file.block.operations if any(output.name == name for output in operation.outputs)
    )
    at = found.inputs["scale"].arguments[0].value.blobFileValue.offset
    return mlpackage.weight_file(package / "model.mlpackage"), file.weights.blob(at).offset


@pytest.mark.usefixtures("in_process")
def test_a_saved_package_passes_with_every_check(copy: Path, tiny: Path) -> None:
    report = validated(copy, tiny, "reference")
    assert report.passed, report.problems
    assert {row.case for row in report.parity} == ROWS
    assert {row.against for row in report.parity} == {"source"}  # the bundle's own weights, nothing re-represented
    assert report.device.kind == "reference" and report.device.emulated
    assert report.latency.threads == 1  # whatever the machine has
    assert report.router is not None and report.router.decisions_equal
    assert list(report.activations) == ["embedding", "layer 0", "layer 1", "head"]
    assert all(peak is not None and 0 < peak < 100 for peak in report.activations.values())


@pytest.mark.usefixtures("in_process")
def test_a_multifunction_package_passes_without_mixes(exported: Export, tiny: Path) -> None:
    report = validated(exported("coreml-multifunction"), tiny, "reference")
    assert report.passed, report.problems
    cases = {row.case for row in report.parity}
    assert {"base", "adapter:alpha", "adapter:beta"} < cases
    assert not any("+" in case for case in cases)


@pytest.mark.usefixtures("in_process")
def test_one_flipped_byte_of_the_weights_is_named(copy: Path, tiny: Path) -> None:
    file, offset = scale_of(copy, "model_layers_0_mlp_down_proj_weight_q")
    data = bytearray(file.read_bytes())
    data[offset + 1] ^= 0x40  # the exponent of one scale, in little endian
    file.write_bytes(data)
    report = validated(copy, tiny, "reference")
    assert any(
        line.startswith("file: model.mlpackage/Data/com.apple.CoreML/weights/weight.bin") for line in report.problems
    )
    assert red(report) == ROWS
    refresh(copy)
    assert red(validated(copy, tiny, "reference")) == ROWS  # found by its numbers alone, too


@pytest.mark.usefixtures("in_process")
def test_exchanged_adapters_are_red_and_the_base_is_not(copy: Path, tiny: Path) -> None:
    alpha, beta = (copy / "adapters" / f"{name}.safetensors" for name in ("alpha", "beta"))
    first, second = alpha.read_bytes(), beta.read_bytes()
    alpha.write_bytes(second)
    beta.write_bytes(first)
    refresh(copy)
    assert red(validated(copy, tiny, "reference")) == ROWS - {"base"}


@pytest.mark.usefixtures("in_process")
def test_a_renamed_input_is_named(copy: Path, tiny: Path) -> None:
    def rename(spec: Any) -> None:
        next(given for given in spec.description.input if given.name == "adapter").name = "adaptor"
        function = spec.mlProgram.functions["main"]
        next(given for given in function.inputs if given.name == "adapter").name = "adaptor"
        for operation in function.block_specializations["CoreML8"].operations:
            for argument in (part for value in operation.inputs.values() for part in value.arguments):
                if argument.name == "adapter":
                    argument.name = "adaptor"

    edit_spec(copy, rename)
    with pytest.raises(PackageError, match="adapt[eo]r"):
        validated(copy, tiny, "reference")


@pytest.mark.usefixtures("in_process")
def test_two_values_of_one_name_are_refused_as_core_ml_does(copy: Path, tiny: Path) -> None:
    def rename(spec: Any) -> None:
        operations = spec.mlProgram.functions["main"].block_specializations["CoreML8"].operations
        linears = [operation for operation in operations if operation.type == "linear"]
        linears[1].outputs[0].name = linears[0].outputs[0].name

    edit_spec(copy, rename)
    with pytest.raises(PackageError, match="output: expected a name of its own, found model_layers_0.* again"):
        validated(copy, tiny, "reference")


@pytest.mark.usefixtures("in_process")
def test_what_float16_can_not_hold_is_a_problem_of_its_layer(copy: Path, tiny: Path) -> None:
    """An adapter whose rows meet at 10^5: its own logits are infinite, and the report says where it began."""
    file = copy / "adapters" / "alpha.safetensors"
    data = bytearray(file.read_bytes())
    rows = load_file(file)["rows"]
    start = len(data) - sum(array.nbytes for array in load_file(file).values())
    position = data.find(rows.tobytes(), start - 16)
    data[position : position + rows.nbytes] = np.full_like(rows, 300).tobytes()
    file.write_bytes(data)
    refresh(copy)
    report = validated(copy, tiny, "reference")
    assert not report.passed
    lines = [line for line in report.problems if line.startswith("activations: layer ")]
    assert lines and lines[0].startswith("activations: layer 0 reaches") and lines[0].endswith("float16 ends at 65504")


def test_it_answers_from_a_process_of_its_own(exported: Export) -> None:
    package = packages.load(exported(INT4))
    job = Job(threads=1, cases=(Case(name="base", mix={}, ids=tuple(range(1, 9)), prefill=6),))
    trace = devices.run("reference", package, job)
    assert trace.logits["base"].shape == (3, package.manifest.model.vocab)
    assert trace.answer.peaks and trace.answer.emulated and trace.answer.timing is None
    here = reference.answer(package, job)
    assert np.array_equal(trace.logits["base"], here.logits["base"])


def test_other_packages_are_refused(package: Path) -> None:
    with pytest.raises(DeviceError, match="--device: reference: expected a Core ML package, found one for onnx"):
        devices.run("reference", packages.load(package), Job(threads=1))


@pytest.mark.skipif(sys.platform == "darwin", reason="there is Core ML here")
def test_host_says_where_core_ml_is(exported: Export) -> None:
    with pytest.raises(DeviceError, match="host: coreml: system: expected macOS, found linux .use --device reference"):
        devices.run("host", packages.load(exported(INT4)), Job(threads=1))
