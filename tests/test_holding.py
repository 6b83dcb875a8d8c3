from __future__ import annotations

from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from calora_export import recipe
from calora_export.compression import PackedWeight, quantize_symmetric
from calora_export.errors import UnsupportedError
from calora_export.formats import samples
from calora_export.holding import EXACT, hold

ROWS = 5
GROUPS = st.sampled_from([1, 2, 6, 16, 32, 48, 64, 96, 128, 160, 192, 256])
SCALES = st.sampled_from([ml_dtypes.bfloat16, np.float16, np.float32])


def packed(bits: int, group: int, count: int, dtype: type[np.generic] = ml_dtypes.bfloat16) -> PackedWeight:
    values = np.random.default_rng(group + count).standard_normal((ROWS, group * count)).astype(np.float32)
    return quantize_symmetric(values, bits, group, scales=dtype)


def kernel_reads(target: str, weight: PackedWeight) -> bool:
    """What the runtimes' own documentation says of MatMulNBits, MatMulBnb4 and Gather; of XNNPACK's qc8w, qc4w, qb4w;
    of iOS 18's constexpr_blockwise_shift_scale and constexpr_lut_to_dense.
    """
    one = weight.scale.shape[1] == 1
    if target == "onnx":
        return weight.group_size in (16, 32, 64, 128) and (weight.codebook is None or weight.zero is None)
    if target == "coreml":
        parts = [weight.scale, *([] if weight.codebook is None else [weight.codebook])]
        return all(np.array_equal(part.astype(np.float16), part.astype(np.float32)) for part in parts)
    if (weight.zero, weight.codebook, weight.order) != (None, None, None):
        return False
    return one or (weight.bits == 4 and weight.group_size % 32 == 0)


@pytest.mark.parametrize("target", ["onnx", "executorch", "coreml"])
@pytest.mark.parametrize("scheme", [name for name, weight in samples().items() if isinstance(weight, PackedWeight)])
def test_every_scheme_is_held_where_a_kernel_reads_it_or_refused(target: str, scheme: str) -> None:
    weight = samples()[scheme]
    assert isinstance(weight, PackedWeight)
    try:
        held = hold(target, "lm_head", weight)
    except UnsupportedError as error:
        assert f"use {EXACT[target]}" in str(error)
        return
    assert kernel_reads(target, held)
    assert (held.zero is None or held.zero.shape == held.scale.shape) and held.q.dtype == np.int8
    original = weight.dequantize()
    noise = np.square(original - held.dequantize()).sum().clip(1e-30)
    assert 10 * np.log10(np.square(original).sum() / noise) > 40


def test_an_order_of_columns_means_nothing_to_a_row() -> None:
    weight, order = packed(8, 64, 1, np.float16), np.random.default_rng(0).permutation(64)
    for target in ("onnx", "executorch", "coreml", "torch"):
        held = hold(target, "lm_head", replace(weight, order=order))
        assert held.order is None
        assert np.array_equal(held.dequantize()[:, order], weight.dequantize())


def test_zero_points_of_0_mean_nothing() -> None:
    weight = packed(4, 32, 3)
    for target in ("onnx", "executorch", "coreml", "torch"):
        held = hold(target, "lm_head", replace(weight, zero=np.zeros_like(weight.scale, np.int8)))
        assert held.zero is None and held.q is weight.q and held.scale is weight.scale


def test_a_codebook_that_is_not_nf4_is_refused() -> None:
    weight = replace(packed(4, 64, 1), codebook=np.linspace(-1, 1, 16, dtype=np.float32))
    with pytest.raises(UnsupportedError, match="codebook: expected that of NF4, found another one"):
        hold("onnx", "lm_head", weight)


def test_scales_that_fp16_does_not_hold_are_refused_when_they_would_be_infinite() -> None:
    weight = packed(8, 32, 2, np.float32)
    with pytest.raises(UnsupportedError, match="at most 65504, which fp16 holds, found 70000"):
        hold("coreml", "lm_head", replace(weight, scale=np.full_like(weight.scale, 70000)))
    with np.errstate(all="ignore"):
        rounded = hold("coreml", "lm_head", weight)
    assert np.array_equal(rounded.scale, weight.scale.astype(np.float16).astype(np.float32))
    assert not np.array_equal(rounded.scale, weight.scale)


