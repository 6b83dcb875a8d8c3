"""RAMoLE (arXiv 2406.16989): LoraRetriever, and an attention over the retrieved LoRAs. Refused: see `run`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from calora_export.errors import UnsupportedError, mismatch
from calora_export.importers import Imported
from calora_export.importers._options import Base, Out

Source = Annotated[Path, typer.Argument(help="What RAMoLE trained.", show_default=False)]


def run(base: Base, source: Source, out: Out) -> Imported:
    """Refused: RAMoLE's trained attention weighs the LoRAs anew in every layer and for every token.

    UnsupportedError says what works instead.
    """
    hint = "import lora-retriever takes the same LoRAs with a retrieval router, whose mixture needs no attention"
    raise UnsupportedError(mismatch(source, "router", "gates per prompt or sentence", "attention per layer", hint))
