from __future__ import annotations

import hashlib
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from calora_export.errors import BundleError
from calora_export.tensors import TensorIndex
from tests.memory import peak_megabytes

Damage = Callable[[Path], object]

DTYPES = (
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2,
    torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool,
)  # fmt: skip


def _write(file: Path, header: object, data: bytes) -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + data)


def _tensor(
    dtype: str = "F32", shape: list[int] | None = None, start: int = 0, end: int = 8
) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape or [2], "data_offsets": [start, end]}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_arrays_are_what_safetensors_stores(tmp_path: Path, dtype: torch.dtype) -> None:
    values = torch.randn(3, 5, generator=torch.manual_seed(0)).mul(3).to(dtype)
    tensors = {"x": values, "scalar": values[0, 0].clone(), "none": torch.empty(0, 4, dtype=dtype)}
    save_file(tensors, tmp_path / "a.safetensors")
    index = TensorIndex.open(tmp_path)
    assert index.names() == ("none", "scalar", "x")
    assert index.info("x").shape == (3, 5)
    assert index.array("scalar").shape == ()
    assert index.array("none").shape == (0, 4)
    with safe_open(tmp_path / "a.safetensors", "pt") as reference:
        expected = reference.get_tensor("x").to(torch.float32)
    np.testing.assert_array_equal(index.float32("x"), expected.numpy())
    assert index.array("x").tobytes() == values.contiguous().view(torch.uint8).numpy().tobytes()
    assert not index.array("x").flags.writeable


def test_fingerprint_is_the_documented_hash_and_ignores_the_files(tmp_path: Path) -> None:
    tensors = {
        "b.weight": torch.arange(6, dtype=torch.float16).reshape(2, 3),
        "a": torch.tensor(7, dtype=torch.int64),
        "a.b": torch.ones(700_000, dtype=torch.bfloat16),  # more than one read
    }
    digest = hashlib.sha256()
    for name, head in (
        ("a", "a I64 []\n"),
        ("a.b", "a.b BF16 [700000]\n"),
        ("b.weight", "b.weight F16 [2,3]\n"),
    ):
        digest.update(head.encode() + tensors[name].flatten().view(torch.uint8).numpy().tobytes())
    expected = f"sha256:{digest.hexdigest()}"
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    save_file(tensors, tmp_path / "one/model.safetensors", {"format": "pt"})
    save_file({"b.weight": tensors["b.weight"]}, tmp_path / "two/1.safetensors")
    save_file({name: tensors[name] for name in ("a.b", "a")}, tmp_path / "two/2.safetensors")
    assert TensorIndex.open(tmp_path / "one").fingerprint() == expected
    assert TensorIndex.open(tmp_path / "two").fingerprint() == expected
    assert TensorIndex.open(tmp_path / "two").nbytes == 12 + 8 + 1_400_000


@pytest.mark.parametrize("dtype", [dtype for dtype in DTYPES if dtype.is_floating_point], ids=str)
@pytest.mark.parametrize("bad", [math.nan, -math.nan, math.inf, -math.inf])
def test_nonfinite_values_are_found(tmp_path: Path, dtype: torch.dtype, bad: float) -> None:
    if dtype is torch.float8_e4m3fn and math.isinf(bad):
        bad = math.nan  # E4M3 has no Inf
    limits = torch.finfo(dtype)
    fine = torch.tensor([limits.max, limits.min, limits.tiny, 0, -0.0], dtype=torch.float64).to(dtype)
    broken = torch.cat([torch.zeros(2_000_000), torch.tensor([bad])]).to(dtype)
    save_file({"a": fine, "i": torch.tensor([-1], dtype=torch.int64)}, tmp_path / "a.safetensors")
    assert TensorIndex.open(tmp_path).first_nonfinite() is None
    save_file({"c": broken, "b": fine}, tmp_path / "b.safetensors")
    assert TensorIndex.open(tmp_path).first_nonfinite() == "c"


def _truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-3])


