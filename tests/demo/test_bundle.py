"""The committed demo bundle: whole, small, compressed as it says, and made by the code beside it."""

from __future__ import annotations

import json
from pathlib import Path

import ml_dtypes
import msgspec
import numpy as np
import pytest
import torch

from calora_export import bundle, demo
from calora_export.bundle import Bundle
from calora_export.compression import PackedWeight
from calora_export.demo.plan import Plan
from calora_export.demo.results import Provenance
from calora_export.demo.routing import held_out_routed
from calora_export.demo.tasks import TASKS, Task, held_out_examples
from calora_export.demo.tokenizing import BOS_ID, EOS_ID, PAD_ID
from calora_export.demo.writing import base_tensors, bundle_manifest, quantization_config, write_tensors
from calora_export.tensors import TensorIndex


@pytest.fixture(scope="module")
def committed() -> Bundle:
    return bundle.load(demo.BUNDLE, deep=True)


@pytest.fixture(scope="module")
def packed(committed: Bundle) -> dict[str, PackedWeight]:
    """Everything of the base that is stored as integers, by module."""
    weights = {name: committed.weight(name) for name in committed.linears}
    return {name: weight for name, weight in weights.items() if isinstance(weight, PackedWeight)}


def made(committed: Bundle) -> Provenance:
    return msgspec.convert(committed.manifest.provenance, Provenance)


def test_it_is_small_and_has_eight_tasks(committed: Bundle) -> None:
    assert sum(file.stat().st_size for file in demo.BUNDLE.rglob("*") if file.is_file()) <= 8_000_000
    assert len(committed.manifest.tasks) == len(committed.manifest.adapters) >= 8
    assert {task.adapter for task in committed.manifest.tasks} == {task.id for task in TASKS}


def test_every_linear_is_int4_and_2_4_sparse(committed: Bundle, packed: dict[str, PackedWeight]) -> None:
    assert len(committed.adaptable) == 4 * 7
    for name in committed.adaptable:
        assert packed[name].bits == 4, name
        assert np.count_nonzero(packed[name].q.reshape(-1, 4), axis=1).max() == 2, name


def test_scales_are_the_same_numbers_in_fp16_and_bf16(committed: Bundle, packed: dict[str, PackedWeight]) -> None:
    assert set(packed) == set(committed.linears)
    for name, weight in packed.items():
        scale = weight.scale.astype(np.float32)
        assert scale.min() >= np.finfo(np.float16).smallest_normal, name
        for dtype in (np.float16, ml_dtypes.bfloat16):
            np.testing.assert_array_equal(scale.astype(dtype).astype(np.float32), scale, name)


def test_writing_the_base_again_keeps_its_fingerprint(
    committed: Bundle, packed: dict[str, PackedWeight], tmp_path: Path
) -> None:
    norms = [name for name in committed.base.names() if name.endswith(".weight")]
    dense = {name: torch.tensor(committed.base.float32(name)) for name in norms}
    assert len(dense) == 4 * 2 + 1
    write_tensors(base_tensors(dense, packed), tmp_path / "base/model.safetensors")
    assert TensorIndex.open(tmp_path / "base").fingerprint() == committed.manifest.base.fingerprint


def test_the_manifest_is_what_the_code_writes(committed: Bundle) -> None:
    assert made(committed).plan == Plan()
    written = bundle_manifest(Plan(), committed.manifest.base.fingerprint, made(committed))
    assert json.loads(msgspec.json.encode(written)) == json.loads((demo.BUNDLE / "bundle.json").read_bytes())


def test_the_base_says_how_it_is_quantised_and_which_tokens_are_special() -> None:
    config = json.loads((demo.BUNDLE / "base/config.json").read_text(encoding="utf-8"))
    assert config["quantization_config"] == quantization_config(Plan())
    assert (config["bos_token_id"], config["eos_token_id"], config["pad_token_id"]) == (BOS_ID, EOS_ID, PAD_ID)
    tokenizer = json.loads((demo.BUNDLE / "base/tokenizer.json").read_text(encoding="utf-8"))
    special = {token["content"]: token["id"] for token in tokenizer["added_tokens"]}
    assert special == {"<|bos|>": BOS_ID, "<|eos|>": EOS_ID, "<|pad|>": PAD_ID}


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.id)
def test_the_evaluation_prompts_are_drawn_again(task: Task) -> None:
    lines = (demo.BUNDLE / f"eval/{task.id}.jsonl").read_text(encoding="utf-8").splitlines()
    drawn = held_out_examples(task, Plan().eval_items, Plan().seed)
    assert [json.loads(line) for line in lines] == [msgspec.to_builtins(example) for example in drawn]


def test_the_router_texts_are_drawn_again() -> None:
    lines = (demo.BUNDLE / "router/eval.jsonl").read_text(encoding="utf-8").splitlines()
    singles, composites = held_out_routed(Plan())
    drawn = [{"text": item.text, "adapters": [TASKS[c].id for c in item.classes]} for item in singles + composites]
    assert [json.loads(line) for line in lines] == drawn
