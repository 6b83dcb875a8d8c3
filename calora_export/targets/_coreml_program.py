"""From a MIL program to a saved .mlpackage, through coremltools' own back end.

coremltools checks every operator's types while a program is built, and writes the file; what of it changes from run to
run (identifiers, dates) is made to depend on the model alone.
"""

from __future__ import annotations

import json
import shutil
import tempfile
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from calora_export import mlpackage, quiet
from calora_export.errors import UnsupportedError
from calora_export.routers import Router

with quiet.absent("executorch", "sklearn", "tensorflow", "torchao", "xgboost"):  # seconds, 250 MB and nothing we use
    import coremltools as ct
    from coremltools.converters.mil.converter import mil_convert
    from coremltools.converters.mil.mil import Builder, Function, Program, Var, get_new_symbol, types
    from coremltools.converters.mil.mil.passes.pass_registry import PASS_REGISTRY

# What is made at run time, or annotated otherwise than it is used, a type checker can not know.
mb: Any = Builder
DEDUPLICATE: Any = PASS_REGISTRY["common::const_deduplication"]
TARGET = ct.target.iOS18
DTYPES = {np.int32: types.int32, np.float16: types.fp16}
DATED = "com.github.apple.coremltools.conversion_date"
LONGEST_TEXT = 4096  # tokens that a router reads at once


@dataclass(frozen=True)
class Flexible:
    """A length that a call chooses: any from 1 to `most`, or one of `only`. One name is one length."""

    name: str
    most: int
    only: tuple[int, ...] = ()


Size = int | Flexible


@dataclass(frozen=True)
class Input:
    """A tensor that every call gives."""

    name: str
    shape: tuple[Size, ...]
    dtype: type[np.generic]
    description: str


@dataclass(frozen=True)
class State:
    """A float16 tensor that stays with the model between calls, zero at first."""

    name: str
    shape: tuple[int, ...]
    description: str


@dataclass(frozen=True)
class Description:
    """What Xcode shows. outputs: name → text."""

    text: str
    author: str
    licence: str
    version: str
    facts: Mapping[str, str]
    outputs: Mapping[str, str]


@contextmanager
def stage(name: str) -> Iterator[None]:
    """What coremltools says, in one line that names the stage."""
    try:
        yield
    except (ValueError, TypeError, KeyError, NotImplementedError, RuntimeError) as error:
        said = str(error).strip().partition("\n")[0] or type(error).__name__
        raise UnsupportedError(f"coreml: {name}: {said}") from error


Values = Mapping[str, Var]
Body = Callable[[Values], Values]


def build(inputs: Sequence[Input], states: Sequence[State], bodies: Mapping[str, Body]) -> Program:
    """A program of functions that take the same inputs and states; the first is the one that runs by default.

    A body gets inputs and states by name and returns the outputs by name. Weights alike are stored once.
    """
    program = Program()
    for name, body in bodies.items():
        program.add_function(name, _function(inputs, states, body))
    first = next(iter(bodies))
    if first != "main":  # what coremltools calls a program's only function
        program.default_function_name = first
        program.export_as_multifunction = True
        DEDUPLICATE._deduplicate_const_across_functions(program)
    return program


def _function(inputs: Sequence[Input], states: Sequence[State], body: Body) -> Function:
    lengths = {size.name: size for given in inputs for size in given.shape if isinstance(size, Flexible)}
    symbols = {name: get_new_symbol() for name in lengths}
    placeholders = {
        given.name: mb.placeholder(
            tuple(symbols[size.name] if isinstance(size, Flexible) else size for size in given.shape),
            DTYPES[given.dtype],
        )
        for given in inputs
    }
    placeholders |= {state.name: mb.state_tensor_placeholder(state.shape, types.fp16) for state in states}
    with Function(placeholders, opset_version=TARGET) as function:
        outputs = body(function.inputs)
        for name, value in outputs.items():
            value.name = name
        function.set_outputs(list(outputs.values()))
    ranges = {name: ct.RangeDim(1, size.most) for name, size in lengths.items() if not size.only}
    kinds: Any = tuple(ct.TensorType(given.name, _shape(given.shape, ranges), given.dtype) for given in inputs)
    function.set_input_types(kinds)
    return function


