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
        """Every packed weight as float32 [out, in], as the documentation of the operators says."""
        tables = [(node.input[0], node) for node in self.nodes("GatherBlockQuantized")]
        linears = [(node.input[1], node) for node in self.nodes("MatMulNBits")]
        found = [self._dequantized(packed, node) for packed, node in tables + linears]
        return found + [self._looked_up(node) for node in self.nodes("MatMulBnb4")]

    def floats(self) -> list[np.ndarray]:
        """Every weight of a plain matrix product, [out, in]."""
        products = [(node, node.op_type == "MatMul") for node in self.nodes("MatMul") + self.nodes("FusedMatMul")]
        weights = [(node.input[1], transposed) for node, transposed in products if node.input[1] in self.initializers]
        return [self.array(name).T if transposed else self.array(name) for name, transposed in weights]

    def _dequantized(self, packed: str, node: onnx.NodeProto) -> np.ndarray:
        """Low nibble first, less the zero point or 2^(bits-1), times the scale of the block."""
        bits, codes, scales = _option(node, "bits"), self.array(packed), self.array(node.input[2])
        codes = codes.reshape(len(codes), -1)
        codes = _nibbles(codes) if bits == 4 else codes
        zero: np.ndarray | int = 2 ** (bits - 1)
        if len(node.input) > 3 and node.input[3]:
            zero = self.array(node.input[3])
            zero = (_nibbles(zero)[:, : scales.shape[1]] if bits == 4 else zero).astype(np.float32)[..., None]
        blocks = codes.reshape(*scales.shape, -1).astype(np.float32) - zero
        return self._in_order((blocks * scales[..., None]).reshape(codes.shape), node)

    def _looked_up(self, node: onnx.NodeProto) -> np.ndarray:
        """High nibble first, a position in bitsandbytes' own table of NF4, times the scale of the block."""
        from bitsandbytes.functional import get_4bit_type

        codes, shape = self.array(node.input[1]), (_option(node, "N"), _option(node, "K"))
        book = get_4bit_type("nf4", device="cpu").numpy()
        values = book[np.stack([codes >> 4, codes & 15], axis=-1).reshape(-1, _option(node, "block_size"))]
        return (values * self.array(node.input[2])[:, None]).reshape(shape)

    def _in_order(self, weight: np.ndarray, node: onnx.NodeProto) -> np.ndarray:
        """Columns as the model's own features stand, which a Gather before the operator may reorder."""
        gather = next((other for other in self.nodes("Gather") if other.output[0] == node.input[0]), None)
        return weight if gather is None else weight[:, np.argsort(self.array(gather.input[1]))]


def _nibbles(codes: np.ndarray) -> np.ndarray:
    return np.stack([codes & 15, codes >> 4], axis=-1).reshape(len(codes), -1)


def _option(node: onnx.NodeProto, name: str) -> int:
    return next(attribute.i for attribute in node.attribute if attribute.name == name)


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
