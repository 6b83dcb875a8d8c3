from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from safetensors.numpy import save_file

from calora_export import layouts
from calora_export.compression import (
    DenseWeight,
    PackedWeight,
    pack_int32,
    quantize_symmetric,
    unpack_int32,
)
from calora_export.errors import BundleError, CaloraError, UnsupportedError
from calora_export.tensors import TensorIndex
from tests.bundles import packed_tensors

CONFIG = b'{"quant_method": "compressed-tensors", "format": "pack-quantized"}'


def read_weight(tensors: TensorIndex, module: str) -> DenseWeight | PackedWeight:
    return layouts.checkpoint(tensors, CONFIG, "config.json").read(module)


BITS = st.sampled_from([4, 8])


def _unpack_bit_by_bit(word: int, bits: int) -> list[int]:
    """The table of docs/bundle.md read literally: q + 2^(bits-1), the first column in the lowest bits."""
    word &= 0xFFFF_FFFF
    values: list[int] = []
    for column in range(32 // bits):
        code = 0
        for bit in range(bits):
            code |= (word >> (column * bits + bit) & 1) << bit
        values.append(code - 2 ** (bits - 1))
    return values


@given(BITS, st.data())
def test_pack_then_unpack_is_the_identity(bits: int, data: st.DataObject) -> None:
    rows, words = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 4))
    half = 2 ** (bits - 1)
    values = hnp.arrays(np.int8, (rows, words * 32 // bits), elements=st.integers(-half, half - 1))
    q = data.draw(values)
    packed = pack_int32(q, bits)
    assert (packed.dtype, packed.shape) == (np.int32, (rows, words))
    np.testing.assert_array_equal(unpack_int32(packed, bits), q)


@given(BITS, hnp.arrays(np.int32, (2, 3)))
def test_unpack_is_the_documented_layout(bits: int, packed: np.ndarray) -> None:
    expected = [
        [value for word in row for value in _unpack_bit_by_bit(word, bits)] for row in packed.tolist()
    ]
    unpacked = unpack_int32(packed, bits)
    assert unpacked.dtype == np.int8
    assert unpacked.tolist() == expected


@pytest.mark.parametrize(
    ("q", "bits"), [(np.full((1, 8), 8), 4), (np.full((1, 8), -9), 4), (np.zeros((1, 7)), 4)]
)
def test_pack_refuses_what_would_not_come_back(q: np.ndarray, bits: int) -> None:
    with pytest.raises(ValueError, match=r"not in \[-8, 7\]|32-bit words"):
        pack_int32(q.astype(np.int8), bits)


FINITE = st.floats(-(2.0**100), 2.0**100, width=32)


@settings(deadline=None)
@given(BITS, hnp.arrays(np.float32, (3, 16), elements=FINITE | st.just(0.0)), st.sampled_from([4, 8, 16]))
def test_quantize_rounds_to_the_nearest_and_keeps_zeros(bits: int, weight: np.ndarray, group: int) -> None:
    packed = quantize_symmetric(weight, bits, group)
    scale = packed.scale.astype(np.float64).repeat(group, axis=1)
    error = np.abs(packed.q.astype(np.float64) * scale - weight.astype(np.float64))
    assert packed.scale.dtype == ml_dtypes.bfloat16
    assert (error <= scale / 2 * (1 + 1e-6)).all()
    assert (packed.q[weight == 0] == 0).all()
    empty = ~weight.reshape(3, -1, group).any(axis=2)
    assert (packed.scale[empty] == 1).all()
    top = 2 ** (bits - 1) - 1
    groups = np.abs(weight.reshape(3, -1, group)).max(axis=2)
    used = groups > 1e-30
    np.testing.assert_allclose(packed.scale.astype(np.float32)[used], groups[used] / top, rtol=2**-8)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("scale_dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_a_packed_weight_is_read_as_stored(tmp_path: Path, bits: int, scale_dtype: type) -> None:
    rng = np.random.default_rng(0)
    q = rng.integers(-(2 ** (bits - 1)), 2 ** (bits - 1), (6, 64)).astype(np.int8)
    scale = rng.uniform(0.01, 1, (6, 4)).astype(scale_dtype)
    tensors = {
        "m.weight_packed": pack_int32(q, bits),
        "m.weight_scale": scale,
        "m.weight_shape": np.array([6, 64], np.int64),
    }
    save_file(tensors, tmp_path / "model.safetensors")
    weight = read_weight(TensorIndex.open(tmp_path), "m")
    assert isinstance(weight, PackedWeight)
    assert (weight.bits, weight.group_size, weight.shape, weight.scale.dtype) == (
        bits,
        16,
        (6, 64),
        scale_dtype,
    )
    np.testing.assert_array_equal(weight.q, q)
    expected = [[float(q[row, col]) * float(scale[row, col // 16]) for col in range(64)] for row in range(6)]
    assert weight.dequantize().dtype == np.float32
    np.testing.assert_allclose(weight.dequantize(), expected, rtol=1e-6)


def test_a_dense_weight_is_read_as_stored(tmp_path: Path) -> None:
    values = np.arange(12, dtype=np.float32).reshape(3, 4).astype(ml_dtypes.bfloat16)
    save_file({"m.weight": values}, tmp_path / "model.safetensors")
    weight = read_weight(TensorIndex.open(tmp_path), "m")
    assert isinstance(weight, DenseWeight)
    assert weight.values.dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(weight.dequantize(), values.astype(np.float32))


Tensors = dict[str, np.ndarray]
Change = Callable[[Tensors], object]


def _drop(name: str) -> Change:
    return lambda tensors: tensors.pop(f"m.{name}")


def _put(name: str, values: np.ndarray) -> Change:
    return lambda tensors: tensors.update({f"m.{name}": values})


def _only(values: np.ndarray) -> Change:
    return lambda tensors: (tensors.clear(), tensors.update({"m.weight": values}))


FLOAT_SCALE = "m.weight_scale: expected F32 or F16 or BF16 [4, 64 / group size], found"
CODES = "m.weight_packed: expected I32 [4, 8] (4 bits) or I32 [4, 16] (8 bits), found"


@pytest.mark.parametrize(
    ("change", "error", "line"),
    [
        (_drop("weight_packed"), BundleError, "base: m.weight: expected a tensor, found nothing"),
        (_drop("weight_scale"), BundleError, "m.weight_scale: expected a tensor, found nothing"),
        (_drop("weight_shape"), BundleError, "m.weight_shape: expected a tensor, found nothing"),
        (_put("weight_packed", np.zeros((4, 7), np.int32)), BundleError, f"{CODES} I32 [4, 7]"),
        (_put("weight_packed", np.zeros((4, 8), np.uint32)), BundleError, f"{CODES} U32 [4, 8]"),
        (_put("weight_scale", np.ones((3, 2), np.float32)), BundleError, f"{FLOAT_SCALE} F32 [3, 2]"),
        (_put("weight_scale", np.ones((4, 3), np.float32)), BundleError, f"{FLOAT_SCALE} F32 [4, 3]"),
        (_put("weight_scale", np.ones((4, 0), np.float32)), BundleError, f"{FLOAT_SCALE} F32 [4, 0]"),
        (_put("weight_scale", np.ones((4, 2), np.int32)), BundleError, f"{FLOAT_SCALE} I32 [4, 2]"),
        (
            _put("weight_shape", np.array([4, 64, 1])),
            BundleError,
            "m.weight_shape: expected I64 [2], found I64 [3]",
        ),
        (_put("weight_shape", np.array([4, 0])), BundleError, "[out, in] of at least 1, found [4, 0]"),
        (_put("weight_shape", np.array([-4, 64])), BundleError, "[out, in] of at least 1, found [-4, 64]"),
        (_put("weight_zero_point", np.zeros((1, 2))), BundleError, "zero_point: expected I32 [1, 2], found F64 [1, 2]"),
        (_put("weight_g_idx", np.zeros(63, np.int32)), BundleError, "g_idx: expected I32 or I64 [64], found I32 [63]"),
        (_put("weight_g_idx", np.zeros(64, np.int32)), UnsupportedError, "2 groups of 32 columns, found groups"),
        (
            _put("weight", np.zeros((4, 64))),
            BundleError,
            "m.weight: expected either this or weight_packed, found both",
        ),
        (
            _only(np.zeros((4, 64), np.int8)),
            UnsupportedError,
            "m.weight: expected F32 or F16 or BF16, found I8",
        ),
        (_only(np.zeros((4,), np.float32)), BundleError, "m.weight: expected [out, in], found [4]"),
    ],
)
def test_tensors_that_do_not_fit_are_one_line(
    tmp_path: Path, change: Change, error: type[CaloraError], line: str
) -> None:
    tensors = packed_tensors("m", np.random.default_rng(0).standard_normal((4, 64)).astype(np.float32), 4)
    change(tensors)
    contiguous = {name: np.ascontiguousarray(values) for name, values in tensors.items()}
    save_file(contiguous, tmp_path / "a.safetensors")
    with pytest.raises(error) as caught:
        read_weight(TensorIndex.open(tmp_path, "base"), "m")
    assert "\n" not in str(caught.value)
    assert line in str(caught.value)
