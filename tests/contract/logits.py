"""Logits [STEPS + 1, vocab] of a family's tokens, from the last position of the prefill on."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from calora_export.adapters import load_adapter
from calora_export.bundle import Bundle
from calora_export.model import Rows, SlotModel
from calora_export.runtimes import Session
from tests.families import PREFILL, STEPS, CaLora, Family, tokens


def of_transformers(family: Family, adapter: CaLora, weight: float) -> np.ndarray:
    """Of transformers' own model, with weight · the adapter's delta added."""
    return family.mixed_logits([(adapter, weight)], tokens(PREFILL + STEPS))[0, PREFILL - 1 :].numpy()


def of_model(model: SlotModel, bundle: Bundle, weight: float) -> np.ndarray:
    """Of the bundle in torch, in one pass, with or without its adapter `one`."""
    rows = Rows.of(load_adapter(bundle, "one")) if weight else Rows.none()
    return model(tokens(PREFILL + STEPS), model.empty_cache(), rows)[0][0, PREFILL - 1 :].numpy()


def of_session(session: Session, mix: Mapping[str, float]) -> np.ndarray:
    """Of a package: a prefill, then token by token."""
    session.select(mix)
    ids = tokens(PREFILL + STEPS)[0].tolist()
    return np.stack([session.extend(part)[-1] for part in (ids[:PREFILL], *([token] for token in ids[PREFILL:]))])
