"""CA-LoRA (arXiv 2307.07705), in the two forms that its authors' code writes.

A state dict `<site>.lora.{lora_A, lora_B, lora_a1, lora_a2}` of its LLaMA runs, without r, alpha and the activation:

    y = base(x) + s · lora_B(lora_A x) + s · lora_a2(gelu(lora_a1 x))        s = alpha / r

or a directory with the PEFT directories inherit/ and recover/ of its Llama-2 runs, whose recovery is linear: the sum
of the two is one LoRA, exactly.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import typer

from calora_export.errors import BundleError, mismatch
from calora_export.importers import Imported, _checkpoint, _lowrank
from calora_export.importers._draft import adapter_id, draft
from calora_export.importers._lowrank import Act, LowRank, Pair
from calora_export.importers._options import Base, Name, Out, TopK, require_positive

Sources = Annotated[
    list[Path], typer.Argument(help=".pt files, or directories with inherit/ and recover/.", show_default=False)
]
PtAlpha = Annotated[float | None, typer.Option(help="lora_alpha of the .pt files: the scale is alpha / r.")]
PtAct = Annotated[Act, typer.Option(help="Between lora_a1 and lora_a2 of the .pt files.")]

MARKER = ".lora.lora_"
_KINDS = ({"A", "B"}, {"a1", "a2"}, {"A", "B", "a1", "a2"})


def run(
    base: Base,
    sources: Sources,
    out: Out,
    alpha: PtAlpha = None,
    act: PtAct = "gelu",
    name: Name = None,
    top_k: TopK = None,
) -> Imported:
    """CA-LoRA checkpoints: .pt files with lora_A, lora_B, lora_a1, lora_a2, or directories with inherit/ and recover/.

    An adapter's id is its file's name without suffix, or its directory's. BundleError in one line.
    """
    if alpha is not None:
        require_positive("--alpha", alpha)
    ids: list[str] = []
    for path in sources:
        if not path.is_dir() and alpha is None:
            raise BundleError(mismatch(path, "--alpha", "lora_alpha of the training, which the file lacks", "nothing"))
        ids.append(adapter_id(path, ids))
    with draft(base, out, name, "ca-lora", top_k) as made:
        for identifier, path in zip(ids, sources, strict=True):
            adapter = _directory(path, made.linears) if path.is_dir() else _file(path, made.linears, alpha or 0.0, act)
            made.add(identifier, _lowrank.write(adapter, made.adapter_dir(identifier), made.linears))
    return Imported(out, tuple(ids))


def _file(path: Path, linears: Mapping[str, tuple[int, int]], alpha: float, act: Act) -> LowRank:
    checkpoint = _checkpoint.read(path)
    lora: dict[str, Pair] = {}
    recovery: dict[str, Pair] = {}
    ranks: dict[str, int] = {}
    for site, parts in checkpoint.sites(MARKER).items():
        rows, columns = checkpoint.site_shape(site, linears, f"{site}{MARKER}{min(parts)}")
        checkpoint.require(site, MARKER, parts, next((kind for kind in _KINDS if parts <= kind), _KINDS[-1]))
        for (down, up), branch in ((("A", "B"), lora), (("a1", "a2"), recovery)):
            if down in parts:
                r = ranks.setdefault(site, (checkpoint.shape(f"{site}{MARKER}{down}") or (0,))[0])
                pair = (
                    checkpoint.take(f"{site}{MARKER}{down}", (r, columns)),
                    checkpoint.take(f"{site}{MARKER}{up}", (rows, r)),
                )
                branch[site] = Pair(*pair, alpha / r)
    return LowRank(lora, recovery, act)


def _directory(path: Path, linears: Mapping[str, tuple[int, int]]) -> LowRank:
    parts = [path / part for part in ("inherit", "recover")]
    for part in parts:
        if not part.is_dir():
            hint = "import peft takes a single PEFT directory"
            raise BundleError(mismatch(path, part.name, "a PEFT directory", "nothing", hint))
    return LowRank(_lowrank.add([_lowrank.read(part, linears) for part in parts]))
