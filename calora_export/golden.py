"""Token streams for parity, and the reference logits that a package carries for checks without a bundle."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors.numpy import save
from tokenizers import Tokenizer

from calora_export.adapters import Adapter
from calora_export.bundle import Bundle
from calora_export.model import Rows, SlotModel

FILE = "golden.safetensors"
PREFILL, DECODE = 16, 8


def examples(bundle: Bundle) -> dict[str, list[tuple[str, str]]]:
    """Adapter id → the (prompt, completion) pairs of its tasks."""
    found: dict[str, list[tuple[str, str]]] = {}
    for task in bundle.manifest.tasks:
        lines = (bundle.path / task.eval).read_text(encoding="utf-8").splitlines()
        pairs = [json.loads(line) for line in lines if line.strip()]
        found.setdefault(task.adapter, []).extend((pair["prompt"], pair["completion"]) for pair in pairs)
    return found


def stream(bundle: Bundle, length: int) -> tuple[int, ...]:
    """`length` token ids: the bundle's own prompts, one of each task in turn, or seeded noise where it has none."""
    tokenizer = Tokenizer.from_file(str(bundle.path / "base" / "tokenizer.json"))
    tasks = list(examples(bundle).values())
    ids: list[int] = []
    for turn in range(max((len(pairs) for pairs in tasks), default=0)):
        for pairs in tasks:
            if turn < len(pairs) and len(ids) < length:
                ids += tokenizer.encode("".join(pairs[turn])).ids
    noise = np.random.default_rng(0).integers(0, tokenizer.get_vocab_size(), length)
    return tuple(int(token) for token in (ids + noise.tolist())[:length])


def reference_logits(model: SlotModel, rows: Rows, ids: Sequence[int], prefill: int) -> np.ndarray:
    """Teacher-forced logits fp32 [len(ids) - prefill + 1, vocab], from position prefill - 1 on, in one pass."""
    with torch.no_grad():
        logits, _ = model(torch.tensor([list(ids)]), model.empty_cache(), rows)
    return logits[0, prefill - 1 :].numpy()


def write(model: SlotModel, adapters: Sequence[Adapter], bundle: Bundle, directory: Path) -> None:
    """golden.safetensors: `ids`, and logits [DECODE + 1, vocab] of `base` and each `adapter:<id>`."""
    directory.mkdir()
    ids = stream(bundle, min(PREFILL + DECODE, model.shape.context))
    prefill = len(ids) - DECODE
    cases: Mapping[str, Rows] = {"base": Rows.none(), **{f"adapter:{a.id}": Rows.of(a) for a in adapters}}
    tensors = {name: reference_logits(model, rows, ids, prefill).copy() for name, rows in cases.items()}
    data = save({"ids": np.array(ids, np.int64), **tensors}, metadata={"prefill": str(prefill)})
    (directory / FILE).write_bytes(data)  # save_file raises its own error on a full disk, not OSError
