from __future__ import annotations

import numpy as np
import pytest

from calora_export import bundle, demo
from calora_export.bundle import Bundle
from calora_export.compression import PackedWeight
from calora_export.demo import requantised
from calora_export.demo.requantised import Row

SITE = "model.layers.0.mlp.down_proj"


@pytest.fixture(scope="module")
def committed() -> Bundle:
    return bundle.load(demo.BUNDLE)


def test_recipes_keep_the_layers_and_quantising_again_does_not(committed: Bundle) -> None:
    trained = committed.weight(SITE).dequantize()
    for name, weight_of in requantised.variants(committed).items():
        assert np.array_equal(weight_of(SITE).dequantize(), trained) == (not name.startswith("quantised again"))


def test_zeros_stay_zero_with_zero_points_too(committed: Bundle) -> None:
    trained = committed.weight(SITE).dequantize()
    assert (trained == 0).mean() >= 0.5
    for weight_of in requantised.variants(committed).values():
        assert (weight_of(SITE).dequantize()[trained == 0] == 0).all()
    shifted = requantised.variants(committed)["quantised again: int4, groups of 32 with zero points"](SITE)
    assert isinstance(shifted, PackedWeight) and shifted.zero is not None and shifted.zero.any()


def test_the_table_counts_points_against_the_first_row() -> None:
    a, b = [True] * 10, [True] * 8 + [False] * 2
    rows = [Row("as trained", 999.0, {"a": a, "b": b}, {"a": 0.1, "b": 0.3}),
            Row("again", 20.5, {"a": [False] * 6 + [True] * 4, "b": b[::-1]}, {"a": 0.2, "b": 0.4})]  # fmt: skip
    lines = list(requantised.table(rows))
    assert lines[2] == "| as trained | all | 100.0 | 80.0 | **90.00** | +0.00 | none | 0.2000 |"
    again = "| again | 20.5 dB | 40.0 | 80.0 | **60.00** | -30.00 | 8, 2 (p 0.11) | 0.3000 |"
    assert lines[3] == again  # 2 · (1 + 10 + 45) / 1024


def test_the_committed_base_scores_what_training_measured(committed: Bundle) -> None:
    """One task of eight, so that it takes seconds: 200 of 200 answers, as results.json has it for CA-LoRA."""
    from msgspec.structs import replace

    only = replace(committed.manifest, tasks=tuple(task for task in committed.manifest.tasks if task.id == "shift"))
    one = Bundle(committed.path, only, committed.weights, committed.embeddings)
    assert requantised.measure(one, "as trained", one.weight).scores == {"shift": 100.0}
