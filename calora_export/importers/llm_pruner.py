"""LLM-Pruner (arXiv 2305.11627): a base whose layers kept other numbers of heads and neurons each. Refused."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from calora_export.errors import BundleError, UnsupportedError, mismatch
from calora_export.importers import Imported
from calora_export.importers._options import Out

Pickle = Annotated[Path, typer.Argument(help="The pytorch_model.bin of LLM-Pruner.", show_default=False)]


def run(checkpoint: Pickle, out: Out) -> Imported:
    """Refused: LLM-Pruner pickles a module whose layers have widths of their own, which no config.json can state.

    UnsupportedError says what works instead.
    """
    if not checkpoint.is_file():
        raise BundleError(mismatch(checkpoint, "checkpoint", "a file", "nothing"))
    hint = "prune whole layers or to one width for all, save_pretrained it as safetensors, and use import peft"
    expected = "a state dict of a model whose config.json gives every width"
    raise UnsupportedError(mismatch(checkpoint, "file", expected, "a pickled module with widths per layer", hint))