@pytest.mark.parametrize("target", ["onnx", "executorch"])
@given(st.sampled_from([4, 8]), GROUPS, st.integers(1, 4), SCALES)
def test_what_is_held_has_a_kernel_or_is_refused_in_one_line(target: str, bits, group, count, dtype) -> None:
    weight = packed(bits, group, count, dtype)
    try:
        held = hold(target, "lm_head", weight)
    except UnsupportedError as error:
        assert str(error).startswith("lm_head: group_size: ") and f"found {group}" in str(error)
        assert "\n" not in str(error)
        return
    assert kernel_reads(target, held)
    assert held.q.shape == weight.q.shape and held.scale.shape == (ROWS, group * count // held.group_size)


def test_what_a_kernel_reads_is_held_as_it_is() -> None:
    for weight in (packed(4, 64, 1, np.float32), packed(4, 32, 3), packed(8, 64, 1, np.float16), packed(4, 20, 1)):
        assert hold("executorch", "lm_head", weight) is weight
    for weight in (packed(4, 32, 3), packed(8, 16, 2, np.float16)):
        assert hold("onnx", "lm_head", weight) is weight
    for weight in (packed(4, 6, 3), packed(8, 160, 2)):
        assert hold("torch", "lm_head", weight) is weight


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("group", "held"), [(48, 16), (96, 32), (256, 128), (160, 32)])
def test_onnx_cuts_groups_without_changing_a_number(bits: int, group: int, held: int) -> None:
    plain = packed(bits, group, 2)
    shifted = replace(plain, zero=np.arange(-5, 5, dtype=np.int8).reshape(ROWS, 2))
    for weight in (plain, shifted):
        made = hold("onnx", "lm_head", weight)
        assert made.group_size == held
        assert np.array_equal(made.dequantize(), weight.dequantize())


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_xnnpack_rounds_the_scales_of_groups_to_bf16_and_nothing_else(dtype: type[np.generic]) -> None:
    weight = packed(4, 32, 3, dtype)
    made = hold("executorch", "lm_head", weight)
    assert made.q is weight.q and (made.bits, made.group_size) == (4, 32)
    assert np.array_equal(made.scale, weight.scale.astype(np.float32).astype(ml_dtypes.bfloat16))
    assert not np.array_equal(made.dequantize(), weight.dequantize())


def test_a_scale_that_bf16_holds_is_no_change() -> None:
    weight = packed(4, 32, 3)
    wide = PackedWeight(weight.q, weight.scale.astype(np.float32), 4, 32)
    assert hold("executorch", "lm_head", wide) is wide


def test_xnnpack_gets_int8_in_rows_that_are_nearest_to_the_groups() -> None:
    weight = packed(8, 32, 4)
    made = hold("executorch", "lm_head", weight)
    assert (made.bits, made.group_size, made.scale.dtype) == (8, 128, np.float32)
    assert np.array_equal(made.scale[:, 0], np.abs(weight.dequantize()).max(axis=1) / np.float32(127))
    assert (np.abs(made.dequantize() - weight.dequantize()) <= made.scale * 0.5001).all()


@pytest.mark.parametrize(("target", "group", "expected"), [("onnx", 24, "16 divides"), ("executorch", 48, "of 32")])
def test_what_no_kernel_reads_is_refused_with_what_to_do(target: str, group: int, expected: str) -> None:
    with pytest.raises(UnsupportedError) as caught:
        hold(target, "model.layers.0.mlp.up_proj", packed(4, group, 2))
    line = str(caught.value)
    assert line.startswith("model.layers.0.mlp.up_proj: group_size: ") and expected in line
    assert f"found {group}" in line and f"use {target}-fp32" in line
    assert f"{target}-fp32" in recipe.catalogue()
