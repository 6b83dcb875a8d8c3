"""Every node that a delegate can have, in ExecuTorch's own runtime against torch's formulas, at several lengths."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torch import Tensor
from torch.nn import functional as F

pytest.importorskip("executorch", reason="the executorch extra is not installed")

from executorch.backends.xnnpack.serialization import xnnpack_graph_schema as schema

from calora_export import ops
from calora_export.targets._executorch_program import Method, Program
from calora_export.targets._xnnpack import END, Filter, Shape, Subgraph, Value, nibbles
from calora_export.targets._xnnpack import SEQUENCE as S

LONGEST, CONTEXT = 32, 64
LENGTHS = (1, 5, LONGEST, 3)
IN, OUT = 64, 48
X = (1, S, IN)

Build = Callable[[Subgraph, Sequence[Value]], Sequence[Value]]
Run = Callable[[Sequence[Tensor]], Sequence[Tensor]]
Compile = Callable[[Sequence[Shape], Build], Run]


@pytest.fixture
def compiled(tmp_path: Path) -> Compile:
    """Shapes of inputs, and what a subgraph makes of them → one delegate, loaded."""
    from executorch.runtime import Runtime

    def compile(shapes: Sequence[Shape], build: Build) -> Run:
        program, graph = Program(), Subgraph()
        method = Method("forward", program)
        made = list(build(graph, values := [graph.input(shape) for shape in shapes]))
        for value in made:
            graph.output(value)
        tensors = [_bound(method.input, value) for value in values] + [_bound(method.tensor, value) for value in made]
        method.delegate(*graph.serialize(), tensors)
        for tensor in tensors[len(values) :]:
            method.output(tensor)
        program.add(method)
        program.write(tmp_path / "delegate.pte")
        return Runtime.get().load_program(tmp_path / "delegate.pte").load_method("forward").execute

    return compile


def _bound(make: Callable[..., int], value: Value) -> int:
    bounds = {S: LONGEST, END: CONTEXT}
    return make("fp32", [bounds.get(size, size) for size in value.shape], dynamic=min(value.shape) <= 0)


def draw(shape: Shape, length: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(1000 * seed + length)
    return torch.randn([size or length for size in shape], generator=generator)


def check(compiled: Compile, shapes: Sequence[Shape], build: Build, formula: Callable[..., Sequence[Tensor]]) -> None:
    """The same program at every length, longer and shorter than before; formula: in float64."""
    run = compiled(shapes, build)
    for length in LENGTHS:
        inputs = [draw(shape, length, seed) for seed, shape in enumerate(shapes)]
        expected = formula(*(x.double() for x in inputs))
        for y, reference in zip(run(inputs), expected, strict=True):
            assert y.shape == reference.shape
            torch.testing.assert_close(y.double(), reference, rtol=1e-5, atol=2e-5)


# ── elementwise ─────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("node", "formula"),
    [
        (schema.XNNGelu, F.gelu),
        (schema.XNNTanh, torch.tanh),
        (schema.XNNSigmoid, torch.sigmoid),
        (schema.XNNSquare, torch.square),
        (schema.XNNSoftmax, lambda x: x.softmax(-1)),
    ],
)
def test_unary(compiled: Compile, node: type[schema.XNNNode1x1], formula: Callable[[Tensor], Tensor]) -> None:
    check(compiled, [X], lambda graph, x: [graph.unary(node, x[0])], lambda x: [formula(x)])


def test_reciprocal_square_root(compiled: Compile) -> None:
    def build(graph: Subgraph, x: Sequence[Value]) -> Sequence[Value]:
        return [graph.unary(schema.XNNReciprocalSquareRoot, graph.unary(schema.XNNSquare, x[0]))]

    run = compiled([X], build)
    x = draw(X, 7)
    torch.testing.assert_close(run([x])[0], 1 / x.abs(), rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    ("node", "formula"),
    [
        (schema.XNNAdd, torch.add),
        (schema.XNNSubtract, torch.sub),
        (schema.XNNMultiply, torch.mul),
        (schema.XNNDiv, torch.div),
        (schema.XNNMinimum, torch.minimum),
    ],
)
@pytest.mark.parametrize(
    ("a", "b"),
    [(X, X), (X, (IN,)), ((1,), X), ((1, S, 4, 16), (1, S, 1, 16)), ((1, S, 1), X)],
    ids=str,
)
def test_binary_broadcasts(
    compiled: Compile, node: type[schema.XNNNode2x1], formula: Callable[[Tensor, Tensor], Tensor], a: Shape, b: Shape
) -> None:
    """Computed with computed, and with constants on either side. The divisor is kept away from 0."""
    positive = [S in shape for shape in (a, b)]
    constants = [np.random.default_rng(i).uniform(1, 2, shape) for i, shape in enumerate((a, b)) if S not in shape]

    def build(graph: Subgraph, x: Sequence[Value]) -> Sequence[Value]:
        values, held = iter(x), iter(constants)
        left, right = (next(values) if inside else graph.constant(next(held)) for inside in positive)
        if node is schema.XNNDiv and positive[1]:
            right = graph.add(graph.unary(schema.XNNSquare, right), graph.constant(np.ones(1)))
        return [graph.binary(node, left, right)]

    def reference(*x: Tensor) -> Sequence[Tensor]:
        values, held = iter(x), iter(constants)
        left, right = (next(values) if inside else torch.from_numpy(next(held)) for inside in positive)
        if node is schema.XNNDiv and positive[1]:
            right = right.square() + 1
        return [formula(left, right)]

    check(compiled, [shape for shape in (a, b) if S in shape], build, reference)


def test_the_short_names_are_those_nodes(compiled: Compile) -> None:
    def build(graph: Subgraph, x: Sequence[Value]) -> Sequence[Value]:
        return [graph.add(*x), graph.subtract(*x), graph.multiply(*x)]

    check(compiled, [X, X], build, lambda a, b: [a + b, a - b, a * b])


@pytest.mark.parametrize("end", [1, 7, 40])
def test_two_dimensions_may_vary(compiled: Compile, end: int) -> None:
    """Scores [heads, S, end] and a mask [S, end], as attention has them."""
    graph_shapes = [(4, S, END), (S, END)]
    run = compiled(graph_shapes, lambda graph, x: [graph.unary(schema.XNNSoftmax, graph.add(*x))])
    for length in LENGTHS:
        scores, mask = draw((4, S, end), length), draw((S, end), length, 1)
        torch.testing.assert_close(run([scores, mask])[0], (scores + mask).softmax(-1), rtol=1e-5, atol=1e-6)


# ── shapes ──────────────────────────────────────────────────────────────────────────────────────────────────


def test_reshape(compiled: Compile) -> None:
    """Heads out of features and back; the sequence stays dynamic on both sides."""

    def build(graph: Subgraph, x: Sequence[Value]) -> Sequence[Value]:
        heads = graph.reshape(x[0], (1, S, 4, 16))
        return [heads, graph.reshape(heads, (1, S, 2, 32))]

    check(compiled, [X], build, lambda x: [x.unflatten(-1, (4, 16)), x.unflatten(-1, (2, 32))])


@pytest.mark.parametrize("order", [(0, 2, 1, 3), (2, 0, 3, 1)])
def test_transpose(compiled: Compile, order: tuple[int, ...]) -> None:
    build: Build = lambda graph, x: [graph.transpose(x[0], order)]  # noqa: E731
    check(compiled, [(1, S, 4, 16)], build, lambda x: [x.permute(order)])


@pytest.mark.parametrize(("start", "size"), [(0, 8), (8, 16), (24, 8)])
def test_slice(compiled: Compile, start: int, size: int) -> None:
    shape = (1, S, 2, 32)
    build: Build = lambda graph, x: [graph.slice(x[0], start, size)]  # noqa: E731
    check(compiled, [shape], build, lambda x: [x[..., start : start + size]])


@pytest.mark.parametrize("sizes", [(8, 24), (5, 1, 7)])
def test_concatenate(compiled: Compile, sizes: tuple[int, ...]) -> None:
    shapes = [(1, S, 2, size) for size in sizes]
    check(compiled, shapes, lambda graph, x: [graph.concatenate(x)], lambda *x: [torch.cat(x, -1)])


def test_what_changes_nothing_adds_no_node() -> None:
    graph = Subgraph()
    x = graph.input(X)
    assert graph.reshape(x, X) is graph.slice(x, 0, IN) is graph.concatenate([x]) is x
    assert not graph._nodes


@pytest.mark.parametrize("columns", [16, 64, 100])
def test_rms_norm(compiled: Compile, columns: int) -> None:
    """Over the last dimension of a sequence, and of every head of one (Qwen 3)."""
    weight, eps = np.random.default_rng(1).uniform(0.5, 2, columns).astype(np.float32), 1e-2

    def reference(*inputs: Tensor) -> Sequence[Tensor]:
        return [F.rms_norm(x, (columns,), torch.from_numpy(weight).double(), eps) for x in inputs]

    def build(graph: Subgraph, x: Sequence[Value]) -> Sequence[Value]:
        return [graph.rms_norm(value, weight, eps) for value in x]

    check(compiled, [(1, S, columns), (1, S, 3, columns)], build, reference)


# ── linear layers ───────────────────────────────────────────────────────────────────────────────────────────


def integers(bits: int, shape: Shape = (OUT, IN), seed: int = 0) -> np.ndarray:
    """Every value that the bits have, the lowest too."""
    half = 1 << (bits - 1)
    q = np.random.default_rng(seed).integers(-half, half, shape).astype(np.int8)
    q.flat[:2] = -half, half - 1
    return q


def scales(groups: int, seed: int = 0) -> np.ndarray:
    """fp32 [OUT, groups], no power of two and no bf16 number."""
    return np.random.default_rng(seed + 9).uniform(0.01, 0.1, (OUT, groups)).astype(np.float32)


def dense(weight: Filter) -> Tensor:
    """float64 [out, in] of what a filter is documented to hold: bf16 scales where a row has several."""
    if weight.scale is None:
        return torch.from_numpy(weight.values).double()
    scale = weight.scale
    if scale.shape[1] > 1:
        scale = scale.astype(ml_dtypes.bfloat16).astype(np.float32)
    return torch.from_numpy(weight.values * np.repeat(scale, weight.values.shape[1] // scale.shape[1], axis=1)).double()


BIAS = np.random.default_rng(4).standard_normal(OUT).astype(np.float32)
FILTERS = {
    "int4 groups of 32": Filter(integers(4), scales(2), 4, None),
    "int4 groups of 64": Filter(integers(4, (OUT, 192)), scales(3), 4, None),
    "int4 rows": Filter(integers(4), scales(1), 4, None),
    "int4 rows of an odd width": Filter(integers(4, (OUT, 50)), scales(1), 4, None),
    "int8 rows": Filter(integers(8), scales(1), 8, None),
    "int8 rows of an odd width": Filter(integers(8, (OUT, 51)), scales(1), 8, None),
    "int4 groups, bias": Filter(integers(4), scales(2), 4, BIAS),
    "int8 rows, bias": Filter(integers(8), scales(1), 8, BIAS),
}


@pytest.mark.parametrize("bias", [None, BIAS], ids=["", "bias"])
def test_a_dense_linear_layer(compiled: Compile, bias: np.ndarray | None) -> None:
    weight = Filter(np.random.default_rng(2).standard_normal((OUT, IN)).astype(np.float32), None, 32, bias)
    offset = torch.zeros(1) if bias is None else torch.from_numpy(bias)
    build: Build = lambda graph, x: [graph.linear(x[0], weight)]  # noqa: E731
    check(compiled, [X], build, lambda x: [x @ dense(weight).T + offset])


KINDS: dict[str, Callable[[Tensor], Tensor]] = {
    "around zero": lambda x: x,
    "above zero": lambda x: x.abs() + 3,
    "below zero": lambda x: -x.abs() - 3,
    "off centre": lambda x: x + 0.3,
    "one outlier": lambda x: x.index_fill(-1, torch.tensor([3]), 80.0),
    "small": lambda x: x * 1e-6,
    "zeros": torch.zeros_like,
}
"""What int8 rounding sees differently: where the zero point is, whether there is a range at all."""


def positions(kind: str, length: int, columns: int) -> Tensor:
    """[1, length, columns] without ties: within an ulp of a half, a kernel may round either way."""
    x = KINDS[kind](draw((1, S, columns), length))
    low, high = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
    step = (high.clamp(min=0) - low.clamp(max=0)) / 255
    tie = (((x / step).frac().abs() - 0.5).abs() < 0.01) & (x != low) & (x != high)
    return torch.where(tie, x - x.sign() * 0.1 * step, x)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", FILTERS)
def test_an_integer_linear_layer_rounds_as_the_target_reference_does(compiled: Compile, name: str, kind: str) -> None:
    """Why a report's `target` rows may use ops.round_activations: one step of int8 would be a hundred times as much."""
    weight = FILTERS[name]
    columns, exact = weight.values.shape[1], dense(weight)
    bias = torch.zeros(OUT) if weight.bias is None else torch.from_numpy(weight.bias)
    run = compiled([(1, S, columns)], lambda graph, x: [graph.linear(x[0], weight)])
    for length in LENGTHS:
        x = positions(kind, length, columns)
        (y,) = run([x])
        expected = ops.round_activations(x, "int8_token", columns).double() @ exact.T + bias
        assert y.shape == expected.shape
        assert (y.double() - expected).abs().max() <= 1e-5 * expected.abs().max() + 1e-12
        if kind == "around zero":
            assert (y.double() - (x.double() @ exact.T + bias)).abs().max() > 1e-3 * expected.abs().max()


