"""The training loop, the loss and the score that base, adapters and router have in common."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

from calora_export.demo.tasks import Example
from calora_export.demo.tokenizing import IGNORED, encode

log = logging.getLogger(__name__)


def task_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross entropy of each labelled token, predicted from the one before it."""
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORED)


def percentage(right: list[bool]) -> float:
    """How many are true, in percent with two decimals."""
    return round(100 * sum(right) / len(right), 2)


@torch.no_grad()
def exact_match(model: nn.Module, tokenizer: PreTrainedTokenizerFast, examples: list[Example]) -> float:
    """Percentage of examples that are `answered`."""
    model.eval()
    ids, labels = encode(tokenizer, examples)
    return percentage(answered(model(input_ids=ids).logits, labels))


def answered(logits: Tensor, labels: Tensor) -> list[bool]:
    """Of which examples the whole completion, end token included, is what greedy decoding would write.

    Feeding the true completion and comparing every argmax is the same test: until its first wrong
    token, greedy decoding has written just that.
    """
    guesses, wanted = logits.argmax(-1)[:, :-1], labels[:, 1:]
    return ((guesses == wanted) | (wanted == IGNORED)).all(1).tolist()


def optimise(
    parameters: Iterable[nn.Parameter], loss_of_step: Callable[[], Tensor], steps: int, lr: float, label: str
) -> None:
    """AdamW with warm-up and cosine decay to 2 %; `loss_of_step` draws its own batch."""
    parameters = list(parameters)
    optimiser = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.01, betas=(0.9, 0.98), fused=True)
    start = time.perf_counter()
    for step in range(steps):
        warm = min(1.0, (step + 1) / 50)
        rate = lr * warm * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / steps)))
        for group in optimiser.param_groups:
            group["lr"] = rate
        loss = loss_of_step()
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()
        if step % 250 == 0 or step == steps - 1:
            seconds = time.perf_counter() - start
            log.info("%s: step %d of %d, loss %.4f, %.0f s", label, step + 1, steps, loss.item(), seconds)
