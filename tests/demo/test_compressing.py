"""Pruning and rounding of the demo's weights, and adapters that start as nothing."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import torch
from torch import nn

from calora_export.compression import quantize_symmetric
from calora_export.demo.adapting import Adapted
from calora_export.demo.compressing import prune_2_4, quantize
from calora_export.demo.plan import Plan


def weights(rows: int = 8, columns: int = 64) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(3))


def test_pruning_keeps_the_two_largest_of_four() -> None:
    pruned = prune_2_4(torch.tensor([[1.0, -4.0, 3.0, 2.0, 0.5, 0.125, -0.25, -0.375]]))
    assert pruned.tolist() == [[0.0, -4.0, 3.0, 0.0, 0.5, 0.0, 0.0, -0.375]]


def test_rounding_is_the_libraries_own_where_fp16_holds_the_scales() -> None:
    for bits in (4, 8):
        ours, theirs = quantize(weights(), bits, 32), quantize_symmetric(weights().numpy(), bits, 32)
        np.testing.assert_array_equal(ours.q, theirs.q)
        np.testing.assert_array_equal(ours.dequantize(), theirs.dequantize())


def test_scales_of_small_weights_stay_exact_in_fp16_and_bf16() -> None:
    small = quantize(weights() * 1e-6, 8, 32)
    scale = small.scale.astype(np.float32)
    assert scale.min() >= np.finfo(np.float16).smallest_normal
    np.testing.assert_array_equal(scale.astype(ml_dtypes.bfloat16).astype(np.float32), scale)


def test_a_new_adapter_changes_nothing_and_a_trained_one_adds_both_branches() -> None:
    torch.manual_seed(0)
    base, x = nn.Linear(16, 24, bias=False), torch.randn(3, 16)
    adapted = Adapted(base, Plan(), recovery=True)
    assert torch.equal(adapted(x), base(x))
    assert list(adapted.branches()) == ["lora_A", "lora_B", "lora_a1", "lora_a2"]
    assert list(Adapted(base, Plan(), recovery=False).branches()) == ["lora_A", "lora_B"]
    for matrix in adapted.branches().values():
        nn.init.normal_(matrix)
    m = adapted.branches()
    expected = base(x) + 2 * (x @ m["lora_A"].T) @ m["lora_B"].T
    expected = expected + 2 * nn.functional.gelu(x @ m["lora_a1"].T) @ m["lora_a2"].T
    torch.testing.assert_close(adapted(x), expected, rtol=1e-4, atol=1e-4)
