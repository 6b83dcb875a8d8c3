"""The operators that a traced graph keeps whole, and their reference in torch.

A target lowers each of these to what its runtime does best. Everything else in a graph is plain ATen.

    linears    a group of linear layers that share an input, with their slots
    experts    which neurons of a MoEfied layer compute (arXiv 2110.01786)
    token_gates  what each token gets of each expert's rows
    embedding  a table, dense or packed
    rms_norm   root mean square norm (arXiv 1910.07467)
    attention  rotary embedding, KV cache and grouped-query attention (arXiv 2305.13245) in one

Weights are dense (float, with an empty scale) or packed: int8 values with scale [out, in / group], and where there are
such, zero points int8 [out, in / group], a codebook [codes] that the values are positions in, an order of the columns.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

BLOCK = 128  # rows


def dequantize(weight: Tensor, scale: Tensor, zero: Tensor | None = None, codebook: Tensor | None = None) -> Tensor:
    """fp32 [out, in] of a packed weight, (q - zero) · scale or codebook[q] · scale; a dense one passes through."""
    if scale.numel() == 0:
        return weight
    out, columns = weight.shape
    values = weight.float() if codebook is None else codebook[weight.int()]
    grouped = values.view(out, scale.shape[1], -1)
    if zero is not None:
        grouped = grouped - zero.float().unsqueeze(-1)
    return (grouped * scale.float().unsqueeze(-1)).view(out, columns)


def _row_blocks(weight: Tensor, scale: Tensor, zero: Tensor | None, codebook: Tensor | None) -> Iterator[Tensor]:
    """`dequantize`, BLOCK rows at a time: a large vocabulary's head takes no memory to speak of."""
    for start in range(0, len(weight), BLOCK if scale.numel() else len(weight)):
        held = [part if part is None or not part.numel() else part[start : start + BLOCK] for part in (scale, zero)]
        rows = weight[start : start + BLOCK] if scale.numel() else weight
        yield dequantize(rows, held[0], held[1], codebook)  # type: ignore[arg-type]


def round_activations(x: Tensor, kind: str, block: int) -> Tensor:
    """x rounded to int8 and back as a target's kernels or a base's layers do it; kind is `compression.Activations`."""
    if kind == "int8_block":
        return _round_blocks(x, block)
    if kind == "int8_absmax":
        return _round_blocks(x, x.shape[-1])
    return _round_tokens(x) if kind == "int8_token" else x


def _round_blocks(x: Tensor, block: int) -> Tensor:
    """Symmetric in each run of `block` values: scale = max|x| / 127 (MatMulNBits with accuracy_level 4; and CA-LoRA's
    W8A8, whose run is a position)."""
    blocks = x.unflatten(-1, (-1, block))
    scale = blocks.abs().amax(-1, keepdim=True) / 127.0
    scale = torch.where(scale == 0, torch.ones_like(scale), scale)
    return ((blocks / scale).round() * scale).flatten(-2)


def _round_tokens(x: Tensor) -> Tensor:
    """Asymmetric over each position's features (XNNPACK's qd8): the range, zero within it, in 255 steps; the zero point
    is taken from the end of the range where it is the more exact."""
    low, high = x.amin(-1, keepdim=True).clamp(max=0), x.amax(-1, keepdim=True).clamp(min=0)
    steps = torch.where(high == low, torch.ones_like(high), 255.0 / (high - low))
    from_low, from_high = -128.0 - low * steps, 127.0 - high * steps
    zero = torch.where((-128.0 + low * steps) + (127.0 + high * steps) > 0, from_low, from_high)
    zero = zero.clamp(-128, 127).round()
    return (((x * steps).round() + zero).clamp(-128, 127) - zero) / steps


