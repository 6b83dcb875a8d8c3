"""The native ONNX Runtime runner: how it reads adapter files, and its command line against wrong input.

What it computes is compared with Python's session in tests/devices/test_host.py.
"""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from calora_export import native, pipeline
from calora_export import package as packages
from calora_export.devices import host
from calora_export.jobs import Case, Job
from tests import pruned
from tests.bundles import edit_json
from tests.conftest import Variant
from tests.packages import copy_package, refresh
from tests.tampering import Arrays, adapter_file, edit_adapter

pytest.importorskip("onnxruntime", reason="the onnx extra is not installed")
IDS = tuple(range(40, 60))


@pytest.fixture(scope="session")
def runner() -> Path:
    if not (shutil.which("c++") or shutil.which("g++")):
        pytest.skip("no C++ compiler")
    return native.runner("onnx")


def generated(runner: Path, package: Path, *options: str) -> subprocess.CompletedProcess[str]:
    command = [str(runner), str(package), "--prompt-ids", "5,6,7", "--tokens", "3", *options]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.mark.usefixtures("runner")
@pytest.mark.parametrize("mix", [{"alpha": 1.0}, {"alpha": 0.7, "beta": -0.4}, {"beta": 0.1}])
def test_fp16_rows_are_scaled_as_numpy_does(tiny: Path, variant: Variant, mix: dict[str, float]) -> None:
    package = packages.load(variant(tiny, "onnx-fp32", adapters="fp16"))
    job = Job(threads=1, cases=(Case("base", {}, IDS, 16), Case("mix", mix, IDS, 16)))
    made, expected = host.run("native", package, job), host.answer(package, job)
    np.testing.assert_allclose(made.logits["mix"], expected.logits["mix"], atol=1e-4)
    assert np.abs(made.logits["mix"] - made.logits["base"]).max() > 1e-2


@pytest.mark.usefixtures("runner")
def test_layers_with_numbers_of_heads_of_their_own(tmp_path: Path) -> None:
    bundle = pruned.make(tmp_path).bundle
    package = pipeline.export(bundle, tmp_path / "package", "onnx-fp32")
    job = Job(threads=1, cases=(Case("base", {}, IDS, 16), Case("one", {"one": 1.0}, IDS, 16)))
    made, expected = host.run("native", package, job), host.answer(package, job)
    for case in ("base", "one"):
        np.testing.assert_allclose(made.logits[case], expected.logits[case], atol=1e-4)


def test_the_program_runs_with_the_loader_and_libraries_that_it_brings(runner: Path, package: Path) -> None:
    """As on a device: from the directory of its files, whatever the system has."""
    script = f"{native.command(runner, native.host_arch())} {package} --prompt-ids 5,6,7 --tokens 3"
    done = subprocess.run(["env", "-i", "/bin/sh", "-c", script], cwd=runner.parent, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, generated(runner, package).stdout), done.stderr


# ── wrong input ───────────────────────────────────────────────────────────────────────────────────────────────────────


def refused(runner: Path, package: Path, expected: str, *options: str) -> None:
    done = generated(runner, package, *options)
    assert (done.returncode, done.stdout) == (1, "") and done.stderr.count("\n") == 1, done.stderr
    assert expected in done.stderr


EDITS: dict[str, Callable[[Arrays, str, str], object]] = {
    "base_fingerprint: expected uint8 [32], found nothing": lambda arrays, *_: arrays.pop("base_fingerprint"),
    "expected no such slot, found fp32 [3]": lambda arrays, *_: arrays.update(extra=np.zeros(3, np.float32)),
    "found nothing": lambda arrays, up, down: arrays.pop(down),
    "found fp16 [": lambda arrays, up, down: arrays.update({up: arrays[up].astype(np.float16)}),
    "found another type [": lambda arrays, up, down: arrays.update({up: arrays[up].astype(np.float64)}),
    "expected fp32 [8, 64], found fp32 [4, 64]": lambda arrays, up, down: arrays.update({up: arrays[up][:4]}),
    "base_fingerprint: expected sha256:": lambda arrays, *_: arrays["base_fingerprint"].__ixor__(1),
}


@pytest.mark.parametrize("expected", EDITS)
def test_an_adapter_of_another_form_is_one_line(runner: Path, package: Path, tmp_path: Path, expected: str) -> None:
    copy = copy_package(package, tmp_path / "package")
    slots = packages.load(copy).manifest.slots
    up, down = slots.tensors[-1].up, slots.tensors[-1].down
    edit_adapter(copy, "alpha", lambda arrays: EDITS[expected](arrays, up, down))
    refused(runner, copy, expected, "--mix", "alpha=1")


def test_a_damaged_adapter_is_refused_and_never_a_crash(runner: Path, package: Path, tmp_path: Path) -> None:
    """Cut anywhere, or with any of the bytes that say where things are changed."""
    copy = copy_package(package, tmp_path / "package")
    file = adapter_file(copy, "alpha")
    whole = file.read_bytes()
    noise = np.random.default_rng(0)
    for turn in range(40):
        data = bytearray(whole)
        if turn % 4 == 0:
            data = data[: int(noise.integers(0, len(whole)))]
        else:
            places = noise.integers(8, 4096 if turn % 2 else len(whole), 16)
            data[:] = bytes(255 if i in set(places.tolist()) else byte for i, byte in enumerate(data))
        file.write_bytes(data)
        refresh(copy)
        done = generated(runner, copy, "--mix", "alpha=0.5")
        assert done.returncode in (0, 1), f"turn {turn}: {done.returncode} {done.stderr}"
        assert done.returncode == 0 or done.stderr.startswith("alpha.onnx_adapter: "), done.stderr


@pytest.mark.parametrize(
    ("keys", "value", "expected"),
    [
        (("target",), "executorch", "package.json: target: expected onnx, found executorch"),
        (("settings", "adapter_inputs"), "functions", "settings.adapter_inputs: expected optional, found functions"),
        (("slots", "dtype"), "bf16", "package.json: slots.dtype: expected fp32, fp16 or int8, found bf16"),
        (("model", "kv_heads"), None, "package.json: model.kv_heads: expected an integer, found null"),
        (("model", "head_dim"), 3, "model.onnx: ONNX Runtime refuses it: "),
        (("model", "context"), 2, "model.context: expected at most 2 tokens of prompt and answer, found 3"),
    ],
)
def test_a_wrong_value_is_one_line(
    runner: Path, package: Path, tmp_path: Path, keys: tuple[str, ...], value: object, expected: str
) -> None:
    copy = copy_package(package, tmp_path / "package")

    def change(document: dict) -> None:
        for key in keys[:-1]:
            document = document[key]
        document[keys[-1]] = value

    edit_json(copy / "package.json", change)
    refused(runner, copy, expected)


def test_a_graph_that_is_none_is_one_line(runner: Path, package: Path, tmp_path: Path) -> None:
    copy = copy_package(package, tmp_path / "package")
    (copy / "model.onnx").write_bytes(b"no graph at all")
    refresh(copy)
    refused(runner, copy, "model.onnx: ONNX Runtime refuses it: ")


def test_a_missing_library_is_one_line(runner: Path, package: Path, tmp_path: Path) -> None:
    alone = Path(shutil.copy2(runner, tmp_path / runner.name))
    refused(alone, package, "libonnxruntime.so.1: library: expected beside this program, found ")
