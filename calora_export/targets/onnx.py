"""Lowering to ONNX Runtime.

Whole operators become contrib ones (MatMulNBits, GroupQueryAttention, SkipSimplifiedLayerNormalization …), the few ATen
operators between them become their ONNX namesakes, and adapter tensors become inputs that default to rank 0. The gate has
no node: it is folded into `up` when an adapter is activated, since what a slot costs on a CPU is launches and bytes.
"""

from __future__ import annotations

import json
import logging
import operator
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
import onnx_ir as ir
import torch
from torch.fx import Node

from calora_export.errors import UnsupportedError, mismatch
from calora_export.graph import Graph
from calora_export.package import Manifest, Slots, SlotTensor
from calora_export.recipe import Recipe
from calora_export.routers import Router

MODEL = "model.onnx"
OPSET = 21
IR_VERSION = 10
CONTRIB = "com.microsoft"
PAGE = 4096
ATEN, CALORA = torch.ops.aten, torch.ops.calora
_VIEWS = (ATEN.view.default, ATEN.reshape.default, ATEN.unflatten.int)


def lower(graph: Graph, recipe: Recipe, directory: Path, fingerprint: str) -> Slots:
    """Write model.onnx and model.onnx.data; return which tensors an adapter file must hold."""
    with _DataFile(directory / "model.onnx.data") as data:
        lowering = _Lowering(graph, recipe, data, fingerprint)
        model = lowering.run()
    model.graph.sort()
    ir.save(model, directory / MODEL)
    return lowering.slots


def lower_router(router: Router, directory: Path) -> str:
    """Write router.onnx: ids [1, tokens] → gates [classes], with the selection policy inside."""
    ids = torch.zeros(1, 8, dtype=torch.long)
    shapes = {"ids": {1: torch.export.Dim("tokens", min=1)}}
    with torch.no_grad(), _quiet_exporter():
        program = torch.onnx.export(
            router.eval(),
            (ids,),
            input_names=["ids"],
            output_names=["gates"],
            dynamic_shapes=shapes,
            opset_version=OPSET,
            dynamo=True,
            verbose=False,
        )
    assert program is not None
    for node in program.model.graph:
        node.metadata_props.clear()
        node.meta.clear()
    program.save(directory / "router.onnx", external_data=False)
    return "router.onnx"


@contextmanager
def _quiet_exporter() -> Iterator[None]:
    """torch.onnx speaks of torchvision, which nobody here needs, and of its own deprecations."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def accompany(manifest: Manifest, directory: Path) -> None:
    """Write what onnxruntime-genai looks for beside the model: genai_config.json and its own copy of the tokenizer."""
    for file in sorted((directory / "tokenizer").glob("*.*")):
        shutil.copyfile(file, directory / file.name)
    text = json.dumps(_genai_config(manifest), indent=2)
    (directory / "genai_config.json").write_text(text + "\n", encoding="utf-8")


def _genai_config(manifest: Manifest) -> dict[str, object]:
    model = manifest.model
    keys = [f"past_key_values.%d.{kv}" for kv in ("key", "value")]
    decoder = {
        "session_options": {"log_id": "onnxruntime-genai", "log_severity_level": 3, "provider_options": []},
        "filename": MODEL,
        "head_size": model.head_dim,
        "hidden_size": model.hidden,
        "inputs": {
            "input_ids": "input_ids",
            "attention_mask": "attention_mask",
            "past_key_names": keys[0],
            "past_value_names": keys[1],
        },
        "outputs": {
            "logits": "logits",
            "present_key_names": keys[0].replace("past_key_values", "present"),
            "present_value_names": keys[1].replace("past_key_values", "present"),
        },
        "num_attention_heads": model.heads,
        "num_hidden_layers": model.layers,
        "num_key_value_heads": model.kv_heads,
    }
    return {
        "model": {
            "bos_token_id": model.bos if model.bos is not None else model.eos[0],
            "context_length": model.context,
            "decoder": decoder,
            "eos_token_id": list(model.eos),
            "pad_token_id": model.eos[0],
            "type": "decoder",
            "vocab_size": model.vocab,
        },
        "search": {"do_sample": False, "max_length": model.context, "past_present_share_buffer": True},
    }


class _DataFile:
    """model.onnx.data: each distinct array once, on a page boundary, so that a runtime can map it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._seen: dict[str, tuple[int, int]] = {}

    def __enter__(self) -> _DataFile:
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
            self._file.write(memoryview(raw).cast("B"))
            self._seen[key] = (offset, raw.nbytes)
        return self._seen[key]


