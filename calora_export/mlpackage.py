"""A saved .mlpackage: its specification and its weight file.

The protobuf classes are those of coremltools, loaded without the rest of it, whose import takes ten seconds.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import re
import sys
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

from calora_export.errors import PackageError, UnsupportedError, mismatch

BASE = ""  # in the place of an adapter's id
_PRIVATE = "calora_export._coreml_proto"


@cache
def messages(module: str) -> ModuleType:
    """One of coremltools' protobuf modules, such as `Model_pb2`; UnsupportedError when coremltools is not installed."""
    if _PRIVATE not in sys.modules:
        found = importlib.util.find_spec("coremltools")
        if found is None or found.origin is None:
            hint = "pip install 'calora-export[coreml]'"
            raise UnsupportedError(mismatch("coreml", "coremltools", "installed", "not installed", hint))
        package = ModuleType(_PRIVATE)
        package.__path__ = [str(Path(found.origin).parent / "proto")]
        sys.modules[_PRIVATE] = package
    return importlib.import_module(f"{_PRIVATE}.{module}")


def model_file(package: Path) -> Path:
    """The file of the package that holds its specification."""
    name = f"{package.name}/Manifest.json"
    try:
        manifest = json.loads((package / "Manifest.json").read_bytes())
        return package / "Data" / manifest["itemInfoEntries"][manifest["rootModelIdentifier"]]["path"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise PackageError(mismatch(name, "rootModelIdentifier", "a model", type(error).__name__)) from error


def weight_file(package: Path) -> Path:
    """The file that the specification's blob values refer to as `@model_path/weights/weight.bin`."""
    return model_file(package).parent / "weights" / "weight.bin"


def read_spec(package: Path) -> object:
    """The specification, a `Model_pb2.Model`; PackageError when the file is not one."""
    from google.protobuf.message import DecodeError

    file = model_file(package)
    spec = messages("Model_pb2").Model()
    try:
        spec.ParseFromString(file.read_bytes())
    except (OSError, DecodeError) as error:
        raise PackageError(f"{package.name}/{file.name}: not a Core ML model: {error}") from error
    if not spec.HasField("mlProgram"):
        raise PackageError(mismatch(f"{package.name}/{file.name}", "type", "mlProgram", spec.WhichOneof("Type")))
    return spec


def states(package: Path, function: str | None) -> tuple[str, ...]:
    """The states of a function, None for the one that runs by default."""
    about: Any = read_spec(package)
    about = about.description
    wanted = function or about.defaultFunctionName
    described = next((found for found in about.functions if found.name == wanted), about)
    return tuple(state.name for state in described.state)


def function_names(adapters: Iterable[str]) -> dict[str, str]:
    """Adapter, or BASE → the function of a multifunction model that has it baked in: its id as Core ML allows it.

    UnsupportedError when two are alike.
    """
    found = {BASE: "base"}
    for name in adapters:
        function = re.sub(r"\W", "_", name if name[0].isalpha() else f"_{name}")
        if function in found.values():
            expected = "an id that is a function's name of its own"
            raise UnsupportedError(mismatch("bundle.json", "adapters", expected, f"{name}, which would be {function}"))
        found[name] = function
    return found
