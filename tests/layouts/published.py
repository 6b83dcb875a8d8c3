"""Weights in the layouts of the real libraries, and what these libraries themselves read back.

compressed-tensors, bitsandbytes and torchao write here; GPTQ and AWQ, whose libraries need a GPU, are packed bit by bit
from their published formats, one value at a time, which no code of ours does.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

Tensors = Mapping[str, Tensor]


@dataclass(frozen=True)
class Published:
    """One weight: its tensors under their module's name, the config and metadata beside them, its float32 values."""

    config: Mapping[str, object]
    tensors: Tensors
    expected: np.ndarray
    metadata: Mapping[str, str] = field(default_factory=dict)


def weights(rows: int, columns: int, shift: float = 0.0) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows * columns)) * 0.1 + shift


# ── compressed-tensors ────────────────────────────────────────────────────────────────────────────────────────────────


def compressed_tensors(module: str, weight: Tensor, bits: int, group: int, symmetric: bool, form: str) -> Published:
    """group 0: one scale a row. Values as the library decompresses them, from scales in fp32 that bf16 holds too."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from compressed_tensors.quantization.utils import calculate_qparams

    args = QuantizationArgs(
        num_bits=bits, symmetric=symmetric, strategy="group" if group else "channel", group_size=group or None
    )
    grouped = weight.reshape(len(weight), -1, group or weight.shape[1])
    scale, zero = calculate_qparams(grouped.amin(-1), grouped.amax(-1), args)
    scheme = QuantizationScheme(targets=["Linear"], weights=args)
    compressor = BaseCompressor.get_value_from_registry(form)
    state = {"weight": weight, "weight_scale": scale.bfloat16().float(), "weight_zero_point": zero.to(torch.int8)}
    stored = compressor.compress(state, scheme)
    back = compressor.decompress(stored, scheme)["weight"]
    tensors = {f"{module}.{name}": tensor.contiguous() for name, tensor in stored.items()}
    config = {"quant_method": "compressed-tensors", "format": form}
    return Published(config, tensors, back.float().numpy())


def packed_act_order(module: str, rows: int, columns: int, group: int) -> Published:
    """pack-quantized with weight_g_idx, value by value: releases of the library before 0.20 write and read it."""
    codes, scale, _ = _random(module, rows, columns, 4, group, True)
    index = (torch.arange(columns) // group)[torch.randperm(columns, generator=torch.Generator().manual_seed(0))]
    tensors = {
        f"{module}.weight_packed": _words(codes.tolist(), 4),
        f"{module}.weight_scale": scale,
        f"{module}.weight_shape": torch.tensor([rows, columns]),
        f"{module}.weight_g_idx": index.int(),
    }
    config = {"quant_method": "compressed-tensors", "format": "pack-quantized"}
    return Published(config, tensors, _dequantized(codes, scale, torch.full_like(scale, 8), index))


# ── bitsandbytes ──────────────────────────────────────────────────────────────────────────────────────────────────────


def nf4(module: str, weight: Tensor, double: bool) -> Published:
    """Read back in rows of one block: the library's CPU kernel garbles a block that begins inside a row."""
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    packed, state = quantize_4bit(weight, blocksize=64, compress_statistics=double, quant_type="nf4")
    parts = {f"{module}.weight.{name}": tensor for name, tensor in state.as_dict(packed=True).items()}
    config = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    state.shape = torch.Size((weight.numel() // 64, 64))
    back = dequantize_4bit(packed, state).reshape(weight.shape)
    return Published(config, {f"{module}.weight": packed, **parts}, back.numpy())


def llm_int8(module: str, weight: Tensor) -> Published:
    from bitsandbytes.functional import int8_vectorwise_dequant, int8_vectorwise_quant

    q, scales, _ = int8_vectorwise_quant(weight.half())
    form = torch.tensor(0, dtype=torch.uint8)
    tensors = {f"{module}.weight": q, f"{module}.SCB": scales, f"{module}.weight_format": form}
    config = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    return Published(config, tensors, int8_vectorwise_dequant(q, scales).numpy())


# ── torchao ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def torchao(module: str, weight: Tensor, bits: int, group: int, symmetric: bool) -> Published:
    """bits 0: Int8WeightOnlyConfig, a tensor class of its own."""
    from torch import nn
    from torchao.prototype.safetensors.safetensors_support import flatten_tensor_state_dict
    from torchao.quantization import Int8WeightOnlyConfig, IntxWeightOnlyConfig, MappingType, quantize_
    from torchao.quantization.granularity import PerAxis, PerGroup

    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    layer.weight.data = weight
    if bits:
        config = IntxWeightOnlyConfig(
            weight_dtype={4: torch.int4, 8: torch.int8}[bits],
            granularity=PerGroup(group) if group else PerAxis(0),
            mapping_type=MappingType.SYMMETRIC if symmetric else MappingType.ASYMMETRIC,
        )
    else:
        config = Int8WeightOnlyConfig()
    quantize_(layer, config)
    tensors, metadata = flatten_tensor_state_dict({f"{module}.weight": layer.weight})
    return Published({"quant_method": "torchao"}, tensors, layer.weight.dequantize().float().numpy(), metadata)


# ── GPTQ and AWQ, value by value ──────────────────────────────────────────────────────────────────────────────────────


def _random(
    module: str, rows: int, columns: int, bits: int, group: int, symmetric: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """codes [out, in], scale fp16 [out, groups], zero points [out, groups], all from 0."""
    draw = torch.Generator().manual_seed(zlib.crc32(module.encode()))
    groups = columns // group
    codes = torch.randint(0, 2**bits, (rows, columns), generator=draw)
    scale = (torch.rand(rows, groups, generator=draw) * 0.02 + 0.001).half()
    middle = torch.full((rows, groups), 2 ** (bits - 1))
    return codes, scale, middle if symmetric else torch.randint(1, 2**bits, (rows, groups), generator=draw)


def _words(values: list[list[int]], bits: int, places: tuple[int, ...] | None = None) -> Tensor:
    """int32 [n, m · bits / 32]: value i of a word at bit places[i] · bits."""
    per_word = 32 // bits
    where = places or tuple(range(per_word))
    rows = []
    for row in values:
        words = []
        for start in range(0, len(row), per_word):
            word = sum(value << (where[i] * bits) for i, value in enumerate(row[start : start + per_word]))
            words.append(word - 2**32 if word >= 2**31 else word)
        rows.append(words)
    return torch.tensor(rows, dtype=torch.int32)


def _dequantized(codes: Tensor, scale: Tensor, zero: Tensor, index: Tensor) -> np.ndarray:
    """Column j by the scale and the zero point of group index[j]."""
    columns = [(codes[:, j] - zero[:, g]).float() * scale[:, g].float() for j, g in enumerate(index.tolist())]
    return torch.stack(columns, dim=1).numpy()


def gptq(
    module: str, rows: int, columns: int, bits: int, group: int, symmetric: bool, act_order: bool, form: str
) -> Published:
    codes, scale, zero = _random(module, rows, columns, bits, group, symmetric)
    index = torch.arange(columns) // group
    if act_order:
        index = index[torch.randperm(columns, generator=torch.Generator().manual_seed(0))]
    less = 1 if form == "gptq" else 0
    tensors = {
        f"{module}.qweight": _words(codes.tolist(), bits).T.contiguous(),
        f"{module}.qzeros": _words((zero.T - less).tolist(), bits),
        f"{module}.scales": scale.T.contiguous(),
        f"{module}.g_idx": index.int(),
    }
    config = {
        "quant_method": "gptq", "bits": bits, "group_size": group, "desc_act": act_order, "sym": symmetric,
        "checkpoint_format": form,
    }  # fmt: skip
    return Published(config, tensors, _dequantized(codes, scale, zero, index))


def awq(module: str, rows: int, columns: int, group: int) -> Published:
    """AutoAWQ packs column order_map[i] = (0, 2, 4, 6, 1, 3, 5, 7)[i] of eight at bit 4 i."""
    order = (0, 2, 4, 6, 1, 3, 5, 7)
    places = tuple(order.index(column) for column in range(8))
    codes, scale, zero = _random(module, rows, columns, 4, group, False)
    tensors = {
        f"{module}.qweight": _words(codes.T.tolist(), 4, places),
        f"{module}.qzeros": _words(zero.T.tolist(), 4, places),
        f"{module}.scales": scale.T.contiguous(),
    }
    config = {"quant_method": "awq", "bits": 4, "group_size": group, "zero_point": True, "version": "gemm"}
    return Published(config, tensors, _dequantized(codes, scale, zero, torch.arange(columns) // group))


def metadata_text(published: Published) -> dict[str, str]:
    """As safetensors takes it."""
    return {key: value if isinstance(value, str) else json.dumps(value) for key, value in published.metadata.items()}