@dataclass(frozen=True)
class _Weight:
    """A linear layer's or a table's weight in the graph: placeholder names of values, scale and bias."""

    name: str
    values: torch.Tensor
    scale: torch.Tensor
    bias: torch.Tensor

    @cached_property
    def bits(self) -> int:
        """0 dense; else the bits that hold the packed values."""
        if self.scale.numel() == 0:
            return 0
        return 4 if -8 <= int(self.values.min()) and int(self.values.max()) <= 7 else 8

    @property
    def group_size(self) -> int:
        return self.values.shape[1] // self.scale.shape[1]

    def nibbles(self) -> np.ndarray:
        """uint8 [out, groups, group · bits / 8], offset by 2^(bits-1), the first value in the low nibble."""
        unsigned = (self.values.numpy().astype(np.int16) + (1 << (self.bits - 1))).astype(np.uint8)
        grouped = unsigned.reshape(unsigned.shape[0], -1, self.group_size)
        return grouped if self.bits == 8 else grouped[..., 0::2] | (grouped[..., 1::2] << 4)


@dataclass
class _Lowering:
    graph: Graph
    recipe: Recipe
    data: _DataFile
    fingerprint: str
    values: dict[Node, ir.Value] = field(default_factory=dict)
    outputs: dict[tuple[Node, int], ir.Value] = field(default_factory=dict)
    nodes: list[ir.Node] = field(default_factory=list)
    inputs: dict[str, ir.Value] = field(default_factory=dict)
    initializers: dict[str, ir.Value] = field(default_factory=dict)
    shared: dict[str, ir.Value] = field(default_factory=dict)
    tensors: list[SlotTensor] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.roles = self.graph.roles()
        self.fx = [node for node in self.graph.program.graph.nodes if node.op == "call_function"]
        self.result = next(node for node in self.graph.program.graph.nodes if node.op == "output").args[0]
        self.fused_adds = _norms_after_add(self.fx)
        self.packed = self._packed_projections()

    @property
    def slots(self) -> Slots:
        return Slots(
            rank="dynamic",
            gate="folded into up",
            recovery="recovery" if self.graph.recovery else None,
            fingerprint="base_fingerprint",
            dtype=self.recipe.adapters,
            tensors=tuple(self.tensors),
        )

    # ── the walk ──────────────────────────────────────────────────────────────────────────────────────────────────────

    def run(self) -> ir.Model:
        self._declare_inputs()
        live = self._live()
        for node in self.fx:
            if node in live:
                self._lower(node)
        logits, *present = self.result
        positions = 1 if self.graph.last_only else "sequence_length"
        outputs = [self._named(self.value(logits), "logits", ["batch_size", positions, self.graph.shape.vocab])]
        for i, node in enumerate(present):
            name = f"present.{i // 2}.{('key', 'value')[i % 2]}"
            outputs.append(self._named(self.value(node), name, self._cache_shape("total_sequence_length")))
        outputs.append(self.emit("Identity", self.inputs["base_fingerprint"], name="fingerprint"))
        outputs[-1].type, outputs[-1].shape = ir.TensorType(ir.DataType.UINT8), ir.Shape([32])
        graph = ir.Graph(
            list(self.inputs.values()),
            outputs,
            nodes=self.nodes,
            initializers=list(self.initializers.values()),
            opset_imports={"": OPSET, CONTRIB: 1},
            name="calora",
        )
        return ir.Model(graph, ir_version=IR_VERSION, producer_name="calora-export")

    def _live(self) -> set[Node]:
        """The nodes that the outputs need, given what is fused away."""
        live: set[Node] = set()
        pending = [node for node in self.result if isinstance(node, Node)]
        while pending:
            node = pending.pop()
            if node in live or node.op != "call_function":
                continue
            live.add(node)
            pending.extend(self._operands(node))
        return live

    def _operands(self, node: Node) -> list[Node]:
        if node.target is CALORA.attention.default:
            if node in self.packed:
                return [self.packed[node][0]]
            return [_heads(arg)[0] for arg in node.args[:3] if isinstance(arg, Node)]
        if node.target in _VIEWS:
            return [_viewed(node)]
        return node.all_input_nodes

    def _lower(self, node: Node) -> None:
        handler = _HANDLERS.get(node.target)
        if handler is None:
            raise UnsupportedError(
                mismatch("onnx", "operator", "one that this target lowers", f"{node.target} in the model's graph")
            )
        handler(self, node)

    # ── values ────────────────────────────────────────────────────────────────────────────────────────────────────────

    def value(self, node: object) -> ir.Value:
        """The ONNX value of an FX node, or an initializer for a tensor that the model holds."""
        assert isinstance(node, Node)
        if node.op == "placeholder":
            role = self.roles[node.name]
            return self.inputs[role] if role in self.inputs else self.held(role)
        return self.values[node]

    def emit(self, op: str, *args: ir.Value | None, domain: str = "", outputs: int = 1, name: str = "", **attrs: object):  # noqa: ANN201, E501
        """Append a node; one output is returned as a value, several as a tuple."""
        made = ir.node(op, list(args), attributes=attrs or None, domain=domain, num_outputs=outputs)  # type: ignore[arg-type]
        for i, output in enumerate(made.outputs):
            output.name = name if name and i == 0 else f"v{len(self.nodes)}.{i}"
        made.name = f"n{len(self.nodes)}"
        self.nodes.append(made)
        return made.outputs[0] if outputs == 1 else tuple(made.outputs)

    def initializer(self, name: str, make: Callable[[], np.ndarray], shape: Sequence[int], dtype: ir.DataType, key: str = "") -> ir.Value:  # noqa: E501
        """A constant in the data file; key lets two of them share bytes under different shapes."""
        if name not in self.initializers:
            offset, length = self.data.put(key or name, make)
            tensor = ir.ExternalTensor(
                self.data.path.name, offset, length, dtype, shape=ir.Shape(shape), name=name, base_dir=self.data.path.parent
            )
            self.initializers[name] = ir.Value(
                name=name, shape=ir.Shape(shape), type=ir.TensorType(dtype), const_value=tensor
            )
        return self.initializers[name]

    def constant(self, values: Sequence[int]) -> ir.Value:
        """A small int64 vector inside the graph file."""
        name = "const_" + "_".join(str(v) for v in values)
        if name not in self.initializers:
            tensor = ir.tensor(np.array(values, np.int64), name=name)
            self.initializers[name] = ir.Value(
                name=name, shape=ir.Shape([len(values)]), type=ir.TensorType(ir.DataType.INT64), const_value=tensor
            )
        return self.initializers[name]

    def held(self, name: str) -> ir.Value:
        """A float tensor of the model: norm weights, rotary tables."""
        tensor = self.graph.tensors[name]
        return self.initializer(_short(name), lambda: tensor.numpy(), list(tensor.shape), ir.DataType.FLOAT)

    def scalar(self, number: float) -> ir.Value:
        name = f"scalar_{number!r}"
        return self.initializer(name, lambda: np.array(number, np.float32), [], ir.DataType.FLOAT)

    def _named(self, value: ir.Value, name: str, shape: Sequence[int | str]) -> ir.Value:
        value.name, value.shape, value.type = name, ir.Shape(shape), ir.TensorType(ir.DataType.FLOAT)
        return value

    # ── inputs ────────────────────────────────────────────────────────────────────────────────────────────────────────

    def _cache_shape(self, length: str) -> list[int | str]:
        return ["batch_size", self.graph.shape.kv_heads, length, self.graph.shape.head_dim]

    def _declare_inputs(self) -> None:
        self._input("ids", "input_ids", ir.DataType.INT64, ["batch_size", "sequence_length"])
        self._input("mask", "attention_mask", ir.DataType.INT64, ["batch_size", "total_sequence_length"])
        for i in range(2 * self.graph.shape.layers):
            name = f"past_key_values.{i // 2}.{('key', 'value')[i % 2]}"
            self._input(f"past.{i}", name, ir.DataType.FLOAT, self._cache_shape("past_sequence_length"))
        raw = bytes.fromhex(self.fingerprint.removeprefix("sha256:"))
        value = self._input("base_fingerprint", "base_fingerprint", ir.DataType.UINT8, [32])
        value.const_value = ir.tensor(np.frombuffer(raw, np.uint8).copy(), name="base_fingerprint")
        self.initializers["base_fingerprint"] = value
        if self.graph.recovery:
            self._adapter_input("recovery", ["rank"])

    def _input(self, role: str, name: str, dtype: ir.DataType, shape: Sequence[int | str]) -> ir.Value:
        self.inputs[role] = ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(dtype))
        return self.inputs[role]

    def _adapter_input(self, name: str, shape: Sequence[int | str]) -> ir.Value:
        """An input that adapter files fill: of rank 0 without one, or required where the runtime has no adapter API."""
        dtype = ir.DataType.FLOAT16 if self.recipe.adapters == "fp16" and name != "recovery" else ir.DataType.FLOAT
        value = self._input(name, name, dtype, shape)
        if self.recipe.adapter_inputs == "optional":
            empty = np.zeros([size if isinstance(size, int) else 0 for size in shape], dtype.numpy())
            value.const_value = ir.tensor(empty, name=name)
            self.initializers[name] = value
        if dtype is ir.DataType.FLOAT:
            return value
        return self.emit("Cast", value, to=int(ir.DataType.FLOAT))

    # ── linears and slots ─────────────────────────────────────────────────────────────────────────────────────────────

    def _packed_projections(self) -> dict[Node, tuple[Node, tuple[int, ...]]]:
        """Attention nodes whose q, k and v are the three outputs of one `linears`: they become one matmul."""
        packed: dict[Node, tuple[Node, tuple[int, ...]]] = {}
        for node in self.fx:
            if node.target is not CALORA.attention.default:
                continue
            sources = [_heads(arg) for arg in node.args[:3] if isinstance(arg, Node)]
            plain = all(is_3d and src.target is operator.getitem for src, is_3d in sources)
            if not plain or len({src.args[0] for src, _ in sources}) != 1:
                continue
            linears = sources[0][0].args[0]
            assert isinstance(linears, Node)
            order = tuple(int(src.args[1]) for src, _ in sources)  # type: ignore[call-overload]
            weights = self.weights(linears)
            same = len({(w.bits, w.bits and w.group_size, w.bias.numel() > 0) for w in weights}) == 1
            if len(weights) == 3 and same and len(linears.args[4]) in (0, 3):  # type: ignore[arg-type]
                packed[node] = (linears, order)
        return packed

    def weights(self, node: Node) -> list[_Weight]:
        _, weights, scales, biases, *_ = node.args
        names = [self.roles[w.name] for w in weights]  # type: ignore[union-attr]
        held = [[self.graph.tensors[self.roles[t.name]] for t in part] for part in (weights, scales, biases)]  # type: ignore[union-attr]
        return [_Weight(_short(name), w, s, b) for name, w, s, b in zip(names, *held, strict=True)]

    def matmul(self, x: ir.Value, weights: Sequence[_Weight], table: bool) -> ir.Value:
        """x times the weights, one below the other. table: the weight is also the token table, which is stored once."""
        name, first = "+".join([weights[0].name, *(w.name.split(".")[-2] for w in weights[1:])]), weights[0]
        rows, columns = sum(w.values.shape[0] for w in weights), first.values.shape[1]
        bias = None
        if first.bias.numel():
            bias = self.initializer(
                f"{name}.bias", lambda: np.concatenate([w.bias.numpy() for w in weights]), [rows], ir.DataType.FLOAT
            )
        if not first.bits:
            return self._dense(x, weights, name, table, bias)
        group = first.group_size
        packed = self.initializer(
            f"{name}.q{first.bits}",
            lambda: np.concatenate([w.nibbles() for w in weights]),
            [rows, columns // group, group * first.bits // 8],
            ir.DataType.UINT8,
            key=f"{name}.q",
        )
        scale = self.initializer(
            f"{name}.scale",
            lambda: np.concatenate([w.scale.numpy() for w in weights]),
            [rows, columns // group],
            ir.DataType.FLOAT,
        )
        operands = [x, packed, scale] + ([None, None, bias] if bias is not None else [])
        return self.emit(
            "MatMulNBits",
            *operands,
            domain=CONTRIB,
            K=columns,
            N=rows,
            bits=first.bits,
            block_size=group,
            accuracy_level=4 if self.recipe.activations == "int8" else 1,
        )

    def _dense(
        self, x: ir.Value, weights: Sequence[_Weight], name: str, table: bool, bias: ir.Value | None
    ) -> ir.Value:
        rows, columns = sum(w.values.shape[0] for w in weights), weights[0].values.shape[1]
        if table:
            value = self.initializer(name, lambda: weights[0].values.numpy(), [rows, columns], ir.DataType.FLOAT)
            y = self.emit("FusedMatMul", x, value, domain=CONTRIB, transB=1)
        else:
            value = self.initializer(
                f"{name}.T",
                lambda: np.concatenate([w.values.numpy() for w in weights]).T,
                [columns, rows],
                ir.DataType.FLOAT,
            )
            y = self.emit("MatMul", x, value)
        return y if bias is None else self.emit("Add", y, bias)

    def lower_linears(self, node: Node) -> None:
        x, weights = self.value(node.args[0]), self.weights(node)
        slotted: Sequence[int] = node.args[4]  # type: ignore[assignment]
        downs: Sequence[Node] = node.args[5]  # type: ignore[assignment]
        sites = [self.roles[down.name].removeprefix("down.") for down in downs]
        packing = next(((attention, order) for attention, (src, order) in self.packed.items() if src is node), None)
        deltas = dict(zip(slotted, self._slots(x, sites, downs), strict=True)) if sites else {}
        if packing:
            _, order = packing
            y = self.matmul(x, [weights[i] for i in order], table=False)
            if deltas:
                y = self.emit("Add", y, self.emit("Concat", *[deltas[i] for i in order], axis=-1))
            self.values[node] = y
            return
        for i, weight in enumerate(weights):
            y = self.matmul(x, [weight], table=self._is_table(weight))
            self.outputs[node, i] = self.emit("Add", y, deltas[i]) if i in deltas else y

    def _is_table(self, weight: _Weight) -> bool:
        return any(
            node.target is CALORA.embedding.default and _short(self.roles[node.args[1].name]) == weight.name  # type: ignore[union-attr]
            for node in self.fx
        )

    def _slots(self, x: ir.Value, sites: Sequence[str], downs: Sequence[Node]) -> list[ir.Value]:
        """The group's deltas: one `down` for all of its sites, the rows' non-linearity, one `up` each."""
        count, features = len(sites), int(downs[0].meta["val"].shape[1])
        prefix = "+".join([sites[0], *(site.split(".")[-1] for site in sites[1:])])
        rank = "rank" if count == 1 else f"rank_{count}"
        down = self._adapter_input(f"{prefix}.down", [rank, features])
        rows = self.emit("FusedMatMul", x, down, domain=CONTRIB, transB=1)
        if self.graph.recovery:
            curved = self.emit("Gelu", rows, domain="")
            rows = self.emit("Where", self._recovery_rows(count), curved, rows)
        parts = [rows] if count == 1 else self._split_rows(rows, count)
        deltas = []
        for i, (site, part) in enumerate(zip(sites, parts, strict=True)):
            size = next(slot.outputs for slot in self.graph.slots if slot.site == site)
            deltas.append(self.emit("MatMul", part, self._adapter_input(f"{site}.up", ["rank", size])))
            self.tensors.append(SlotTensor(site, f"{prefix}.down", i, count, f"{site}.up", features, size))
        return deltas

    def _recovery_rows(self, count: int) -> ir.Value:
        key = f"recovery_{count}"
        if key not in self.shared:
            mask = self.emit("Cast", self.inputs["recovery"], to=int(ir.DataType.BOOL))
            self.shared[key] = mask if count == 1 else self.emit("Concat", *[mask] * count, axis=0)
        return self.shared[key]

    def _split_rows(self, rows: ir.Value, count: int) -> Sequence[ir.Value]:
        key = f"sizes_{count}"
        if key not in self.shared:
            rank = self.emit("Div", self.emit("Shape", rows, start=-1), self.constant([count]))
            self.shared[key] = self.emit("Concat", *[rank] * count, axis=0)
        return self.emit("Split", rows, self.shared[key], outputs=count, axis=-1)

    # ── the other operators ───────────────────────────────────────────────────────────────────────────────────────────

    def lower_embedding(self, node: Node) -> None:
        ids, table, scale = (arg for arg in node.args)
        weight = _Weight(
            _short(self.roles[table.name]),  # type: ignore[union-attr]
            self.graph.tensors[self.roles[table.name]],  # type: ignore[union-attr]
            self.graph.tensors[self.roles[scale.name]],  # type: ignore[union-attr]
            torch.zeros(0),
        )
        rows, columns = weight.values.shape
        if not weight.bits:
            value = self.initializer(weight.name, lambda: weight.values.numpy(), [rows, columns], ir.DataType.FLOAT)
            self.values[node] = self.emit("Gather", value, self.value(ids))
            return
        packed = self.initializer(
            f"{weight.name}.table",
            weight.nibbles,
            [rows, columns * weight.bits // 8],
            ir.DataType.UINT8,
            key=f"{weight.name}.q",
        )
        scales = self.initializer(
            f"{weight.name}.scale", lambda: weight.scale.numpy(), list(weight.scale.shape), ir.DataType.FLOAT
        )
        attrs = {"bits": weight.bits, "block_size": weight.group_size, "gather_axis": 0, "quantize_axis": 1}
        self.values[node] = self.emit(
            "GatherBlockQuantized", packed, self.value(ids), scales, domain=CONTRIB, **attrs
        )

    def lower_rms_norm(self, node: Node) -> None:
        x, weight, eps = node.args
        if node in self.values:
            return
        self.values[node] = self.emit(
            "SimplifiedLayerNormalization", self.value(x), self.value(weight), epsilon=eps, axis=-1, stash_type=1
        )

    def lower_add(self, node: Node) -> None:
        norm = self.fused_adds.get(node)
        if norm is None:
            self.values[node] = self._binary("Add", node)
            return
        _, weight, eps = norm.args
        x, skip = (self.value(arg) for arg in node.args)
        made = self.emit(
            "SkipSimplifiedLayerNormalization",
            x,
            skip,
            self.value(weight),
            domain=CONTRIB,
            outputs=4,
            epsilon=eps,
        )
        made[1].name = made[2].name = ""
        self.values[norm], self.values[node] = made[0], made[3]

    def _binary(self, op: str, node: Node) -> ir.Value:
        sides = [self.scalar(float(a)) if isinstance(a, (int, float)) else self.value(a) for a in node.args[:2]]
        return self.emit(op, *sides)

    def lower_mul(self, node: Node) -> None:
        self.values[node] = self._binary("Mul", node)

    def lower_div(self, node: Node) -> None:
        self.values[node] = self._binary("Div", node)

    def lower_silu(self, node: Node) -> None:
        self.values[node] = self.emit("QuickGelu", self.value(node.args[0]), domain=CONTRIB, alpha=1.0)

    def lower_gelu(self, node: Node) -> None:
        kind = node.kwargs.get("approximate", "none")
        self.values[node] = self.emit("Gelu", self.value(node.args[0]), approximate=kind)

    def lower_tanh(self, node: Node) -> None:
        self.values[node] = self.emit("Tanh", self.value(node.args[0]))

    def lower_getitem(self, node: Node) -> None:
        source, index = node.args
        assert isinstance(source, Node) and isinstance(index, int)
        self.values[node] = self.outputs[source, index]

    def lower_view(self, node: Node) -> None:
        """A reshape whose only unknown length is the sequence's; the FX node says where it is."""
        source = _viewed(node)
        if source.meta["val"].shape == node.meta["val"].shape:
            self.values[node] = self.value(source)
            return
        shape = [size if isinstance(size, int) else -1 for size in node.meta["val"].shape]
        if shape.count(-1) > 1:
            raise UnsupportedError(mismatch("onnx", str(node.target), "one dynamic dimension", str(shape)))
        self.values[node] = self.emit("Reshape", self.value(source), self.constant(shape))

    def lower_transpose(self, node: Node) -> None:
        x, a, b = node.args
        assert isinstance(x, Node) and isinstance(a, int) and isinstance(b, int)
        order = list(range(len(x.meta["val"].shape)))
        order[a], order[b] = order[b], order[a]
        self.values[node] = self.emit("Transpose", self.value(x), perm=order)

    def lower_slice(self, node: Node) -> None:
        x, axis, start, end, *_ = node.args
        bounds = [self.constant([int(v)]) for v in (start, end, axis)]  # type: ignore[call-overload]
        self.values[node] = self.emit("Slice", self.value(x), *bounds)

    def lower_chunk(self, node: Node) -> None:
        x, chunks, axis = node.args
        parts = self.emit("Split", self.value(x), outputs=int(chunks), axis=axis, num_outputs=chunks)  # type: ignore[call-overload]
        self.outputs.update({(node, i): part for i, part in enumerate(parts)})

    def lower_same(self, node: Node) -> None:
        """Casts to fp32 of what is fp32, clones, dropout at inference."""
        self.values[node] = self.value(node.args[0])

    def lower_attention(self, node: Node) -> None:
        q, k, v, past_key, past_value, cos, sin, scale, window, softcap = node.args
        heads = self.graph.shape.heads
        if node in self.packed:
            qkv: list[ir.Value | None] = [self.values[self.packed[node][0]], None, None]
        else:
            qkv = [self._flat_heads(arg) for arg in (q, k, v)]
        rotary = int(cos.meta["val"].numel() > 0)  # type: ignore[union-attr]
        tables = [self.value(cos), self.value(sin)] if rotary else []
        self.outputs.update(
            {
                (node, i): out
                for i, out in enumerate(
                    self.emit(
                        "GroupQueryAttention",
                        *qkv,
                        self.value(past_key),
                        self.value(past_value),
                        *self._lengths(),
                        *tables,
                        domain=CONTRIB,
                        outputs=3,
                        num_heads=heads,
                        kv_num_heads=self.graph.shape.kv_heads,
                        scale=scale,
                        do_rotary=rotary,
                        local_window_size=window or -1,
                        softcap=softcap,
                    )
                )
            }
        )

    def _flat_heads(self, node: object) -> ir.Value:
        """[B, S, H·D] from what attention gets as [B, H, S, D], without moving it there and back."""
        assert isinstance(node, Node)
        source, is_3d = _heads(node)
        if is_3d:
            return self.value(source)
        value = self.value(source)
        if source is node:
            value = self.emit("Transpose", value, perm=[0, 2, 1, 3])
        return self.emit("Reshape", value, self.constant([0, 0, -1]))

    def _lengths(self) -> list[ir.Value]:
        """seqlens_k [batch] (the total less one) and total_sequence_length [], from the attention mask."""
        if "total" not in self.shared:
            mask = self.inputs["mask"]
            valid = self.emit("ReduceSum", mask, self.constant([1]), keepdims=0)
            self.shared["seqlens"] = self.emit(
                "Cast", self.emit("Sub", valid, self.constant([1])), to=int(ir.DataType.INT32)
            )
            total = self.emit("Squeeze", self.emit("Shape", mask, start=1), self.constant([0]))
            self.shared["total"] = self.emit("Cast", total, to=int(ir.DataType.INT32))
        return [self.shared["seqlens"], self.shared["total"]]


def _short(name: str) -> str:
    """The Hugging Face name of a tensor in the traced module."""
    return name.removeprefix("model.lm.")


def _viewed(node: Node) -> Node:
    """What a chain of views looks at."""
    while node.target in _VIEWS:
        assert isinstance(node.args[0], Node)
        node = node.args[0]
    return node


def _heads(node: Node) -> tuple[Node, bool]:
    """Follow [B, H, S, D] back over its transpose and view; says whether what it found is [B, S, H·D]."""
    if node.target is not ATEN.transpose.int or tuple(node.args[1:]) != (1, 2):
        return node, False
    before = node.args[0]
    assert isinstance(before, Node)
    if before.target in _VIEWS and len(before.args[0].meta["val"].shape) == 3:  # type: ignore[union-attr]
        return before.args[0], True  # type: ignore[return-value]
    return before, False


def _norms_after_add(nodes: Sequence[Node]) -> dict[Node, Node]:
    """Residual additions whose sum goes through an RMS norm: add node → norm node."""
    fused: dict[Node, Node] = {}
    for node in nodes:
        source = node.args[0] if node.target is CALORA.rms_norm.default else None
        if isinstance(source, Node) and source.target is ATEN.add.Tensor and source not in fused:
            shapes = [arg.meta["val"].shape for arg in source.args if isinstance(arg, Node)]
            if len(shapes) == 2 and shapes[0] == shapes[1]:
                fused[source] = node
    return fused


_HANDLERS: Mapping[object, Callable[[_Lowering, Node], None]] = {
    CALORA.linears.default: _Lowering.lower_linears,
    CALORA.embedding.default: _Lowering.lower_embedding,
    CALORA.rms_norm.default: _Lowering.lower_rms_norm,
    CALORA.attention.default: _Lowering.lower_attention,
    operator.getitem: _Lowering.lower_getitem,
    ATEN.add.Tensor: _Lowering.lower_add,
    ATEN.mul.Tensor: _Lowering.lower_mul,
    ATEN.div.Tensor: _Lowering.lower_div,
    ATEN.silu.default: _Lowering.lower_silu,
    ATEN.gelu.default: _Lowering.lower_gelu,
    ATEN.tanh.default: _Lowering.lower_tanh,
    ATEN.view.default: _Lowering.lower_view,
    ATEN.reshape.default: _Lowering.lower_view,
    ATEN.unflatten.int: _Lowering.lower_view,
    ATEN.transpose.int: _Lowering.lower_transpose,
    ATEN.slice.Tensor: _Lowering.lower_slice,
    ATEN.chunk.default: _Lowering.lower_chunk,
    ATEN.to.dtype: _Lowering.lower_same,
    ATEN.contiguous.default: _Lowering.lower_same,
    ATEN.dropout.default: _Lowering.lower_same,
}