@torch.library.custom_op("calora::linears", mutates_args=())
def linears(
    x: Tensor,
    weights: list[Tensor],
    scales: list[Tensor],
    biases: list[Tensor],
    slotted: list[int],
    downs: list[Tensor],
    ups: list[Tensor],
    gate: Tensor,
    recovery: Tensor,
    activations: str,
    zeros: list[Tensor | None],
    codebooks: list[Tensor | None],
    orders: list[Tensor | None],
    masks: list[Tensor | None],
) -> list[Tensor]:
    """y_i = base_i(x) ⊙ mask_i + up_i (gate ⊙ act(down_i x)), act = exact GELU on recovery rows, identity elsewhere.

    x [..., in]; weights[i] [out_i, in]; biases[i] [out_i] or empty. downs[j] [R, in] and ups[j] [out, R] belong to the
    linear slotted[j]; gate [R], or [..., R] of each token (`token_gates`); recovery bool [R]. activations: how a packed
    base reads x, and of int8_absmax any base. zeros[i], codebooks[i] as in `dequantize`; orders[i] int64 [in]: which
    feature of x each column of weights[i] is of. masks[i] [..., out_i] of `experts`, or None: an adapter adds to
    neurons that do not compute, too.
    Source: CA-LoRA (arXiv 2307.07705) eq. 5 for the rows, DLP-LoRA (arXiv 2410.01497) eq. 4 for the gates.
    """
    ys = []
    forms = zip(weights, scales, biases, zeros, codebooks, orders, masks, strict=True)
    for weight, scale, bias, zero, codebook, order, mask in forms:
        seen = x if order is None else x[..., order]
        if activations == "int8_absmax":  # the base's own
            seen = round_activations(seen, activations, 0)
        elif scale.numel() and codebook is None:  # kernels that look values up read x as it is
            seen = round_activations(seen, activations, x.shape[-1] // scale.shape[1])
        y = torch.cat([F.linear(seen, rows) for rows in _row_blocks(weight, scale, zero, codebook)], dim=-1)
        y = y + bias if bias.numel() else y
        ys.append(y if mask is None else y * mask)
    for index, down, up in zip(slotted, downs, ups, strict=True):
        rows = F.linear(x, down)
        rows = torch.where(recovery, F.gelu(rows), rows) * gate
        ys[index] = ys[index] + F.linear(rows, up)
    return ys


@linears.register_fake
def _(x, weights, scales, biases, slotted, downs, ups, gate, recovery, activations, zeros, codebooks, orders, masks):
    return [x.new_empty(*x.shape[:-1], weight.shape[0]) for weight in weights]


@torch.library.custom_op("calora::experts", mutates_args=())
def experts(x: Tensor, hidden: Tensor, scores: Tensor, labels: Tensor, top_k: int) -> Tensor:
    """1 for the neurons of the top_k experts of each position, else 0: x [..., in] → fp32 [..., out].

    hidden [hidden, in], scores [experts, hidden]; labels int64 [out]: the expert of each neuron. Experts that score as
    much as the last one chosen are chosen too. Source: MoEfication (arXiv 2110.01786) sec. 3.3, with the normalised
    input and the tanh of its code.
    """
    found = F.linear(torch.tanh(F.linear(F.normalize(x, dim=-1), hidden)), scores)
    chosen = found >= found.topk(top_k, dim=-1).values[..., -1:]
    return chosen[..., labels].float()


@experts.register_fake
def _(x, hidden, scores, labels, top_k):
    return x.new_empty(*x.shape[:-1], labels.shape[0])


@torch.library.custom_op("calora::token_gates", mutates_args=())
def token_gates(x: Tensor, weight: Tensor, bias: Tensor, select: Tensor, gate: Tensor) -> Tensor:
    """gate + (softmax(W x + b₀) + b₁) · select, [..., R]: gates of each token, for x [..., features].

    weight [E, features], bias [2, E]; select [E, R] marks each expert's rows, whose gate [R] is 0; or gate
    [..., R], what a module around this one makes of them.

    LoRA-Flow (arXiv 2402.11455) eq. 4, its b inside b₁; LLaVA-MoLE (arXiv 2401.16160), its router's bias in b₀.
    """
    return gate + (F.linear(x, weight, bias[0]).softmax(-1) + bias[1]) @ select


@token_gates.register_fake
def _(x, weight, bias, select, gate):
    return x.new_empty(*x.shape[:-1], gate.shape[-1])


@torch.library.custom_op("calora::embedding", mutates_args=())
def embedding(
    ids: Tensor, weight: Tensor, scale: Tensor, zero: Tensor | None = None, codebook: Tensor | None = None
) -> Tensor:
    """Rows of a table: ids [...] → [..., dim]; weight [vocab, dim], dense or packed."""
    if scale.numel() == 0:
        return F.embedding(ids, weight).clone()
    flat = ids.flatten()
    rows = dequantize(weight[flat], scale[flat], None if zero is None else zero[flat], codebook)
    return rows.view(*ids.shape, -1)


@embedding.register_fake
def _(ids, weight, scale, zero=None, codebook=None):
    return torch.empty(*ids.shape, weight.shape[1], dtype=torch.float32, device=ids.device)


@torch.library.custom_op("calora::rms_norm", mutates_args=())
def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x²) + eps) · weight over the last dimension."""
    return F.rms_norm(x, (x.shape[-1],), weight, eps)


@rms_norm.register_fake
def _(x, weight, eps):
    return torch.empty_like(x)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding (arXiv 2104.09864), half-split form: x [B, H, S, D]; cos, sin [S, rotary / 2]."""
    half = cos.shape[-1]
    a, b, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return torch.cat([a * cos - b * sin, b * cos + a * sin, rest], dim=-1)


@torch.library.custom_op("calora::attention", mutates_args=())
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    past_key: Tensor,
    past_value: Tensor,
    cos: Tensor,
    sin: Tensor,
    scale: float,
    window: int,
    softcap: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Causal attention of S new positions behind P cached ones.

    q [B, H, S, D]; k, v [B, KV, S, D] before rotation; past_key, past_value [B, KV, P, D] after it; cos, sin
    [positions, rotary / 2] or empty for no rotation; window > 0 looks back only that far; softcap > 0 bounds scores.
    Returns out [B, S, H·D], key and value [B, KV, P + S, D].
    """
    past, new = past_key.shape[2], q.shape[2]
    if cos.numel():
        q, k = (rotate(t, cos[past : past + new], sin[past : past + new]) for t in (q, k))
    key, value = torch.cat([past_key, k], dim=2), torch.cat([past_value, v], dim=2)
    repeat = q.shape[1] // k.shape[1]
    scores = q @ key.repeat_interleave(repeat, 1).transpose(-1, -2) * scale
    if softcap > 0:
        scores = torch.tanh(scores / softcap) * softcap
    distance = torch.arange(past, past + new)[:, None] - torch.arange(past + new)[None, :]
    hidden = distance < 0 if window <= 0 else (distance < 0) | (distance >= window)
    weights = scores.masked_fill(hidden, float("-inf")).softmax(-1)
    out = weights @ value.repeat_interleave(repeat, 1)
    return out.transpose(1, 2).flatten(2), key, value


@attention.register_fake
def _(q, k, v, past_key, past_value, cos, sin, scale, window, softcap):
    batch, heads, new, size = q.shape
    shape = (batch, k.shape[1], past_key.shape[2] + new, size)
    return q.new_empty(batch, new, heads * size), k.new_empty(shape), v.new_empty(shape)
