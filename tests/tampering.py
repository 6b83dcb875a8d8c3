"""Packages on ONNX Runtime, changed so that only their numbers tell."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort

from tests.packages import refresh

Arrays = dict[str, np.ndarray]


def adapter_file(package: Path, identifier: str) -> Path:
    return package / "adapters" / f"{identifier}.onnx_adapter"


def read_adapter(file: Path) -> Arrays:
    """Tensor name → a copy of its values."""
    parameters = ort.AdapterFormat.read_adapter(str(file)).get_parameters()
    return {name: value.numpy().copy() for name, value in parameters.items()}


def write_adapter(file: Path, arrays: Arrays) -> None:
    """The bare file, written as ONNX Runtime's documentation does."""
    values = {name: ort.OrtValue.ortvalue_from_numpy(array) for name, array in arrays.items()}
    adapter = ort.AdapterFormat()
    adapter.set_adapter_version(1)
    adapter.set_model_version(1)
    adapter.set_parameters(values)
    adapter.export_adapter(str(file))


def edit_adapter(package: Path, identifier: str, edit: Callable[[Arrays], object]) -> None:
    """Let `edit` change one adapter's tensors in place."""
    file = adapter_file(package, identifier)
    arrays = read_adapter(file)
    edit(arrays)
    write_adapter(file, arrays)
    refresh(package)


def edit_weight(package: Path, name: str, edit: Callable[[np.ndarray], object]) -> None:
    """Let `edit` change the values of the initializer `name` in model.onnx.data in place."""
    graph = onnx.load(package / "model.onnx", load_external_data=False).graph
    tensor = next(tensor for tensor in graph.initializer if tensor.name == name)
    place = {entry.key: entry.value for entry in tensor.external_data}
    dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)
    data = np.memmap(package / place["location"], dtype, "r+", int(place["offset"]), tuple(tensor.dims))
    edit(data)
    data.flush()
    del data
    refresh(package)


def edit_router(package: Path, edit: Callable[[Arrays], object]) -> None:
    """Let `edit` change the initializers of router.onnx in place."""
    model = onnx.load(package / "router.onnx")
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    arrays = {name: onnx.numpy_helper.to_array(tensor).copy() for name, tensor in tensors.items()}
    edit(arrays)
    for name, tensor in tensors.items():
        tensor.CopyFrom(onnx.numpy_helper.from_array(arrays[name], name))
    onnx.save(model, package / "router.onnx")
    refresh(package)
