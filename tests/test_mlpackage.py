"""Reading a package without coremltools: where its files are, what is not a model, and how quick that is."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from calora_export import mlpackage
from calora_export.errors import PackageError
from tests.mil.programs import quiet, save


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A package by coremltools, with one weight that is large enough for the weight file."""
    weight = np.arange(64, dtype=np.float32)

    def body(m: Any, given: Any) -> dict[str, Any]:
        return {"y": m.mul(x=given["x"], y=weight)}

    path = tmp_path_factory.mktemp("written") / "model.mlpackage"
    return save(path, {"x": np.ones(64, np.float32)}, body)


@pytest.fixture
def package(written: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(written, tmp_path / "model.mlpackage"))


def test_finds_the_files_that_coremltools_names(written: Path) -> None:
    import coremltools as ct

    with quiet():
        model = ct.models.MLModel(str(written), skip_model_load=True)
    assert mlpackage.weight_file(written).parent.name == Path(model.weights_dir).name
    assert mlpackage.weight_file(written).read_bytes() == (Path(model.weights_dir) / "weight.bin").read_bytes()
    spec: Any = mlpackage.read_spec(written)
    assert spec.SerializeToString(deterministic=True) == model.get_spec().SerializeToString(deterministic=True)


def test_reads_without_coremltools(written: Path) -> None:
    """Its import takes ten seconds, of every command that looks at a package."""
    code = (
        "import sys; from pathlib import Path; from calora_export import mil\n"
        f"function = mil.load(Path({str(written)!r})).functions['main']\n"
        "print(function.inputs['x'], [name for name in sys.modules if name.startswith('coremltools')])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert found.stdout == "float32 [64] []\n"


def test_a_manifest_that_names_no_model_is_told(package: Path) -> None:
    manifest = json.loads((package / "Manifest.json").read_bytes())
    (package / "Manifest.json").write_text(json.dumps(manifest | {"rootModelIdentifier": "other"}))
    with pytest.raises(PackageError, match=r"^model.mlpackage/Manifest.json: rootModelIdentifier: expected a model"):
        mlpackage.read_spec(package)
    (package / "Manifest.json").unlink()
    with pytest.raises(PackageError, match=r"^model.mlpackage/Manifest.json: .*found FileNotFoundError$"):
        mlpackage.read_spec(package)


def test_a_damaged_specification_is_told(package: Path) -> None:
    file = mlpackage.model_file(package)
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2])
    with pytest.raises(PackageError, match=r"^model.mlpackage/model.mlmodel: not a Core ML model: [^\n]*$"):
        mlpackage.read_spec(package)
    file.unlink()
    with pytest.raises(PackageError, match=r"^model.mlpackage/model.mlmodel: not a Core ML model: [^\n]*No such file"):
        mlpackage.read_spec(package)


def test_another_kind_of_model_is_told(package: Path) -> None:
    """An empty file is a valid message of no model."""
    mlpackage.model_file(package).write_bytes(b"")
    with pytest.raises(PackageError, match=r"^model.mlpackage/model.mlmodel: type: expected mlProgram, found None$"):
        mlpackage.read_spec(package)
