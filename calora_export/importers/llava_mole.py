"""LLaVA-MoLE (arXiv 2401.16160): expert LoRAs on the MLP and a router per token and layer. Refused: see `run`."""

from __future__ import annotations

from calora_export.errors import UnsupportedError, mismatch
from calora_export.importers import Imported, _checkpoint
from calora_export.importers._options import Base, Checkpoint, Out

EXPERTS = ".mlp.moe_"


def run(base: Base, checkpoint: Checkpoint, out: Out) -> Imported:
    """Refused: LLaVA-MoLE chooses expert LoRAs per token inside every layer, which the exported graph cannot.

    UnsupportedError says what works instead; BundleError when `checkpoint` has no experts.
    """
    state = _checkpoint.read(checkpoint)
    found = next((key for key in state.tensors if EXPERTS in key), None)
    if found is None:
        raise state.wrong("tensors", "<layer>.mlp.moe_gate, moe_up, moe_down and router", "none")
    hint = "train one LoRA per task, and let a router choose per prompt or sentence"
    raise UnsupportedError(mismatch(checkpoint, found, "gates per prompt or sentence", "a router per token", hint))
