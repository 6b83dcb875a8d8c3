"""An exported model.onnx, read with onnx and numpy alone."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import onnx
import torch
from onnx import numpy_helper
from safetensors.torch import load_file


@dataclass(frozen=True)
class OnnxFile:
    package: Path

    @cached_property
    def graph(self) -> onnx.GraphProto:
        return onnx.load(self.package / "model.onnx", load_external_data=False).graph

    @cached_property
    def data(self) -> bytes:
        return (self.package / "model.onnx.data").read_bytes()

    @cached_property
    def initializers(self) -> dict[str, onnx.TensorProto]:
        return {tensor.name: tensor for tensor in self.graph.initializer}

    @property
    def inputs(self) -> dict[str, int]:
        """Name → element type."""
        return {value.name: value.type.tensor_type.elem_type for value in self.graph.input}

    def operators(self) -> Counter[str]:
        return Counter(node.op_type for node in self.graph.node)

    def nodes(self, operator: str) -> list[onnx.NodeProto]:
        return [node for node in self.graph.node if node.op_type == operator]

    def place(self, name: str) -> tuple[int, int] | None:
        """Offset and length in the data file, or None for what the graph file itself holds."""
        entries = {entry.key: entry.value for entry in self.initializers[name].external_data}
        return (int(entries["offset"]), int(entries["length"])) if entries else None

    def array(self, name: str) -> np.ndarray:
        tensor, place = self.initializers[name], self.place(name)
        if place is None:
            return numpy_helper.to_array(tensor)
        dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)
        return np.frombuffer(self.data, dtype, place[1] // dtype.itemsize, place[0]).reshape(tensor.dims)

    def dequantized(self) -> list[np.ndarray]:
        """Every packed weight as float32 [out, in], as the documentation of the two operators says."""
        tables = [(node.input[0], node.input[2], node) for node in self.nodes("GatherBlockQuantized")]
        linears = [(node.input[1], node.input[2], node) for node in self.nodes("MatMulNBits")]
        return [self._dequantized(packed, scale, _bits(node)) for packed, scale, node in tables + linears]

    def _dequantized(self, packed: str, scale: str, bits: int) -> np.ndarray:
        """Low nibble first, less 2^(bits-1), times the scale of the block."""
        codes, scales = self.array(packed), self.array(scale)
        codes = codes.reshape(len(codes), -1)
        if bits == 4:
            codes = np.stack([codes & 15, codes >> 4], axis=-1).reshape(len(codes), -1)
        blocks = codes.reshape(*scales.shape, -1).astype(np.float32) - 2 ** (bits - 1)
        return (blocks * scales[..., None]).reshape(codes.shape)


def _bits(node: onnx.NodeProto) -> int:
    return next(attribute.i for attribute in node.attribute if attribute.name == "bits")


def bundle_weights(bundle: Path) -> dict[str, np.ndarray]:
    """Module → float32 [out, in] of every packed weight: compressed-tensors' pack-quantized, read with torch."""
    tensors = load_file(bundle / "base" / "model.safetensors")
    suffix = ".weight_packed"
    modules = [name.removesuffix(suffix) for name in tensors if name.endswith(suffix)]
    return {module: _unpacked(tensors, module) for module in modules}


def _unpacked(tensors: dict[str, torch.Tensor], module: str) -> np.ndarray:
    words, shape = tensors[f"{module}.weight_packed"], tensors[f"{module}.weight_shape"].tolist()
    bits = words.shape[1] * 32 // shape[1]
    codes = torch.stack([(words >> shift) & (2**bits - 1) for shift in range(0, 32, bits)], dim=-1)
    scale = tensors[f"{module}.weight_scale"].float()
    groups = codes.reshape(*scale.shape, -1).float() - 2 ** (bits - 1)
    return (groups * scale[..., None]).reshape(shape).numpy()
