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
EXPORT = """
import sys
from pathlib import Path
from calora_export import pipeline
bundle = Path(sys.argv[1])
package = pipeline.export(bundle, bundle.parent / "package", "onnx-int4")
print(len(package.manifest.represented))
"""


@pytest.mark.heavy
def test_a_base_of_a_billion_weights_exports_in_less_than_4_gb(tmp_path: Path) -> None:
    bundle = tmp_path / "bundle"
    weights = write_base(bundle / "base")
    assert 1.09e9 < weights < 1.11e9
    sites = [*(f"model.layers.*.{site}" for site in SITES), "model.embed_tokens", "lm_head"]
    step = {"scheme": "int4", "sites": sites, "group_size": GROUP, "symmetric": True}
    manifest = {
        "schema_version": 1, "name": "large", "adapters": [], "router": None, "tasks": [], "provenance": {},
        "base": {"fingerprint": TensorIndex.open(bundle / "base").fingerprint(), "compression": [step]},
    }  # fmt: skip
    write_json(bundle / "bundle.json", manifest)
    megabytes, lines = peak_megabytes(EXPORT, bundle)
    assert lines == ["0"]
    print(f"peak {megabytes:.0f} MB")
    assert megabytes < 4096


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
