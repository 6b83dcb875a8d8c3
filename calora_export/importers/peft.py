"""A Hugging Face model directory and PEFT adapter directories, as a bundle."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

from calora_export import adapter_format
from calora_export.errors import BundleError, mismatch
from calora_export.importers import Imported, _lowrank
from calora_export.importers._checkpoint import peft_directory
from calora_export.importers._draft import directory_ids, draft
from calora_export.importers._options import Adapters, Base, Name, Out, TopK
from calora_export.manifest import Branch


def run(base: Base, adapters: Adapters, out: Out, name: Name = None, top_k: TopK = None) -> Imported:
    """PEFT LoRA adapters, with CA-LoRA's recovery branch beside them or not; an adapter's id is its directory's name.

    No router and no tasks; an adapter's class_index is its place. BundleError or UnsupportedError in one line.
    """
    ids = directory_ids(adapters)
    with draft(base, out, name, "peft", top_k) as made:
        for identifier, source in zip(ids, adapters, strict=True):
            made.add(identifier, copy_adapter(source, made.adapter_dir(identifier), made.linears))
    return Imported(out, tuple(ids))


def copy_adapter(source: Path, destination: Path, linears: Mapping[str, tuple[int, int]]) -> tuple[Branch, ...]:
    """Check and copy one adapter's two files; its branches."""
    config = adapter_format.read_config(source, str(source))
    with peft_directory(source) as place:
        tensors = adapter_format.open_weights(place, str(source))
        branches = adapter_format.stored_branches(tensors, config)
        if not branches:
            raise BundleError(mismatch(source / adapter_format.WEIGHTS, "tensors", "lora_A and lora_B", "none"))
        adapter_format.check_tensors(tensors, branches, linears)
        for name in (adapter_format.CONFIG, adapter_format.WEIGHTS):
            shutil.copyfile(place / name, destination / name)
    return _lowrank.collapse(branches, linears)
