"""Whole programs: what plain coremltools makes of torch models, run from the saved file, against torch."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from calora_export import mil, mlpackage
from calora_export.errors import CaloraError, PackageError, UnsupportedError
from tests.mil.programs import convert, operators, quiet, save

FLOAT16 = {"rtol": 2e-2, "atol": 4e-3}
FLOAT32 = {"rtol": 1e-4, "atol": 1e-5}


def some(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def on_torch(model: nn.Module, *arrays: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return model(*[torch.from_numpy(array) for array in arrays]).numpy()


def tensor(name: str | None, shape: Any, dtype: Any = np.float32, **options: Any) -> Any:
    import coremltools as ct

    return ct.TensorType(name, shape, dtype=dtype, **options)


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    operators()
    return tmp_path_factory.mktemp("programs")


def mlp() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(32, 64), nn.GELU(), nn.LayerNorm(64), nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, 8), nn.Softmax(-1)
    )


class Attention(nn.Module):
    """Two heads of attention with a mask, rotated queries and keys, RMS norm, residual, gated MLP."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.table = nn.Embedding(50, 32)
        self.qkv, self.out = nn.Linear(32, 96), nn.Linear(32, 32, bias=False)
        self.gate, self.up, self.down = nn.Linear(32, 48), nn.Linear(32, 48), nn.Linear(48, 32)

    def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        x = self.table(ids)
        y = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5)
        q, k, v = self.qkv(y).view(1, ids.shape[1], 3, 2, 16).permute(2, 0, 3, 1, 4)
        angle = torch.arange(ids.shape[1])[:, None] * torch.tensor([1.0, 0.1, 0.01, 0.001, 1.0, 0.1, 0.01, 0.001])
        q, k = (torch.cat([_turned(half, angle)], -1) for half in (q, k))
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).reshape(1, -1, 32)
        x = x + self.out(y)
        return x + self.down(F.silu(self.gate(x)) * self.up(x))


def _turned(x: torch.Tensor, angle: torch.Tensor) -> torch.Tensor:
    a, b = x.chunk(2, -1)
    return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], -1)


class Convolutions(nn.Module):
    """A small picture classifier."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.first, self.norm = nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.BatchNorm2d(8)
        self.norm.running_mean = torch.rand(8)
        self.norm.running_var = torch.rand(8) + 0.5
        self.deep, self.wide = nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.Conv2d(8, 12, 1)
        self.back, self.head = nn.ConvTranspose2d(12, 6, 3, stride=2, padding=1), nn.Linear(6, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.max_pool2d(F.relu(self.norm(self.first(x))), 2)
        x = F.hardswish(self.wide(F.leaky_relu(self.deep(x), 0.1)))
        x = F.avg_pool2d(F.interpolate(x, scale_factor=2.0, mode="nearest"), 3, stride=2, padding=1)
        x = F.instance_norm(self.back(x))
        return F.log_softmax(self.head(x.amax((2, 3))), -1)


class Cache(nn.Module):
    """Attention over a cache that stays in the model."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("keys", torch.zeros(1, 2, 16, 8))
        self.register_buffer("values", torch.zeros(1, 2, 16, 8))

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        end = mask.shape[-1]
        begin = end - x.shape[2]
        self.keys[:, :, begin:end] = x
        self.values[:, :, begin:end] = x * 2
        return F.scaled_dot_product_attention(x, self.keys[:, :, :end], self.values[:, :, :end], attn_mask=mask)


@pytest.mark.parametrize(("precision", "tolerance"), [("FLOAT32", FLOAT32), ("FLOAT16", FLOAT16)])
def test_mlp(packages: Path, precision: str, tolerance: dict[str, float]) -> None:
    import coremltools as ct

    model, x = mlp(), some(4, 32)
    path = packages / f"mlp-{precision}.mlpackage"
    options = {"inputs": [tensor("x", (4, 32))], "compute_precision": getattr(ct.precision, precision)}
    convert(path, model, [torch.from_numpy(x)], outputs=[ct.TensorType("y")], **options)
    function = mil.load(path).functions["main"]
    np.testing.assert_allclose(function.run({"x": x}, {})["y"], on_torch(model, x), **tolerance)


