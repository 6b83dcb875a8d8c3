"""One XNNPACK delegate, written node by node.

The upstream path partitions a traced graph and runs a dozen passes over every part of it, which takes seconds for each
layer of a model. A delegate is a short list of nodes, so this writes the list.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import ml_dtypes
import numpy as np
from executorch.backends.xnnpack.serialization import xnnpack_graph_schema as schema
from executorch.backends.xnnpack.serialization.xnnpack_graph_serialize import serialize_xnnpack_binary
from executorch.exir._serialize._named_data_store import NamedDataStore, NamedDataStoreOutput

BACKEND = "XnnpackBackend"
ALIGNMENT = 16  # of constants, in bytes, as the backend's own serialiser has it
ELSEWHERE = 2**64 - 1  # the offset of a constant that is looked up by its key
NONE = 2**32 - 1  # XNN_INVALID_VALUE_ID
INPUT, OUTPUT = 1, 2  # XNN_VALUE_FLAG_EXTERNAL_INPUT and _OUTPUT
SEQUENCE, END = 0, -1
"""In a shape: the dimensions that vary, how many positions are new and how many will be cached."""

Shape = tuple[int, ...]
Kind = schema.XNNDatatype


@dataclass(frozen=True)
class Value:
    """A tensor of a subgraph; shape in elements, SEQUENCE and END for what varies."""

    number: int
    shape: Shape


@dataclass(frozen=True)
class Filter:
    """A linear layer's weight: fp32 [out, in], or integers [out, in] with fp32 scale [out, groups]; bias [out] or None.

    One group a row is held with its fp32 scales; several groups only in 4 bits, their scales rounded to bf16.
    """

    values: np.ndarray
    scale: np.ndarray | None
    bits: int
    bias: np.ndarray | None


class Subgraph:
    """Collects the nodes of one delegate."""

    def __init__(self) -> None:
        self._store = NamedDataStore()
        self._inputs: list[int] = []
        self._outputs: list[int] = []
        self._nodes: list[schema.XNode] = []
        self._tensors: list[schema.XNNTensorValue] = []
        self._values: list[schema.XValue] = []
        self._data = [schema.ConstantDataOffset(0, 0)]
        self._rounded: dict[int, int] = {}
        self._known: dict[str, Value] = {}

    def serialize(self) -> tuple[bytes, NamedDataStoreOutput]:
        """The delegate's bytes and the constants they refer to, each under the hash of its content."""
        graph = schema.XNNGraph(
            version="0",
            xnodes=self._nodes,
            xvalues=self._values,
            num_externs=len(self._inputs) + len(self._outputs),
            input_ids=self._inputs,
            output_ids=self._outputs,
            constant_data=self._data,
        )
        return serialize_xnnpack_binary(graph, bytearray()), self._store.get_named_data_store_output()

    # ── values ────────────────────────────────────────────────────────────────────────────────────────────────────

    def input(self, shape: Shape) -> Value:
        """The next argument. All inputs come before the first output."""
        value = self._value(shape)
        self._expose(value, INPUT, len(self._inputs))
        self._inputs.append(value.number)
        return value

    def output(self, value: Value) -> None:
        """Return a value that a node has computed."""
        self._expose(value, OUTPUT, len(self._inputs) + len(self._outputs))
        self._outputs.append(value.number)

    def constant(self, array: np.ndarray) -> Value:
        """An fp32 tensor."""
        data = np.ascontiguousarray(array, np.float32)
        key = self._keep(data)
        if key not in self._known:
            self._known[key] = self._value(data.shape, buffer=self._buffer(key, data.nbytes))
        return self._known[key]

    def _value(
        self,
        shape: Shape,
        kind: Kind = Kind.xnn_datatype_fp32,
        buffer: int = 0,
        quant: schema.XNNQuantParams | None = None,
    ) -> Value:
        number = len(self._values)
        dims = [max(size, 1) for size in shape]  # for one position: memory for more is found when there are more
        tensor = schema.XNNTensorValue(kind, len(dims), dims, buffer, NONE, 0, number)
        self._tensors.append(tensor)
        self._values.append(schema.XValue(schema.XNNQuantizedTensorValue(tensor, quant) if quant else tensor))
        return Value(number, shape)

    def _expose(self, value: Value, flag: int, external: int) -> None:
        tensor = self._tensors[value.number]
        tensor.flags, tensor.external_id = flag, external

    def _keep(self, data: np.ndarray) -> str:
        content = data.tobytes()
        key = hashlib.sha256(content).hexdigest()
        self._store.add_named_data(key, content, ALIGNMENT)
        return key

    def _buffer(self, key: str, size: int) -> int:
        self._data.append(schema.ConstantDataOffset(ELSEWHERE, size, key))
        return len(self._data) - 1

    def _node(self, node: schema.XNodeUnion) -> None:
        self._nodes.append(schema.XNode(node, debug_handle=len(self._nodes)))

    # ── nodes ─────────────────────────────────────────────────────────────────────────────────────────────────────

    def linear(self, x: Value, weight: Filter) -> Value:
        """x [..., in] → [..., out]. Integer weights read x rounded to int8 per position (XNNPACK's qd8)."""
        rows = weight.values.shape[0]
        source = x.number if weight.scale is None else self._round(x)
        filter_ = self._filter(weight)
        bias = NONE if weight.bias is None else self.constant(weight.bias).number
        y = self._value((*x.shape[:-1], rows))
        self._node(schema.XNNFullyConnected(source, filter_.number, bias, y.number, 0))
        return y

    def _round(self, x: Value) -> int:
        """Members of a group read the same rounded input."""
        if x.number not in self._rounded:
            rounded = self._value(x.shape, Kind.xnn_datatype_qdint8, quant=schema.PerTokenDynamicQuant(1))
            self._node(schema.XNNConvert(x.number, rounded.number, 0))
            self._rounded[x.number] = rounded.number
        return self._rounded[x.number]

    def _filter(self, weight: Filter) -> Value:
        if weight.scale is None:
            return self.constant(weight.values)
        data = nibbles(weight.values) if weight.bits == 4 else weight.values
        buffer = self._buffer(self._keep(np.ascontiguousarray(data)), data.nbytes)
        groups = weight.scale.shape[1]
        scale = np.ascontiguousarray(weight.scale, np.float32)
        stored = scale if groups == 1 else scale.astype(ml_dtypes.bfloat16)
        place = self._buffer(self._keep(stored), stored.nbytes)
        if groups == 1:
            kind = Kind.xnn_datatype_qcint4 if weight.bits == 4 else Kind.xnn_datatype_qcint8
            return self._value(weight.values.shape, kind, buffer, schema.PerChannelQuant([], 0, place, scale.size))
        quant = schema.PerChannelGroupQuant(
            [], 0, weight.values.shape[1] // groups, scale_buffer_idx=place, num_scales=scale.size
        )
        return self._value(weight.values.shape, Kind.xnn_datatype_qbint4, buffer, quant)

    def binary(self, node: type, a: Value, b: Value) -> Value:
        """Elementwise with broadcasting; one of the schema's XNNNode2x1."""
        y = self._value(_broadcast(a.shape, b.shape))
        self._node(node(a.number, b.number, y.number, 0))
        return y

    def add(self, a: Value, b: Value) -> Value:
        return self.binary(schema.XNNAdd, a, b)

    def multiply(self, a: Value, b: Value) -> Value:
        return self.binary(schema.XNNMultiply, a, b)

    def subtract(self, a: Value, b: Value) -> Value:
        return self.binary(schema.XNNSubtract, a, b)

    def unary(self, node: type, x: Value) -> Value:
        """One of the schema's XNNNode1x1."""
        y = self._value(x.shape)
        self._node(node(x.number, y.number, 0))
        return y

    def reshape(self, x: Value, shape: Shape) -> Value:
        """shape may have SEQUENCE, not END: XNNPACK finds out one dimension."""
        if shape == x.shape:
            return x
        y = self._value(shape)
        self._node(schema.XNNStaticReshape(len(shape), list(shape), x.number, y.number, 0))
        return y

    def transpose(self, x: Value, order: Sequence[int]) -> Value:
        """The axes of x in another order."""
        y = self._value(tuple(x.shape[axis] for axis in order))
        self._node(schema.XNNStaticTranspose(len(order), list(order), x.number, y.number, 0))
        return y

    def slice(self, x: Value, start: int, size: int) -> Value:
        """x[..., start : start + size]."""
        shape = (*x.shape[:-1], size)
        if shape == x.shape:
            return x
        y = self._value(shape)
        offsets = [0] * (len(shape) - 1) + [start]
        self._node(schema.XNNStaticSlice(len(shape), offsets, list(shape), x.number, y.number, 0))
        return y

    def concatenate(self, parts: Sequence[Value]) -> Value:
        """Two or three tensors along the last dimension."""
        if len(parts) == 1:
            return parts[0]
        node = {2: schema.XNNConcatenate2, 3: schema.XNNConcatenate3}[len(parts)]
        first = parts[0].shape
        y = self._value((*first[:-1], sum(part.shape[-1] for part in parts)))
        numbers = [part.number for part in parts] + [NONE] * (5 - len(parts))
        self._node(node(len(first) - 1, *numbers[:4], y.number, 0, numbers[4]))
        return y

    def rms_norm(self, x: Value, weight: np.ndarray, eps: float) -> Value:
        """x / sqrt(mean(x²) + eps) · weight; the mean is a linear layer of one row: the schema has no reduction."""
        columns = x.shape[-1]
        squares = self.unary(schema.XNNSquare, x)
        mean = self.linear(squares, Filter(np.full((1, columns), 1.0 / columns, np.float32), None, 32, None))
        shifted = self.add(mean, self.constant(np.full((1,), eps)))
        factor = self.unary(schema.XNNReciprocalSquareRoot, shifted)
        return self.multiply(self.multiply(x, factor), self.constant(weight))


def nibbles(values: np.ndarray) -> np.ndarray:
    """int4 [out, in] as uint8 [out, in / 2], offset by 8, the first value in the low nibble."""
    unsigned = (values + 8).astype(np.uint8)
    return unsigned[:, 0::2] | (unsigned[:, 1::2] << 4)


def _broadcast(a: Shape, b: Shape) -> Shape:
    """numpy's rule, for shapes in which what varies meets itself or 1."""
    width = max(len(a), len(b))
    pairs = zip((1,) * (width - len(a)) + a, (1,) * (width - len(b)) + b, strict=True)
    return tuple(y if x == 1 else x for x, y in pairs)
