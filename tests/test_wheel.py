"""The wheel holds exactly what the repository tracks of the package and its data, and works on its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
import zipfile
from dataclasses import dataclass
from email import message_from_string
from pathlib import Path

import pytest

from calora_export.version import VERSION

REPOSITORY = Path(__file__).resolve().parents[1]
DATA = ("devices", "recipes", "targets")
DIST_INFO = f"calora_export-{VERSION}.dist-info"


@dataclass(frozen=True)
class Installed:
    """A virtual environment outside the checkout: the wheel, and behind it this environment's packages."""

    bin: Path
    site_packages: Path


def _run(command: list[str | Path], cwd: Path) -> str:
    """Standard output of a command that must succeed; PYTHONPATH can not smuggle the checkout in."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("dist")
    _run([sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", out, "."], cwd=REPOSITORY)
    (file,) = out.iterdir()
    return file


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Installed:
    environment = tmp_path_factory.mktemp("clean")
    _run([sys.executable, "-m", "venv", "--without-pip", environment], cwd=environment)
    python = environment / "bin" / "python"
    install = ["install", "--quiet", "--no-deps", "--no-index", "--disable-pip-version-check", wheel]
    _run([sys.executable, "-m", "pip", "--python", python, *install], cwd=environment)
    scheme = {"base": str(environment), "platbase": str(environment)}
    site_packages = Path(sysconfig.get_path("purelib", "venv", scheme))
    # A path from a .pth file goes behind the wheel, and .pth files there (an editable install) are not read.
    (site_packages / "outer.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return Installed(python.parent, site_packages)


def _names(wheel: Path) -> list[str]:
    with zipfile.ZipFile(wheel) as archive:
        return archive.namelist()


def _repository_files(*folders: str) -> set[str]:
    """Paths of the files that are tracked, or new and not ignored."""
    listing = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", "--"]
    paths = _run([*listing, *folders], cwd=REPOSITORY).split("\0")
    return {path for path in paths if path and (REPOSITORY / path).is_file()}


def test_the_only_importable_name_is_calora_export(wheel: Path) -> None:
    assert {name.split("/")[0] for name in _names(wheel)} == {"calora_export", DIST_INFO}


def test_the_file_list_is_exact(wheel: Path) -> None:
    info = ("METADATA", "RECORD", "WHEEL", "entry_points.txt", "licenses/LICENSE")
    expected = {f"{DIST_INFO}/{name}" for name in info}
    expected |= _repository_files("calora_export")
    expected |= {f"calora_export/_data/{path}" for path in _repository_files(*DATA)}
    names = _names(wheel)
    assert set(names) == expected
    assert len(names) == len(expected)


@pytest.mark.parametrize(
    "name",
    [
        "calora_export/_data/recipes/onnx-int4.toml",
        "calora_export/_data/targets/onnx/target.toml",
        "calora_export/demo/bundle/bundle.json",
        "calora_export/demo/bundle/base/model.safetensors",
        "calora_export/py.typed",
    ],
)
def test_what_users_need_is_inside(wheel: Path, name: str) -> None:
    assert name in _names(wheel)


def test_metadata_pins_torch_exactly_and_declares_the_extras(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        metadata = message_from_string(archive.read(f"{DIST_INFO}/METADATA").decode())
    assert "torch==2.13.0" in metadata.get_all("Requires-Dist", [])
    assert {"onnx", "executorch", "coreml", "all"} <= set(metadata.get_all("Provides-Extra", []))
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Description-Content-Type"] == "text/markdown"


def test_the_installed_wheel_lists_its_recipes_outside_the_checkout(
    installed: Installed, tmp_path: Path
) -> None:
    where = "import calora_export.resources as r; print(r.__file__, r.root(), sep='\\n')"
    module, root = _run([installed.bin / "python", "-I", "-c", where], cwd=tmp_path).splitlines()
    package = installed.site_packages / "calora_export"
    assert (Path(module), Path(root)) == (package / "resources.py", package / "_data")
    listing = _run([installed.bin / "calora-export", "list", "recipes"], cwd=tmp_path)
    document = json.loads(_run([installed.bin / "calora-export", "list", "recipes", "--json"], cwd=tmp_path))
    for recipe in (REPOSITORY / "recipes").glob("*.toml"):
        assert recipe.stem in listing
        assert recipe.stem in json.dumps(document)