@pytest.fixture(scope="module")
def attention(packages: Path) -> Path:
    import coremltools as ct

    length = ct.RangeDim(2, 12, default=5)
    inputs = [tensor("ids", (1, length), np.int32), tensor("mask", (1, 1, length, length))]
    example = [torch.zeros(1, 5, dtype=torch.int32), torch.zeros(1, 1, 5, 5)]
    return convert(packages / "attention.mlpackage", Attention(), example, inputs=inputs, outputs=[ct.TensorType("y")])


@pytest.mark.parametrize("length", [2, 5, 12])
def test_attention_of_any_length(attention: Path, length: int) -> None:
    ids = np.random.default_rng(3).integers(0, 50, (1, length)).astype(np.int32)
    mask = np.triu(np.full((1, 1, length, length), -1e4, np.float32), 1)
    found = mil.load(attention).functions["main"].run({"ids": ids, "mask": mask}, {})["y"]
    np.testing.assert_allclose(found, on_torch(Attention(), ids, mask), **FLOAT16)


def test_convolutions(packages: Path) -> None:
    import coremltools as ct

    model, x = Convolutions().eval(), some(2, 3, 21, 18)
    options = {"inputs": [tensor("x", x.shape)], "compute_precision": ct.precision.FLOAT32}
    path = convert(packages / "cnn.mlpackage", model, [torch.from_numpy(x)], outputs=[ct.TensorType("y")], **options)
    found = mil.load(path).functions["main"].run({"x": x}, {})["y"]
    np.testing.assert_allclose(found, on_torch(model, x), **FLOAT32)


@pytest.fixture(scope="module")
def cache(packages: Path) -> Path:
    import coremltools as ct

    new, end = ct.RangeDim(1, 15, default=3), ct.RangeDim(1, 15, default=3)
    inputs = [tensor("x", (1, 2, new, 8), np.float16), tensor("mask", (1, 1, new, end), np.float16)]
    states = [ct.StateType(tensor(None, (1, 2, 16, 8), np.float16), name=name) for name in ("keys", "values")]
    example = [torch.zeros(1, 2, 3, 8), torch.zeros(1, 1, 3, 3)]
    options = {"inputs": inputs, "states": states, "outputs": [tensor("y", None, np.float16)]}
    return convert(packages / "cache.mlpackage", Cache(), example, **options)


def test_states_stay_between_runs(cache: Path) -> None:
    function = mil.load(cache).functions["main"]
    model, state = Cache(), function.state()
    memory = state["keys"].data_ptr()
    assert {name: str(spec) for name, spec in function.states.items()} == dict.fromkeys(
        ("keys", "values"), "float16 [1, 2, 16, 8]"
    )
    for turn, (begin, end) in enumerate([(0, 4), (4, 5), (5, 6), (6, 9)]):
        x = some(1, 2, end - begin, 8, seed=turn).astype(np.float16)
        mask = np.triu(np.full((1, 1, end - begin, end), -1e4, np.float16), begin + 1)
        found = function.run({"x": x, "mask": mask}, state)["y"]
        assert found.dtype == np.float16
        np.testing.assert_allclose(found, on_torch(model, x.astype(np.float32), mask.astype(np.float32)), **FLOAT16)
    np.testing.assert_array_equal(state["keys"].numpy(), model.keys.numpy())
    assert state["keys"].data_ptr() == memory  # a cache is not copied at every token
    fresh = function.run({"x": x[:, :, :1], "mask": np.zeros((1, 1, 1, 1), np.float16)}, function.state())["y"]
    np.testing.assert_allclose(fresh, 2 * x[:, :, :1].astype(np.float32), **FLOAT16)


def compress(path: Path, target: Path, compression: Callable[[Any, Any], Any]) -> tuple[Path, Path]:
    """A compressed package, and the same with the weights that coremltools decompresses from it."""
    import coremltools as ct
    from coremltools.optimize import coreml as cto

    with quiet():
        small = compression(cto, ct.models.MLModel(str(path), skip_model_load=True))
        small.save(str(target))
        dense = target.with_suffix(".dense.mlpackage")
        cto.decompress_weights(small).save(str(dense))
    return target, dense


def quantised(cto: Any, model: Any) -> Any:
    op = cto.OpLinearQuantizerConfig(
        mode="linear_symmetric", dtype="int4", granularity="per_block", block_size=8, weight_threshold=64
    )
    return cto.linear_quantize_weights(model, cto.OptimizationConfig(op))


