"""Chain of LoRA (arXiv 2401.04151) and XGBLoRA (arXiv 2410.19694): one LoRA after the other on the same layers.

ΔW = Σ_i s_i B_i A_i        exact as one LoRA whose ranks are theirs side by side
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from calora_export.importers import Imported, _lowrank
from calora_export.importers._draft import directory_ids, draft
from calora_export.importers._lowrank import LowRank
from calora_export.importers._options import Base, Name, Out
from calora_export.manifest import check_id

Links = Annotated[list[Path], typer.Argument(help="The chain's PEFT adapter directories.", show_default=False)]
Id = Annotated[str, typer.Option("--id", help="The id of the one adapter that they become.", show_default=False)]


def run(base: Base, links: Links, out: Out, identifier: Id, name: Name = None) -> Imported:
    """Chain of LoRA, XGBLoRA: the LoRAs of a chain or of boosting rounds, as PEFT directories; one adapter, their sum.

    BundleError or UnsupportedError in one line: so for a chain that was merged into its model.
    """
    check_id(identifier, "--id", "id")
    directory_ids(links)
    with draft(base, out, name, "chain-of-lora") as made:
        adapter = LowRank(_lowrank.add([_lowrank.read(link, made.linears) for link in links]))
        made.add(identifier, _lowrank.write(adapter, made.adapter_dir(identifier), made.linears))
    return Imported(out, (identifier,))
