"""The files of the demo bundle, in the layout of docs/bundle.md."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Literal

import msgspec
import torch
from peft import LoraConfig, TaskType
from safetensors.torch import save_file
from torch import Tensor
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from calora_export.compression import PackedWeight, pack_int32
from calora_export.demo.adapting import adapted_sites
from calora_export.demo.compressing import LINEARS
from calora_export.demo.plan import Plan
from calora_export.demo.results import Provenance
from calora_export.demo.routing import held_out_routed, router_config, router_selection
from calora_export.demo.tasks import TASKS, Task, held_out_examples
from calora_export.manifest import AdapterSpec, BaseSpec, Branch, CompressionStep, Manifest, RouterSpec, TaskSpec
from calora_export.routers import Mlp

SITES = tuple(
    f"model.layers.*.{block}.{name}"
    for block, names in (("self_attn", LINEARS[:4]), ("mlp", LINEARS[4:]))
    for name in names
)


def write_json(path: Path, value: object) -> None:
    """`value` as indented JSON; directories are made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def write_lines(path: Path, values: Iterable[object]) -> None:
    """One line of JSON per value; directories are made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(value) + "\n" for value in values), encoding="utf-8")


def write_base(plan: Plan, model: LlamaForCausalLM, packed: dict[str, PackedWeight], directory: Path) -> None:
    """The compressed base: integers and scales of `packed`, everything else (the norms) dense."""
    parameters = {name: parameter.data for name, parameter in model.named_parameters()}
    dense = {name: values for name, values in parameters.items() if name.removesuffix(".weight") not in packed}
    write_tensors(base_tensors(dense, packed), directory / "model.safetensors")
    config = model.config.to_dict() | {
        "architectures": ["LlamaForCausalLM"],
        "dtype": "float16",
        "quantization_config": quantization_config(plan),
    }
    del config["_name_or_path"]  # a path of this machine
    write_json(directory / "config.json", config)


def write_adapter(plan: Plan, model: LlamaForCausalLM, directory: Path) -> None:
    """One task's CA-LoRA branches in fp16 under PEFT's names."""
    tensors = {}
    for site, adapted in adapted_sites(model).items():
        for branch, values in adapted.branches().items():
            tensors[f"base_model.model.{site}.{branch}.weight"] = values.half()
    write_tensors(tensors, directory / "adapter_model.safetensors")
    config = LoraConfig(
        r=plan.rank,
        lora_alpha=plan.alpha,
        target_modules=list(LINEARS),
        task_type=TaskType.CAUSAL_LM,
        inference_mode=True,
    )
    # PEFT keeps the names in a set, whose order changes from run to run.
    write_json(directory / "adapter_config.json", config.to_dict() | {"target_modules": sorted(LINEARS)})


def write_router(plan: Plan, router: Mlp, tokenizer: PreTrainedTokenizerFast, directory: Path) -> None:
    """The router, its tokenizer and its held-out texts."""
    write_json(directory / "config.json", msgspec.to_builtins(router_config(plan)))
    write_tensors(dict(router.state_dict()), directory / "model.safetensors")
    tokenizer.save_pretrained(directory)
    lines = (
        {"text": item.text, "adapters": [TASKS[c].id for c in item.classes]}
        for items in held_out_routed(plan)
        for item in items
    )
    write_lines(directory / "eval.jsonl", lines)


def write_eval(plan: Plan, task: Task, path: Path) -> None:
    """The task's held-out prompts with their answers."""
    examples = held_out_examples(task, plan.eval_items, plan.seed)
    write_lines(path, (msgspec.to_builtins(example) for example in examples))


def base_tensors(dense: dict[str, Tensor], packed: dict[str, PackedWeight]) -> dict[str, Tensor]:
    """The base's tensors by stored name: `dense` by parameter in fp16, `packed` by module with fp16 scales."""
    tensors = {name: values.half() for name, values in dense.items()}
    for module, weight in packed.items():
        tensors[f"{module}.weight_packed"] = torch.from_numpy(pack_int32(weight.q, weight.bits))
        tensors[f"{module}.weight_scale"] = torch.tensor(weight.scale).half()
        tensors[f"{module}.weight_shape"] = torch.tensor(weight.shape)
    return tensors


def write_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    """A safetensors file; directories are made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path, metadata={"format": "pt"})


def quantization_config(plan: Plan) -> dict[str, object]:
    """What compressed-tensors needs to read the base; lm_head is the embedding's own tensor."""

    def group(target: str, bits: int) -> dict[str, object]:
        weights = {
            "num_bits": bits,
            "type": "int",
            "symmetric": True,
            "strategy": "group",
            "group_size": plan.group_size,
            "dynamic": False,
        }
        return {
            "targets": [target],
            "weights": weights,
            "input_activations": None,
            "output_activations": None,
        }

    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {
            "group_0": group("Linear", plan.linear_bits),
            "group_1": group("Embedding", plan.embedding_bits),
        },
        "ignore": ["lm_head"],
    }


def bundle_manifest(plan: Plan, fingerprint: str, provenance: Provenance) -> Manifest:
    """bundle.json for a base of this fingerprint."""
    rank, alpha, scale = plan.rank, plan.alpha, plan.alpha / plan.rank
    branches = (
        Branch("lora", SITES, rank, alpha, scale, "identity"),
        Branch("recovery", SITES, rank, alpha, scale, "gelu"),
    )
    return Manifest(
        schema_version=1,
        name="calora-demo",
        base=BaseSpec(fingerprint, compression_steps(plan)),
        adapters=tuple(AdapterSpec(task.id, task.id, i, fingerprint, branches) for i, task in enumerate(TASKS)),
        router=RouterSpec(
            kind="classifier",
            granularity="sentence",
            template="{text}",
            max_length=plan.router_max_length,
            truncation="left",
            classes=tuple(task.id for task in TASKS),
            selection=router_selection(plan),
        ),
        tasks=tuple(TaskSpec(task.id, task.id, "exact_match", f"eval/{task.id}.jsonl") for task in TASKS),
        provenance=msgspec.to_builtins(provenance),
    )


def compression_steps(plan: Plan) -> tuple[CompressionStep, ...]:
    """What compressing.compress did, in its order."""
    schemes: dict[int, Literal["int4", "int8"]] = {4: "int4", 8: "int8"}
    return (
        CompressionStep("prune", SITES, pattern="2:4"),
        CompressionStep(schemes[plan.linear_bits], SITES, plan.group_size, True),
        CompressionStep(schemes[plan.embedding_bits], ("model.embed_tokens",), plan.group_size, True),
    )
