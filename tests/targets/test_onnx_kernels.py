"""The operators of our own for ONNX Runtime, in the runtime, against the formula in numpy."""

from __future__ import annotations

import math
import shutil
from collections.abc import Sequence

import numpy as np
import onnxruntime as ort
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper

from calora_export import native
from tests.conftest import Families, Variant
from tests.families import PREFILL, STEPS, tokens
from tests.onnx_file import OnnxFile
from tests.targets.test_onnx import run, steps

if not (shutil.which("c++") or shutil.which("g++")):
    pytest.skip("no C++ compiler", allow_module_level=True)

FLOAT = TensorProto.FLOAT
ERF = np.vectorize(math.erf)


def session(op: str, ups: int, ys: int, rows: int, *, recovery: bool, threads: int = 2) -> ort.InferenceSession:
    """A graph of one node, whose y comes out of another, as a matmul's does: the operator writes over it."""
    shapes = {"x": (FLOAT, 3), "down": (rows, 2), "recovery": (FLOAT, 1)}
    shapes |= {f"up{i}": (rows, 2) for i in range(ups)} | {f"y{i}": (FLOAT, 3) for i in range(ys)}
    shapes = {name: kind for name, kind in shapes.items() if recovery or name != "recovery"}
    read = ["x", "down", "recovery" if recovery else "", *(f"up{i}" for i in range(ups)), *[""] * (3 - ups)]
    outputs = [f"out{i}" for i in range(2 if op == "SlotGlu" else ys)]
    nodes = [helper.make_node("Neg", [f"y{i}"], [f"negative{i}"]) for i in range(ys)]
    nodes.append(helper.make_node(op, [*read, *(f"negative{i}" for i in range(ys))], outputs, domain="calora"))
    inputs = [helper.make_tensor_value_info(name, kind, [None] * dims) for name, (kind, dims) in shapes.items()]
    seen = outputs[:1] if op == "SlotGlu" else outputs
    graph = helper.make_graph(
        nodes, "one", inputs, [helper.make_tensor_value_info(name, FLOAT, [None] * 3) for name in seen]
    )
    model = helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", 21), helper.make_opsetid("calora", 1)], ir_version=10
    )
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = threads, 4
    options.register_custom_ops_library(str(native.kernels("onnx")))
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def outputs(made: ort.InferenceSession, feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
    return [np.asarray(array) for array in made.run(None, feeds)]


def slots(feeds: dict[str, np.ndarray], ups: int) -> list[np.ndarray]:
    """What the slots add to each linear, in fp64: up · act(down · x), act exact GELU on recovery rows."""
    x, down = feeds["x"].astype(np.float64), feeds["down"].astype(np.float64)
    added = []
    for i, part in enumerate(np.split(down, ups)):
        h = x @ part.T
        if "recovery" in feeds:
            h = np.where(feeds["recovery"] != 0, 0.5 * h * (1 + ERF(h / math.sqrt(2))) if h.size else h, h)
        added.append(h @ feeds[f"up{i}"].astype(np.float64))
    return added


def values(
    seed: int, positions: int, inputs: int, outs: Sequence[int], rank: int, half: bool, widths: Sequence[int]
) -> dict[str, np.ndarray]:
    noise, dtype = np.random.default_rng(seed), np.float16 if half else np.float32
    feeds = {"x": noise.normal(size=(1, positions, inputs)).astype(np.float32)}
    feeds["down"] = (noise.normal(size=(len(outs) * rank, inputs)) / math.sqrt(inputs)).astype(dtype)
    feeds["recovery"] = (noise.random(rank) < 0.5).astype(np.float32)
    feeds |= {f"up{i}": noise.normal(size=(rank, out)).astype(dtype) for i, out in enumerate(outs)}
    return feeds | {f"y{i}": noise.normal(size=(1, positions, n)).astype(np.float32) for i, n in enumerate(widths)}


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    positions=st.sampled_from([1, 2, 9, 40]),
    inputs=st.integers(1, 70),
    outs=st.lists(st.integers(1, 150), min_size=1, max_size=3),
    rank=st.integers(0, 70),
    half=st.booleans(),
    recovery=st.booleans(),
    packed=st.booleans(),
)
def test_slot_is_the_formula(
    seed: int, positions: int, inputs: int, outs: list[int], rank: int, half: bool, recovery: bool, packed: bool
) -> None:
    widths = [sum(outs)] if packed else outs
    feeds = values(seed, positions, inputs, outs, rank, half, widths)
    if not recovery:
        del feeds["recovery"]
    kind = TensorProto.FLOAT16 if half else FLOAT
    made = outputs(session("Slot", len(outs), len(widths), kind, recovery=recovery), feeds)
    added = slots(feeds, len(outs))
    for i, delta in enumerate([np.concatenate(added, axis=-1)] if packed else added):
        np.testing.assert_allclose(made[i], delta - feeds[f"y{i}"], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("positions", [1, 3, 33])
@pytest.mark.parametrize("rank", [0, 16])
def test_a_gated_unit_is_the_formula(positions: int, rank: int) -> None:
    feeds = values(5, positions, 48, [100, 100], rank, True, [200])
    feeds["y0"][..., :8] *= 60  # where exp overflows and underflows
    made = outputs(session("SlotGlu", 2, 1, TensorProto.FLOAT16, recovery=True), feeds)[0]
    gate, up = np.split(np.concatenate(slots(feeds, 2), axis=-1) - feeds["y0"], 2, axis=-1)
    np.testing.assert_allclose(made, gate / (1 + np.exp(-gate)) * up, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("outs", "inputs"), [([600, 200, 200], 600), ([1500, 1500], 600)])
def test_a_position_has_the_same_bits_alone_in_a_prompt_and_on_any_number_of_threads(
    outs: list[int], inputs: int
) -> None:
    """600 and 1500: rows enough to be worth a second thread."""
    feeds = values(7, 21, inputs, outs, 32, True, [sum(outs)])
    expected = outputs(session("Slot", len(outs), 1, TensorProto.FLOAT16, recovery=True, threads=1), feeds)[0]
    for threads in (1, 2, 3):
        one = session("Slot", len(outs), 1, TensorProto.FLOAT16, recovery=True, threads=threads)
        np.testing.assert_array_equal(outputs(one, feeds)[0], expected)
        for position in range(21):
            part = {key: value[:, position : position + 1] if key in "xy0" else value for key, value in feeds.items()}
            np.testing.assert_array_equal(outputs(one, part)[0][0, 0], expected[0, position])


@pytest.mark.parametrize(
    ("name", "shape", "said"),
    [
        ("down", (7, 12), "down: fp16 or fp32 [linears"),
        ("down", (8, 11), "down: fp16 or fp32 [linears"),
        ("up1", (3, 6), "up: as down, [rank, out]"),
        ("recovery", (5,), "recovery: fp32 [rank]"),
        ("y0", (1, 3, 11), "y: a column for every output"),
        ("y0", (1, 2, 12), "y: fp32 [batch, positions"),
    ],
)
def test_rows_that_do_not_fit_are_refused(name: str, shape: tuple[int, ...], said: str) -> None:
    feeds = values(3, 3, 12, [6, 6], 4, False, [12])
    one = session("Slot", 2, 1, FLOAT, recovery=True)
    one.run(None, feeds)
    with pytest.raises(Exception, match=said.replace("[", r"\[")):
        one.run(None, feeds | {name: np.zeros(shape, np.float32)})


@pytest.mark.parametrize("name", ["llama", "qwen3", "mistral", "gemma3"])
def test_packages_with_our_operators_equal_peft(families: Families, variant: Variant, name: str) -> None:
    """In llama and qwen3 gated units become SlotGlu; mistral has slots on q and v alone, gemma another activation."""
    ids, family = tokens(PREFILL + STEPS), families(name)
    package = variant(family.bundle, "onnx-fp32", kernels="calora")
    adapter = "a16" if name == "llama" else "all"
    operators = OnnxFile(package).operators()
    assert operators["Slot"] and not operators.keys() & {"Concat", "Split"}
    assert (operators["SlotGlu"] > 0) == (name in ("llama", "qwen3"))
    for mix, logits in (({}, family.logits(ids)), ({adapter: 1.0}, family.peft_logits(adapter, ids))):
        np.testing.assert_allclose(run(package, mix, ids[0].tolist()), steps(logits), atol=2e-4)
