"""A base of TinyLlama's shape, 1.1 billion random int4 weights, exported on a machine with little memory."""

from __future__ import annotations

import json
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from calora_export.tensors import TensorIndex
from tests.bundles import write_json, write_tokenizer
from tests.memory import peak_megabytes

HIDDEN, LAYERS, HEADS, KV_HEADS, MLP, VOCAB, GROUP = 2048, 22, 32, 4, 5632, 32000, 32
KV = HIDDEN // HEADS * KV_HEADS
SITES = {
    "self_attn.q_proj": (HIDDEN, HIDDEN),
    "self_attn.k_proj": (KV, HIDDEN),
    "self_attn.v_proj": (KV, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HIDDEN),
    "mlp.gate_proj": (MLP, HIDDEN),
    "mlp.up_proj": (MLP, HIDDEN),
    "mlp.down_proj": (HIDDEN, MLP),
}
START = """
import sys
from pathlib import Path
from calora_export import inspection, pipeline
bundle = Path(sys.argv[1])
package = bundle.parent / "package"
"""
EXPORT = 'print(len(pipeline.export(bundle, package, "onnx-int4").manifest.represented))'
INSPECT = "print(inspection.inspect(bundle).base.parameters, inspection.inspect(package).slots)"
ADD = 'print(pipeline.add_adapter(package, bundle.parent / "late").id)'


@pytest.mark.heavy
def test_a_base_of_a_billion_weights_exports_in_less_than_4_gb(tmp_path: Path) -> None:
    """And no weight of it is read to look at it, or to add an adapter."""
    bundle = tmp_path / "bundle"
    weights = write_base(bundle / "base")
    assert 1.09e9 < weights < 1.11e9
    fingerprint = TensorIndex.open(bundle / "base").fingerprint()
    sites = [*(f"model.layers.*.{site}" for site in SITES), "model.embed_tokens", "lm_head"]
    step = {"scheme": "int4", "sites": sites, "group_size": GROUP, "symmetric": True}
    for directory in (bundle / "adapters" / "first", tmp_path / "late"):
        write_adapter(directory, fingerprint)
    where = {"role": "lora", "act": "identity", "sites": ["model.layers.*.self_attn.q_proj"]}
    lora = where | {"r": 8, "alpha": 8, "scale": 1.0}
    first = {"id": "first", "task": "first", "class_index": 0, "base_fingerprint": fingerprint, "branches": [lora]}
    manifest = {
        "schema_version": 1, "name": "large", "adapters": [first], "router": None, "tasks": [], "provenance": {},
        "base": {"fingerprint": fingerprint, "compression": [step]},
    }  # fmt: skip
    write_json(bundle / "bundle.json", manifest)
    nothing, _ = peak_megabytes(START, bundle)
    peaks = {}
    for name, code, said in (
        ("export", EXPORT, "0"),
        ("inspect", INSPECT, f"{weights + (2 * LAYERS + 1) * HIDDEN} {LAYERS}"),
        ("add-adapter", ADD, "late"),
    ):
        peaks[name], lines = peak_megabytes(START + code, bundle)
        assert lines == [said]
    print(f"weights: {weights / 1e9:.2f} billion, {(weights * 4.5) / 8e6:.0f} MB packed; imports: {nothing:.0f} MB")
    print("peak: " + ", ".join(f"{name} {megabytes:.0f} MB" for name, megabytes in peaks.items()))
    assert peaks["export"] < 4096
    assert max(peaks["inspect"], peaks["add-adapter"]) < nothing + 100


def write_adapter(directory: Path, fingerprint: str) -> None:
    """A LoRA of rank 8 on every q_proj."""
    directory.mkdir(parents=True)
    config = {"peft_type": "LORA", "r": 8, "lora_alpha": 8, "target_modules": ["q_proj"]}
    write_json(directory / "adapter_config.json", config | {"base_fingerprint": fingerprint})
    rng = np.random.default_rng(1)
    names = [f"base_model.model.model.layers.{layer}.self_attn.q_proj" for layer in range(LAYERS)]
    shapes = {"lora_A": (8, HIDDEN), "lora_B": (HIDDEN, 8)}
    tensors = {f"{name}.{part}.weight": shape for name in names for part, shape in shapes.items()}
    made = {name: rng.standard_normal(shape, np.float32) for name, shape in tensors.items()}
    save_file(made, directory / "adapter_model.safetensors")


def write_base(directory: Path) -> int:
    """Random codes and scales; returns how many weights there are."""
    directory.mkdir(parents=True)
    quantization = {"quant_method": "compressed-tensors", "format": "pack-quantized"}
    config = {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": VOCAB, "hidden_size": HIDDEN,
        "num_hidden_layers": LAYERS, "num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS,
        "intermediate_size": MLP, "max_position_embeddings": 2048, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
        "hidden_act": "silu", "tie_word_embeddings": False, "eos_token_id": 0, "quantization_config": quantization,
    }  # fmt: skip
    (directory / "config.json").write_text(json.dumps(config))
    write_tokenizer(directory)
    rng, norm = np.random.default_rng(0), np.ones(HIDDEN, ml_dtypes.bfloat16)
    shapes = {"model.embed_tokens": (VOCAB, HIDDEN), "lm_head": (VOCAB, HIDDEN)}
    tensors = {"model.norm.weight": norm}
    for layer in range(LAYERS):
        shapes |= {f"model.layers.{layer}.{site}": shape for site, shape in SITES.items()}
        for name in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"model.layers.{layer}.{name}.weight"] = norm
    for module, (rows, columns) in shapes.items():
        words = rng.integers(-(2**31), 2**31, (rows, columns // 8), dtype=np.int32)
        tensors[f"{module}.weight_packed"] = words
        tensors[f"{module}.weight_scale"] = np.full((rows, columns // GROUP), 0.005, ml_dtypes.bfloat16)
        tensors[f"{module}.weight_shape"] = np.array([rows, columns], np.int64)
    save_file(tensors, directory / "model.safetensors")
    return sum(rows * columns for rows, columns in shapes.values())
