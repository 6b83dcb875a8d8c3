"""Parity numbers against torch's own functions; nothing that is not a number may pass."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from calora_export import parity
from calora_export.recipe import Tolerance

LOOSE = Tolerance(max_abs=1e9, kl_max=1e9, top1_agreement=0.0, sqnr_db=-1e9, effect_ratio=(0.0, 1e9))
TIGHT = Tolerance(max_abs=0.1, kl_max=0.01, top1_agreement=0.9, sqnr_db=30.0, effect_ratio=(0.9, 1.1))
GOOD: dict[str, float | None] = {
    "prefill_max_abs": 0.05,
    "decode_max_abs": 0.05,
    "kl_max": 0.001,
    "top1_agreement": 0.95,
    "sqnr_db": 40.0,
    "effect_ratio": 1.0,
}

logits = st.integers(0, 2**32 - 1).flatmap(
    lambda seed: st.tuples(
        arrays.arrays(np.float32, (3, 7), elements=st.floats(-30, 30, width=32)), st.just(seed)
    )
)


def noisy(reference: np.ndarray, seed: int, size: float = 0.5) -> np.ndarray:
    noise = np.random.default_rng(seed).standard_normal(reference.shape, np.float32)
    return reference + np.float32(size) * noise


@settings(max_examples=50, deadline=None)
@given(logits)
def test_kl_is_torchs(drawn: tuple[np.ndarray, int]) -> None:
    reference, seed = drawn
    device = noisy(reference, seed)
    p, q = (torch.from_numpy(part).double().log_softmax(-1) for part in (reference, device))
    per_position = torch.nn.functional.kl_div(q, p, reduction="none", log_target=True).sum(-1)
    assert parity.kl_max(reference, device) == pytest.approx(float(per_position.max()), rel=1e-6, abs=1e-9)


@settings(max_examples=50, deadline=None)
@given(logits)
def test_max_abs_and_top1_are_torchs(drawn: tuple[np.ndarray, int]) -> None:
    reference, seed = drawn
    device = noisy(reference, seed)
    one, other = torch.from_numpy(reference), torch.from_numpy(device)
    assert parity.max_abs(reference, device) == pytest.approx(float((one - other).abs().max()), rel=1e-5)
    equal = one.argmax(-1).eq(other.argmax(-1)).double().mean()
    assert parity.top1_agreement(reference, device) == pytest.approx(float(equal))


def test_kl_takes_the_worst_position_and_the_reference_as_truth() -> None:
    reference = np.log(np.array([[0.5, 0.5], [0.9, 0.1]], np.float32))
    device = np.log(np.array([[0.5, 0.5], [0.5, 0.5]], np.float32))
    by_hand = 0.9 * math.log(0.9 / 0.5) + 0.1 * math.log(0.1 / 0.5)
    assert parity.kl_max(reference, device) == pytest.approx(by_hand, rel=1e-5)


def test_kl_survives_large_logits() -> None:
    large = np.array([[1e4, 0.0, -1e4]], np.float32)
    assert parity.kl_max(large, large) == 0.0
    assert parity.kl_max(large, large[:, ::-1]) == pytest.approx(2e4)


@pytest.mark.parametrize("decibel", [0, 6, 20, 40, 80])
def test_sqnr_of_noise_of_known_power(decibel: int) -> None:
    """A tenth of the amplitude is 20 dB, whatever the scale."""
    signal = np.random.default_rng(0).standard_normal((5, 100)).astype(np.float32) * 7
    noisy_signal = signal.astype(np.float64) * (1 + 10 ** (-decibel / 20))
    assert parity.sqnr_db(signal, noisy_signal) == pytest.approx(decibel, abs=1e-4)


def test_sqnr_of_the_same_and_of_nothing() -> None:
    ones = np.ones((2, 3), np.float32)
    assert parity.sqnr_db(ones, ones) == parity.SQNR_EXACT_DB
    assert parity.sqnr_db(0 * ones, ones) < -200


@settings(max_examples=50, deadline=None)
@given(st.floats(0, 5), st.integers(0, 1000))
def test_effect_ratio_is_the_strength_of_the_adapter(strength: float, seed: int) -> None:
    """An adapter that is `strength` times as strong shows that ratio, whatever the base's own error."""
    rng = np.random.default_rng(seed)
    base, effect, error = (rng.standard_normal((4, 9)) for _ in range(3))
    ratio = parity.effect_ratio(base + effect, base, base + error + strength * effect, base + error)
    assert ratio == pytest.approx(strength, rel=1e-9, abs=1e-9)


def test_effect_ratio_without_any_effect() -> None:
    zero, one = np.zeros((1, 2)), np.ones((1, 2))
    assert parity.effect_ratio(zero, zero, one, one) == 1.0
    assert parity.effect_ratio(zero, zero, one, zero) == math.inf


def test_the_first_row_is_the_prefill() -> None:
    reference = np.zeros((3, 4), np.float32)
    device = reference.copy()
    device[0, 1], device[2, 3] = 0.25, -0.5
    row = parity.compare("base", "source", reference, device, None, LOOSE)
    assert (row.prefill_max_abs, row.decode_max_abs) == (0.25, 0.5)
    assert (row.case, row.against, row.effect_ratio, row.passed) == ("base", "source", None, True)


def test_good_numbers_pass() -> None:
    assert parity.failures(GOOD, TIGHT) == []
    assert parity.failures(GOOD | {"effect_ratio": None}, TIGHT) == []


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("prefill_max_abs", 0.11),
        ("decode_max_abs", 0.11),
        ("kl_max", 0.011),
        ("kl_max", -0.1),
        ("top1_agreement", 0.89),
        ("sqnr_db", 29.9),
        ("effect_ratio", 0.89),
        ("effect_ratio", 1.11),
        ("effect_ratio", math.inf),
        ("decode_max_abs", math.inf),
        *((name, math.nan) for name in GOOD),
    ],
)
def test_each_number_alone_can_fail(name: str, value: float) -> None:
    (line,) = parity.failures(GOOD | {name: value}, TIGHT)
    assert line.startswith(f"{name} ") and "is outside [" in line


@pytest.mark.parametrize("side", ["reference", "device"])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("row", [0, 2])
def test_one_bad_logit_fails_even_the_loosest_tolerance(side: str, bad: float, row: int) -> None:
    pair = {
        "reference": np.ones((3, 5), np.float32) * np.arange(5),
        "device": np.ones((3, 5), np.float32) * np.arange(5),
    }
    pair[side][row, 2] = bad
    with np.errstate(invalid="ignore", divide="ignore"):
        made = parity.compare("base", "source", pair["reference"], pair["device"], None, LOOSE)
    assert not made.passed
