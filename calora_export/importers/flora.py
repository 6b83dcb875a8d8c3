"""FLoRA (batched, arXiv 2312.05677): an adapter that multiplies the base's weight. Refused: see `run`.

Y = φ(A ∘ ((B ∘ X) W0))        rank 1: a scale per input and one per output; higher ranks: a sum of r such products
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from calora_export.errors import UnsupportedError, mismatch
from calora_export.importers import Imported
from calora_export.importers._options import Base, Out

Source = Annotated[Path, typer.Argument(help="What FLoRA trained.", show_default=False)]
Rank = Annotated[int, typer.Option(min=1, help="The rank as trained.", show_default=False)]


def run(base: Base, source: Source, out: Out, rank: Rank) -> Imported:
    """Refused: FLoRA multiplies the base's weight, and the exported graph only adds to its output.

    UnsupportedError says what works instead.
    """
    hint = "train LoRA, which adds to it"
    found = "a scale per input and output of the base's layer"
    if rank > 1:
        found = f"{rank} products with the base's weight, {rank} passes through it"
    raise UnsupportedError(mismatch(source, "--rank", "a delta that adds to the base's output", found, hint))
