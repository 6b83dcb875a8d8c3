"""What the layers of a base read: the bundle's own held-out prompts, run through the base as trained."""

from __future__ import annotations

import numpy as np

from calora_export.bundle import Bundle
from calora_export.errors import RecipeError, mismatch

TOKENS, AT_ONCE = 512, 128  # positions


def require_prompts(bundle: Bundle) -> None:
    """RecipeError for a bundle that has no prompts to calibrate with."""
    if not bundle.manifest.tasks:
        expected = "a bundle with tasks, whose eval/ it reads"
        raise RecipeError(mismatch("recipe", "calibration", expected, "none", 'calibration = "none" rounds to nearest'))


def second_moments(bundle: Bundle) -> dict[str, np.ndarray]:
    """Site → float32 [in], the mean of x² of every feature over TOKENS positions, AT_ONCE at a time."""
    import torch  # seconds to import, like the model

    from calora_export import composing, golden

    composed = composing.compose(bundle, bundle.weight, context=AT_ONCE)
    ids = torch.tensor([golden.stream(bundle, TOKENS)])
    sums: dict[str, torch.Tensor] = {}
    for part in ids.split(composed.shape.context, dim=1):
        for site, x in composed.inputs(part):
            total = x[0].square().sum(0)
            sums[site] = sums[site] + total if site in sums else total
    return {site: (total / ids.shape[1]).numpy() for site, total in sums.items()}
