"""The example of docs/testing.md, run as an app team's CI does: green, and red in the right test."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.packages import copy_package
from tests.tampering import edit_adapter

EXAMPLE = Path(__file__).parents[1] / "docs" / "examples" / "app-tests"


@pytest.fixture
def app(package: Path, tiny: Path, tmp_path: Path) -> Path:
    """An app's repository: the example, with a package and its bundle beside it."""
    repository = Path(shutil.copytree(EXAMPLE, tmp_path / "app"))
    copy_package(package, repository / "package")
    (repository / "bundle").symlink_to(tiny)
    return repository


def checked(app: Path, *arguments: str) -> tuple[int, str]:
    command = [sys.executable, "-m", "pytest", "-q", "-rA", "--tb=short", "-p", "no:cacheprovider", *arguments]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run(command, cwd=app, capture_output=True, text=True, env=environment)
    return done.returncode, done.stdout + done.stderr


def test_the_example_passes_and_a_corrupt_adapter_is_red_in_its_own_test(app: Path) -> None:
    code, said = checked(app)
    assert code == 0 and "3 passed" in said, said
    assert "PASSED test_on_device.py::test_adapter[alpha]" in said and (app / "package" / "report").is_dir()

    edit_adapter(app / "package", "beta", lambda arrays: arrays["model.layers.0.self_attn.q_proj.up"].__imul__(-1))
    code, said = checked(app)
    assert code == 1
    assert "PASSED test_on_device.py::test_adapter[alpha]" in said
    assert "FAILED test_on_device.py::test_adapter[beta]" in said
    assert "FAILED test_on_device.py::test_everything_else" in said


def test_what_is_not_there_is_said_in_one_line(app: Path) -> None:
    code, said = checked(app, "--calora-device", "pigeon", "-k", "everything")
    assert code == 1 and "--device: pigeon: expected one of " in said and "Traceback" not in said
    code, said = checked(app, "--calora-package", "nowhere")
    assert code == 2 and "nowhere" in said and "Traceback" not in said, said
    (app / "pytest.ini").write_text("[pytest]\n")
    code, said = checked(app)
    assert code == 2 and "say which: calora_package in pytest's configuration, or --calora-package" in said
