from __future__ import annotations

import shutil
import tomllib
from pathlib import Path

import pytest

from calora_export import resources
from calora_export.errors import RecipeError

REPOSITORY = Path(__file__).resolve().parents[1]


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A stand-in for site-packages: the module's folder with `_data` beside it. Returns `_data`."""
    package = tmp_path / "site-packages" / "calora_export"
    package.mkdir(parents=True)
    shutil.copy(resources.__file__, package / "resources.py")
    monkeypatch.setattr(resources, "__file__", str(package / "resources.py"))
    # What a checkout would offer lies one level up and must not be read.
    _write(package.parent / "recipes" / "stranger.toml")
    return package / "_data"


def _write(file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("")


def test_a_checkout_reads_its_own_top_level_folders() -> None:
    assert resources.root() == REPOSITORY
    assert resources.recipes()["onnx-int4"] == REPOSITORY / "recipes" / "onnx-int4.toml"
    assert resources.target_dir("onnx") == REPOSITORY / "targets" / "onnx"


def test_an_installed_package_reads_only_its_data(installed: Path) -> None:
    for name in ("b", "a"):
        _write(installed / "recipes" / f"{name}.toml")
        _write(installed / "devices" / f"{name}.toml")
        _write(installed / "targets" / name / "target.toml")
    _write(installed / "recipes" / "README.md")
    _write(installed / "targets" / "no-toml" / "kit" / "readme.md")
    assert list(resources.recipes().items()) == [(n, installed / "recipes" / f"{n}.toml") for n in "ab"]
    assert list(resources.devices().items()) == [(n, installed / "devices" / f"{n}.toml") for n in "ab"]
    assert list(resources.targets().items()) == [(n, installed / "targets" / n) for n in "ab"]
    assert resources.target_dir("b") == installed / "targets" / "b"


def test_an_unknown_target_is_refused_in_one_line_that_names_the_known_ones(installed: Path) -> None:
    _write(installed / "targets" / "coreml" / "target.toml")
    _write(installed / "targets" / "onnx" / "target.toml")
    with pytest.raises(RecipeError) as error:
        resources.target_dir("../recipes")
    assert str(error.value) == (
        f"{installed / 'targets'}: target: expected one of coreml, onnx, found '../recipes'"
    )


def test_every_file_that_ships_is_valid_toml() -> None:
    files = [*resources.recipes().values(), *resources.devices().values()]
    files += [folder / "target.toml" for folder in resources.targets().values()]
    assert files
    for file in files:
        assert tomllib.loads(file.read_text(encoding="utf-8")), file
