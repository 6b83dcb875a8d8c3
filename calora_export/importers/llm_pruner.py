"""LLM-Pruner (arXiv 2305.11627): a base whose layers kept other numbers of heads and neurons each.

Its pickle is refused, its tensors are read.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from calora_export.errors import BundleError, UnsupportedError, mismatch
from calora_export.importers import Imported
from calora_export.importers._options import Out

Pickle = Annotated[Path, typer.Argument(help="The pytorch_model.bin of LLM-Pruner.", show_default=False)]


def run(checkpoint: Pickle, out: Out) -> Imported:
    """Refused: LLM-Pruner pickles a module, code and all. UnsupportedError says what works instead: its tensors."""
    if not checkpoint.is_file():
        raise BundleError(mismatch(checkpoint, "checkpoint", "a file", "nothing"))
    hint = "save its model.state_dict() as model.safetensors beside the config.json it was pruned from, and import peft"
    expected = "tensors without code"
    raise UnsupportedError(mismatch(checkpoint, "file", expected, "a pickled module", hint))
