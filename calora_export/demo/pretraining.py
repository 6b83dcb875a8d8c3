"""The demo's base before compression: a small Llama that learns all skills from terse prompts."""

from __future__ import annotations

import random
from collections.abc import Iterator

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from calora_export.demo.plan import Plan
from calora_export.demo.tasks import TASKS, Example, draw, terse
from calora_export.demo.tokenizing import BOS_ID, EOS_ID, PAD_ID, encode
from calora_export.demo.training import optimise, task_loss


def base_config(plan: Plan) -> LlamaConfig:
    """1.67 M parameters with the default vocabulary."""
    return LlamaConfig(
        vocab_size=plan.vocab_size,
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=6,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        bos_token_id=BOS_ID,
        eos_token_id=EOS_ID,
        pad_token_id=PAD_ID,
    )


def terse_batches(rng: random.Random, size: int) -> Iterator[list[Example]]:
    """Endless batches of mixed tasks; examples of about one length go together, which halves the padding."""
    while True:
        pool = []
        for _ in range(8 * size):
            task = rng.choice(TASKS)
            pool.append(terse(task, *draw(task, rng, held_out=False)))
        pool.sort(key=lambda example: len(example.prompt) + len(example.completion))
        batches = [pool[start : start + size] for start in range(0, len(pool), size)]
        rng.shuffle(batches)
        yield from batches


def train_base(plan: Plan, tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """The uncompressed base: all skills, asked for by terse tags only."""
    torch.manual_seed(plan.seed)
    rng = random.Random(f"{plan.seed} base")
    model = LlamaForCausalLM(base_config(plan))
    batches = terse_batches(rng, plan.base_batch)

    def loss() -> Tensor:
        ids, labels = encode(tokenizer, next(batches))
        return task_loss(model(input_ids=ids).logits, labels)

    optimise(model.parameters(), loss, plan.base_steps, plan.base_lr, "base")
    model.requires_grad_(False)
    return model
