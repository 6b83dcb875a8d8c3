"""A small valid bundle with random weights, written with numpy alone; its base is a LlamaForCausalLM."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

from calora_export.compression import pack_int32, quantize_symmetric
from calora_export.tensors import TensorIndex

HIDDEN, LAYERS, HEADS, KV_HEADS, MLP, VOCAB = 64, 2, 4, 2, 128, 256
GROUP = 32
LINEARS = {
    "self_attn.q_proj": (HIDDEN, HIDDEN),
    "self_attn.k_proj": (HIDDEN // HEADS * KV_HEADS, HIDDEN),
    "self_attn.v_proj": (HIDDEN // HEADS * KV_HEADS, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HIDDEN),
    "mlp.gate_proj": (MLP, HIDDEN),
    "mlp.up_proj": (MLP, HIDDEN),
    "mlp.down_proj": (HIDDEN, MLP),
}
LORA_SITES = ("self_attn.q_proj", "self_attn.v_proj")
RECOVERY_SITES = ("self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj")
RANKS = (4, 2)  # of the adapters in turn, so that rows of several ranks meet
ALPHA = 8

Json = dict[str, object]


def tiny_bundle(
    path: Path,
    *,
    compressed: bool = True,
    recovery: bool = True,
    router: bool = True,
    adapters: tuple[str, ...] = ("alpha", "beta"),
) -> Path:
    """Write the bundle into the new directory `path` and return it.

    `compressed`: int4 linears (q_proj also 2:4), int8 embedding and lm_head, else all bf16.
    """
    rng = np.random.default_rng(0)
    tiny_base(path / "base", rng, compressed=compressed)
    fingerprint = TensorIndex.open(path / "base").fingerprint()
    specs = [
        _adapter(path / "adapters", name, index, fingerprint, recovery, rng)
        for index, name in enumerate(adapters)
    ]
    (path / "eval").mkdir()
    for name in adapters:
        lines = [{"prompt": f"{name} {text}", "completion": text[::-1]} for text in ("one", "two", "three")]
        (path / "eval" / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    manifest = {
        "schema_version": 1,
        "name": "tiny",
        "base": {"fingerprint": fingerprint, "compression": _steps() if compressed else []},
        "adapters": specs,
        "router": _router(path / "router", adapters, rng) if router else None,
        "tasks": [
            {"id": name, "adapter": name, "metric": "exact_match", "eval": f"eval/{name}.jsonl"}
            for name in adapters
        ],
        "provenance": {"made_by": "tests"},
    }
    write_json(path / "bundle.json", manifest)
    return path


def tiny_base(directory: Path, rng: np.random.Generator, *, compressed: bool) -> None:
    """A Hugging Face model directory: config.json, tokenizer, model.safetensors."""
    directory.mkdir(parents=True)
    config: Json = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": VOCAB,
        "hidden_size": HIDDEN, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HIDDEN // HEADS, "intermediate_size": MLP, "max_position_embeddings": 256,
        "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "hidden_act": "silu", "tie_word_embeddings": False,
        "attention_bias": False, "mlp_bias": False, "bos_token_id": None, "eos_token_id": 0,
        "pad_token_id": None, "dtype": "bfloat16",
    }  # fmt: skip
    if compressed:
        config["quantization_config"] = _quantization_config()
    write_json(directory / "config.json", config)
    write_tokenizer(directory)
    tensors: dict[str, np.ndarray] = {"model.norm.weight": np.ones(HIDDEN, ml_dtypes.bfloat16)}
    shapes = {"model.embed_tokens": (VOCAB, HIDDEN), "lm_head": (VOCAB, HIDDEN)}
    for layer in range(LAYERS):
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"model.layers.{layer}.{norm}.weight"] = np.ones(HIDDEN, ml_dtypes.bfloat16)
        shapes |= {f"model.layers.{layer}.{name}": shape for name, shape in LINEARS.items()}
    for module, (rows, columns) in shapes.items():
        weight = rng.standard_normal((rows, columns), np.float32) / np.float32(np.sqrt(columns))
        if not compressed:
            tensors[f"{module}.weight"] = weight.astype(ml_dtypes.bfloat16)
            continue
        if module.endswith("q_proj"):
            weight.reshape(rows, -1, 4)[:, :, ::2] = 0  # 2:4
        tensors |= packed_tensors(module, weight, 4 if ".layers." in module else 8)
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})


def packed_tensors(module: str, weight: np.ndarray, bits: int) -> dict[str, np.ndarray]:
    """The three pack-quantized tensors of `weight` float32 [out, in]."""
    packed = quantize_symmetric(weight, bits, GROUP)
    return {
        f"{module}.weight_packed": pack_int32(packed.q, bits),
        f"{module}.weight_scale": packed.scale,
        f"{module}.weight_shape": np.array(weight.shape, np.int64),
    }


def write_tokenizer(directory: Path) -> None:
    """A byte-level BPE tokenizer without merges: token id = byte."""
    printable = [
        *range(ord("!"), ord("~") + 1),
        *range(ord("¡"), ord("¬") + 1),
        *range(ord("®"), ord("ÿ") + 1),
    ]
    others = [byte for byte in range(256) if byte not in printable]
    letters = {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    bpe: Json = {
        "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
        "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": False,
        "merges": [],
        "vocab": {letters[byte]: byte for byte in range(256)},
    }  # fmt: skip
    document: Json = {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": [], "normalizer": None,
        "pre_tokenizer": byte_level, "post_processor": None, "decoder": byte_level, "model": bpe,
    }  # fmt: skip
    write_json(directory / "tokenizer.json", document)
    write_json(directory / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast"})


def write_json(path: Path, document: object) -> None:
    """`document` as JSON, indented."""
    path.write_text(json.dumps(document, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def edit_json(path: Path, edit: Callable[[dict], object]) -> None:
    """Read, let `edit` change the document in place, write back."""
    document = json.loads(path.read_text(encoding="utf-8"))
    edit(document)
    write_json(path, document)


def edit_tensors(file: Path, edit: Callable[[dict[str, np.ndarray]], object]) -> None:
    """Read all tensors of a safetensors file, let `edit` change the mapping in place, write back."""
    index = TensorIndex.open(file.parent)
    tensors = {name: np.array(index.array(name)) for name in index.names() if index.info(name).file == file}
    edit(tensors)
    save_file(tensors, file, {"format": "pt"})


def copy_bundle(source: Path, destination: Path) -> Path:
    """A copy to break."""
    shutil.copytree(source, destination)
    return destination


def _adapter(
    directory: Path, name: str, index: int, fingerprint: str, recovery: bool, rng: np.random.Generator
) -> Json:
    r = RANKS[index % len(RANKS)]
    tensors: dict[str, np.ndarray] = {}
    for layer in range(LAYERS):
        for site in LORA_SITES:
            tensors |= _pair(f"model.layers.{layer}.{site}", ("lora_A", "lora_B"), LINEARS[site], r, rng)
        for site in RECOVERY_SITES if recovery else ():
            tensors |= _pair(f"model.layers.{layer}.{site}", ("lora_a1", "lora_a2"), LINEARS[site], r, rng)
    (directory / name).mkdir(parents=True)
    save_file(tensors, directory / name / "adapter_model.safetensors", {"format": "pt"})
    config = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": r, "lora_alpha": ALPHA, "lora_dropout": 0.0,
        "bias": "none", "target_modules": [site.split(".")[-1] for site in LORA_SITES],
        "inference_mode": True, "use_rslora": False,
    }  # fmt: skip
    write_json(directory / name / "adapter_config.json", config)
    branches = [_branch("lora", "identity", LORA_SITES, r)]
    branches += [_branch("recovery", "gelu", RECOVERY_SITES, r)] if recovery else []
    return {
        "id": name,
        "task": name,
        "class_index": index,
        "base_fingerprint": fingerprint,
        "branches": branches,
    }


def _branch(role: str, act: str, sites: tuple[str, ...], r: int) -> Json:
    patterns = [f"model.layers.*.{site}" for site in sites]
    return {"role": role, "sites": patterns, "r": r, "alpha": ALPHA, "scale": ALPHA / r, "act": act}


def _pair(
    site: str, names: tuple[str, str], shape: tuple[int, int], r: int, rng: np.random.Generator
) -> Mapping[str, np.ndarray]:
    rows, columns = shape
    down = rng.standard_normal((r, columns), np.float32) / np.float32(np.sqrt(columns))
    up = rng.standard_normal((rows, r), np.float32) * np.float32(0.1)
    prefix = f"base_model.model.{site}"
    return {f"{prefix}.{names[0]}.weight": down, f"{prefix}.{names[1]}.weight": up}


def _steps() -> list[Json]:
    linears = [f"model.layers.*.{name}" for name in LINEARS]
    return [
        {"scheme": "prune", "sites": ["model.layers.*.self_attn.q_proj"], "pattern": "2:4"},
        {"scheme": "int4", "sites": linears, "group_size": GROUP, "symmetric": True},
        {
            "scheme": "int8",
            "sites": ["model.embed_tokens", "lm_head"],
            "group_size": GROUP,
            "symmetric": True,
        },
    ]


def _quantization_config() -> Json:
    def group(bits: int, targets: list[str]) -> Json:
        weights = {
            "num_bits": bits,
            "type": "int",
            "symmetric": True,
            "strategy": "group",
            "group_size": GROUP,
        }
        return {"targets": targets, "weights": weights, "input_activations": None, "output_activations": None}

    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {
            "group_0": group(4, [r"re:model\.layers\..*_proj"]),
            "group_1": group(8, ["Embedding", "re:lm_head"]),
        },
        "ignore": [],
    }


def _router(directory: Path, classes: tuple[str, ...], rng: np.random.Generator) -> Json:
    directory.mkdir()
    sizes = (16, 32, 32, len(classes))
    tensors = {"embedding.weight": rng.standard_normal((VOCAB, sizes[0]), np.float32)}
    for index in range(len(sizes) - 1):
        rows, columns = sizes[index + 1], sizes[index]
        weight = rng.standard_normal((rows, columns), np.float32) / np.float32(np.sqrt(columns))
        tensors[f"layers.{index}.weight"] = weight
        tensors[f"layers.{index}.bias"] = rng.standard_normal(rows, np.float32) * np.float32(0.1)
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    config = {
        "form": "mlp", "vocab_size": VOCAB, "embedding_size": sizes[0], "hidden_sizes": list(sizes[1:-1]),
        "num_classes": len(classes),
    }  # fmt: skip
    write_json(directory / "config.json", config)
    write_tokenizer(directory)
    return {
        "kind": "classifier",
        "granularity": "sentence",
        "template": "{text}",
        "max_length": 64,
        "truncation": "left",
        "classes": list(classes),
        "selection": {"select": "top_p", "p": 0.6, "weights": "softmax_probs", "temperature": 1.0},
    }
