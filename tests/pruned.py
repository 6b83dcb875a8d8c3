"""A base as LLM-Pruner leaves it: config.json of the whole model, tensors without the heads and neurons it took."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from calora_export.importers.peft import run as import_peft
from tests.bundles import write_tokenizer
from tests.families import CaLora, Family, base

HEAD = 16  # features; of 4 query heads, 2 share a key-value head
KV_HEADS = ((0, 1), (1,))  # those kept, by layer
NEURONS = (64, 32)  # of 96, a random choice
ROWS, COLUMNS = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"), ("o_proj", "down_proj")


def make(directory: Path) -> Family:
    """The bundle of the pruned model with adapter `one`. `hf` is the whole model, in which the columns that read what
    was pruned are zero: transformers' own arithmetic, with equal results."""
    hf = base("llama")
    (directory / "base").mkdir(parents=True)
    kept = _kept()
    with torch.no_grad():
        for site, columns in kept.items():
            if site.endswith(COLUMNS):
                hf.get_submodule(site).weight.mul_(_mask(columns, hf.get_submodule(site).in_features))
    save_file(_cut(hf.state_dict(), kept), directory / "base" / "model.safetensors", {"format": "pt"})
    hf.config.save_pretrained(directory / "base")
    write_tokenizer(directory / "base")
    adapter = adapted(hf)
    cut = {site: _cut(own, kept, site) for site, own in adapter.tensors.items()}
    saved = replace(adapter, tensors=cut).save(directory / "calora" / "one")
    import_peft(directory / "base", [saved], directory / "bundle")
    return Family("pruned", hf, directory)


def adapted(hf: torch.nn.Module) -> CaLora:
    """The adapter for the whole model: what it reads of pruned features is zero."""
    adapter = CaLora.draw(hf, (4, 3), 10, (*ROWS, *COLUMNS), ("v_proj", *COLUMNS))
    for site, columns in _kept().items():
        for name in ("lora_A", "lora_a1") if site.endswith(COLUMNS) else ():
            down = adapter.tensors[site][name]
            down.mul_(_mask(columns, down.shape[1]))
    return adapter


def _kept() -> dict[str, Tensor]:
    """Site → which of its rows, or columns, are left."""
    found: dict[str, Tensor] = {}
    for layer, (heads, neurons) in enumerate(zip(KV_HEADS, NEURONS, strict=True)):
        key = torch.cat([torch.arange(HEAD) + head * HEAD for head in heads])
        query = torch.cat([torch.arange(2 * HEAD) + head * 2 * HEAD for head in heads])
        left = torch.randperm(96, generator=torch.Generator().manual_seed(layer))[:neurons].sort().values
        for name in (*ROWS, *COLUMNS):
            part, rows = ("self_attn", query) if name in ("q_proj", "o_proj") else ("self_attn", key)
            part, rows = ("mlp", left) if name in ("gate_proj", "up_proj", "down_proj") else (part, rows)
            found[f"model.layers.{layer}.{part}.{name}"] = rows
    return found


def _mask(kept: Tensor, width: int) -> Tensor:
    return torch.zeros(width).index_fill(0, kept, 1.0)


def _cut(tensors: Mapping[str, Tensor], kept: Mapping[str, Tensor], owner: str = "") -> dict[str, Tensor]:
    """Without the rows of what writes pruned features and the columns of what reads them."""
    made: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        site = owner or name.removesuffix(".weight")
        if site.endswith(COLUMNS) and name not in ("lora_B", "lora_a2"):
            tensor = tensor[:, kept[site]]
        elif site.endswith(ROWS) and name not in ("lora_A", "lora_a1"):
            tensor = tensor[kept[site]]
        made[name] = tensor.contiguous()
    return made
