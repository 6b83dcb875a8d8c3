"""ShareLoRA (arXiv 2406.10785): LoRA whose A is one matrix for all layers, saved by PEFT once per layer."""

from __future__ import annotations

from calora_export.errors import BundleError, mismatch
from calora_export.importers import Imported, _lowrank
from calora_export.importers._draft import directory_ids, draft
from calora_export.importers._lowrank import LowRank
from calora_export.importers._options import Adapters, Base, Name, Out


def run(base: Base, adapters: Adapters, out: Out, name: Name = None) -> Imported:
    """ShareLoRA adapters, as PEFT directories: the matrix that layers share is stored once.

    BundleError or UnsupportedError in one line.
    """
    ids = directory_ids(adapters)
    with draft(base, out, name, "sharelora") as made:
        for identifier, source in zip(ids, adapters, strict=True):
            adapter = LowRank(_lowrank.read(source, made.linears))
            branches = _lowrank.write(adapter, made.adapter_dir(identifier), made.linears)
            if not any(branch.tied for branch in branches):
                hint = "import peft takes plain LoRA"
                raise BundleError(mismatch(source, "tensors", "a matrix that several layers share", "none", hint))
            made.add(identifier, branches)
    return Imported(out, tuple(ids))