def palettised(cto: Any, model: Any) -> Any:
    op = cto.OpPalettizerConfig(mode="uniform", nbits=4, weight_threshold=64)
    return cto.palettize_weights(model, cto.OptimizationConfig(op))


def pruned(cto: Any, model: Any) -> Any:
    op = cto.OpMagnitudePrunerConfig(target_sparsity=0.5, weight_threshold=64)
    return cto.prune_weights(model, cto.OptimizationConfig(op))


@pytest.mark.parametrize(
    ("compression", "operator"),
    [
        (quantised, "constexpr_blockwise_shift_scale"),
        (palettised, "constexpr_lut_to_dense"),
        (pruned, "constexpr_sparse_to_dense"),
    ],
)
def test_compressed_weights(packages: Path, compression: Callable[[Any, Any], Any], operator: str) -> None:
    import coremltools as ct

    model, x = mlp(), some(4, 32)
    source = packages / "small.mlpackage"
    if not source.exists():
        convert(source, model, [torch.from_numpy(x)], inputs=[tensor("x", (4, 32))], outputs=[ct.TensorType("y")])
    small, dense = compress(source, packages / f"{compression.__name__}.mlpackage", compression)
    assert operator in {op.type for op in operations(mlpackage.read_spec(small))}
    found, expected = (mil.load(path).functions["main"].run({"x": x}, {})["y"] for path in (small, dense))
    np.testing.assert_array_equal(found, expected)
    assert not np.array_equal(found, mil.load(source).functions["main"].run({"x": x}, {})["y"])


def operations(spec: Any) -> Any:
    function = spec.mlProgram.functions["main"]
    return function.block_specializations[function.opset].operations


def test_functions_of_one_package(packages: Path) -> None:
    """coremltools' multifunction form: each function by name, equal weights decoded once."""
    import coremltools as ct

    torch.manual_seed(5)
    shared = nn.Linear(32, 200)
    models = {"first": nn.Sequential(shared, nn.Linear(200, 4)), "second": nn.Sequential(shared, nn.ReLU())}
    description = ct.utils.MultiFunctionDescriptor()
    x = some(2, 32)
    for name, model in models.items():
        path = packages / f"{name}.mlpackage"
        options = {"inputs": [tensor("x", (2, 32))], "compute_precision": ct.precision.FLOAT32}
        convert(path, model, [torch.from_numpy(x)], outputs=[ct.TensorType("y")], **options)
        description.add_function(str(path), src_function_name="main", target_function_name=name)
    description.default_function_name = "second"
    path = packages / "functions.mlpackage"
    with quiet():
        ct.utils.save_multifunction(description, str(path))
    program = mil.load(path)
    assert (set(program.functions), program.default) == ({"first", "second"}, "second")
    for name, model in models.items():
        np.testing.assert_allclose(program.functions[name].run({"x": x}, {})["y"], on_torch(model, x), **FLOAT32)
    memories = [
        {
            constant.tensor.data_ptr()
            for constant in program.functions[name].code.constants
            if constant.tensor.numel() > 1000
        }
        for name in models
    ]
    assert memories[0] == memories[1] and len(memories[0]) == 1


def test_enumerated_shapes_and_defaults(packages: Path) -> None:
    import coremltools as ct

    class Sum(nn.Module):
        def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            return x.sum(-1) + y

    shapes = ct.EnumeratedShapes([(2, 3), (2, 5)], default=(2, 3))
    inputs = [tensor("x", shapes), tensor("y", (1,), default_value=np.float32([7]))]
    options = {"inputs": inputs, "outputs": [ct.TensorType("z")], "compute_precision": ct.precision.FLOAT32}
    path = convert(packages / "shapes.mlpackage", Sum(), [torch.zeros(2, 3), torch.zeros(1)], **options)
    function = mil.load(path).functions["main"]
    assert function.inputs["y"].default == 7
    np.testing.assert_allclose(function.run({"x": np.ones((2, 5), np.float32)}, {})["z"], [12, 12])
    with pytest.raises(PackageError, match=r"input x: expected float32 \[2, 3\] or \[2, 5\], found float32 \[2, 4\]$"):
        function.run({"x": np.ones((2, 4), np.float32)}, {})


