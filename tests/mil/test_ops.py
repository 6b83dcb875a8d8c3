"""Every operator of the reference runtime against what coremltools, numpy or torch computes, in float32 and float16."""

from __future__ import annotations

from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from calora_export import mil
from calora_export.errors import PackageError
from calora_export.mil.ops import OPERATORS
from tests.mil.cases import GROUPS, Case
from tests.mil.programs import inferred, results, save


def packed(groups: Any) -> tuple[dict[str, Case], dict[str, np.ndarray]]:
    """The cases by a name of their own, and all their inputs by name."""
    count: Counter[str] = Counter()
    cases = {}
    for group in groups:
        for case in group():
            cases[f"{case.operator}_{count[case.operator]}"] = case
            count[case.operator] += 1
    return cases, {f"{name}_in{i}": array for name, case in cases.items() for i, array in enumerate(case.inputs)}


CASES, INPUTS = packed(GROUPS)


def body(m: Any, given: Any, *, referred: bool = True) -> dict[str, Any]:
    """All cases in one program, or those without a reference of their own; several results are several outputs."""
    outputs = {}
    for name, case in CASES.items():
        if case.reference is not None and not referred:
            continue
        parts = [given[f"{name}_in{i}"] for i in range(len(case.inputs))]
        outputs |= {f"{name}_out{i}": value for i, value in enumerate(results(case.build(m, *parts)))}
    return outputs


@pytest.fixture(scope="module")
def expected() -> dict[str, np.ndarray]:
    """Each result: the case's own reference, or what coremltools computes while it folds constants."""
    known = inferred(INPUTS, partial(body, referred=False))
    for name, case in CASES.items():
        if case.reference is not None:
            known |= {f"{name}_out{i}": value for i, value in enumerate(results(case.reference(*case.inputs)))}
    return known


@pytest.fixture(scope="module", params=["float32", "float16"])
def computed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, mil.Function]:
    file = tmp_path_factory.mktemp("operators") / f"{request.param}.mlpackage"
    return request.param, mil.load(save(file, INPUTS, body, precision=request.param)).functions["main"]


def test_operators_agree_with_coremltools_numpy_and_torch(
    computed: tuple[str, mil.Function], expected: dict[str, np.ndarray]
) -> None:
    precision, function = computed
    found = function.run(INPUTS, {})
    assert found.keys() == expected.keys()
    assert not [name for name, value in expected.items() if value is None]  # these need a reference of their own
    tolerance = 1e-5 if precision == "float32" else 2**-10
    wrong = {
        name: (array, expected[name])
        for name, array in found.items()
        if array.shape != np.shape(expected[name])
        or not np.allclose(array.astype(float), np.float64(expected[name]), rtol=tolerance, atol=tolerance)
    }
    assert not wrong


def test_before_ios17_a_negative_index_counts_from_the_end(tmp_path: Path) -> None:
    inputs = {"x": np.arange(6, dtype=np.float32).reshape(2, 3), "i": np.int32([-1, 0])}

    def body(m: Any, given: Any) -> dict[str, Any]:
        return {"y": m.gather(x=given["x"], indices=given["i"], axis=1)}

    earlier, later = (
        mil.load(save(tmp_path / f"{system}.mlpackage", inputs, body, system)).functions["main"]
        for system in ("iOS16", "iOS17")
    )
    np.testing.assert_array_equal(earlier.run(inputs, {})["y"], [[2, 0], [5, 3]])
    with pytest.raises(PackageError, match=r"iOS17.mlpackage: gather \(\w+\): .*out of"):
        later.run(inputs, {})


def test_every_operator_has_a_case() -> None:
    assert {n for n in OPERATORS if not n.startswith("constexpr_")} == {case.operator for case in CASES.values()}


def test_kernels_keep_their_promises(computed: tuple[str, mil.Function]) -> None:
    """Nobody writes in an input; a result lies in an input's memory only where its kernel says so; all in a float16
    program is float16, where a kernel says that its results need no rounding, too.
    """
    precision, function = computed
    code = function.code
    values: list[Any] = [None] * code.size
    for constant, slot in code.constants.items():
        values[slot] = constant.tensor
    for name, value in function.hold(INPUTS).items():
        values[code.slots[name]] = value
    for step in code.steps:
        inputs = [values[slot] for slot in step.inputs]
        before = [value.clone() for value in inputs]
        result = step.run(*inputs)
        assert all(map(torch.equal, inputs, before)), f"{step.names} writes in its inputs"
        memory = {value.untyped_storage().data_ptr() for value in inputs if value.numel()}
        for slot, value in zip(step.outputs, results(result), strict=True):
            values[slot] = kept = value.half().float() if step.rounds else value
            assert kept.dtype in (torch.float32, torch.int32, torch.bool), step.names
            if precision == "float16" and kept.is_floating_point():
                assert torch.equal(kept, kept.half().float()), f"{step.names} is not rounded"
            assert step.shares or kept.untyped_storage().data_ptr() not in memory, f"{step.names} shares memory"