@pytest.mark.parametrize("kind", KINDS)
def test_every_value_is_rounded_to_the_step_that_the_reference_names(compiled: Compile, kind: str) -> None:
    """A weight of 1 shows the rounded input itself."""
    one = Filter(np.eye(IN, dtype=np.int8), np.ones((IN, 1), np.float32), 8, None)
    x = positions(kind, LONGEST, IN)
    (y,) = compiled([X], lambda graph, x: [graph.linear(x[0], one)])([x])
    torch.testing.assert_close(y, ops.round_activations(x, "int8_token", IN), rtol=1e-5, atol=0)


def test_members_of_a_group_read_one_rounded_input(compiled: Compile) -> None:
    members = [FILTERS["int4 groups of 32"], FILTERS["int8 rows, bias"], FILTERS["int4 rows"]]

    def build(graph: Subgraph, x: Sequence[Value]) -> Sequence[Value]:
        made = [graph.linear(x[0], weight) for weight in members]
        assert sum(isinstance(node.xnode_union, schema.XNNConvert) for node in graph._nodes) == 1
        return [graph.concatenate(made)]

    run = compiled([X], build)
    x = draw(X, 6)
    rounded = ops.round_activations(x, "int8_token", IN).double()
    expected = torch.cat([rounded @ dense(weight).T for weight in members], -1)
    expected[..., OUT : 2 * OUT] += torch.from_numpy(BIAS)
    torch.testing.assert_close(run([x])[0].double(), expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))


def test_equal_constants_are_stored_once() -> None:
    graph = Subgraph()
    x = graph.input(X)
    weight = Filter(integers(4), scales(2), 4, BIAS)
    again = Filter(weight.values.copy(), scales(2), 4, BIAS.copy())
    graph.output(graph.add(graph.linear(x, weight), graph.linear(x, again)))
    _, stored = graph.serialize()
    assert sorted(len(buffer) for buffer in stored.buffers) == sorted([OUT * IN // 2, OUT * 2 * 2, OUT * 4])


# ── encodings ───────────────────────────────────────────────────────────────────────────────────────────────


@given(hnp.arrays(np.int8, (3, 8), elements=st.integers(-8, 7)))
def test_nibbles_hold_the_even_columns_low_and_are_offset_by_8(values: np.ndarray) -> None:
    packed = nibbles(values)
    assert (packed.dtype, packed.shape) == (np.uint8, (3, 4))
    for row, bytes_ in zip(values.tolist(), packed.tolist(), strict=True):
        assert row == [nibble - 8 for byte in bytes_ for nibble in (byte % 16, byte // 16)]