def test_the_peak_is_seen_before_it_overflows(packages: Path) -> None:
    """A float16 program whose value leaves the range: the file gives inf, the peaks give the value."""

    def body(m: Any, given: Any) -> dict[str, Any]:
        large = m.mul(x=given["x"], y=np.float16(300), name="large")
        return {"y": m.mul(x=large, y=np.float16(0.001)), "no_number": m.sub(x=large, y=large)}

    function = mil.load(save(packages / "peaks.mlpackage", {"x": np.ones(2, np.float16)}, body)).functions["main"]
    peaks: dict[str, float] = {}
    found = function.run({"x": np.float16([1, -1000])}, {}, peaks)["y"]
    assert np.isinf(found[1]) and np.isfinite(found[0])
    assert peaks["large"] == 300_000
    assert peaks["y"] == peaks["no_number"] == np.inf
    function.run({"x": np.float16([1, -2])}, {}, peaks)
    assert peaks["large"] == 300_000
    np.testing.assert_array_equal(
        function.run({"x": np.float16([1, 2])}, {})["y"], np.float16([300, 600]) * np.float16(0.001)
    )


def test_float16_accumulates_in_float32_and_rounds_every_result(packages: Path) -> None:
    """4096 products of 1: float16 sums would stop at 2048. And 2048 + 1 - 2048: float32 would give 1."""
    ones = np.ones((1, 4096), np.float16)

    def body(m: Any, given: Any) -> dict[str, Any]:
        product = m.matmul(x=given["x"], y=given["x"], transpose_y=True)
        half = m.mul(x=product, y=np.float16(0.5))
        one = m.slice_by_index(x=given["x"], begin=[0, 0], end=[1, 1])
        total = m.reduce_sum(x=given["x"], axes=[1])
        return {"product": product, "sum": total, "lost": m.sub(x=m.add(x=half, y=one), y=half)}

    found = mil.load(save(packages / "sums.mlpackage", {"x": ones}, body)).functions["main"].run({"x": ones}, {})
    assert {name: value.item() for name, value in found.items()} == {"product": 4096, "sum": 4096, "lost": 0}


# What is wrong is told in one line


@pytest.fixture
def broken(attention: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(attention, tmp_path / "model.mlpackage"))


def rewrite(package: Path, change: Callable[[Any], None]) -> None:
    spec: Any = mlpackage.read_spec(package)
    change(spec)
    mlpackage.model_file(package).write_bytes(spec.SerializeToString())


def test_a_flipped_weight_still_runs(broken: Path) -> None:
    inputs = {"ids": np.ones((1, 3), np.int32), "mask": np.zeros((1, 1, 3, 3), np.float32)}
    before = mil.load(broken).functions["main"].run(inputs, {})["y"]
    file = mlpackage.weight_file(broken)
    content = bytearray(file.read_bytes())
    function: Any = mlpackage.read_spec(broken)
    blobs = [
        op.attributes["val"].blobFileValue.offset
        for op in operations(function)
        if op.attributes["val"].HasField("blobFileValue")
    ]
    content[max(blobs) + 64 + 1] ^= 0x04
    file.write_bytes(content)
    assert not np.array_equal(mil.load(broken).functions["main"].run(inputs, {})["y"], before)


