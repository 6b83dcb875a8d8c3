"""The parameters that importers have in common, as the command line shows them."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated

import typer

from calora_export.errors import BundleError, mismatch
from calora_export.manifest import check_id

Base = Annotated[Path, typer.Argument(help="A Hugging Face model directory.", show_default=False)]
Adapters = Annotated[list[Path], typer.Argument(help="PEFT adapter directories.", show_default=False)]
Checkpoint = Annotated[Path, typer.Argument(help="A state dict: .pt, .pth, .bin or .safetensors.", show_default=False)]
Out = Annotated[Path, typer.Option("-o", "--out", metavar="BUNDLE", show_default=False)]
TopK = Annotated[int | None, typer.Option(min=1, help="How many experts of a MoEfied base compute for a token.")]
Name = Annotated[str | None, typer.Option(help="The bundle's name; its directory's name by default.")]
Alpha = Annotated[float, typer.Option(help="lora_alpha as trained: the scale is alpha / r.", show_default=False)]
Rslora = Annotated[bool, typer.Option("--rslora", help="It was trained with the scale alpha / sqrt(r).")]
Tasks = Annotated[
    str, typer.Option(help="The tasks' names in the order of their indices: one,two,…", show_default=False)
]


def require_positive(option: str, value: float) -> None:
    """BundleError unless the number of an option is finite and above 0."""
    if not 0 < value < math.inf:
        raise BundleError(mismatch(option, "value", "a number above 0", f"{value:g}"))


def task_names(tasks: str) -> tuple[str, ...]:
    """`one,two` → (one, two); BundleError unless each can be an id of its own."""
    names = tuple(name.strip() for name in tasks.split(","))
    for index, name in enumerate(names):
        check_id(name, "--tasks", f"[{index}]")
        if name in names[:index]:
            raise BundleError(mismatch("--tasks", f"[{index}]", "a name of its own", f"{name} again"))
    return names