def _shape(shape: tuple[Size, ...], ranges: Mapping[str, ct.RangeDim]) -> object:
    """As coremltools takes it: sizes and ranges, or every shape there may be."""
    choices = next((size.only for size in shape if isinstance(size, Flexible) and size.only), ())
    if not choices:
        return tuple(ranges[size.name] if isinstance(size, Flexible) else size for size in shape)
    shapes = [tuple(choice if isinstance(size, Flexible) else size for size in shape) for choice in choices]
    return ct.EnumeratedShapes(shapes, default=shapes[0])


def save(
    program: Program, path: Path, description: Description, inputs: Sequence[Input], states: Sequence[State]
) -> None:
    """Write the package. The same program gives the same bytes."""
    with stage("writing the model"), quiet.libraries():
        model: Any = mil_convert(
            program,
            convert_from="milinternal",
            convert_to="mlprogram",
            compute_units=ct.ComputeUnit.ALL,
            specification_version=TARGET.value,
            skip_model_load=True,
            pass_pipeline=ct.PassPipeline(["common::dedup_op_and_var_names"]),  # what is written is what is meant
        )
    texts = {given.name: given.description for given in (*inputs, *states)}
    _write(model, path, description, texts)


def save_traced(router: Router, path: Path) -> None:
    """Convert a router from torch, in fp32: its decisions are to be those of the reference."""
    example = torch.zeros(1, 8, dtype=torch.int32)
    tokens = torch.export.Dim("tokens", min=1, max=LONGEST_TEXT)
    with stage("converting the router"), torch.no_grad(), quiet.libraries():
        traced = torch.export.export(router.eval(), (example,), dynamic_shapes={"ids": {1: tokens}}, strict=False)
        model: Any = ct.convert(
            traced.run_decompositions({}),
            outputs=[ct.TensorType("gates")],
            minimum_deployment_target=TARGET,
            compute_precision=ct.precision.FLOAT32,
            skip_model_load=True,
        )
    description = Description("Which adapters a prompt needs.", "", "", "", {}, {"gates": "One gate per class."})
    _write(model, path, description, {"ids": "Token ids of the prompt, from the router's own tokenizer."})


def _write(model: ct.models.MLModel, path: Path, description: Description, texts: Mapping[str, str]) -> None:
    spec = model.get_spec()
    about = spec.description
    for part in (about, *about.functions):
        for feature in (*part.input, *part.state, *part.output):
            feature.shortDescription = {**texts, **description.outputs}.get(feature.name, "")
    metadata = about.metadata
    metadata.shortDescription, metadata.author = description.text, description.author
    metadata.license, metadata.versionString = description.licence, description.version
    metadata.userDefined.pop(DATED, None)
    metadata.userDefined.update(description.facts)
    with tempfile.TemporaryDirectory(dir=path.parent) as scratch, quiet.libraries():
        draft = Path(scratch) / path.name
        ct.models.utils.save_spec(spec, str(draft), weights_dir=model.weights_dir)
        _settle(draft)
        shutil.move(draft, path)


def _settle(package: Path) -> None:
    """Replace random identifiers by ones that depend on the paths, and the specification by its one canonical form."""
    manifest = json.loads((package / "Manifest.json").read_bytes())
    renamed = {
        old: str(uuid.uuid5(uuid.NAMESPACE_URL, entry["path"])) for old, entry in manifest["itemInfoEntries"].items()
    }
    manifest["itemInfoEntries"] = {
        renamed[old]: entry
        for old, entry in sorted(manifest["itemInfoEntries"].items(), key=lambda item: item[1]["path"])
    }
    manifest["rootModelIdentifier"] = renamed[manifest["rootModelIdentifier"]]
    (package / "Manifest.json").write_text(json.dumps(manifest, indent=4, sort_keys=True) + "\n")
    file = mlpackage.model_file(package)
    spec: Any = mlpackage.read_spec(package)
    file.write_bytes(spec.SerializeToString(deterministic=True))
