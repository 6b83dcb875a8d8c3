"""Programs written by hand: where tensors are planned, what is stored once, and that the runtime runs them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

pytest.importorskip("executorch", reason="the executorch extra is not installed")

from executorch.exir import schema
from executorch.exir.scalar_type import ScalarType
from executorch.runtime import Runtime

from calora_export.targets._executorch_program import Method, Program
from calora_export.targets._xnnpack import Filter, Subgraph
from tests.bundles import LAYERS
from tests.conftest import Export
from tests.pte_file import PteFile

SIZE = 8
BYTES = {ScalarType.BOOL: 1, ScalarType.FLOAT: 4, ScalarType.LONG: 8}
CACHE = {"llama::update_cache": 1, "aten::index_put_": 0}  # which operand it is
ADD, COPY, EMBEDDING = "aten::add.out", "aten::clone.out", "aten::embedding.out"


def write(path: Path, *methods: Method, program: Program) -> Path:
    for method in methods:
        program.add(method)
    program.write(path)
    return path


def loaded(path: Path, name: str = "forward"):
    program = Runtime.get().load_program(path)
    return program.load_method(name)


def add(method: Method, a: int, b: int, out: int) -> None:
    method.call(ADD, [a, b, method.number(1), out, out])


# ── memory ──────────────────────────────────────────────────────────────────────────────────────────────────

# Per instruction: what it reads, as distances back; how large its result is; whether it reads them as a list, or is a
# view of the result before it.
FORMS = ("operands", "list", "view")
SCHEDULES = st.lists(
    st.tuples(st.lists(st.integers(1, 12), max_size=3), st.integers(1, 300), st.sampled_from(FORMS)),
    min_size=1,
    max_size=25,
)


def scheduled(
    schedule: Sequence[tuple[list[int], int, str]], states: Sequence[int], outputs: int
) -> schema.ExecutionPlan:
    """A method of operators that read some results before them; its last results are its outputs."""
    method = Method("forward", Program())
    kept = [method.state([size]) for size in states]
    made = [(method.input("fp32", [4], dynamic=True), 4)]
    for distances, size, form in schedule:
        read = [made[-distance][0] for distance in distances if distance <= len(made)]
        if form == "view":
            before, size = made[-1]
            out = method.tensor("fp32", [size], dynamic=True)
            method.view(before, [method.number(size)], out)
        else:
            out = method.tensor("fp32", [size], dynamic=bool(size % 2))
            operands = [method.tensors([*read, None])] if form == "list" else read
            method.call("calora::any.out", [*operands, *kept, out, out])
        made.append((out, size))
    for value, _ in made[1:][-outputs:]:
        method.output(value)
    return method.plan()


def spans(plan: schema.ExecutionPlan) -> dict[int, tuple[int, int]]:
    """Value → its first and last byte + 1 in the arena."""
    found = {}
    for number, value in enumerate(plan.values):
        tensor = value.val
        if isinstance(tensor, schema.Tensor) and (place := tensor.allocation_info) is not None:
            start = place.memory_offset_high * 2**32 + place.memory_offset_low
            assert place.memory_id == 1
            found[number] = (start, start + BYTES[tensor.scalar_type] * int(np.prod(tensor.sizes)))
    return found


def lives(plan: schema.ExecutionPlan) -> dict[int, tuple[int, int]]:
    """Value → first and last instruction that has it, or a list or a view of it; outputs outlive the last."""
    found: dict[int, tuple[int, int]] = {}
    place: dict[int, int] = {}
    calls = [instruction.instr_args for instruction in plan.chains[0].instructions]
    for step, call in enumerate([*calls, None]):
        arguments = plan.outputs if call is None else call.args
        if isinstance(call, schema.KernelCall) and plan.operators[call.op_index].name == "executorch_prim::et_view":
            place[arguments[2]] = place.get(arguments[0], arguments[0])
        for argument in arguments:
            held = plan.values[argument].val
            for value in held.items if isinstance(held, schema.OptionalTensorList) else [argument]:
                root = place.get(value, value)
                found[root] = (found.get(root, (step, step))[0], step)
    return found


def require_places_of_their_own(plan: schema.ExecutionPlan, states: set[int]) -> None:
    places, times = spans(plan), lives(plan)
    for a, where in places.items():
        assert where[0] % 64 == 0 and where[1] <= plan.non_const_buffer_sizes[1]
        for b in places.keys() - {a}:
            if {a, b} & states or (times[a][0] <= times[b][1] and times[b][0] <= times[a][1]):
                assert not overlap(where, places[b]), (a, b)


def overlap(a: tuple[int, int], b: tuple[int, int]) -> bool:
    return a[0] < b[1] and b[0] < a[1]


VIEW_OF_A_VIEW = [([], 16, form) for form in ("operands", "view", "view", "operands", "operands")]


@example([*VIEW_OF_A_VIEW, ([3], 16, "operands")], [], 1)
@given(SCHEDULES, st.lists(st.integers(1, 200), max_size=3), st.integers(1, 3))
def test_tensors_of_the_same_time_have_places_of_their_own(schedule, states, outputs) -> None:
    plan = scheduled(schedule, states, outputs)
    places = spans(plan)
    assert len(places) == len(states) + sum(form != "view" for *_, form in schedule)
    require_places_of_their_own(plan, set(list(places)[: len(states)]))


@pytest.mark.parametrize("method", ["forward", "adapted"])
@pytest.mark.parametrize("recipe", ["executorch-8da4w", "executorch-8da4w-portable"])
def test_so_have_those_of_a_model(exported: Export, recipe: str, method: str) -> None:
    plan = PteFile(exported(recipe)).plan(method)
    calls = [instruction.instr_args for instruction in plan.chains[0].instructions]
    named = [(plan.operators[c.op_index].name, c.args) for c in calls if isinstance(c, schema.KernelCall)]
    caches = {arguments[CACHE[name]] for name, arguments in named if name in CACHE}
    assert len(caches) == 2 * LAYERS
    require_places_of_their_own(plan, caches)


def test_memory_is_used_again() -> None:
    """A chain needs two places, however long it is."""
    plan = scheduled([([1], 256, "operands")] * 50, [], 1)
    assert plan.non_const_buffer_sizes == [0, 2 * 1024]


def test_an_arena_above_4_gib_has_two_part_offsets() -> None:
    plan = scheduled([([], 16, "list"), ([1], 16, "list")], [2**30 + 16], 1)
    assert [start for start, _ in spans(plan).values()] == [0, 4 * 2**30 + 64, 4 * 2**30 + 128]


@given(st.lists(st.tuples(st.integers(1, 6), st.integers(1, 6)), min_size=1, max_size=12))
def test_the_runtime_gets_what_the_operators_mean(tmp_path_factory: pytest.TempPathFactory, steps) -> None:
    """Sums of earlier results, with values that a shared place would change."""
    program = Program()
    method = Method("forward", program)
    made = [method.input("fp32", [1, SIZE], dynamic=True)]
    expected = [torch.arange(5.0)[None] + 1]
    for first, second in steps:
        a, b = -min(first, len(made)), -min(second, len(made))
        out = method.tensor("fp32", [1, SIZE], dynamic=True)
        add(method, made[a], made[b], out)
        made.append(out)
        expected.append(expected[a] + expected[b])
    for value in made[1:]:
        method.output(value)
    path = write(tmp_path_factory.mktemp("program") / "model.pte", method, program=program)
    for result, reference in zip(loaded(path).execute(expected[:1]), expected[1:], strict=True):
        assert torch.equal(result, reference)


def test_a_state_outlives_the_call_that_wrote_it(tmp_path: Path) -> None:
    """Each call returns what the one before was given."""
    program = Program()
    method = Method("forward", program)
    x = method.input("fp32", [SIZE], dynamic=False)
    state, before = method.state([SIZE]), method.tensor("fp32", [SIZE], dynamic=False)
    for source, out in ((state, before), (x, state)):
        method.call(COPY, [source, method.number(None), out, out])
    scratch = method.tensor("fp32", [SIZE], dynamic=False)
    add(method, x, x, scratch)
    method.output(before)
    run = loaded(write(tmp_path / "model.pte", method, program=program)).execute
    inputs = [torch.full([SIZE], float(i)) for i in range(1, 5)]
    answers = [run([x])[0].clone() for x in inputs]
    for given_before, answer in zip(inputs, answers[1:], strict=False):
        assert torch.equal(answer, given_before)


# ── constants ───────────────────────────────────────────────────────────────────────────────────────────────


def plus(program: Program, name: str, constant: np.ndarray, weight: np.ndarray) -> Method:
    """weight · (x + constant): the one an operator's constant, the other a delegate's."""
    method = Method(name, program)
    x = method.input("fp32", [1, SIZE], dynamic=True)
    middle, out = (method.tensor("fp32", [1, SIZE], dynamic=True) for _ in range(2))
    add(method, x, method.constant(constant), middle)
    graph = Subgraph()
    graph.output(graph.linear(graph.input((1, SIZE)), Filter(weight, None, 32, None)))
    method.delegate(*graph.serialize(), [middle, out])
    method.output(out)
    return method


def test_methods_share_equal_constants_and_payloads(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    constant, weight = rng.random((1, SIZE), np.float32), rng.random((SIZE, SIZE), np.float32)
    program = Program()
    methods = [plus(program, name, constant.copy(), weight.copy()) for name in ("forward", "again")]
    path = write(tmp_path / "model.pte", *methods, program=program)
    content = path.read_bytes()
    assert content.count(constant.tobytes()) == content.count(weight.tobytes()) == 1
    x = torch.from_numpy(rng.random((1, SIZE), np.float32))
    expected = (x + torch.from_numpy(constant)) @ torch.from_numpy(weight).T
    for name in ("forward", "again"):
        torch.testing.assert_close(loaded(path, name).execute([x])[0], expected)


def test_other_constants_are_not_mixed_up(tmp_path: Path) -> None:
    constants = [np.full((1, SIZE), float(i), np.float32) for i in range(3)]
    program = Program()
    eye = np.eye(SIZE, dtype=np.float32)
    methods = [plus(program, f"plus_{i}", constant, eye) for i, constant in enumerate(constants)]
    path = write(tmp_path / "model.pte", *methods, program=program)
    for i in range(3):
        assert loaded(path, f"plus_{i}").execute([torch.zeros(1, SIZE)])[0].tolist() == [[float(i)] * SIZE]


def test_what_an_operator_and_a_delegate_both_read_is_stored_once(tmp_path: Path) -> None:
    """Rows of a table, times the same table: tied embeddings."""
    table = np.random.default_rng(1).random((5, SIZE), np.float32)
    program = Program()
    method = Method("forward", program)
    ids = method.input("int64", [1, SIZE], dynamic=True)
    rows, out = (method.tensor("fp32", [1, SIZE, width], dynamic=True) for width in (SIZE, 5))
    options = (method.number(-1), method.number(False), method.number(False))
    method.call(EMBEDDING, [method.constant(table), ids, *options, rows, rows])
    graph = Subgraph()
    graph.output(graph.linear(graph.input((1, 0, SIZE)), Filter(table, None, 32, None)))
    method.delegate(*graph.serialize(), [rows, out])
    method.output(out)
    path = write(tmp_path / "model.pte", method, program=program)
    assert path.read_bytes().count(table.tobytes()) == 1
    weight = torch.from_numpy(table)
    for tokens in ([3], [0, 4, 1]):
        (made,) = loaded(path).execute([torch.tensor([tokens])])
        torch.testing.assert_close(made, (weight[tokens] @ weight.T)[None])


# ── answers ─────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("value", [0, 7, 2**40, -1, True, False])
def test_a_program_answers_what_it_is_asked(tmp_path: Path, value: int | bool) -> None:
    program = Program()
    program.answer("get_something", [value])
    program.write(tmp_path / "model.pte")
    (found,) = loaded(tmp_path / "model.pte", "get_something").execute([])
    assert found == value and type(found) is type(value)


def test_numbers_of_other_types_are_other_values() -> None:
    """1, 1.0 and True are equal in Python, and three arguments to an operator."""
    method = Method("forward", Program())
    assert len({method.number(value) for value in (1, 1.0, True, 0, False, None, 1)}) == 6
