"""LoRA-Flow (arXiv 2402.11455): a gate per layer weighs two LoRAs anew for every token. Refused: see `run`."""

from __future__ import annotations

from calora_export.errors import UnsupportedError, mismatch
from calora_export.importers import Imported, _checkpoint
from calora_export.importers._draft import directory_ids
from calora_export.importers._options import Adapters, Base, Checkpoint, Out

GATE = ".lora_fusion_gate.weight"


def run(base: Base, gate: Checkpoint, adapters: Adapters, out: Out) -> Imported:
    """Refused: LoRA-Flow's gates weigh LoRAs per token and layer, which the exported graph cannot.

    UnsupportedError says what works instead; BundleError when `gate` is no gate of LoRA-Flow.
    """
    directory_ids(adapters)
    state = _checkpoint.read(gate)
    found = next((key for key in state.tensors if key.endswith(GATE)), None)
    if found is None:
        raise state.wrong("tensors", f"encoder.layers.<i>{GATE}", "none")
    names = ",".join(f"{path.name}=0.5" for path in adapters)
    hint = f"import peft takes the LoRAs, and run --adapter {names} mixes them with fixed weights"
    raise UnsupportedError(mismatch(gate, found, "gates per prompt or sentence", "a gate per token and layer", hint))