def test_a_damaged_weight_file_is_told_at_load(broken: Path) -> None:
    file = mlpackage.weight_file(broken)
    content = bytearray(file.read_bytes())
    file.write_bytes(content[: len(content) // 2])
    with pytest.raises(PackageError, match=r"^model.mlpackage/weight.bin: blob at byte \d+: expected \d+ bytes"):
        mil.load(broken)
    content[64] ^= 1
    file.write_bytes(content)
    with pytest.raises(PackageError, match=r"^model.mlpackage/weight.bin: blob at byte 64: expected the sentinel"):
        mil.load(broken)
    file.unlink()
    with pytest.raises(
        PackageError, match=r"^model.mlpackage/weight.bin: header: expected a weight file, found No such"
    ):
        mil.load(broken)


def test_a_blob_of_another_size_is_told_at_load(broken: Path) -> None:
    def change(spec: Any) -> None:
        large = next(op for op in operations(spec) if op.attributes["val"].HasField("blobFileValue"))
        large.attributes["val"].type.tensorType.dimensions[0].constant.size += 1

    rewrite(broken, change)
    with pytest.raises(
        PackageError, match=r"^model.mlpackage/weight.bin: blob at byte \d+ .*: expected float16 × \d+, found"
    ):
        mil.load(broken)


def test_a_weight_file_elsewhere_is_refused(broken: Path) -> None:
    def change(spec: Any) -> None:
        large = next(op for op in operations(spec) if op.attributes["val"].HasField("blobFileValue"))
        large.attributes["val"].blobFileValue.fileName = "@model_path/../../weight.bin"

    rewrite(broken, change)
    with pytest.raises(PackageError, match=r"weight file: expected @model_path/…, found @model_path/../../weight.bin$"):
        mil.load(broken)


def test_an_unknown_operator_is_named_at_load(broken: Path) -> None:
    def change(spec: Any) -> None:
        next(op for op in operations(spec) if op.type == "silu").type = "surprise"

    rewrite(broken, change)
    message = r"^coreml: operator: expected one of the reference runtime, found surprise \(\w+\)$"
    with pytest.raises(UnsupportedError, match=message):
        mil.load(broken)


def test_a_parameter_of_another_name_is_told(broken: Path, attention: Path) -> None:
    """It is neither ignored nor left out."""

    def change(operator: str, old: str, new: str | None) -> None:
        def rename(spec: Any) -> None:
            operation = next(op for op in operations(spec) if op.type == operator)
            if new:
                operation.inputs[new].CopyFrom(operation.inputs[old])
            del operation.inputs[old]

        rewrite(broken, rename)

    change("silu", "x", "z")
    with pytest.raises(UnsupportedError, match=r"^coreml: silu \(\w+\): parameters: expected those of .*, found z$"):
        mil.load(broken)
    change("silu", "z", None)
    with pytest.raises(PackageError, match=r"silu \(\w+\): x: expected a value, found nothing$"):
        mil.load(broken)

    def empty(spec: Any) -> None:
        del next(op for op in operations(spec) if op.type == "concat").inputs["values"].arguments[:]

    shutil.copy(mlpackage.model_file(attention), mlpackage.model_file(broken))
    rewrite(broken, empty)
    with pytest.raises(PackageError, match=r"concat \(\w+\): values: expected a value, found nothing$"):
        mil.load(broken)
    shutil.copy(mlpackage.model_file(attention), mlpackage.model_file(broken))
    change("concat", "axis", None)
    with pytest.raises(UnsupportedError, match=r"^coreml: concat \(\w+\): axis: expected a value, found nothing$"):
        mil.load(broken)


def test_an_option_that_is_not_computed_is_named(packages: Path) -> None:
    def body(m: Any, given: Any) -> dict[str, Any]:
        size = {"target_size_height": 4, "target_size_width": 4, "sampling_mode": "OFFSET_CORNERS"}
        return {"y": m.resize_bilinear(x=given["x"], name="bigger", **size)}

    path = save(packages / "option.mlpackage", {"x": np.ones((1, 1, 2, 2), np.float32)}, body)
    message = r"^coreml: resize_bilinear \(bigger\): sampling_mode: expected STRICT_.*, found OFFSET_CORNERS$"
    with pytest.raises(UnsupportedError, match=message):
        mil.load(path)


def test_a_renamed_input_is_told(broken: Path, attention: Path) -> None:
    """In the description alone: at load. Everywhere: by who gives the old name."""

    def describe(spec: Any) -> None:
        spec.description.input[0].name = "tokens"

    def rename(spec: Any) -> None:
        describe(spec)
        function = spec.mlProgram.functions["main"]
        function.inputs[0].name = "tokens"
        for operation in operations(spec):
            for argument in operation.inputs.values():
                for binding in argument.arguments:
                    binding.name = "tokens" if binding.name == "ids" else binding.name

    inputs = {"ids": np.ones((1, 3), np.int32), "mask": np.zeros((1, 1, 3, 3), np.float32)}
    rewrite(broken, describe)
    with pytest.raises(
        PackageError, match=r"^model.mlpackage: inputs: expected mask, tokens \(the description\), found ids, mask$"
    ):
        mil.load(broken)
    shutil.copy(mlpackage.model_file(attention), mlpackage.model_file(broken))
    rewrite(broken, rename)
    with pytest.raises(PackageError, match=r"^model.mlpackage: inputs: expected tokens, mask, found ids$"):
        mil.load(broken).functions["main"].run(inputs, {})


def test_a_name_that_nothing_defines_is_told(broken: Path) -> None:
    def change(spec: Any) -> None:
        next(op for op in operations(spec) if op.type == "silu").inputs["x"].arguments[0].name = "nowhere"

    rewrite(broken, change)
    with pytest.raises(
        PackageError, match=r"silu \(\w+\): input: expected a value that is defined before, found nowhere$"
    ):
        mil.load(broken)


IDS, MASK = np.ones((1, 3), np.int32), np.zeros((1, 1, 3, 3), np.float32)


def test_any_damage_of_the_specification_is_one_line(broken: Path) -> None:
    """Whichever byte is another: it loads, or it says in one line why not."""
    file = mlpackage.model_file(broken)
    content = file.read_bytes()
    random = np.random.default_rng(0)
    told = 0
    for at in random.choice(len(content), 250, replace=False):
        file.write_bytes(content[:at] + bytes([content[at] ^ (1 << random.integers(8))]) + content[at + 1 :])
        try:
            mil.load(broken)
        except CaloraError as error:
            told += 1
            assert "\n" not in str(error)
    assert told > 50


@pytest.mark.parametrize(
    ("inputs", "line"),
    [
        ({"ids": IDS}, r"input mask: expected float32 \[1, 1, 2..12, 2..12\], found nothing"),
        ({"ids": IDS, "mask": MASK, "more": IDS}, "inputs: expected ids, mask, found more"),
        ({"ids": IDS[0], "mask": MASK}, r"input ids: expected int32 \[1, 2..12\], found int32 \[3\]"),
        (
            {"ids": np.ones((1, 13), np.int32), "mask": MASK},
            r"input ids: expected int32 \[1, 2..12\], found int32 \[1, 13\]",
        ),
        ({"ids": IDS[:, :1], "mask": MASK}, r"input ids: expected int32 \[1, 2..12\], found int32 \[1, 1\]"),
        ({"ids": IDS / 2, "mask": MASK}, r"input ids: expected int32 \[1, 2..12\], found float64 \[1, 3\]"),
        ({"ids": IDS, "mask": MASK[:, :, :2]}, r"\w+ \(\w+\): "),  # only an operator can tell
    ],
)
def test_wrong_inputs_are_told(attention: Path, inputs: dict[str, np.ndarray], line: str) -> None:
    with pytest.raises(PackageError, match=f"^attention.mlpackage: {line}"):
        mil.load(attention).functions["main"].run(inputs, {})


def test_wrong_states_are_told(cache: Path) -> None:
    function = mil.load(cache).functions["main"]
    inputs = {"x": np.zeros((1, 2, 1, 8), np.float16), "mask": np.zeros((1, 1, 1, 1), np.float16)}
    state = function.state()
    with pytest.raises(PackageError, match="^cache.mlpackage: states: expected keys, values, found keys$"):
        function.run(inputs, {"keys": state["keys"]})
    line = r"^cache.mlpackage: state keys: expected float32 \[1, 2, 16, 8\], found"
    with pytest.raises(PackageError, match=rf"{line} float32 \[1, 2, 8, 8\]$"):
        function.run(inputs, state | {"keys": state["keys"][:, :, :8]})
    with pytest.raises(PackageError, match=rf"{line} float16 \[1, 2, 16, 8\]$"):
        function.run(inputs, state | {"keys": state["keys"].half()})


def test_held_inputs_are_converted_once(cache: Path) -> None:
    function = mil.load(cache).functions["main"]
    inputs = {"x": some(1, 2, 1, 8).astype(np.float16), "mask": np.zeros((1, 1, 1, 1), np.float16)}
    held = function.hold({"x": inputs["x"]})
    first = function.run(inputs, function.state())["y"]
    np.testing.assert_array_equal(function.run({**inputs, **held}, function.state())["y"], first)
    with pytest.raises(PackageError, match="input x: expected"):
        function.hold({"x": inputs["x"][0]})
