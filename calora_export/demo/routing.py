"""The demo's router: its data, its training and its score on held-out operands."""

from __future__ import annotations

import random
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

from calora_export.demo.plan import Plan
from calora_export.demo.results import RouterScores
from calora_export.demo.tasks import TASKS, draw, natural
from calora_export.demo.tokenizing import PAD_ID, token_ids
from calora_export.demo.training import optimise, percentage
from calora_export.manifest import Selection
from calora_export.router_config import MlpConfig
from calora_export.routers import Mlp, Select


@dataclass(frozen=True)
class Routed:
    """One or two sentences and, for each, the class that should answer it."""

    sentences: tuple[str, ...]
    classes: tuple[int, ...]

    @property
    def text(self) -> str:
        return " ".join(self.sentences)


def router_config(plan: Plan) -> MlpConfig:
    """DLP-LoRA's mini-MLP (arXiv 2410.01497), one class per task."""
    return MlpConfig("mlp", plan.vocab_size, plan.router_embedding, plan.router_hidden, len(TASKS))


def router_selection(plan: Plan) -> Selection:
    """Top p: the classes by falling probability, up to and including the one that crosses p."""
    return Selection(select="top_p", p=plan.router_p, weights="softmax_probs", temperature=1.0)


def train_router(plan: Plan, tokenizer: PreTrainedTokenizerFast) -> Mlp:
    """Single sentences have one label; a pair of sentences has two, half each, so that top-p selects both."""
    torch.manual_seed(plan.seed)
    rng = random.Random(f"{plan.seed} router")
    router = Mlp(router_config(plan))

    def loss() -> Tensor:
        batch = [draw_routed(rng, rng.randint(1, 2), held_out=False) for _ in range(plan.router_batch)]
        labels = torch.zeros(len(batch), len(TASKS))
        for row, item in zip(labels, batch, strict=True):
            row[list(item.classes)] = 1 / len(item.classes)
        return F.cross_entropy(router_logits(plan, router, tokenizer, [item.text for item in batch]), labels)

    optimise(router.parameters(), loss, plan.router_steps, plan.router_lr, "router")
    return router.requires_grad_(False)


def score_router(plan: Plan, router: Mlp, tokenizer: PreTrainedTokenizerFast) -> RouterScores:
    """Its score on `held_out_routed`."""
    select = Select(router_selection(plan))
    scores = []
    for items in held_out_routed(plan):
        sentences = [sentence for item in items for sentence in item.sentences]
        wanted = torch.tensor([item.classes for item in items])
        right = router_logits(plan, router, tokenizer, sentences).argmax(-1).view_as(wanted) == wanted
        whole = router_logits(plan, router, tokenizer, [item.text for item in items])
        exact = [selected(select, row) == set(item.classes) for row, item in zip(whole, items, strict=True)]
        scores += [percentage(right.all(1).tolist()), percentage(exact)]
    return RouterScores(*scores)


def draw_routed(rng: random.Random, count: int, held_out: bool) -> Routed:
    """`count` natural sentences of as many different tasks."""
    classes = tuple(rng.sample(range(len(TASKS)), count))
    sentences = (natural(TASKS[c], *draw(TASKS[c], rng, held_out), rng).prompt for c in classes)
    return Routed(tuple(sentences), classes)


def held_out_routed(plan: Plan) -> tuple[list[Routed], list[Routed]]:
    """Single and composite held-out texts."""
    rng = random.Random(f"{plan.seed} router held-out")
    singles = [draw_routed(rng, 1, held_out=True) for _ in range(plan.router_eval_items)]
    composites = [draw_routed(rng, 2, held_out=True) for _ in range(plan.router_eval_items)]
    return singles, composites


def router_logits(plan: Plan, router: Mlp, tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> Tensor:
    """Logits [n, classes] of `texts` as one padded batch, which Mlp itself, made for one prompt, does not take."""
    rows = [torch.tensor(ids[-plan.router_max_length :]) for ids in token_ids(tokenizer, texts)]
    ids = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=PAD_ID)
    real = ids != PAD_ID
    x = (router.embedding(ids) * real[..., None]).sum(1) / real.sum(1, keepdim=True)
    for i, layer in enumerate(router.layers):
        x = layer(F.relu(x) if i else x)
    return x


def selected(select: Select, logits: Tensor) -> set[int]:
    """The classes that get a gate for logits [classes]."""
    return set(select(logits[None]).nonzero().flatten().tolist())
