"""The operators of our own for ONNX Runtime, in the runtime, against the formula in numpy."""

from __future__ import annotations

import math
import shutil
from collections.abc import Sequence
from dataclasses import replace
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
DIMENSIONS = {"x": 3, "y": 3, "skip": 3, "gate": 3, "down": 2, "up": 2}  # of the other inputs: 1
ERF = np.vectorize(math.erf, otypes=[np.float64])
Feeds = dict[str, np.ndarray]


def session(op: str, feeds: Feeds, threads: int = 2) -> ort.InferenceSession:
    """A graph of one node, whose y comes out of another, as a matmul's does: the operator writes over it."""
    numbered = [[f"{name}{i}" for i in range(3)] for name in ("up", "y", "up_scale")]
    names = ["x", "down", "recovery", *numbered[0], *numbered[1], "gate", "down_scale", *numbered[2], *MORE[op]]
    read = [name if name in feeds else "" for name in names]
    ys = [name for name in numbered[1] if name in feeds]
    nodes = [helper.make_node("Neg", [y], [f"negative_{y}"]) for y in ys]
    outputs = [f"out{i}" for i in range(2 if MORE[op] or op == "SlotGlu" else len(ys))]
    nodes.append(
        helper.make_node(op, [f"negative_{name}" if name in ys else name for name in read], outputs, domain="calora")
    )
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


def slots(feeds: Feeds) -> list[np.ndarray]:
    """What the slots add to each linear, in fp64: up · (gate ⊙ act(down · x)), act exact GELU on recovery rows."""
    exact = {name: array.astype(np.float64) for name, array in feeds.items()}
    ups = [name for name in exact if name in ("up0", "up1", "up2")]
    down = exact["down"] * exact["down_scale"][:, None] if "down_scale" in exact else exact["down"]
    added = []
    for name, part in zip(ups, np.split(down, len(ups)), strict=True):
        h = exact["x"] @ part.T
        if "recovery" in exact:
            h = np.where(exact["recovery"] != 0, 0.5 * h * (1 + ERF(h / math.sqrt(2))), h)
        h = h * exact.get("gate", 1.0)
        up = exact[name] * exact[f"up_scale{name[-1]}"][:, None] if "down_scale" in exact else exact[name]
        added.append(h @ up)
    return added


def values(seed: int, positions: int, inputs: int, outs: Sequence[int], rank: int, kind: str, *, packed: bool) -> Feeds:
    noise = np.random.default_rng(seed)

    def rows(name: str, count: int, width: int, size: float) -> Feeds:
        floats = (noise.normal(size=(count, width)) * size).astype(np.float32)
        if kind != "int8":
            return {name: floats.astype(np.float16 if kind == "fp16" else np.float32)}
        scale = f"up_scale{name[-1]}" if name != "down" else "down_scale"
        steps = (floats / size * 40).clip(-127, 127).astype(np.int8)
        return {name: steps, scale: noise.random(count, np.float32) * size / 20}

    feeds = {"x": noise.normal(size=(1, positions, inputs)).astype(np.float32)}
    feeds |= rows("down", len(outs) * rank, inputs, 1 / math.sqrt(inputs))
    feeds["recovery"] = (noise.random(rank) < 0.5).astype(np.float32)
    for i, out in enumerate(outs):
        feeds |= rows(f"up{i}", rank, out, 1.0)
    widths = [sum(outs)] if packed else outs
    return feeds | {f"y{i}": noise.normal(size=(1, positions, n)).astype(np.float32) for i, n in enumerate(widths)}


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
    feeds = values(seed, positions, inputs, outs, rank, kind, packed=packed)
    feeds["gate"] = np.random.default_rng(seed).normal(size=(1, positions, rank)).astype(np.float32)
    feeds = {name: array for name, array in feeds.items() if name not in left_out}
    made, added = outputs(session("Slot", feeds), feeds), slots(feeds)
    for i, delta in enumerate([np.concatenate(added, axis=-1)] if packed else added):
        np.testing.assert_allclose(made[i], delta - feeds[f"y{i}"], rtol=1e-4, atol=2e-4)


@pytest.mark.parametrize("positions", [1, 3, 33])
@pytest.mark.parametrize("rank", [0, 16])
def test_a_gated_unit_is_the_formula(positions: int, rank: int) -> None:
    feeds = values(5, positions, 48, [100, 100], rank, "fp16", packed=True)
    feeds["y0"][..., :8] *= 60  # where exp overflows and underflows
    made = outputs(session("SlotGlu", feeds), feeds)[0]
    gate, up = np.split(np.concatenate(slots(feeds), axis=-1) - feeds["y0"], 2, axis=-1)
    np.testing.assert_allclose(made, gate / (1 + np.exp(-gate)) * up, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("positions", [1, 3, 33])
@pytest.mark.parametrize("rank", [0, 16])
def test_a_norm_after_the_residual_is_the_formula(positions: int, rank: int) -> None:
    feeds, noise = values(6, positions, 48, [101], rank, "int8", packed=True), np.random.default_rng(6)
    feeds |= {"skip": noise.normal(size=(1, positions, 101)).astype(np.float32)}
    feeds |= {"weight": noise.normal(size=101).astype(np.float32), "epsilon": np.array([1e-5], np.float32)}
    norm, total = outputs(session("SlotNorm", feeds), feeds)
    expected = slots(feeds)[0] - feeds["y0"] + feeds["skip"]
    np.testing.assert_allclose(total, expected, rtol=1e-4, atol=1e-4)
    root = np.sqrt((expected**2).mean(axis=-1, keepdims=True) + 1e-5)
    np.testing.assert_allclose(norm, expected / root * feeds["weight"], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("outs", "inputs"), [([600, 200, 200], 600), ([1500, 1500], 600)])
def test_a_position_has_the_same_bits_alone_in_a_prompt_and_on_any_number_of_threads(
    outs: list[int], inputs: int
) -> None:
    """600 and 1500: rows enough to be worth a second thread."""
    feeds = values(7, 21, inputs, outs, 32, "fp16", packed=True)
    expected = outputs(session("Slot", feeds, threads=1), feeds)[0]
    for threads in (1, 2, 3):
        one = session("Slot", feeds, threads=threads)
        np.testing.assert_array_equal(outputs(one, feeds)[0], expected)
        for position in range(21):
            part = {key: value[:, position : position + 1] if key in "xy0" else value for key, value in feeds.items()}
            np.testing.assert_array_equal(outputs(one, part)[0][0, 0], expected[0, position])


@pytest.mark.parametrize(
    ("name", "shape", "said"),
    [
        ("down", (7, 12), "down: [linears"),
        ("down", (8, 11), "down: [linears"),
        ("up1", (3, 6), "up: as down, [rank, out]"),
        ("recovery", (5,), "recovery: fp32 [rank]"),
        ("down_scale", (7,), "down_scale: fp32 [linears"),
        ("up_scale1", (3,), "up_scale: fp32 [rank]"),
        ("y0", (1, 3, 11), "y: a column for every output"),
        ("y0", (1, 2, 12), "y: fp32 [batch, positions"),
    ],
)
def test_rows_that_do_not_fit_are_refused(name: str, shape: tuple[int, ...], said: str) -> None:
    feeds = values(3, 3, 12, [6, 6], 4, "int8", packed=True)
    one = session("Slot", feeds)
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
