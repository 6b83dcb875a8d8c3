"""The native ExecuTorch runner: its kernels against numpy and torch, its command line against wrong input."""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from torch import Tensor, nn

from calora_export import native
from calora_export.jobs import Case, Completion, Job, Safety, SafetyTrace, Timing, read_trace, write_job

pytest.importorskip("executorch", reason="the executorch extra is not installed")
SOURCE = Path(__file__).parents[1] / "targets" / "executorch" / "runner"
SCHEMA = "(Tensor x, Tensor y, Tensor rows, Tensor gate, Tensor recovery, int offset, int[] columns, int[] outs"


@pytest.fixture(scope="session")
def cmake() -> str:
    """What builds the runner; only a machine without the tools skips."""
    found = shutil.which("cmake", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    if found is None or not (shutil.which("c++") or shutil.which("g++")):
        pytest.skip("the runner needs cmake and a C++ compiler")
    return found


@pytest.fixture(scope="session")
def runner(cmake: str) -> Path:
    return native.runner("executorch")


@pytest.fixture(scope="session")
def kernels(cmake: str) -> Path:
    return native.kernels("executorch")


@pytest.fixture(scope="session")
def attention(cmake: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The library of the attention kernels, which only tests load."""
    import executorch

    directory, sdk = tmp_path_factory.mktemp("attention-build"), Path(executorch.__path__[0]) / "share" / "cmake"
    options = [f"-Dexecutorch_DIR={sdk}", "-DBUILD_TESTING=ON", "-DCALORA_RUNNER=OFF"]
    for command in (
        [cmake, "-S", str(SOURCE), "-B", str(directory), *options],
        [cmake, "--build", str(directory), "--target", "calora_attention_test"],
    ):
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return next(directory.glob("libcalora_attention_test.*"))


@pytest.fixture(scope="session")
def declared() -> torch.library.Library:
    """calora::slot as torch.export needs it; nothing runs it there."""
    library = torch.library.Library("calora", "FRAGMENT")
    library.define(f"slot{SCHEMA}) -> Tensor")
    library.define(f"slot.out{SCHEMA}, *, Tensor(a!) out) -> Tensor(a!)")
    torch.library.register_fake("calora::slot", lambda x, y, *_: torch.empty_like(y), lib=library)
    return library


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
def slot(kernels: Path, declared: object) -> Callable[[Group, torch.dtype], Run]:
    """A program of nothing but the operator, in the Python runtime with our library in it."""
    from executorch.exir import ExecutorchBackendConfig, to_edge
    from executorch.exir.passes import MemoryPlanningPass
    from executorch.runtime import Runtime
    from torch.export import Dim, export

    runtime, kept = Runtime.get(), []
    ctypes.CDLL(str(kernels), mode=ctypes.RTLD_GLOBAL)

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


def _position(start: Tensor, context: int) -> int:
    position = start.item()
    torch._check(position >= 0)
    torch._check(position < context)
    return position  # type: ignore[return-value]


class _Attention(nn.Module):
    """Update both caches and attend: causally, or under an additive mask over the whole cache."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.register_buffer("keys", torch.zeros(1, CONTEXT, shape.kv_heads, shape.depth))
        self.register_buffer("values", torch.zeros(1, CONTEXT, shape.kv_heads, shape.depth))

    def forward(self, q: Tensor, k: Tensor, v: Tensor, start: Tensor, mask: Tensor) -> Tensor:
        position = _position(start, CONTEXT)
        torch.ops.llama.update_cache(k, self.keys, position)
        torch.ops.llama.update_cache(v, self.values, position)
        arguments = (mask, 0.0, False) if self.shape.masked else (None, 0.0, True)
        return torch.ops.llama.custom_sdpa(q, self.keys, self.values, position, *arguments, self.shape.scale)


# A process of its own: one that has the framework's kernels aborts when ours are registered too.
ATTENTION = """
import ctypes, sys
from pathlib import Path
import numpy as np, torch
from executorch.runtime import Runtime
runtime = Runtime.get()
ctypes.CDLL(sys.argv[1], mode=ctypes.RTLD_GLOBAL)
for directory in Path(sys.argv[2]).iterdir():
    program = runtime.load_program(directory / "attention.pte")
    forward, found, steps = program.load_method("forward"), {}, np.load(directory / "inputs.npz")
    for step in range(len(steps) // 5):
        arguments = [torch.from_numpy(steps[f"{name}{step}"]) for name in ("q", "k", "v", "start", "mask")]
        found[str(step)] = forward.execute(arguments)[0].numpy().copy()
    np.savez(directory / "outputs.npz", **found)
"""
CONTEXT, LENGTHS = 300, (70, 1, 1, 130, 16, 1)
STARTS = [int(start) for start in np.cumsum((0, *LENGTHS))]


@dataclass(frozen=True)
class Shape:
    heads: int
    kv_heads: int
    depth: int
    scale: float | None
    masked: bool

    def inputs(self) -> dict[str, np.ndarray]:
        """q, k, v, start and mask of each call."""
        random, steps = np.random.default_rng(self.heads), {}
        for i, (start, length) in enumerate(zip(STARTS, LENGTHS, strict=False)):
            steps[f"q{i}"] = random.standard_normal((1, length, self.heads, self.depth)) * 2
            steps[f"k{i}"], steps[f"v{i}"] = random.standard_normal((2, 1, length, self.kv_heads, self.depth))
            steps[f"mask{i}"] = np.where(random.random((length, CONTEXT)) < 0.5, 0.25, -np.inf)
            steps[f"mask{i}"][0, :140] = -np.inf  # a whole block of keys that the first row does not see
            steps[f"mask{i}"][:, -1] = 0.5
            steps[f"start{i}"] = np.array([start])
        dtypes = {name: np.int64 if name.startswith("start") else np.float32 for name in steps}
        return {name: step.astype(dtypes[name]) for name, step in steps.items()}

    def export(self, example: dict[str, np.ndarray]) -> bytes:
        from executorch.exir import to_edge
        from executorch.extension.llm.custom_ops import custom_ops as _  # noqa: F401  declares llama::…
        from torch.export import Dim, export

        inputs = tuple(torch.from_numpy(example[f"{name}0"]) for name in ("q", "k", "v", "start", "mask"))
        length = {1: Dim("length", min=1, max=150)}
        program = export(_Attention(self), inputs, dynamic_shapes=(length, length, length, None, {0: length[1]}))
        return to_edge(program).to_executorch().buffer


SHAPES = [
    Shape(heads=9, kv_heads=3, depth=64, scale=None, masked=False),
    Shape(heads=4, kv_heads=4, depth=24, scale=0.3, masked=False),
    Shape(heads=8, kv_heads=2, depth=96, scale=None, masked=False),
    Shape(heads=6, kv_heads=2, depth=20, scale=None, masked=True),
]


@pytest.fixture(scope="session")
def attended(attention: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory for each shape with what went in and what our kernels made of it."""
    directory = tmp_path_factory.mktemp("attention")
    for number, shape in enumerate(SHAPES):
        inputs = shape.inputs()
        (directory / str(number)).mkdir()
        np.savez(directory / str(number) / "inputs.npz", **inputs)
        (directory / str(number) / "attention.pte").write_bytes(shape.export(inputs))
    command = [sys.executable, "-c", ATTENTION, str(attention), str(directory)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return directory


@pytest.mark.parametrize("number", range(len(SHAPES)))
def test_attention_is_torchs(attended: Path, number: int) -> None:
    shape, directory = SHAPES[number], attended / str(number)
    steps, found = np.load(directory / "inputs.npz"), np.load(directory / "outputs.npz")
    cache = np.zeros((2, 1, CONTEXT, shape.kv_heads, shape.depth))
    for i, (start, end) in enumerate(zip(STARTS, STARTS[1:], strict=False)):
        cache[0, :, start:end], cache[1, :, start:end] = steps[f"k{i}"], steps[f"v{i}"]
        seen = CONTEXT if shape.masked else end
        causal = torch.arange(seen)[None] <= torch.arange(start, end)[:, None]
        expected = nn.functional.scaled_dot_product_attention(
            torch.from_numpy(steps[f"q{i}"]).double().transpose(1, 2),
            *(torch.from_numpy(part[:, :seen]).transpose(1, 2) for part in cache),
            attn_mask=torch.from_numpy(steps[f"mask{i}"]).double() if shape.masked else causal,
            scale=shape.scale,
            enable_gqa=True,
        )
        np.testing.assert_allclose(found[str(i)], expected.transpose(1, 2).numpy(), rtol=1e-4, atol=2e-5)


VOCAB, DEPTH, TOY_CONTEXT, CHUNK, END = 11, 8, 32, 6, 4
FINGERPRINT = "sha256:" + "a" * 64
RANKS = {"one": 3, "two": 2}
MIXES: dict[str, dict[str, float]] = {
    "base": {},
    "one": {"one": 1.0},
    "half": {"two": 0.5},
    "mix": {"one": 0.7, "two": -1.5},
}
PROMPT = [int(token) for token in np.random.default_rng(3).integers(0, VOCAB, 20)]


class _Toy(nn.Module):
    """One layer with a cache and a slot, and the inputs and outputs of every package: logits [1, 1, vocab]."""

    def __init__(self) -> None:
        super().__init__()
        random = torch.Generator().manual_seed(1)
        self.register_buffer("table", torch.randn(VOCAB, DEPTH, generator=random))
        self.register_buffer("head", torch.randn(VOCAB, DEPTH, generator=random))
        self.register_buffer("keys", torch.zeros(1, TOY_CONTEXT, 1, DEPTH))

    def forward(self, tokens: Tensor, input_pos: Tensor, rows: Tensor, gate: Tensor, recovery: Tensor) -> Tensor:
        position = _position(input_pos, TOY_CONTEXT)
        x = nn.functional.embedding(tokens, self.table)
        q = torch.ops.calora.slot(x, x, rows, gate, recovery, 0, [0], [DEPTH]).unsqueeze(2)
        torch.ops.llama.update_cache(q, self.keys, position)
        h = torch.ops.llama.custom_sdpa(q, self.keys, self.keys, position, None, 0.0, True, None).squeeze(2)
        return h[:, -1:] @ self.head.T

    def expected(self, ids: list[int], adapters: list[tuple[float, np.ndarray, np.ndarray]]) -> np.ndarray:
        """Logits [vocab] after the ids. adapters: gate, rows, recovery."""
        x = self.table[ids].double().numpy()
        slot, keys = Group(inputs=DEPTH, width=DEPTH, columns=(0,), outs=(DEPTH,), offset=0), x
        for gate, rows, recovery in adapters:
            keys = _expected(slot, x, keys, rows, np.full(len(recovery), gate), recovery)
        x = torch.from_numpy(keys)
        h = nn.functional.scaled_dot_product_attention(x[-1:], x, x)
        return (h @ self.head.double().T).numpy()[0]


class _Gates(nn.Module):
    def forward(self, ids: Tensor) -> Tensor:
        return torch.softmax(torch.stack([ids.float().mean(), ids.float().amax()]), 0)


def _program(methods: dict[str, tuple[nn.Module, tuple[Tensor, ...], object]], path: Path) -> None:
    from executorch.exir import ExecutorchBackendConfig, to_edge
    from executorch.exir.passes import MemoryPlanningPass
    from torch.export import export

    programs = {
        name: export(module, example, dynamic_shapes=dynamic) for name, (module, example, dynamic) in methods.items()
    }
    planning = MemoryPlanningPass(alloc_graph_input=False)
    edge = to_edge(programs).to_executorch(ExecutorchBackendConfig(memory_planning_pass=planning))
    path.write_bytes(edge.buffer)


def _adapter(path: Path, rank: int, fingerprint: str = FINGERPRINT, elements: int = 2 * DEPTH) -> None:
    random = np.random.default_rng(rank)
    tensors = {
        "rows": random.standard_normal(rank * elements).astype(np.float16),
        "recovery": np.arange(rank, dtype=np.float32) % 2,
    }
    save_file(tensors, path, metadata={"base_fingerprint": fingerprint})


@pytest.fixture(scope="session")
def toy(declared: object, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A package with two adapters and a router, and a job that asks for everything."""
    from executorch.extension.llm.custom_ops import custom_ops as _  # noqa: F401  declares llama::…
    from torch.export import Dim

    package = tmp_path_factory.mktemp("toy")
    rank, width = Dim("rank", min=0, max=8), 2 * DEPTH
    example = (torch.zeros(1, 4).long(), torch.zeros(1).long(), torch.zeros(3 * width).half(), *torch.zeros(2, 3))
    dynamic = ({1: Dim("length", min=1, max=CHUNK)}, None, {0: width * rank}, {0: rank}, {0: rank})
    _program({"adapted": (_Toy(), example, dynamic)}, package / "model.pte")
    ids = (torch.zeros(1, 4).long(),)
    _program({"forward": (_Gates(), ids, ({1: Dim("length", min=1, max=64)},))}, package / "router.pte")
    for name, number in RANKS.items():
        _adapter(package / f"{name}.safetensors", number)
    _write_json(package / "package.json", _manifest(package))
    return package


def _manifest(package: Path) -> dict[str, Any]:
    slot = {"site": "s", "down": "s.down", "part": 0, "parts": 1, "up": "s.up", "inputs": DEPTH, "outputs": DEPTH}
    files = [path for path in package.iterdir() if path.name != "package.json"]
    return {
        "schema_version": 1,
        "target": "executorch",
        "base_fingerprint": FINGERPRINT,
        "settings": {"rank_budget": 8, "chunk": CHUNK, "kernels": "calora"},
        "model": {"file": "model.pte", "vocab": VOCAB, "context": TOY_CONTEXT, "logits": "last", "eos": [END]},
        "slots": {"dtype": "fp16", "tensors": [slot]},
        "adapters": [{"id": name, "file": f"{name}.safetensors"} for name in RANKS],
        "router": {"file": "router.pte"},
        "files": {path.name: {"sha256": "", "size": path.stat().st_size} for path in files},
    }


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value))


def _run(runner: Path, package: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [str(part) for part in (runner, package, *arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


def _job(directory: Path) -> Job:
    _adapter(directory / "forged.safetensors", 3, fingerprint="sha256:" + "b" * 64)
    return Job(
        threads=2,
        cases=tuple(Case(name, mix, tuple(PROMPT), 14) for name, mix in MIXES.items()),
        routes=((1, 2, 6), (3,)),
        completions=(Completion("one", tuple(PROMPT[:3]), 12), Completion("two", tuple(PROMPT[:8]), 3)),
        safety=Safety(MIXES["one"], MIXES["mix"], tuple(PROMPT), str(directory / "forged.safetensors")),
        timing=Timing("one", "two", tuple(PROMPT[:9]), 4, 2, 5),
    )


def _parts(package: Path, mix: dict[str, float]) -> list[tuple[float, np.ndarray, np.ndarray]]:
    files = {name: load_file(package / f"{name}.safetensors") for name in mix}
    return [(gate, files[name]["rows"], files[name]["recovery"]) for name, gate in mix.items()]


def test_a_job_is_answered_as_the_formula_says(runner: Path, toy: Path, tmp_path: Path) -> None:
    job, model = _job(tmp_path), _Toy()
    write_job(tmp_path, job)
    done = _run(runner, toy, tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    trace = read_trace(tmp_path, job)
    for case in job.cases:  # the prefill of 14 is fed in chunks of 6
        lengths = range(case.prefill, len(PROMPT) + 1)
        expected = [model.expected(PROMPT[:length], _parts(toy, dict(case.mix))) for length in lengths]
        np.testing.assert_allclose(trace.logits[case.name], expected, rtol=1e-4, atol=1e-4)
    for completion, made in zip(job.completions, trace.answer.completions, strict=True):
        ids = list(completion.ids)
        for _ in made:
            ids.append(int(model.expected(ids, _parts(toy, {completion.adapter: 1.0})).argmax()))
        assert list(made) == ids[len(completion.ids) :] and END not in made[:-1]
        assert len(made) == completion.limit or made[-1] == END
    for route, gates in zip(job.routes, trace.answer.gates, strict=True):
        np.testing.assert_allclose(gates, _Gates()(torch.tensor([route])).numpy(), rtol=1e-5)
    assert trace.answer.safety == SafetyTrace(aba=True, fresh=True, stale=True, refused=True)
    timing = trace.answer.timing
    assert timing is not None and set(timing.decode) == {"base", "adapter", "mix2"}
    counts = [len(timing.swap), len(timing.first_token), len(timing.prefill), len(timing.router)]
    assert counts == [5, 5, 2, 5] and {len(samples) for samples in timing.decode.values()} == {8}
    assert (trace.answer.runtime, trace.answer.vocab) == ("executorch", VOCAB)
    assert trace.answer.peak_rss > 2**20 and timing.load > 0


def test_generation_prints_ids(runner: Path, toy: Path) -> None:
    model, ids = _Toy(), PROMPT[:8]
    for _ in range(5):
        ids = [*ids, int(model.expected(ids, _parts(toy, MIXES["mix"])).argmax())]
    prompt = ",".join(str(token) for token in PROMPT[:8])
    done = _run(runner, toy, "--prompt-ids", prompt, "--mix", "one=0.7,two=-1.5", "--tokens", 5)
    made = [int(token) for token in done.stdout.split()]
    assert done.returncode == 0 and made == ids[8 : 8 + len(made)] and (len(made) == 5 or made[-1] == END)


GONE = object()
PACKAGE, JOB = "package.json", "job.json"
# document, key, value, what the one line says
WRONG: list[tuple[str, tuple[str | int, ...], object, str]] = [
    (PACKAGE, ("schema_version",), 2, "package.json: schema_version: expected 1, found 2"),
    (PACKAGE, ("target",), "onnx", "package.json: target: expected executorch, found onnx"),
    (PACKAGE, ("model", "vocab"), GONE, "package.json: model.vocab: expected an integer, found nothing"),
    (PACKAGE, ("slots", "tensors", 0, "inputs"), "8", 'slots.tensors[0].inputs: expected an integer, found "8"'),
    (PACKAGE, ("base_fingerprint",), "sha256:cc", "one.safetensors: base_fingerprint: expected sha256:cc, found"),
    (PACKAGE, ("slots", "dtype"), "fp32", "Input 2 has unexpected scalar type: expected Half but was Float"),
    (PACKAGE, ("settings", "rank_budget"), 4, "mix: rank: expected at most 4, found 5"),
    (PACKAGE, ("router",), None, "package.json: router: expected a router, found none (name an adapter instead)"),
    (JOB, ("treads",), 2, "job.json: treads: expected no such key, found 2"),
    (JOB, ("threads",), 0, "job.json: threads: expected at least 1, found 0"),
    (JOB, ("cases", 1, "ids"), "abc", 'job.json: cases[1].ids: expected a list of integers, found "abc"'),
    (JOB, ("cases", 0, "prefill"), 21, "job.json: base.prefill: expected 1 to 20, found 21"),
    (JOB, ("cases", 1, "mix"), {"three": 1}, "package.json: adapters: expected one of one, two, found three"),
    (JOB, ("cases", 0, "ids"), [99] * 20, "package.json: model.vocab: expected tokens from 0 to 10, found 99"),
    (JOB, ("cases", 0, "ids"), PROMPT * 2, "model.context: expected at most 32 tokens of prompt and answer, found 33"),
]


@pytest.mark.parametrize(("file", "keys", "value", "expected"), WRONG, ids=[" ".join(map(str, w[1])) for w in WRONG])
def test_a_wrong_value_is_one_line(
    runner: Path, toy: Path, tmp_path: Path, file: str, keys: tuple[str | int, ...], value: object, expected: str
) -> None:
    shutil.copytree(toy, tmp_path, dirs_exist_ok=True)
    write_job(tmp_path, _job(tmp_path))
    document = json.loads((tmp_path / file).read_text())
    inner = document
    for key in keys[:-1]:
        inner = inner[key]
    if value is GONE:
        del inner[keys[-1]]
    else:
        inner[keys[-1]] = value
    _write_json(tmp_path / file, document)
    _refused(runner, tmp_path, expected)


def _refused(runner: Path, directory: Path, expected: str) -> None:
    done = _run(runner, directory, directory)
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.count("\n") == 1 and expected in done.stderr
    trace = directory / "trace.json"  # what it had said until then, never the end
    assert not trace.exists() or "mapped" not in json.loads(trace.read_text())


DAMAGED: dict[str, tuple[str, Callable[[Path], object]]] = {
    "package.json: content: expected JSON": (PACKAGE, lambda path: path.write_text("{")),
    "expected a directory with package.json": (PACKAGE, lambda path: path.unlink()),
    "job.json: file: expected a file, found nothing": (JOB, lambda path: path.unlink()),
    "router.pte: size: expected": ("router.pte", lambda path: path.unlink()),
    "two.safetensors: size: expected": ("two.safetensors", lambda path: path.write_bytes(b"12")),
}


@pytest.mark.parametrize("expected", DAMAGED)
def test_a_damaged_file_is_one_line(runner: Path, toy: Path, tmp_path: Path, expected: str) -> None:
    file, damage = DAMAGED[expected]
    shutil.copytree(toy, tmp_path, dirs_exist_ok=True)
    write_job(tmp_path, _job(tmp_path))
    damage(tmp_path / file)
    _refused(runner, tmp_path, expected)


SWAPPED: dict[str, tuple[str, Callable[[Path], object]]] = {
    "model.pte: adapted: ExecuTorch refuses to load it: ": ("model.pte", lambda path: path.write_bytes(bytes(99))),
    "one.safetensors: header: expected a safetensors file": ("one.safetensors", lambda path: path.write_bytes(b"12")),
    "one.safetensors: content: expected JSON": ("one.safetensors", lambda path: path.write_bytes(b"\1" + bytes(8))),
    "one.safetensors: rows: expected F16 [48], found F16 [51]": (
        "one.safetensors",
        lambda path: _adapter(path, 3, elements=17),
    ),
}


@pytest.mark.parametrize("expected", SWAPPED)
def test_a_file_of_another_kind_is_one_line(runner: Path, toy: Path, tmp_path: Path, expected: str) -> None:
    file, swap = SWAPPED[expected]
    shutil.copytree(toy, tmp_path, dirs_exist_ok=True)
    swap(tmp_path / file)
    _write_json(tmp_path / PACKAGE, _manifest(tmp_path))
    write_job(tmp_path, _job(tmp_path))
    _refused(runner, tmp_path, expected)
