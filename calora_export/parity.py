"""Numbers that say how far a device is from a reference, and the verdict on them."""

from __future__ import annotations

import numpy as np

from calora_export.recipe import Tolerance
from calora_export.report import ParityRow

SQNR_EXACT_DB = 200.0
"""Stands for identical logits, where the ratio has no value."""


def max_abs(reference: np.ndarray, device: np.ndarray) -> float:
    return float(np.abs(reference.astype(np.float64) - device).max(initial=0.0))


def kl_max(reference: np.ndarray, device: np.ndarray) -> float:
    """Largest KL(reference || device) of the next-token distributions over positions, in nats."""
    p, q = _log_softmax(reference), _log_softmax(device)
    return float((np.exp(p) * (p - q)).sum(-1).max())


def top1_agreement(reference: np.ndarray, device: np.ndarray) -> float:
    return float((reference.argmax(-1) == device.argmax(-1)).mean())


def sqnr_db(reference: np.ndarray, device: np.ndarray) -> float:
    """Signal to noise in dB: 10 log10(Σ reference² / Σ (reference - device)²)."""
    signal = float(np.square(reference, dtype=np.float64).sum())
    noise = float(np.square(reference.astype(np.float64) - device).sum())
    return SQNR_EXACT_DB if noise == 0 else min(SQNR_EXACT_DB, 10 * float(np.log10(max(signal, 1e-30) / noise)))


def effect_ratio(
    reference: np.ndarray, reference_base: np.ndarray, device: np.ndarray, device_base: np.ndarray
) -> float:
    """|device(adapter) - device(base)| / |reference(adapter) - reference(base)|: 0 for an adapter that does nothing."""
    effect = float(np.linalg.norm(reference.astype(np.float64) - reference_base))
    seen = float(np.linalg.norm(device.astype(np.float64) - device_base))
    return seen / effect if effect > 0 else (1.0 if seen == 0 else float("inf"))


def compare(
    case: str, against: str, reference: np.ndarray, device: np.ndarray, effect: float | None, limit: Tolerance
) -> ParityRow:
    """Row 0 of the logits [steps + 1, vocab] is the prefill's, the others the decode steps'."""
    numbers = {
        "prefill_max_abs": max_abs(reference[:1], device[:1]),
        "decode_max_abs": max_abs(reference[1:], device[1:]),
        "kl_max": kl_max(reference, device),
        "top1_agreement": top1_agreement(reference, device),
        "sqnr_db": sqnr_db(reference, device),
        "effect_ratio": effect,
    }
    passed = not failures(numbers, limit)
    return ParityRow(case=case, against="source" if against == "source" else "target", passed=passed, **numbers)


def failures(numbers: dict[str, float | None], limit: Tolerance) -> list[str]:
    """One phrase per number that misses its tolerance; NaN misses every one."""
    low, high = limit.effect_ratio
    bounds = {
        "prefill_max_abs": (0.0, limit.max_abs),
        "decode_max_abs": (0.0, limit.max_abs),
        "kl_max": (-1e-6, limit.kl_max),
        "top1_agreement": (limit.top1_agreement, 1.0),
        "sqnr_db": (limit.sqnr_db, float("inf")),
        "effect_ratio": (low, high),
    }
    missed = []
    for name, (least, most) in bounds.items():
        value = numbers[name]
        if value is not None and not least <= value <= most:
            missed.append(f"{name} {value:.4g} is outside [{least:.4g}, {most:.4g}]")
    return missed


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits.astype(np.float64) - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