def _twice(file: Path) -> None:
    file.with_name("copy.safetensors").write_bytes(file.read_bytes())


def _bytes(content: bytes) -> Damage:
    return lambda file: file.write_bytes(content)


def _header(header: object, data: int) -> Damage:
    return lambda file: _write(file, header, bytes(data))


OVERLAP = {"x": _tensor(), "y": _tensor(start=4, end=12)}


@pytest.mark.parametrize(
    ("damage", "parts"),
    [
        (Path.unlink, ("base: *.safetensors: expected at least one file, found none",)),
        (_truncate, ("base/model.safetensors: file size: expected ", "the file is truncated")),
        (_twice, ("base/model.safetensors: x: ", "found it in copy.safetensors too")),
        (_bytes(b"abc"), ("base/model.safetensors: header length",)),
        (_bytes(b"\xff" * 16), ("header length: expected at most 8", "found 18446744073709551615")),
        (_bytes(b"version https://git-lfs.github.com/spec/v1\n"), ("header length", "Git LFS pointer")),
        (_header(b"{", 0), ("base/model.safetensors: header: expected a JSON object, found an error",)),
        (_header(b"[1]", 0), ("header: expected a JSON object, found an error",)),
        (_header(b'{"a":' * 5000, 0), ("header: expected a JSON object, found an error",)),
        (
            _header({"x": {"dtype": "F32"}}, 0),
            ("model.safetensors: x: expected dtype, shape and data_offsets",),
        ),
        (_header({"x": _tensor("F4")}, 8), ("x dtype: expected one of BOOL", "found F4")),
        (_header({"x": _tensor(shape=[-2])}, 8), ("x: expected dtype, shape and data_offsets",)),
        (_header({"x": _tensor(shape=[3])}, 8), ("x data_offsets: expected 12 bytes for F32 [3], found 8",)),
        (_header({"x": _tensor(start=8, end=16)}, 16), ("x data_offsets: expected start 0, found 8",)),
        (_header({"x\n": _tensor()}, 8), ("header: expected printable tensor names, found 'x\\n'",)),
        (_header(OVERLAP, 12), ("y data_offsets: expected start 8, found 4",)),
        (_header({"x": _tensor()}, 9), ("file size: expected ", "bytes that belong to no tensor")),
    ],
)
def test_a_damaged_file_is_one_line(tmp_path: Path, damage: Damage, parts: tuple[str, ...]) -> None:
    save_file({"x": torch.zeros(2, 2)}, tmp_path / "model.safetensors")
    damage(tmp_path / "model.safetensors")
    with pytest.raises(BundleError) as error:
        TensorIndex.open(tmp_path, "base")
    assert "\n" not in str(error.value)
    for part in parts:
        assert part in str(error.value)


def test_an_unknown_name_and_a_file_that_shrank_are_bundle_errors(tmp_path: Path) -> None:
    save_file({"x": torch.zeros(2, 2)}, tmp_path / "model.safetensors")
    index = TensorIndex.open(tmp_path, "base")
    with pytest.raises(BundleError, match="^base: y: expected a tensor, found nothing$"):
        index.array("y")
    _truncate(tmp_path / "model.safetensors")
    with pytest.raises(BundleError, match=r"^base/model\.safetensors: x: expected 16 more bytes"):
        index.fingerprint()


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_reading_all_of_a_large_base_needs_little_memory(tmp_path: Path) -> None:
    size = 256 << 20
    _write(tmp_path / "model.safetensors", {"x": _tensor("F32", [size // 4], 0, size)}, b"")
    with (tmp_path / "model.safetensors").open("r+b") as file:
        file.seek(0, 2)
        file.truncate(file.tell() + size)  # sparse: no disk is written
    script = (
        "import sys; from pathlib import Path; from calora_export.tensors import TensorIndex\n"
        "index = TensorIndex.open(Path(sys.argv[1]))\n"
        "index.fingerprint(); assert index.first_nonfinite() is None"
    )
    megabytes, _ = peak_megabytes(script, tmp_path)
    assert megabytes < 80
