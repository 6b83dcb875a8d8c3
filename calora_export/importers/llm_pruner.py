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
    """Refused: LLM-Pruner pickles a module, code and all. Its tensors are a base that import peft takes.

    UnsupportedError says how.
    """
    if not checkpoint.is_file():
        hint = "import peft takes a base that was saved as safetensors" if checkpoint.is_dir() else ""
        found = "a directory" if checkpoint.is_dir() else "nothing"
        raise BundleError(mismatch(checkpoint, "checkpoint", "a file", found, hint))
    hint = "save its model.state_dict() as model.safetensors beside the config.json it was pruned from, and import peft"
    expected = "tensors without code"
    raise UnsupportedError(mismatch(checkpoint, "file", expected, "a pickled module", hint))
