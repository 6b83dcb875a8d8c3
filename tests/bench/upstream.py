"""transformers' own ExecuTorch exporter, with torchao's 8da4w: `python -m tests.bench.upstream MODEL LAYERS FILE`.

It costs about as much for each further layer, minutes for all of them, so it lowers a few and the rest is
extrapolated; --upstream-full lowers all.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import astuple
from pathlib import Path

from . import peers
from .process import Run, run

LAYERS = (2, 4)  # lowered to extrapolate from
CONTEXT = 512
GROUP = 32


def installed() -> bool:
    """Whether what it needs besides transformers is there."""
    return peers.has("executorch") and peers.has("torchao")


def lower(model: Path, layers: int, path: Path, log: Path) -> Run:
    """Lower the first `layers` of a model, in a process of its own."""
    path.parent.mkdir(parents=True, exist_ok=True)
    return run([sys.executable, "-m", __name__, model, str(layers), path], log)


def extrapolate(runs: Mapping[int, Run], layers: int) -> Run:
    """What `layers` would cost, on the line through runs of two numbers of layers."""
    (few, low), (more, high) = sorted(runs.items())
    share = (layers - few) / (more - few)
    seconds, cpu_seconds, peak_rss = (a + (b - a) * share for a, b in zip(astuple(low), astuple(high), strict=True))
    return Run(seconds, cpu_seconds, round(peak_rss))


def main(model_path: str, layers: str, path: str) -> None:
    """Write a .pte with forward(input_ids [1, S], cache_position [S]) -> logits [1, S, vocab].

    As optimum-executorch does on top of transformers with `--qlinear 8da4w --qembedding 8w`: one partitioner, dynamic
    shapes. transformers.exporters.ExecutorchExporter partitions alike, but its `export_for_generation` stops at the
    second of its two programs when weights are torchao's.
    """
    import torch
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import EdgeCompileConfig, ExecutorchBackendConfig, to_edge_transform_and_lower
    from executorch.exir.passes import MemoryPlanningPass
    from torchao.quantization import Int8DynamicActivationIntxWeightConfig, IntxWeightOnlyConfig, quantize_
    from torchao.quantization.granularity import PerAxis, PerGroup
    from transformers import AutoModelForCausalLM, GenerationConfig
    from transformers.integrations.executorch import TorchExportableModuleForDecoderOnlyLM

    model = AutoModelForCausalLM.from_pretrained(model_path, num_hidden_layers=int(layers), dtype=torch.float32)
    model.requires_grad_(False).eval()
    model.get_input_embeddings().padding_idx = None  # ExecuTorch's pattern of a quantised embedding has none
    int8 = IntxWeightOnlyConfig(weight_dtype=torch.int8, granularity=PerAxis(0))
    quantize_(model, int8, lambda module, name: isinstance(module, torch.nn.Embedding))
    int4 = Int8DynamicActivationIntxWeightConfig(weight_dtype=torch.int4, weight_granularity=PerGroup(GROUP))
    quantize_(model, int4)
    cache = {"batch_size": 1, "max_cache_len": CONTEXT}
    model.generation_config = GenerationConfig(use_cache=True, cache_implementation="static", cache_config=cache)
    length = torch.export.Dim("length", max=CONTEXT - 1)
    with torch.no_grad():
        program = TorchExportableModuleForDecoderOnlyLM(model).export(
            input_ids=torch.zeros((1, 3), dtype=torch.long),
            cache_position=torch.arange(3),
            dynamic_shapes={"input_ids": {1: length}, "cache_position": {0: length}},
        )
        edge = to_edge_transform_and_lower(
            program,
            partitioner=[XnnpackPartitioner()],
            compile_config=EdgeCompileConfig(_check_ir_validity=False, _skip_dim_order=True),
        )
        planning = MemoryPlanningPass(alloc_graph_input=False)
        options = ExecutorchBackendConfig(memory_planning_pass=planning, do_quant_fusion_and_const_prop=True)
        made = edge.to_executorch(options)
    with Path(path).open("wb") as file:
        made.write_to_file(file)


if __name__ == "__main__":
    main(*sys.argv[1:])
