"""Compressed weights, decoded by the reference runtime, against the decoding in coremltools' operator definitions."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from calora_export import mil
from tests.mil.programs import operators, save

_RANDOM = np.random.default_rng(0)
_STARTS = {"int4": -8, "int8": -128}


def integers(kind: str, *shape: int) -> np.ndarray:
    """All values of a type that may have less than a byte, in coremltools' numpy form of it."""
    from coremltools.converters.mil.mil import types

    low = _STARTS.get(kind, 0)
    values = _RANDOM.integers(low, low + 2 ** int(kind.lstrip("uint")), shape)
    own = types.nptype_from_builtin(types.string_to_builtin(kind))
    return values.astype(own)


def floats(*shape: int, kind: str = "float32") -> np.ndarray:
    return _RANDOM.uniform(0.01, 1.0, shape).astype(kind)


def mask(*shape: int) -> np.ndarray:
    return (_RANDOM.random(shape) < 0.4).astype(integers("uint1", 1).dtype)


def blockwise(m: Any) -> dict[str, Any]:
    """Integers of every kind in blocks along one or two axes, with and without offsets."""
    shift_scale = m.constexpr_blockwise_shift_scale
    return {
        "int4": shift_scale(data=integers("int4", 6, 8), scale=floats(6, 2)),
        "int4_half": shift_scale(data=integers("int4", 6, 8), scale=floats(6, 2, kind="float16")),
        "uint4": shift_scale(data=integers("uint4", 6, 8), scale=floats(3, 2), offset=integers("uint4", 3, 2)),
        "int8": shift_scale(data=integers("int8", 6, 8), scale=floats(6, 1), offset=integers("int8", 6, 1)),
        "uint8": shift_scale(data=integers("uint8", 6, 8), scale=floats(1, 1), offset=floats(1, 1)),
        "conv": shift_scale(data=integers("int8", 4, 2, 3, 3), scale=floats(4, 1, 1, 1)),
        "odd": shift_scale(data=integers("int4", 3, 5), scale=floats(3, 1)),
        "floats": shift_scale(data=floats(4, 6), scale=floats(2, 3)),
    }


def tables(m: Any) -> dict[str, Any]:
    """Tables of 2 to 256 values, per tensor, row or block; vectors along either axis."""
    look_up = m.constexpr_lut_to_dense
    cases = {
        kind: look_up(indices=integers(kind, 6, 10), lut=floats(1, 1, 2 ** int(kind[4:]), 1))
        for kind in ("uint1", "uint2", "uint3", "uint4", "uint6", "uint8")
    }
    return cases | {
        "rows": look_up(indices=integers("uint4", 6, 8), lut=floats(6, 1, 16, 1)),
        "blocks": look_up(indices=integers("uint2", 6, 8), lut=floats(2, 4, 4, 1)),
        "half": look_up(indices=integers("uint4", 6, 8), lut=floats(3, 1, 16, 1, kind="float16")),
        "vectors_0": look_up(indices=integers("uint2", 3, 4), lut=floats(1, 1, 4, 2), vector_axis=0),
        "vectors_1": look_up(indices=integers("uint2", 3, 4), lut=floats(1, 1, 4, 3), vector_axis=-1),
        "nested": m.constexpr_blockwise_shift_scale(
            data=look_up(indices=integers("uint2", 6, 8), lut=integers("int8", 1, 1, 4, 1)), scale=floats(6, 1)
        ),
    }


def sparse(m: Any) -> dict[str, Any]:
    """Masks with values, with integers and scales, with indices and tables."""
    ones = mask(6, 8)
    count = int(ones.astype(int).sum())
    scaled = m.constexpr_sparse_blockwise_shift_scale(
        data_mask=ones, nonzero_data=integers("int4", count), scale=floats(6, 2)
    )
    found = m.constexpr_lut_to_sparse(
        indices_mask=ones, indices_nonzero_data=integers("uint2", count), lut=floats(1, 1, 4, 1)
    )
    return {
        "values": m.constexpr_sparse_to_dense(nonzero_data=floats(count), mask=ones),
        "scaled": m.constexpr_sparse_to_dense(nonzero_data=scaled[1], mask=scaled[0]),
        "found": m.constexpr_sparse_to_dense(nonzero_data=found[1], mask=found[0]),
    }


def earlier(m: Any) -> dict[str, Any]:
    """The forms of iOS 16, whose constants are attributes and whose indices and masks are packed bytes."""
    ones = _RANDOM.random(5 * 7) < 0.4
    return {
        "affine": m.constexpr_affine_dequantize(
            quantized_data=integers("uint8", 4, 6), zero_point=np.uint8(7), scale=np.float32(0.25), axis=0
        ),
        "affine_rows": m.constexpr_affine_dequantize(
            quantized_data=integers("int8", 4, 6), zero_point=integers("int8", 6), scale=floats(6), axis=-1
        ),
        "table": m.constexpr_lut_to_dense(indices=integers("uint8", 12), lut=floats(64), shape=np.uint32([4, 4])),
        "mask": m.constexpr_sparse_to_dense(
            nonzero_data=floats(int(ones.sum())), mask=np.packbits(ones, bitorder="little"), shape=np.uint32([5, 7])
        ),
        "cast": m.constexpr_cast(source_val=floats(4, 6, kind="float16"), output_dtype="fp32"),
    }


@pytest.mark.parametrize(
    ("weights", "system"), [(blockwise, "iOS18"), (tables, "iOS18"), (sparse, "iOS18"), (earlier, "iOS16")]
)
def test_compressed_weights(weights: Callable[[Any], Mapping[str, Any]], system: str, tmp_path: Path) -> None:
    operators()
    wanted = {}

    def body(m: Any, given: Any) -> dict[str, Any]:
        outputs = {}
        for kind, weight in weights(m).items():
            name = f"{kind}_weight"  # coremltools gives an output called like a type another name
            wanted[name] = weight.op.materialized_val_inference()
            one = given["half_one"] if wanted[name].dtype == np.float16 else given["one"]
            outputs[name] = m.mul(x=weight, y=one)
        return outputs

    ones = {"one": np.ones(1, np.float32), "half_one": np.ones(1, np.float16)}
    function = mil.load(save(tmp_path / "weights.mlpackage", ones, body, system)).functions["main"]
    found = function.run(ones, {})
    assert found.keys() == wanted.keys()
    for name, array in found.items():
        assert array.dtype == wanted[name].dtype
        np.testing.assert_array_equal(array, wanted[name], err_msg=name)
