"""The native ExecuTorch runner: its kernels against numpy and torch, its command line against wrong input."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("executorch", reason="the executorch extra is not installed")
SOURCE = Path(__file__).parents[1] / "targets" / "executorch" / "runner"


@pytest.fixture(scope="session")
def build(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The runner's build directory: library, program and the attention test."""
    import executorch

    cmake = shutil.which("cmake", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    if cmake is None or not (shutil.which("c++") or shutil.which("g++")):
        pytest.skip("the runner needs cmake and a C++ compiler")
    directory = tmp_path_factory.mktemp("runner")
    sdk = Path(executorch.__path__[0]) / "share" / "cmake"
    for command in (
        [cmake, "-S", str(SOURCE), "-B", str(directory), f"-Dexecutorch_DIR={sdk}", "-DBUILD_TESTING=ON"],
        [cmake, "--build", str(directory), "--parallel", "2"],
    ):
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return directory


@dataclass(frozen=True)
class Group:
    """Members of a group: where they begin in y and how wide they are."""

    inputs: int
    width: int
    columns: tuple[int, ...]
    outs: tuple[int, ...]
    offset: int

    @property
    def elements(self) -> int:
        """Of an adapter file per rank, with what comes before this group."""
        return self.offset + self.inputs * len(self.outs) + sum(self.outs)


ALL = Group(inputs=37, width=40, columns=(0,), outs=(40,), offset=0)
GAPS = Group(inputs=576, width=700, columns=(3, 203, 500), outs=(192, 70, 101), offset=19)
REACH = 128


class _Slot(nn.Module):
    def __init__(self, group: Group) -> None:
        super().__init__()
        self.group = group

    def forward(self, x: Tensor, y: Tensor, rows: Tensor, gate: Tensor, recovery: Tensor) -> Tensor:
        group = self.group
        return torch.ops.calora.slot(x, y, rows, gate, recovery, group.offset, list(group.columns), list(group.outs))


Run = Callable[..., np.ndarray]


@pytest.fixture(scope="session")
def slot(build: Path) -> Callable[[Group, torch.dtype], Run]:
    """A program of nothing but the operator, in the Python runtime with our library in it."""
    from executorch.exir import ExecutorchBackendConfig, to_edge
    from executorch.exir.passes import MemoryPlanningPass
    from executorch.runtime import Runtime
    from torch.export import Dim, export

    from calora_export.targets import _slot_op as _  # noqa: F401  registers calora::slot

    runtime, kept = Runtime.get(), []
    ctypes.CDLL(str(build / "libcalora_kernels.so"), mode=ctypes.RTLD_GLOBAL)

    def load(group: Group, dtype: torch.dtype) -> Run:
        rank, length = Dim("rank", min=0, max=REACH), Dim("length", min=1, max=128)
        example = (
            torch.zeros(1, 4, group.inputs),
            torch.zeros(1, 4, group.width),
            torch.zeros(3 * group.elements, dtype=dtype),
            torch.zeros(3),
            torch.zeros(3),
        )
        dynamic = ({1: length}, {1: length}, {0: group.elements * rank}, {0: rank}, {0: rank})
        program = export(_Slot(group), example, dynamic_shapes=dynamic)
        planning = MemoryPlanningPass(alloc_graph_input=False)
        config = ExecutorchBackendConfig(memory_planning_pass=planning)
        loaded = runtime.load_program(to_edge(program).to_executorch(config).buffer)
        method = loaded.load_method("forward")
        assert method is not None
        kept.append(loaded)  # a method does not keep its program alive
        return lambda *inputs: method.execute([_tensor(value) for value in inputs])[0].numpy().copy()

    return load


def _tensor(value: np.ndarray) -> Tensor:
    """numpy's strides of nothing are 0, and the runtime aborts on them."""
    return torch.from_numpy(value).new_zeros(value.shape) if value.size == 0 else torch.from_numpy(value)


def _erf(x: np.ndarray) -> np.ndarray:
    from math import erf

    return np.vectorize(erf)(x)


def _expected(group: Group, x: np.ndarray, y: np.ndarray, rows: np.ndarray, gate: np.ndarray, recovery: np.ndarray):
    """The operator in float64: h = gate · act(x · downᵀ), added to each member's columns."""
    rank, result, start = len(gate), y.astype(np.float64), len(gate) * group.offset
    wide = rows.astype(np.float64)
    ups = start + rank * group.inputs * len(group.outs)
    for column, out in zip(group.columns, group.outs, strict=True):
        down = wide[start : start + rank * group.inputs].reshape(rank, group.inputs)
        up = wide[ups : ups + rank * out].reshape(rank, out)
        start, ups = start + rank * group.inputs, ups + rank * out
        h = x.astype(np.float64) @ down.T
        h = gate * np.where(recovery != 0, h * (1 + _erf(h / np.sqrt(2))) / 2, h)
        result[..., column : column + out] += h @ up
    return result


def _inputs(group: Group, rank: int, length: int, dtype: type) -> tuple[np.ndarray, ...]:
    random = np.random.default_rng(rank + length)
    x = random.standard_normal((1, length, group.inputs)).astype(np.float32)
    y = random.standard_normal((1, length, group.width)).astype(np.float32)
    rows = (random.standard_normal(rank * group.elements) / 8).astype(dtype)
    gate = random.uniform(-1, 1, rank).astype(np.float32)
    return x, y, rows, gate, (random.random(rank) < 0.5).astype(np.float32)


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("group", [ALL, GAPS], ids=["one", "gaps"])
def test_the_slot_kernel_computes_the_formula(slot, group: Group, dtype: type) -> None:
    run = slot(group, {np.float32: torch.float32, np.float16: torch.float16}[dtype])
    for rank in (1, 6, 16, 97):
        for length in (1, 2, 70):
            inputs = _inputs(group, rank, length, dtype)
            np.testing.assert_allclose(run(*inputs), _expected(group, *inputs), rtol=2e-5, atol=2e-4)


def test_rank_0_is_y_bit_for_bit(slot) -> None:
    run = slot(GAPS, torch.float16)
    x, y, _, _, _ = _inputs(GAPS, 1, 70, np.float16)
    nothing = np.zeros(0, np.float32)
    assert run(x, y, nothing.astype(np.float16), nothing, nothing).tobytes() == y.tobytes()


def test_a_position_has_the_same_bits_alone_and_among_others(slot) -> None:
    run = slot(GAPS, torch.float16)
    x, y, *rest = _inputs(GAPS, 70, 70, np.float16)
    together = run(x, y, *rest)
    for position in (0, 5, 33, 69):
        one = slice(position, position + 1)
        assert run(x[:, one].copy(), y[:, one].copy(), *rest).tobytes() == together[:, one].tobytes()
