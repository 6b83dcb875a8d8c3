"""Packages that coremltools writes, for tests of what reads them: single operators, and programs of many."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

Body = Callable[[Any, Mapping[str, Any]], Mapping[str, Any]]


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without coremltools' progress bars and version warnings."""
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)


def operators() -> Any:
    """coremltools' builder of MIL operations."""
    with quiet():
        from coremltools.converters.mil.mil import Builder
    return Builder


def placeholder(array: np.ndarray) -> Any:
    """An input of this array's shape and type."""
    from coremltools.converters.mil.mil import Placeholder, types

    return Placeholder(array.shape, types.numpy_type_to_builtin_type(array.dtype))


def state(array: np.ndarray) -> Any:
    """A state of this array's shape and type."""
    mb = operators()
    from coremltools.converters.mil.mil import types

    return mb.state_tensor_placeholder(array.shape, types.numpy_type_to_builtin_type(array.dtype))


def save(
    path: Path,
    inputs: Mapping[str, np.ndarray],
    body: Body,
    system: str = "iOS18",
    precision: str = "float32",
    states: Mapping[str, np.ndarray] | None = None,
) -> Path:
    """A package of one function, its operations as they are; with "float16" each of them in that precision.

    `body` takes the builder and the variables of inputs and states, and returns the outputs by name.
    """
    mb = operators()
    import coremltools as ct
    from coremltools.converters.mil.mil import Function, Program

    target = getattr(ct.target, system)
    program = Program()
    takes = {name: placeholder(array) for name, array in inputs.items()}
    takes |= {name: state(array) for name, array in (states or {}).items()}
    with quiet(), Function(takes, opset_version=target) as function:
        outputs = [mb.identity(x=value, name=name) for name, value in body(mb, function.inputs).items()]
        function.set_outputs(outputs)
        program.add_function("main", function)
    passes = ["common::add_fp16_cast"] if precision == "float16" else []
    with quiet():
        model = ct.convert(
            program,
            convert_to="mlprogram",
            minimum_deployment_target=target,
            pass_pipeline=ct.PassPipeline(passes, "as it is"),
            skip_model_load=True,
        )
        model.save(str(path))
    return path


def inferred(inputs: Mapping[str, np.ndarray], body: Body) -> dict[str, np.ndarray]:
    """What coremltools itself computes when every input is a constant (its constant folding)."""
    mb = operators()
    import coremltools as ct
    from coremltools.converters.mil.mil import Function

    with quiet(), Function({}, opset_version=ct.target.iOS18):
        return {name: value.val for name, value in body(mb, dict(inputs)).items()}


def results(result: Any) -> Sequence[Any]:
    """One result or several as a list."""
    return list(result) if isinstance(result, list | tuple) else [result]


def convert(path: Path, model: Any, example: Sequence[Any], system: str = "iOS18", **options: Any) -> Path:
    """A traced torch model, as coremltools converts it with all of its usual passes."""
    import coremltools as ct
    import torch

    with quiet(), torch.no_grad():
        traced = torch.jit.trace(model.eval(), tuple(example), check_trace=False)
        target = getattr(ct.target, system)
        converted = ct.convert(traced, minimum_deployment_target=target, skip_model_load=True, **options)
        converted.save(str(path))
    return path
