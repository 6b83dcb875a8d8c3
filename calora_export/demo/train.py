"""Trains the demo bundle from nothing on two CPU cores: `python -m calora_export.demo.train OUT`.

One straight line, each step with its own seed: tokenizer → base → compressed base → per task a LoRA on the
uncompressed base, the same one moved to the compressed base, a LoRA trained there and a CA-LoRA trained
there → router → bundle and results. Only the CA-LoRA adapters are bundled; the others are for comparison.
"""

from __future__ import annotations

import logging
import multiprocessing
import platform
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from importlib import metadata
from pathlib import Path

import msgspec
import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils.logging import disable_progress_bar

from calora_export.demo.adapting import adapt, inherit_lora, train_adapter
from calora_export.demo.compressing import compress
from calora_export.demo.plan import Plan
from calora_export.demo.pretraining import train_base
from calora_export.demo.results import Provenance, Results, Seconds, TaskScores
from calora_export.demo.routing import score_router, train_router
from calora_export.demo.table import table
from calora_export.demo.tasks import TASKS, held_out_examples
from calora_export.demo.tokenizing import build_tokenizer
from calora_export.demo.training import exact_match
from calora_export.demo.writing import (
    bundle_manifest,
    write_adapter,
    write_base,
    write_eval,
    write_json,
    write_router,
)
from calora_export.manifest import write_manifest
from calora_export.tensors import TensorIndex

CORES = 2


def prepare_process() -> None:
    """One thread each: two small trainings side by side beat one on two threads, and repeat exactly."""
    torch.set_num_threads(1)
    disable_progress_bar()
    logging.basicConfig(format="%(message)s")
    logging.getLogger("calora_export.demo").setLevel(logging.INFO)


def train_demo(plan: Plan, out: Path) -> Results:
    """Train everything, write `out`/bundle and `out`/results.json, and return the latter."""
    prepare_process()
    start = time.perf_counter()
    source, bundle = out / "uncompressed", out / "bundle"

    tokenizer = build_tokenizer(plan)
    base = train_base(plan, tokenizer)
    base.save_pretrained(source)
    tokenizer.save_pretrained(source)
    compressed, packed = compress(plan, base)
    write_base(plan, compressed, packed, bundle / "base")
    tokenizer.save_pretrained(bundle / "base")
    base_seconds = time.perf_counter() - start

    with ProcessPoolExecutor(CORES, multiprocessing.get_context("spawn"), prepare_process) as pool:
        task_runs = [
            pool.submit(train_task, plan, index, source, bundle / "adapters" / task.id)
            for index, task in enumerate(TASKS)
        ]
        router_run = pool.submit(train_router, plan, tokenizer)
        task_scores, router = [run.result() for run in task_runs], router_run.result()

    write_router(plan, router, tokenizer, bundle / "router")
    for task in TASKS:
        write_eval(plan, task, bundle / "eval" / f"{task.id}.jsonl")
    made = Provenance(plan, CORES, Seconds(round(base_seconds), round(time.perf_counter() - start)), versions())
    write_manifest(bundle, bundle_manifest(plan, TensorIndex.open(bundle / "base").fingerprint(), made))
    parameters = sum(parameter.numel() for parameter in base.parameters())
    results = Results(parameters, tuple(task_scores), score_router(plan, router, tokenizer), made)
    write_json(out / "results.json", msgspec.to_builtins(results))
    return results


def train_task(plan: Plan, index: int, source: Path, adapter: Path) -> TaskScores:
    """Train and compare the adapters of one task for the uncompressed base in `source`; write its CA-LoRA."""
    torch.manual_seed(plan.seed + index)
    task = TASKS[index]
    tokenizer = PreTrainedTokenizerFast.from_pretrained(source)
    base = LlamaForCausalLM.from_pretrained(source, dtype=torch.float32).requires_grad_(False)
    compressed, _ = compress(plan, base)
    items = held_out_examples(task, plan.eval_items, plan.seed)

    lora = adapt(base, plan)
    train_adapter(plan, task, tokenizer, lora, "LoRA on the uncompressed base")
    moved = adapt(compressed, plan)
    inherit_lora(moved, lora)
    lora_compressed = adapt(compressed, plan)
    train_adapter(plan, task, tokenizer, lora_compressed, "LoRA on the compressed base")
    calora = adapt(compressed, plan, recovery=True)
    inherit_lora(calora, lora)
    train_adapter(plan, task, tokenizer, calora, "CA-LoRA on the compressed base", teacher=lora.eval())
    write_adapter(plan, calora, adapter)
    models = (base, lora, moved, lora_compressed, calora)
    return TaskScores(task.id, *(exact_match(model, tokenizer, items) for model in models))


def versions() -> dict[str, str]:
    """Python's version and those of the packages that the numbers depend on."""
    packages = ("torch", "transformers", "peft", "tokenizers", "safetensors")
    return {"python": platform.python_version()} | {name: metadata.version(name) for name in packages}


def main() -> None:
    if len(sys.argv) != 2:
        sys.exit("usage: python -m calora_export.demo.train OUT")
    print(table(train_demo(Plan(), Path(sys.argv[1]))))


if __name__ == "__main__":
    main()
