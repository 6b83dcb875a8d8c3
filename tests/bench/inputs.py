"""All inputs of one run, below one directory."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

from . import bundle, peers, shapes
from .shapes import ADAPTERS, LATE_ADAPTER, Shape


@dataclass(frozen=True)
class Inputs:
    """Where the inputs lie: the fp32 model, the PEFT adapters, the bundle, and GGUF files for llama.cpp."""

    root: Path

    @property
    def model(self) -> Path:
        return self.root / "model"

    @property
    def bundle(self) -> Path:
        return self.root / "bundle"

    def adapter(self, name: str) -> Path:
        return self.root / "adapters" / name

    def gguf(self, name: str) -> Path:
        return self.root / f"{name}.gguf"


def write_inputs(shape: Shape, inputs: Inputs, corpus: Path) -> None:
    """Write what is missing below `inputs.root`, with fixed seeds; another shape's inputs are replaced.

    Holds the model in memory: call it in a process of its own (`process.apart`).
    """
    stamp = inputs.root / "shape.json"
    wanted = json.dumps(asdict(shape))
    if not stamp.exists() or stamp.read_text(encoding="utf-8") != wanted:
        shutil.rmtree(inputs.root, ignore_errors=True)
        shapes.write_model(shape, inputs.model, corpus)
        for seed, name in enumerate((*ADAPTERS, LATE_ADAPTER)):
            shapes.write_adapter(shape, inputs.adapter(name), seed)
        bundle.write_bundle(shape, inputs.model, inputs.root / "adapters", inputs.bundle)
        stamp.write_text(wanted, encoding="utf-8")
    if peers.has("gguf") and not inputs.gguf(ADAPTERS[-1]).exists():
        for embedding in peers.EMBEDDINGS:
            peers.write_gguf(shape, inputs.model, inputs.gguf(embedding), embedding)
        for name in ADAPTERS:
            peers.write_gguf_adapter(shape, inputs.adapter(name), inputs.gguf(name))
