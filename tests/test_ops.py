from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb

from calora_export import ops
from calora_export.compression import PackedWeight, quantize_symmetric

EMPTY = torch.zeros(0)
PLAIN = ([None], [None], [None], [None])  # neither zero points nor a codebook, an order or experts


@pytest.fixture
def draw() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def normal(draw: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=draw)


def packed(draw: torch.Generator, rows: int, columns: int, bits: int = 4) -> tuple[Tensor, Tensor]:
    weight = quantize_symmetric(normal(draw, rows, columns).numpy(), bits, 16)
    return torch.from_numpy(weight.q), torch.from_numpy(weight.scale.astype(np.float32))


def unpacked(q: Tensor, scale: Tensor) -> Tensor:
    """weight = q · scale of its group, value by value."""
    size = q.shape[1] // scale.shape[1]
    rows = [[q[i, j].item() * scale[i, j // size].item() for j in range(q.shape[1])] for i in range(q.shape[0])]
    return torch.tensor(rows)


def slotless(x: Tensor, weight: Tensor, scale: Tensor, activations: str = "float") -> Tensor:
    none = torch.zeros(0, dtype=torch.bool)
    return ops.linears(x, [weight], [scale], [EMPTY], [], [], [], EMPTY, none, activations, *PLAIN)[0]


def gelu(x: float) -> float:
    return x * 0.5 * (1 + math.erf(x / math.sqrt(2)))


def test_dequantize(draw: torch.Generator) -> None:
    q, scale = packed(draw, 6, 48)
    assert torch.equal(ops.dequantize(q, scale), unpacked(q, scale))
    dense = normal(draw, 3, 5)
    assert ops.dequantize(dense, EMPTY) is dense


def test_dequantize_takes_zero_points_off(draw: torch.Generator) -> None:
    q, scale = packed(draw, 6, 48)
    zero = torch.randint(-8, 8, scale.shape, generator=draw).to(torch.int8)
    pairs = [[(q[i, j] - zero[i, j // 16].int(), scale[i, j // 16]) for j in range(48)] for i in range(6)]
    expected = [[difference.item() * step.item() for difference, step in row] for row in pairs]
    assert torch.equal(ops.dequantize(q, scale, zero), torch.tensor(expected))
    held = PackedWeight(q.numpy(), scale.numpy(), 4, 16, zero.numpy())
    assert np.array_equal(held.dequantize(), np.array(expected, np.float32))


def test_dequantize_looks_values_up(draw: torch.Generator) -> None:
    codes, scale = torch.randint(0, 16, (6, 48), generator=draw).to(torch.int8), normal(draw, 6, 3).abs()
    book = normal(draw, 16)
    expected = [[book[codes[i, j]].item() * scale[i, j // 16].item() for j in range(48)] for i in range(6)]
    assert torch.equal(ops.dequantize(codes, scale, None, book), torch.tensor(expected))
    held = PackedWeight(codes.numpy(), scale.numpy(), 4, 16, codebook=book.numpy())
    assert np.array_equal(held.dequantize(), np.array(expected, np.float32))


def test_columns_may_stand_in_an_order_of_their_own(draw: torch.Generator) -> None:
    """A group is of columns that were sorted together; the input is gathered, then rounded block by block."""
    x, order = normal(draw, 3, 32), torch.randperm(32, generator=draw)
    q, scale = packed(draw, 4, 32)
    dense = torch.empty(4, 32)
    dense[:, order] = unpacked(q, scale)
    none = torch.zeros(0, dtype=torch.bool)

    def run(activations: str) -> Tensor:
        forms = ([None], [None], [order], [None])
        return ops.linears(x, [q], [scale], [EMPTY], [], [], [], EMPTY, none, activations, *forms)[0]

    torch.testing.assert_close(run("float"), F.linear(x, dense), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(run("int8_block"), slotless(x[:, order], q, scale, "int8_block"))
    held = PackedWeight(q.numpy(), scale.numpy(), 4, 16, order=order.numpy())
    assert np.array_equal(held.dequantize(), dense.numpy())


def test_linears_is_the_slot_contract(draw: torch.Generator) -> None:
    """A dense layer with bias, a packed one without, slots on one of them, three rows, of which one is recovery."""
    x, weight, bias = normal(draw, 2, 5, 32), normal(draw, 8, 32), normal(draw, 8)
    q, scale = packed(draw, 7, 32)
    down, up = normal(draw, 3, 32), normal(draw, 7, 3)
    gate, recovery = torch.tensor([0.5, -2.0, 3.0]), torch.tensor([False, True, False])
    args = ([weight, q], [EMPTY, scale], [bias, EMPTY], [1], [down], [up], gate, recovery, "float", *[[None, None]] * 4)
    dense, slotted = ops.linears(x, *args)

    exact = x.double()
    h = exact @ down.double().T
    h[..., 1].apply_(gelu)
    expected = exact @ unpacked(q, scale).double().T + (h * gate.double()) @ up.double().T
    torch.testing.assert_close(dense.double(), exact @ weight.double().T + bias.double(), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(slotted.double(), expected, atol=1e-5, rtol=1e-5)


def test_rank_0_changes_no_bit(draw: torch.Generator) -> None:
    x, weight = normal(draw, 4, 32), normal(draw, 8, 32)
    none, down, up = torch.zeros(0, dtype=torch.bool), torch.zeros(0, 32), torch.zeros(8, 0)
    slotted = ops.linears(x, [weight], [EMPTY], [EMPTY], [0], [down], [up], EMPTY, none, "float", *PLAIN)[0]
    assert torch.equal(slotted, F.linear(x, weight))


@pytest.mark.parametrize("dense", [False, True])
def test_w8a8_multiplies_integers_and_scales_the_sum(draw: torch.Generator, dense: bool) -> None:
    """Whatever holds the weights: x of each position in 127 steps either way, as CA-LoRA's bases were trained."""
    x, q = normal(draw, 3, 32), torch.randint(-127, 128, (4, 32), generator=draw, dtype=torch.int8)
    scale, none = normal(draw, 4, 1).abs(), torch.zeros(0, dtype=torch.bool)
    step = x.abs().amax(-1, keepdim=True) / 127
    expected = ((x / step).round().long() @ q.long().T).double() * step.double() * scale.double().T
    held, factor = (q * scale, EMPTY) if dense else (q, scale)
    made = ops.linears(x, [held], [factor], [EMPTY], [], [], [], EMPTY, none, "int8_absmax", *PLAIN)[0]
    torch.testing.assert_close(made.double(), expected, atol=1e-5, rtol=1e-5)


def test_activations_are_rounded_as_the_int8_kernels_round_them() -> None:
    """scale = max |x| / 127 per block, values to the nearest integer; a block of zeros stays zero."""
    x = torch.tensor([[127.0, 1.4, -63.6, 0.0, 0.0, 0.0, 0.0, 0.0, -2.54, 1.271, 0.011, 0.029]])
    expected = torch.tensor([[127.0, 1.0, -64.0, 0.0, 0.0, 0.0, 0.0, 0.0, -2.54, 1.28, 0.02, 0.02]])
    torch.testing.assert_close(ops.round_activations(x, "int8_block", 4), expected, atol=1e-6, rtol=0)


def test_only_a_packed_base_reads_rounded_activations(draw: torch.Generator) -> None:
    x, weight = normal(draw, 3, 32), normal(draw, 4, 32)
    q, scale = packed(draw, 4, 32)
    blocks = x.double().reshape(3, 2, 16)
    step = blocks.abs().amax(-1, keepdim=True) / 127
    rounded = (torch.round(blocks / step) * step).reshape(3, 32)
    expected = (rounded @ unpacked(q, scale).double().T).float()
    torch.testing.assert_close(slotless(x, q, scale, activations="int8_block"), expected, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(slotless(x, q, scale), expected, atol=1e-3)
    assert torch.equal(slotless(x, weight, EMPTY, activations="int8_block"), slotless(x, weight, EMPTY))


@pytest.mark.parametrize("bits", [4, 8])
def test_embedding_looks_up_rows(draw: torch.Generator, bits: int) -> None:
    ids = torch.tensor([[3, 0, 3], [7, 8, 1]])
    q, scale = packed(draw, 9, 32, bits)
    dense = unpacked(q, scale)
    assert torch.equal(ops.embedding(ids, q, scale), F.embedding(ids, dense))
    assert torch.equal(ops.embedding(ids, dense, EMPTY), F.embedding(ids, dense))
    zero = torch.randint(-8, 8, scale.shape, generator=draw).to(torch.int8)
    assert torch.equal(ops.embedding(ids, q, scale, zero), F.embedding(ids, ops.dequantize(q, scale, zero)))
    codes, book = (q.int() & 15).to(torch.int8), normal(draw, 16)
    expected = F.embedding(ids, ops.dequantize(codes, scale, None, book))
    assert torch.equal(ops.embedding(ids, codes, scale, None, book), expected)


def test_rms_norm_equals_that_of_transformers(draw: torch.Generator) -> None:
    norm = LlamaRMSNorm(32, eps=1e-3)
    norm.weight.data = normal(draw, 32)
    x = normal(draw, 2, 3, 32) * 0.05
    torch.testing.assert_close(ops.rms_norm(x, norm.weight.data, 1e-3), norm(x).detach())


# ── attention ───────────────────────────────────────────────────────────────────────────────────────────────

HEADS, KV, SIZE, PAST, NEW = 4, 2, 16, 5, 3


def heads(draw: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v of all positions."""
    total = PAST + NEW
    return normal(draw, 1, HEADS, total, SIZE), normal(draw, 1, KV, total, SIZE), normal(draw, 1, KV, total, SIZE)


def rotary(size: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines [positions, size / 2] of a table that is longer than what is used."""
    angles = torch.arange(20.0)[:, None] * 10000.0 ** -(torch.arange(0, size, 2) / size)
    return angles.cos(), angles.sin()


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """transformers' rotary embedding of positions 0, 1, 2 … over the first values of each head."""
    total, size = x.shape[2], 2 * cos.shape[1]
    tables = [torch.cat([table, table], dim=-1)[None, :total] for table in (cos, sin)]
    turned, _ = apply_rotary_pos_emb(x[..., :size], x[..., :size], *tables)
    return torch.cat([turned, x[..., size:]], dim=-1)


def in_steps(q: Tensor, k: Tensor, v: Tensor, *options: object) -> Tensor:
    """Out [1, S, H·D] of all positions: PAST of them first, then the others one by one."""
    key, value, outs = torch.zeros(1, KV, 0, SIZE), torch.zeros(1, KV, 0, SIZE), []
    for start, end in [(0, PAST), *((i, i + 1) for i in range(PAST, PAST + NEW))]:
        part = [t[:, :, start:end] for t in (q, k, v)]
        out, key, value = ops.attention(*part, key, value, *options)
        outs.append(out)
    assert torch.equal(value, v)
    return torch.cat(outs, dim=1)


@pytest.mark.parametrize("size", [SIZE, SIZE // 2])
@pytest.mark.parametrize("window", [0, 3])
def test_attention_equals_that_of_torch(draw: torch.Generator, window: int, size: int) -> None:
    """Cached steps against one causal pass of torch over transformers' rotary embedding."""
    (q, k, v), (cos, sin), total = heads(draw), rotary(size), PAST + NEW
    visible = torch.ones(total, total, dtype=torch.bool).tril()
    if window:
        visible &= ~torch.ones(total, total, dtype=torch.bool).tril(-window)
    expected = F.scaled_dot_product_attention(
        rotated(q, cos, sin), rotated(k, cos, sin), v, attn_mask=visible, scale=0.3, enable_gqa=True
    )
    out = in_steps(q, k, v, cos, sin, 0.3, window, 0.0)
    torch.testing.assert_close(out, expected.transpose(1, 2).flatten(2), atol=1e-5, rtol=1e-5)


def test_attention_without_rotation_and_with_capped_scores(draw: torch.Generator) -> None:
    q, k, v = heads(draw)
    scores = torch.einsum("bhqd,bhkd->bhqk", q, k.repeat_interleave(2, 1)) * 0.7
    mask = torch.full((PAST + NEW, PAST + NEW), -torch.inf).triu(1)
    weights = torch.softmax(2.0 * torch.tanh(scores / 2.0) + mask, dim=-1)
    expected = torch.einsum("bhqk,bhkd->bqhd", weights, v.repeat_interleave(2, 1)).flatten(2)
    out = in_steps(q, k, v, EMPTY, EMPTY, 0.7, 0, 2.0)
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)


def test_the_cache_holds_rotated_keys(draw: torch.Generator) -> None:
    (q, k, v), (cos, sin) = heads(draw), rotary(SIZE)
    past = torch.zeros(1, KV, 0, SIZE)
    _, key, _ = ops.attention(q, k, v, past, past, cos, sin, 1.0, 0, 0.0)
    torch.testing.assert_close(key, rotated(k, cos, sin))


# ── what torch.export sees ──────────────────────────────────────────────────────────────────────────────────


def test_the_traced_shapes_are_the_real_ones(draw: torch.Generator) -> None:
    """torch's own check of custom operators: schema, aliasing, and shapes of fake tensors against real ones."""
    tests = ("test_schema", "test_faketensor")
    x, (q, scale), weight = normal(draw, 1, 4, 32), packed(draw, 6, 32), normal(draw, 8, 32)
    rows = ([normal(draw, 3, 32)], [normal(draw, 6, 3)], torch.ones(3), torch.tensor([True, False, True]))
    linears = (x, [weight, q], [EMPTY, scale], [normal(draw, 8), EMPTY], [1], *rows, "int8_block", *[[None, None]] * 4)
    torch.library.opcheck(torch.ops.calora.linears, linears, test_utils=tests)
    experts = (x, normal(draw, 5, 32), normal(draw, 7, 5), torch.arange(14) % 7, 3)
    torch.library.opcheck(torch.ops.calora.experts, experts, test_utils=tests)
    torch.library.opcheck(torch.ops.calora.rms_norm, (x, normal(draw, 32), 1e-5), test_utils=tests)
    for table in ((q, scale), (weight, EMPTY)):
        torch.library.opcheck(torch.ops.calora.embedding, (torch.tensor([[1, 5]]), *table), test_utils=tests)
    past = (normal(draw, 1, KV, PAST, SIZE), normal(draw, 1, KV, PAST, SIZE))
    attention = (*heads(draw), *past, *rotary(SIZE), 0.3, 3, 0.0)
    torch.library.opcheck(torch.ops.calora.attention, attention, test_utils=tests)
