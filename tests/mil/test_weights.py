"""The weight file's reader against the writer that coremltools ships, and against damage."""

from __future__ import annotations

import importlib.util
import struct
import sys
from functools import cache
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from calora_export.errors import PackageError
from calora_export.mil.weights import WeightFile, map_weights, storage, unpack

BITS = {"int4": 4, "uint1": 1, "uint2": 2, "uint3": 3, "uint4": 4, "uint6": 6}
WHOLE = ("int8", "uint8", "int16", "uint16", "int32", "uint32", "float16", "float32")
KINDS = (*BITS, *WHOLE)


@cache
def apple() -> ModuleType:
    """coremltools' storage library, without the ten seconds of the rest; it can be loaded only once."""
    name = "coremltools.libmilstoragepython"
    if name in sys.modules:
        return sys.modules[name]
    package = importlib.util.find_spec("coremltools")
    assert package is not None and package.origin is not None
    [library] = Path(package.origin).parent.glob("libmilstoragepython*.so")
    spec = importlib.util.spec_from_file_location(name, library)
    assert spec is not None and spec.loader is not None
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def write(path: Path, blobs: list[tuple[str, np.ndarray]]) -> list[int]:
    """A weight file by coremltools, and where each blob is described."""
    path.unlink(missing_ok=True)
    writer = apple()._BlobStorageWriter(str(path))
    offsets = []
    for kind, array in blobs:
        if kind == "float16":
            offsets.append(writer.write_fp16_data(array.view(np.uint16)))
        else:
            offsets.append(getattr(writer, f"write_{kind.replace('float32', 'float')}_data")(array))
    return offsets


@st.composite
def blob(draw: st.DrawFn) -> tuple[str, np.ndarray]:
    """Values of one type, any count from none."""
    kind = draw(st.sampled_from(KINDS))
    count = draw(st.integers(1, 70))
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    if kind in BITS:
        low = -8 if kind == "int4" else 0
        return kind, random.integers(low, low + 2 ** BITS[kind], count).astype(storage(kind))
    return kind, np.frombuffer(random.bytes(count * storage(kind).itemsize), storage(kind))


@settings(max_examples=60, deadline=None)
@given(blobs=st.lists(blob(), min_size=1, max_size=6))
def test_reads_what_coremltools_writes(
    tmp_path_factory: pytest.TempPathFactory, blobs: list[tuple[str, np.ndarray]]
) -> None:
    path = tmp_path_factory.getbasetemp() / "weights.bin"
    offsets = write(path, blobs)
    file = map_weights(path, "p.mlpackage")
    for at, (kind, array) in zip(offsets, blobs, strict=True):
        found = file.blob(at)
        assert (found.dtype, found.count) == (kind, len(array))
        values = file.array(found)
        assert values.dtype == storage(kind)
        assert values.tobytes() == array.tobytes()


@given(
    bits=st.sampled_from([1, 2, 3, 4, 6, 8]),
    numbers=st.lists(st.integers(0, 255), min_size=1, max_size=50),
)
def test_unpacks_least_significant_bits_first(bits: int, numbers: list[int]) -> None:
    """Against one long integer that the bytes spell."""
    values = [number % 2**bits for number in numbers]
    spelled = sum(value << (bits * place) for place, value in enumerate(values))
    data = np.frombuffer(spelled.to_bytes((len(values) * bits + 7) // 8, "little"), np.uint8)
    assert unpack(data, bits, len(values)).tolist() == values


def test_whole_bytes_are_views_of_the_file(tmp_path: Path) -> None:
    [at] = write(tmp_path / "w.bin", [("float32", np.arange(1000, dtype=np.float32))])
    file = map_weights(tmp_path / "w.bin", "p.mlpackage")
    assert np.shares_memory(file.array(file.blob(at)), file.data)


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    write(tmp_path / "weight.bin", [("int4", np.arange(-8, 7).astype(np.int8)), ("float16", np.ones(40, np.float16))])
    return tmp_path / "weight.bin"


def changed(path: Path, at: int, data: bytes) -> WeightFile:
    content = bytearray(path.read_bytes())
    content[at : at + len(data)] = data
    path.write_bytes(content)
    return map_weights(path, "p.mlpackage")


FIRST = 64  # the description of the first blob


@pytest.mark.parametrize(
    ("at", "data", "line"),
    [
        (FIRST, b"\x00", "blob at byte 64: expected the sentinel 0xdeadbeef, found 0xdeadbe00"),
        (FIRST + 4, struct.pack("<I", 99), "blob at byte 64: expected a type from 1 to 17, found 99"),
        (FIRST + 8, struct.pack("<Q", 10**6), "expected 1000000 bytes of data from byte 128, found"),
        (FIRST + 16, struct.pack("<Q", 65), "expected 8 bytes of data from byte 65, found"),
        (FIRST + 16, struct.pack("<Q", 0), "expected 8 bytes of data from byte 0, found"),
        (FIRST + 24, struct.pack("<Q", 9), "expected whole values of int4, found 8 bytes less 9 bits"),
    ],
)
def test_damage_is_told(weights: Path, at: int, data: bytes, line: str) -> None:
    file = changed(weights, at, data)
    with pytest.raises(PackageError, match=f"^p.mlpackage/weight.bin: .*{line}"):
        file.blob(FIRST)


@pytest.mark.parametrize("at", [0, 63, 65, 10**9])
def test_no_blob_is_described_there(weights: Path, at: int) -> None:
    with pytest.raises(PackageError, match=f"blob at byte {at}: expected a description of 64 aligned bytes"):
        map_weights(weights, "p.mlpackage").blob(at)


def test_a_damaged_header_is_told(weights: Path) -> None:
    with pytest.raises(PackageError, match="p.mlpackage/weight.bin: header: version: expected 2, found 1"):
        changed(weights, 4, b"\x01")


@pytest.mark.parametrize(("size", "found"), [(0, "an empty file"), (63, "63")])
def test_a_cut_header_is_told(weights: Path, size: int, found: str) -> None:
    weights.write_bytes(weights.read_bytes()[:size])
    with pytest.raises(PackageError, match=f"p.mlpackage/weight.bin: header: .*found {found}$"):
        map_weights(weights, "p.mlpackage")


def test_a_missing_file_is_told(tmp_path: Path) -> None:
    with pytest.raises(PackageError, match="header: expected a weight file, found No such file"):
        map_weights(tmp_path / "weight.bin", "p.mlpackage")


def test_cut_data_are_told(weights: Path) -> None:
    weights.write_bytes(weights.read_bytes()[:-20])
    file = map_weights(weights, "p.mlpackage")
    with pytest.raises(PackageError, match="expected 80 bytes of data from byte 256, found 316 bytes"):
        file.blob(192)
