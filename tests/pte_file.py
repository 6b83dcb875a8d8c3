"""An exported model.pte, read with executorch alone."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib import resources
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from executorch.exir import schema
from executorch.exir._serialize._flatbuffer import _flatc_decompile
from executorch.exir._serialize._program import PTEFile, deserialize_pte_binary
from torch import Tensor

from calora_export import package as packages
from calora_export.runtimes import executorch as runtime

DELEGATE = "delegate"
HEADER = slice(10, 14), slice(14, 18)  # of an XNNPACK payload: where its flatbuffer begins, and its size
Run = Callable[[Sequence[Tensor]], Sequence[Tensor]]


@dataclass(frozen=True)
class PteFile:
    package: Path

    @property
    def path(self) -> Path:
        return self.package / "model.pte"

    @cached_property
    def content(self) -> bytes:
        """Of the file."""
        return self.path.read_bytes()

    @cached_property
    def parsed(self) -> PTEFile:
        return deserialize_pte_binary(self.path.read_bytes())

    def plan(self, method: str) -> schema.ExecutionPlan:
        return next(plan for plan in self.parsed.program.execution_plan if plan.name == method)

    def calls(self, method: str) -> list[str]:
        """Operators in the order in which they run."""
        plan = self.plan(method)
        calls = [instruction.instr_args for instruction in plan.chains[0].instructions]
        return [plan.operators[c.op_index].name if isinstance(c, schema.KernelCall) else DELEGATE for c in calls]

    def operators(self, method: str) -> Counter[str]:
        return Counter(self.calls(method))

    def load(self, method: str) -> Run:
        """The method in the Python runtime, with the operators that it lacks."""
        from executorch.runtime import Runtime

        runtime.prepare(packages.load(self.package))
        program = Runtime.get().load_program(self.path)
        return program.load_method(method).execute

    def filters(self) -> list[np.ndarray]:
        """Every matrix that a linear layer of a delegate multiplies with, float32 [out, in], rows side by side."""
        parsed = self.parsed
        assert parsed.named_data is not None
        data = {key: parsed.named_data.buffers[entry.buffer_index] for key, entry in parsed.named_data.pte_data.items()}
        payloads = {payload.data for payload in parsed.program.backend_delegate_data}
        return [weight for payload in payloads for weight in _filters(payload, data)]

    def answer(self, method: str) -> list[int]:
        return [int(value) for value in self.load(method)([])]


def _filters(payload: bytes, data: dict[str, bytes]) -> list[np.ndarray]:
    """Read with upstream's own schema and flatc."""
    offset, size = (int.from_bytes(payload[place], "little") for place in HEADER)
    with TemporaryDirectory() as folder:
        schema_file = Path(folder, "schema.fbs")
        upstream = resources.files("executorch.backends.xnnpack.serialization")
        schema_file.write_bytes(upstream.joinpath("schema.fbs").read_bytes())
        Path(folder, "graph.bin").write_bytes(payload[offset : offset + size])
        _flatc_decompile(folder, str(schema_file), str(Path(folder, "graph.bin")), ["--raw-binary"])
        graph = json.loads(Path(folder, "graph.json").read_text())
    values = {}
    for entry in graph["xvalues"]:
        value = entry["xvalue_union"]
        tensor = value.get("tensor_value", value)
        values[tensor["id_out"]] = (tensor, value)
    stored = [data.get(place.get("named_key", ""), b"") for place in graph["constant_data"]]
    linears = [node for node in graph["xnodes"] if node["xnode_union_type"] == "XNNFullyConnected"]
    wanted = [node["xnode_union"]["filter_id"] for node in linears]
    return [_filter(*values[number], stored) for number in dict.fromkeys(wanted)]


def _filter(tensor: dict, value: dict, stored: list[bytes]) -> np.ndarray:
    kind, shape, raw = tensor["datatype"], tensor["dims"], stored[tensor["constant_buffer_idx"]]
    if kind == "xnn_datatype_fp32":
        return np.frombuffer(raw, np.float32).reshape(shape)
    if kind == "xnn_datatype_qcint8":
        q = np.frombuffer(raw, np.int8).reshape(shape)
    else:
        codes = np.frombuffer(raw, np.uint8)
        q = np.stack([codes & 15, codes >> 4], axis=-1).reshape(shape).astype(np.int8) - 8
    scales = stored[value["quant_params"]["scale_buffer_idx"]]
    if kind == "xnn_datatype_qbint4":
        scale = (np.frombuffer(scales, np.uint16).astype(np.uint32) << 16).view(np.float32)
    else:
        scale = np.frombuffer(scales, np.float32)
    scale = scale.reshape(shape[0], -1, 1)
    return (q.reshape(shape[0], scale.shape[1], -1).astype(np.float32) * scale).reshape(shape)
