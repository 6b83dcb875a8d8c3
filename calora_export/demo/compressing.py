"""The demo's compression: 2:4 pruning by magnitude, then round-to-nearest integers, without calibration."""

from __future__ import annotations

import copy

import numpy as np
import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from calora_export.compression import PackedWeight
from calora_export.demo.plan import Plan

LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def prune_2_4(weight: Tensor) -> Tensor:
    """Zero the two smallest of every four weights in a row of [out, in]."""
    fours = weight.unflatten(1, (-1, 4))
    kept = fours.abs().topk(2, dim=-1).indices
    return torch.zeros_like(fours).scatter(-1, kept, fours.gather(-1, kept)).flatten(1)


def quantize(weight: Tensor, bits: int, group_size: int) -> PackedWeight:
    """Symmetric round-to-nearest of [out, in] per group.

    compression.quantize_symmetric with one more promise: scales are bf16 values inside fp16's normal range, so
    they are the same number in bf16, fp16 (as which they are stored) and fp32.
    """
    top = 2 ** (bits - 1) - 1
    groups = weight.unflatten(1, (-1, group_size))
    scales = (groups.abs().amax(-1) / top).clamp(min=6.2e-5).bfloat16().float()
    integers = (groups / scales[..., None]).round().clamp(-top - 1, top)
    return PackedWeight(integers.flatten(1).to(torch.int8).numpy(), scales.half().numpy(), bits, group_size)


def compress(plan: Plan, base: LlamaForCausalLM) -> tuple[LlamaForCausalLM, dict[str, PackedWeight]]:
    """The compressed base as a dense fp32 model of the very same values, and its weights by module name."""
    model = copy.deepcopy(base)
    packed = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding):
            packed[name] = quantize(module.weight.data, plan.embedding_bits, plan.group_size)
            _fill(module.weight, packed[name].dequantize())
        elif isinstance(module, nn.Linear) and name.rpartition(".")[2] in LINEARS:
            packed[name] = quantize(prune_2_4(module.weight.data), plan.linear_bits, plan.group_size)
            _fill(module.weight, packed[name].dequantize())
        elif isinstance(module, LlamaRMSNorm):
            module.weight.data = module.weight.data.half().float()
    model.tie_weights()
    return model, packed


def _fill(weight: Tensor, values: np.ndarray) -> None:
    # Copied, not shared: torch's own memory is aligned, and kernels may round by alignment.
    weight.data.copy_(torch.from_numpy(values))
