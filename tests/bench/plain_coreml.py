"""coremltools by itself: `python -m tests.bench.plain_coreml MODEL FILE`. No slots, no adapters, no KV cache."""

from __future__ import annotations

import sys
from pathlib import Path

from . import peers
from .process import Run, run

CONTEXT = 512
GROUP = 32


def installed() -> bool:
    return peers.has("coremltools")


def convert(model: Path, path: Path, log: Path) -> Run:
    """Convert a model, in a process of its own."""
    path.parent.mkdir(parents=True, exist_ok=True)
    return run([sys.executable, "-m", __name__, model, path], log)


def main(model_path: str, path: str) -> None:
    """Write a .mlpackage with input_ids [1, S] -> logits [1, 1, vocab], int4 in blocks of 32, as its guide says."""
    import coremltools as ct
    import coremltools.optimize.coreml as cto
    import torch
    from transformers import AutoModelForCausalLM

    class Last(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = AutoModelForCausalLM.from_pretrained(
                model_path, dtype=torch.float32, attn_implementation="eager"
            )

        def forward(self, input_ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
            return self.model(input_ids, attention_mask=mask, use_cache=False, logits_to_keep=1).logits

    module = Last().requires_grad_(False).eval()
    length = torch.export.Dim("length", min=2, max=CONTEXT)
    example = (torch.zeros((1, 8), dtype=torch.int32), torch.zeros((1, 1, 8, 8)))
    shapes = {"input_ids": {1: length}, "mask": {2: length, 3: length}}
    with torch.no_grad():
        program = torch.export.export(module, example, dynamic_shapes=shapes, strict=False).run_decompositions({})
    made = ct.convert(program, minimum_deployment_target=ct.target.iOS18, skip_model_load=True)
    int4 = cto.OpLinearQuantizerConfig("linear_symmetric", dtype="int4", granularity="per_block", block_size=GROUP)
    cto.linear_quantize_weights(made, cto.OptimizationConfig(global_config=int4)).save(path)


if __name__ == "__main__":
    main(*sys.argv[1:])
