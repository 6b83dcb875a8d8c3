"""The operators of our own for ONNX Runtime, in the runtime, against the formula in numpy."""

from __future__ import annotations

import math
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper
from torch import Tensor

from calora_export import native
from calora_export import package as packages
from calora_export.devices import host
from calora_export.jobs import Case, Job
from tests.bundles import RANKS
from tests.conftest import Families, Variant
from tests.families import PREFILL, STEPS, tokens
from tests.onnx_file import OnnxFile
from tests.targets.test_onnx import IDS, run, steps
from tests.twin import CaLora, calora, dense_twin

if not (shutil.which("c++") or shutil.which("g++")):
    pytest.skip("no C++ compiler", allow_module_level=True)

MIXES = ({}, {"alpha": 1.0}, {"beta": 1.0}, {"alpha": 0.6, "beta": -0.4})
FLOAT = TensorProto.FLOAT
KINDS = {"fp32": FLOAT, "fp16": TensorProto.FLOAT16, "int8": TensorProto.INT8}
MORE = {"Slot": (), "SlotGlu": (), "SlotNorm": ("skip", "weight", "epsilon")}
DIMENSIONS = {"x": 3, "y": 3, "skip": 3, "gate": 3}  # of the other inputs: 1
ERF = np.vectorize(math.erf, otypes=[np.float64])
Feeds = dict[str, np.ndarray]


@dataclass(frozen=True)
class Values:
    """down, up [R, …] of each linear, steps of int8 with a scale [R] each; feeds: whatever else an operator reads."""

    downs: list[np.ndarray]
    ups: list[np.ndarray]
    scales: list[np.ndarray]
    feeds: Feeds

    @property
    def outs(self) -> list[int]:
        return [up.shape[1] for up in self.ups]

    def packed(self) -> Feeds:
        """Behind a matrix of 5 columns and before one of 3, which are another node's."""
        rank, dtype = len(self.downs[0]), self.downs[0].dtype
        others = [np.full((rank, columns), 77, dtype) for columns in (5, 3)]
        matrices = [others[0], *self.downs, *self.ups, others[1]]
        rows = {"rows": np.concatenate([matrix.ravel() for matrix in matrices])}
        ends = np.full(rank, 99, np.float32)
        return rows | ({"scales": np.concatenate([ends, *self.scales, ends])} if self.scales else {}) | self.feeds

    def layout(self) -> dict[str, object]:
        matrices = [*self.downs, *self.ups]
        width = 5 + sum(matrix.shape[1] for matrix in matrices) + 3
        return {"outs": self.outs, "width": width, "offset": 5, "matrices": len(matrices) + 2, "first": 1}


