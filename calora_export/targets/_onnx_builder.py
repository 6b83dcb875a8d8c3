"""A growing ONNX graph: nodes, constants in a data file, inputs. Knows nothing of models."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from pathlib import Path

import numpy as np
import onnx_ir as ir

OPSET = 21
IR_VERSION = 10
CONTRIB = "com.microsoft"
OURS = "calora"
PAGE = 4096

Dims = Sequence[int | str]


class DataFile:
    """model.onnx.data: each distinct array once, on a page boundary, so that a runtime can map it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._seen: dict[str, tuple[int, int]] = {}

    def __enter__(self) -> DataFile:
        self._file = self.path.open("wb")
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()

    def put(self, key: str, make: Callable[[], np.ndarray]) -> tuple[int, int]:
        """Offset and length of the array called key, written when it is first asked for."""
        if key not in self._seen:
            self._file.write(b"\0" * (-self._file.tell() % PAGE))
            offset = self._file.tell()
            raw = np.ascontiguousarray(make())
            self._file.write(raw.tobytes())
            self._seen[key] = (offset, raw.nbytes)
        return self._seen[key]


class Builder:
    """Nodes in the order in which they are emitted, and the values that they meet."""

    def __init__(self, data: DataFile) -> None:
        self.nodes: list[ir.Node] = []
        self.inputs: dict[str, ir.Value] = {}
        self.initializers: dict[str, ir.Value] = {}
        self._data = data
        self._made: dict[Hashable, ir.Value] = {}

    def emit(self, op: str, *args: ir.Value | None, domain: str = "", **attrs: object) -> ir.Value:
        """Append a node with one output."""
        return self.emit_many(op, *args, outputs=1, domain=domain, **attrs)[0]

    def emit_many(
        self, op: str, *args: ir.Value | None, outputs: int, domain: str = "", **attrs: object
    ) -> Sequence[ir.Value]:
        """Append a node with several outputs."""
        number = len(self.nodes)
        node = ir.node(op, list(args), attributes=attrs or None, domain=domain, num_outputs=outputs)  # type: ignore[arg-type]
        node.name = f"n{number}"
        for i, output in enumerate(node.outputs):
            output.name = f"v{number}.{i}"
        self.nodes.append(node)
        return node.outputs

    def once(self, key: Hashable, make: Callable[[], ir.Value]) -> ir.Value:
        """What `make` emitted when this key was first asked for."""
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]

    def declare(self, role: str, name: str, dtype: ir.DataType, shape: Dims) -> ir.Value:
        """An input of the graph, found again under its role."""
        self.inputs[role] = ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(dtype))
        return self.inputs[role]

    def default(self, value: ir.Value, array: np.ndarray) -> None:
        """Let an input be left out: it is this array then."""
        assert value.name is not None
        value.const_value = ir.tensor(array, name=value.name)
        self.initializers[value.name] = value

    def stored(
        self,
        name: str,
        make: Callable[[], np.ndarray],
        shape: Sequence[int],
        dtype: ir.DataType,
        key: str = "",
    ) -> ir.Value:
        """A constant in the data file; `key` lets two of them share bytes under different shapes."""
        if name not in self.initializers:
            path = self._data.path
            offset, length = self._data.put(key or name, make)
            tensor = ir.ExternalTensor(
                path.name, offset, length, dtype, shape=ir.Shape(shape), name=name, base_dir=path.parent
            )
            self._add(name, tensor)
        return self.initializers[name]

    def floats(self, name: str, make: Callable[[], np.ndarray], shape: Sequence[int]) -> ir.Value:
        """An fp32 constant in the data file."""
        return self.stored(name, make, shape, ir.DataType.FLOAT)

    def integers(self, values: Sequence[int]) -> ir.Value:
        """A small int64 vector inside the graph file."""
        name = "const_" + "_".join(str(value) for value in values)
        if name not in self.initializers:
            self._add(name, ir.tensor(np.array(values, np.int64), name=name))
        return self.initializers[name]

    def constant(self, name: str, array: np.ndarray) -> ir.Value:
        """An array inside the graph file."""
        if name not in self.initializers:
            self._add(name, ir.tensor(array, name=name))
        return self.initializers[name]

    def scalar(self, number: float) -> ir.Value:
        """An fp32 scalar inside the graph file."""
        name = f"scalar_{number!r}"
        if name not in self.initializers:
            self._add(name, ir.tensor(np.array(number, np.float32), name=name))
        return self.initializers[name]

    def model(self, outputs: Sequence[ir.Value]) -> ir.Model:
        """The finished model."""
        domains = {"": OPSET, CONTRIB: 1} | ({OURS: 1} if any(node.domain == OURS for node in self.nodes) else {})
        graph = ir.Graph(
            list(self.inputs.values()),
            outputs,
            nodes=self.nodes,
            initializers=list(self.initializers.values()),
            opset_imports=domains,
            name="calora",
        )
        return ir.Model(graph, ir_version=IR_VERSION, producer_name="calora-export")

    def _add(self, name: str, tensor: ir.TensorProtocol) -> None:
        kind = ir.TensorType(tensor.dtype)
        self.initializers[name] = ir.Value(name=name, shape=tensor.shape, type=kind, const_value=tensor)  # type: ignore[arg-type]


def named(value: ir.Value, name: str, dtype: ir.DataType, shape: Dims) -> ir.Value:
    """Make a value an output that users see."""
    value.name, value.shape, value.type = name, ir.Shape(shape), ir.TensorType(dtype)
    return value
