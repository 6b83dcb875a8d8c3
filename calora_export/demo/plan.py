"""Every number of the demo's training that was chosen."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Plan:
    """The defaults are the committed bundle's."""

    seed: int = 2024
    vocab_size: int = 512
    base_steps: int = 2500
    base_batch: int = 64
    base_lr: float = 2e-3
    adapter_steps: int = 500
    adapter_batch: int = 32
    adapter_lr: float = 3e-3
    rank: int = 8
    alpha: int = 16
    group_size: int = 32
    linear_bits: int = 4
    embedding_bits: int = 8
    eval_items: int = 200
    router_embedding: int = 64
    router_hidden: tuple[int, ...] = (128, 128, 128)
    router_max_length: int = 64
    router_steps: int = 4000
    router_batch: int = 64
    router_lr: float = 2e-3
    router_p: float = 0.6
    router_eval_items: int = 300