def session(op: str, values: Values, threads: int = 2) -> ort.InferenceSession:
    """A graph of one node, whose y comes out of another, as a matmul's does: the operator writes over it."""
    feeds, numbered = values.packed(), [f"y{i}" for i in range(3)]
    names = ["x", "rows", "scales", "recovery", "gate", *numbered, *MORE[op]]
    read = [name if name in feeds else "" for name in names]
    ys = [name for name in numbered if name in feeds]
    nodes = [helper.make_node("Neg", [y], [f"negative_{y}"]) for y in ys]
    outputs = [f"out{i}" for i in range(2 if MORE[op] or op == "SlotGlu" else len(ys))]
    read = [f"negative_{name}" if name in ys else name for name in read]
    nodes.append(helper.make_node(op, read, outputs, domain="calora", **values.layout()))
    inputs = [
        helper.make_tensor_value_info(
            name, helper.np_dtype_to_tensor_dtype(array.dtype), [None] * DIMENSIONS.get(name.rstrip("012"), 1)
        )
        for name, array in feeds.items()
    ]
    seen = outputs[:1] if op == "SlotGlu" else outputs
    graph = helper.make_graph(
        nodes, "one", inputs, [helper.make_tensor_value_info(name, FLOAT, [None] * 3) for name in seen]
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("calora", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = threads, 4
    options.register_custom_ops_library(str(native.kernels("onnx")))
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def outputs(made: ort.InferenceSession, feeds: Feeds) -> list[np.ndarray]:
    return [np.asarray(array) for array in made.run(None, feeds)]


def slots(values: Values) -> list[np.ndarray]:
    """What the slots add to each linear, in fp64: up · (gate ⊙ act(down · x)), act exact GELU on recovery rows."""
    matrices = [matrix.astype(np.float64) for matrix in (*values.downs, *values.ups)]
    if values.scales:
        matrices = [matrix * scale[:, None] for matrix, scale in zip(matrices, values.scales, strict=True)]
    added, count, feeds = [], len(values.ups), values.feeds
    for down, up in zip(matrices[:count], matrices[count:], strict=True):
        h = feeds["x"].astype(np.float64) @ down.T
        if "recovery" in feeds:
            h = np.where(feeds["recovery"] != 0, 0.5 * h * (1 + ERF(h / math.sqrt(2))), h)
        added.append((h * feeds.get("gate", 1.0)) @ up)
    return added


def values(
    seed: int, positions: int, inputs: int, outs: Sequence[int], rank: int, kind: str, *, packed: bool
) -> Values:
    noise = np.random.default_rng(seed)
    scales: list[np.ndarray] = []

    def rows(width: int, size: float) -> np.ndarray:
        floats = (noise.normal(size=(rank, width)) * size).astype(np.float32)
        if kind != "int8":
            return floats.astype(np.float16 if kind == "fp16" else np.float32)
        scales.append(noise.random(rank, np.float32) * size / 20)
        return (floats / size * 40).clip(-127, 127).astype(np.int8)

    downs, ups = [rows(inputs, 1 / math.sqrt(inputs)) for _ in outs], [rows(out, 1.0) for out in outs]
    feeds = {"x": noise.normal(size=(1, positions, inputs)).astype(np.float32)}
    feeds["recovery"] = (noise.random(rank) < 0.5).astype(np.float32)
    for i, width in enumerate([sum(outs)] if packed else outs):
        feeds[f"y{i}"] = noise.normal(size=(1, positions, width)).astype(np.float32)
    return Values(downs, ups, scales, feeds)


@settings(max_examples=50, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    positions=st.sampled_from([1, 2, 9, 40]),
    inputs=st.integers(1, 70),
    outs=st.lists(st.integers(1, 150), min_size=1, max_size=3),
    rank=st.integers(0, 70),
    kind=st.sampled_from(sorted(KINDS)),
    left_out=st.sets(st.sampled_from(["recovery", "gate"])),
    packed=st.booleans(),
)
def test_slot_is_the_formula(
    seed: int, positions: int, inputs: int, outs: list[int], rank: int, kind: str, left_out: set[str], packed: bool
) -> None:
    given = values(seed, positions, inputs, outs, rank, kind, packed=packed)
    given.feeds["gate"] = np.random.default_rng(seed).normal(size=(1, positions, rank)).astype(np.float32)
    for name in left_out:
        del given.feeds[name]
    made, added = outputs(session("Slot", given), given.packed()), slots(given)
    for i, delta in enumerate([np.concatenate(added, axis=-1)] if packed else added):
        np.testing.assert_allclose(made[i], delta - given.feeds[f"y{i}"], rtol=1e-4, atol=2e-4)


@pytest.mark.parametrize("positions", [1, 3, 33])
@pytest.mark.parametrize("rank", [0, 16])
def test_a_gated_unit_is_the_formula(positions: int, rank: int) -> None:
    given = values(5, positions, 48, [100, 100], rank, "fp16", packed=True)
    given.feeds["y0"][..., :8] *= 60  # where exp overflows and underflows
    made = outputs(session("SlotGlu", given), given.packed())[0]
    gate, up = np.split(np.concatenate(slots(given), axis=-1) - given.feeds["y0"], 2, axis=-1)
    np.testing.assert_allclose(made, gate / (1 + np.exp(-gate)) * up, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("positions", [1, 3, 33])
@pytest.mark.parametrize("rank", [0, 16])
def test_a_norm_after_the_residual_is_the_formula(positions: int, rank: int) -> None:
    given, noise = values(6, positions, 48, [101], rank, "int8", packed=True), np.random.default_rng(6)
    feeds = given.feeds
    feeds["skip"] = noise.normal(size=(1, positions, 101)).astype(np.float32)
    feeds |= {"weight": noise.normal(size=101).astype(np.float32), "epsilon": np.array([1e-5], np.float32)}
    norm, total = outputs(session("SlotNorm", given), given.packed())
    expected = slots(given)[0] - feeds["y0"] + feeds["skip"]
    np.testing.assert_allclose(total, expected, rtol=1e-4, atol=1e-4)
    root = np.sqrt((expected**2).mean(axis=-1, keepdims=True) + 1e-5)
    np.testing.assert_allclose(norm, expected / root * feeds["weight"], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("outs", "inputs"), [([600, 200, 200], 600), ([1500, 1500], 600)])
def test_a_position_has_the_same_bits_alone_in_a_prompt_and_on_any_number_of_threads(
    outs: list[int], inputs: int
) -> None:
    """600 and 1500: rows enough to be worth a second thread."""
    given = values(7, 21, inputs, outs, 32, "fp16", packed=True)
    feeds = given.packed()
    expected = outputs(session("Slot", given, threads=1), feeds)[0]
    for threads in (1, 2, 3):
        one = session("Slot", given, threads=threads)
        np.testing.assert_array_equal(outputs(one, feeds)[0], expected)
        for position in range(21):
            part = {key: value[:, position : position + 1] if key in "xy0" else value for key, value in feeds.items()}
            np.testing.assert_array_equal(outputs(one, part)[0][0, 0], expected[0, position])


@pytest.mark.parametrize(
    ("name", "shape", "said"),
    [
        ("rows", (177,), "rows: [rank · width]"),
        ("recovery", (5,), "recovery: fp32 [rank]"),
        ("scales", (7,), "scales: fp32 [rank · matrices]"),
        ("y0", (1, 3, 11), "y: a column for every output"),
        ("y0", (1, 2, 12), "y: fp32 [batch, positions"),
        ("x", (1, 3, 14), "offset: of matrices inside rows"),
    ],
)
def test_rows_that_do_not_fit_are_refused(name: str, shape: tuple[int, ...], said: str) -> None:
    given = values(3, 3, 12, [6, 6], 4, "int8", packed=True)
    one, feeds = session("Slot", given), given.packed()
    one.run(None, feeds)
    with pytest.raises(Exception, match=said.replace("[", r"\[")):
        one.run(None, feeds | {name: np.zeros(shape, feeds[name].dtype)})


@pytest.mark.parametrize("name", ["llama", "qwen3", "mistral", "gemma3"])
def test_packages_with_our_operators_equal_peft(families: Families, variant: Variant, name: str) -> None:
    """In llama and qwen3 gated units become SlotGlu, and norms SlotNorm; mistral has slots on q and v alone, gemma
    other activations and norms."""
    ids, family = tokens(PREFILL + STEPS), families(name)
    package = variant(family.bundle, "onnx-fp32", kernels="calora")
    adapter = "a16" if name == "llama" else "all"
    operators = OnnxFile(package).operators()
    assert operators["Slot"] and not operators.keys() & {"Concat", "Split"}
    assert (operators["SlotGlu"] > 0) == (operators["SlotNorm"] > 0) == (name in ("llama", "qwen3"))
    for mix, logits in (({}, family.logits(ids)), ({adapter: 1.0}, family.peft_logits(adapter, ids))):
        np.testing.assert_allclose(run(package, mix, ids[0].tolist()), steps(logits), atol=2e-4)


def rounded(adapter: CaLora) -> CaLora:
    """Each row of the adapter in 127 steps either way: of A and a1, and of the transposes of B and a2."""

    def round_rows(matrix: Tensor) -> Tensor:
        scale = matrix.abs().amax(dim=1, keepdim=True) / 127
        return torch.where(scale > 0, (matrix / scale).round() * scale, 0.0)

    def round_part(name: str, part: Tensor) -> Tensor:
        return round_rows(part) if name in ("lora_A", "lora_a1") else round_rows(part.T).T

    sites = {
        site: {name: round_part(name, part) for name, part in parts.items()} for site, parts in adapter.tensors.items()
    }
    return replace(adapter, tensors=sites)


@pytest.mark.parametrize("device", ["python", "native"])
def test_int8_adapters_are_the_rounded_ones(tiny: Path, variant: Variant, device: str) -> None:
    """Alone and mixed, with recovery, against transformers with the rows rounded by numpy."""
    package = packages.load(variant(tiny, "onnx-int4-fused", activations="float"))
    twin = dense_twin(tiny)
    exact = {name: rounded(calora(tiny, name, rank)) for name, rank in zip(("alpha", "beta"), RANKS, strict=True)}
    cases = tuple(Case(str(i), mix, tuple(IDS), PREFILL) for i, mix in enumerate(MIXES))
    job = Job(threads=1, cases=cases)
    answer = host.answer(package, job) if device == "python" else host.run("native", package, job)
    for i, mix in enumerate(MIXES):
        expected = steps(twin.mixed_logits([(exact[name], gate) for name, gate in mix.items()], torch.tensor([IDS])))
        np.testing.assert_allclose(answer.logits[str(i)][-len(expected) :], expected, atol=3e-4)
