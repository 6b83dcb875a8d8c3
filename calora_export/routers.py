"""Routers: from a prompt's token ids to one gate per adapter, selection policy included.

The released DLP-LoRA (arXiv 2410.01497) selects by top-p and then takes a softmax of the *selected probabilities*.
Ranks are found by comparing every pair of classes instead of by sorting, so that ties go to the lower class index on
every target.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from calora_export import router_config
from calora_export.bundle import Bundle
from calora_export.encoder import Encoder
from calora_export.manifest import Selection
from calora_export.router_config import EncoderConfig, MlpConfig, TableConfig
from calora_export.tensors import TensorIndex


class Mlp(nn.Module):
    """Token embeddings, averaged, through linear layers with ReLU between them. ids [1, T] → logits [1, classes]."""

    def __init__(self, config: MlpConfig) -> None:
        super().__init__()
        sizes = (config.embedding_size, *config.hidden_sizes, config.num_classes)
        self.embedding = nn.Embedding(config.vocab_size, config.embedding_size)
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in zip(sizes, sizes[1:], strict=False))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids).mean(dim=1)
        for i, layer in enumerate(self.layers):
            x = layer(torch.relu(x) if i else x)
        return x


class Select(nn.Module):
    """Logits [1, classes] → gates [classes]; unselected classes get 0."""

    def __init__(self, selection: Selection) -> None:
        super().__init__()
        self.selection = selection

    def forward(self, logits: Tensor) -> Tensor:
        scores = logits[0] / self.selection.temperature
        probs = scores.softmax(0)
        chosen = self._chosen(probs)
        match self.selection.weights:
            case "softmax_probs":
                return probs.masked_fill(torch.logical_not(chosen), float("-inf")).softmax(0)
            case "softmax_logits":
                return scores.masked_fill(torch.logical_not(chosen), float("-inf")).softmax(0)
            case "renorm":
                kept = probs * chosen
                return kept / kept.sum()
            case "uniform":
                return chosen.float() / chosen.float().sum()

    def _chosen(self, probs: Tensor) -> Tensor:
        """bool [classes]. before[i, j]: class j ranks before class i."""
        index = torch.arange(probs.shape[0])
        ahead = probs[None, :] > probs[:, None]
        tied = torch.logical_and(probs[None, :] == probs[:, None], index[None, :] < index[:, None])
        before = torch.logical_or(ahead, tied).float()
        first = before.sum(1) == 0
        match self.selection:
            case Selection(select="top_p", p=float(p)):  # the class that crosses p is kept
                return (before * probs[None, :]).sum(1) <= p
            case Selection(select="top_k", k=int(k)):
                return before.sum(1) < k
            case Selection(select="threshold", threshold=float(threshold)):
                return torch.logical_or(probs >= threshold, first)
            case _:
                return torch.ones_like(first)


class Table(nn.Module):
    """ids [1, 1], a row's number → its gates [classes]."""

    def __init__(self, config: TableConfig) -> None:
        super().__init__()
        self.register_buffer("gates", torch.zeros(config.rows, config.num_classes))

    def forward(self, ids: Tensor) -> Tensor:
        return F.embedding(ids[0, :1], self.get_buffer("gates"))[0]


class Router(nn.Module):
    """ids [1, T] → gates [classes]. A table has its gates; other scores are selected from."""

    def __init__(self, scores: Mlp | Encoder | Table, selection: Selection | None) -> None:
        super().__init__()
        self.scores, self.select = scores, nn.Identity() if selection is None else Select(selection)

    def forward(self, ids: Tensor) -> Tensor:
        return self.select(self.scores(ids))


def load(bundle: Bundle) -> Router | None:
    """The bundle's router, or None."""
    spec = bundle.manifest.router
    if spec is None:
        return None
    directory = bundle.path / "router"
    config = router_config.read(directory, "router", spec.kind)
    tensors = TensorIndex.open(directory, "router")
    state = {name: torch.from_numpy(np.array(tensors.float32(name))) for name in tensors.names()}
    scores = build(config)
    scores.load_state_dict(state)
    return Router(scores, spec.selection).eval().requires_grad_(False)


def build(config: router_config.RouterConfig) -> Mlp | Encoder | Table:
    """The module of a config.json, not yet with its weights."""
    match config:
        case MlpConfig():
            return Mlp(config)
        case EncoderConfig():
            return Encoder(config)
        case TableConfig():
            return Table(config)
