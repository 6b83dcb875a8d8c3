"""The demo's tokenizer, and examples as padded token ids with labels."""

from __future__ import annotations

import random

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from calora_export.demo.plan import Plan
from calora_export.demo.tasks import TASKS, Example, draw, natural, terse

BOS, EOS, PAD = "<|bos|>", "<|eos|>", "<|pad|>"
BOS_ID, EOS_ID, PAD_ID = 0, 1, 2  # the trainer numbers special tokens first, in the order they are given
IGNORED = -100


def build_tokenizer(plan: Plan) -> PreTrainedTokenizerFast:
    """A byte-level BPE trained on both forms of all tasks.

    Capitals and digits stand alone: operands are read letter by letter while the words around them merge.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            # Some runtimes' tokenizers drop what the pattern does not match.
            pre_tokenizers.Split(Regex("[A-Z0-9]|[^A-Z0-9]+"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=plan.vocab_size,
        special_tokens=[BOS, EOS, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_texts(plan), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        clean_up_tokenization_spaces=False,
    )


def token_ids(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> list[list[int]]:
    """The ids of each text; no token is added."""
    return tokenizer(texts)["input_ids"]


def encode(tokenizer: PreTrainedTokenizerFast, examples: list[Example]) -> tuple[Tensor, Tensor]:
    """Token ids [n, length], padded on the right, and labels [n, length], IGNORED outside the completion."""
    prompts = token_ids(tokenizer, [e.prompt for e in examples])
    completions = [ids + [EOS_ID] for ids in token_ids(tokenizer, [e.completion for e in examples])]
    length = max(len(p) + len(c) for p, c in zip(prompts, completions, strict=True))
    ids = torch.full((len(examples), length), PAD_ID)
    labels = torch.full_like(ids, IGNORED)
    for row, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
        ids[row, : len(prompt) + len(completion)] = torch.tensor(prompt + completion)
        labels[row, len(prompt) : len(prompt) + len(completion)] = torch.tensor(completion)
    return ids, labels


def _texts(plan: Plan) -> list[str]:
    rng = random.Random(f"{plan.seed} tokenizer")
    texts = []
    for task in TASKS:
        for _ in range(300):
            operand, answer = draw(task, rng, held_out=False)
            for example in (terse(task, operand, answer), natural(task, operand, answer, rng)):
                texts.append(example.prompt + example.completion)
    return texts
