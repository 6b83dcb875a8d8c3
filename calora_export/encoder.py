"""A sentence encoder of a router: BERT, RoBERTa and ALBERT in one, with operators that every converter knows.

Written for one text at a time, so that there is neither padding nor a mask, and no batch that converters would have
to fold away and unfold at every layer.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from calora_export.router_config import EncoderConfig


class Encoder(nn.Module):
    """ids [1, T] → scores [1, classes]: logits of a classifier, or cosines with the classes' centroids."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.config = config
        self.embeddings = Embeddings(config)
        self.layers = nn.ModuleList(Layer(config) for _ in range(1 if config.shared_layers else config.layers))
        if config.head == "cosine":
            self.register_buffer("centroids", torch.zeros(config.num_classes, config.hidden_size))
        else:
            self.norm = nn.LayerNorm(config.hidden_size, 1e-5)  # that of torch: the head is DLP-LoRA's own
            self.classifier = nn.Linear(config.hidden_size, config.num_classes)

    def forward(self, ids: Tensor) -> Tensor:
        pooled = self.embed(ids)
        if self.config.head == "cosine":
            return unit(pooled) @ unit(self.get_buffer("centroids")).T
        return self.classifier(self.norm(pooled))

    def embed(self, ids: Tensor) -> Tensor:
        """ids [1, T] → the text as one vector [1, hidden]."""
        x = self.embeddings(ids[0])
        for index in range(self.config.layers):
            x = self.layers[0 if self.config.shared_layers else index](x)
        return x[:1] if self.config.pooling == "first" else x.mean(dim=0, keepdim=True)


class Embeddings(nn.Module):
    """Word, position and the first segment's vector, added and normed; ids [T] → [T, hidden]."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        size = config.embedding_size
        self.offset, self.projected = config.position_offset, config.projected
        self.word = nn.Embedding(config.vocab_size, size)
        self.position = nn.Embedding(config.positions, size)
        self.segment = nn.Embedding(1, size)
        self.norm = nn.LayerNorm(size, config.eps)
        if config.projected:
            self.project = nn.Linear(size, config.hidden_size)

    def forward(self, ids: Tensor) -> Tensor:
        positions = torch.arange(ids.shape[0]) + self.offset
        x = self.word(ids) + self.segment.weight + self.position(positions)
        x = self.norm(x)
        return self.project(x) if self.projected else x


class Layer(nn.Module):
    """Attention and feed-forward, each added to its input and normed; x [T, hidden]."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        h = config.hidden_size
        self.heads, self.activation = config.heads, config.activation
        self.query, self.key, self.value, self.output = (nn.Linear(h, h) for _ in range(4))
        self.up, self.down = nn.Linear(h, config.intermediate_size), nn.Linear(config.intermediate_size, h)
        self.attention_norm, self.output_norm = nn.LayerNorm(h, config.eps), nn.LayerNorm(h, config.eps)

    def forward(self, x: Tensor) -> Tensor:
        x = self.attention_norm(x + self.output(self.attend(x)))
        return self.output_norm(x + self.down(self.act(self.up(x))))

    def attend(self, x: Tensor) -> Tensor:
        size = x.shape[1] // self.heads
        q, k, v = (part(x).view(-1, self.heads, size).transpose(0, 1) for part in (self.query, self.key, self.value))
        weights = (torch.bmm(q, k.transpose(1, 2)) * (1 / math.sqrt(size))).softmax(-1)
        return torch.bmm(weights, v).transpose(0, 1).reshape(-1, self.heads * size)

    def act(self, x: Tensor) -> Tensor:
        if self.activation == "relu":
            return F.relu(x)
        return F.gelu(x, approximate="tanh" if self.activation == "gelu_tanh" else "none")


def unit(x: Tensor) -> Tensor:
    """Rows of length one; a zero row stays zero."""
    return x / (x * x).sum(dim=-1, keepdim=True).sqrt().clamp(min=1e-12)
