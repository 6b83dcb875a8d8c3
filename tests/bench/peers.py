"""What the peers make of the inputs: the model builder's packages, and GGUF files for llama.cpp."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from .process import Run, run
from .shapes import ALPHA, BOS, EOS, Shape

if TYPE_CHECKING:
    import gguf

EMBEDDINGS = ("Q8_0", "Q4_0")


def has(module: str) -> bool:
    """Whether a peer is installed."""
    return importlib.util.find_spec(module) is not None


def build(model: Path, adapter: Path | None, package: Path, log: Path) -> Run:
    """Export with onnxruntime_genai.models.builder: int4, symmetric, blocks of 32, tied embedding by default.

    The LM head sees the last token only, as in our packages: without that option its prefill does more work.
    An adapter is baked in: as int4 like the base, and for good.
    """
    command: list[str | Path] = [sys.executable, "-m", "onnxruntime_genai.models.builder"]
    command += ["-i", model, "-o", package, "-p", "int4", "-e", "cpu", "-c", package.parent / "cache"]
    command += ["--extra_options", "prune_lm_head=true"]
    if adapter is not None:
        command += [f"adapter_path={adapter}"]
    return run(command, log)


def write_gguf(shape: Shape, model: Path, path: Path, embedding: str) -> None:
    """The model as GGUF: linears Q4_0, the tied embedding in the type named `embedding`.

    Q8_0 is what llama.cpp's own quantiser takes for a width that is no multiple of 256; Q4_0 reads as few
    bytes as the other systems do.
    """
    import gguf
    from safetensors import safe_open

    kinds = gguf.GGMLQuantizationType
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_context_length(2048)
    writer.add_embedding_length(shape.hidden)
    writer.add_block_count(shape.layers)
    writer.add_feed_forward_length(shape.intermediate)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.kv_heads)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(shape.head)
    writer.add_vocab_size(shape.vocab)
    writer.add_tokenizer_model("llama")
    writer.add_token_list([f"t{index}" for index in range(shape.vocab)])
    writer.add_token_scores([0.0] * shape.vocab)
    writer.add_token_types([1] * shape.vocab)
    writer.add_bos_token_id(BOS)
    writer.add_eos_token_id(EOS)
    with safe_open(model / "model.safetensors", "numpy") as weights:
        for name in weights.keys():  # noqa: SIM118 - a safe_open is no dict
            array = weights.get_tensor(name)
            kind = kinds[embedding] if "embed_tokens" in name else kinds.Q4_0
            if array.ndim == 1:
                writer.add_tensor(_gguf_name(name), array)
                continue
            data = gguf.quants.quantize(_for_rope(array, name, shape), kind)
            writer.add_tensor(_gguf_name(name), data, raw_dtype=kind)
    _finish(writer)


def write_gguf_adapter(shape: Shape, adapter: Path, path: Path) -> None:
    """A PEFT adapter as a GGUF adapter in fp16."""
    import gguf
    from safetensors.numpy import load_file

    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", float(ALPHA))
    tensors = load_file(adapter / "adapter_model.safetensors")
    for site, _, _ in shape.linears():
        down = tensors[f"base_model.model.{site}.lora_A.weight"]
        up = _for_rope(tensors[f"base_model.model.{site}.lora_B.weight"], site, shape)
        writer.add_tensor(f"{_gguf_name(site)}.weight.lora_a", down.astype(np.float16))
        writer.add_tensor(f"{_gguf_name(site)}.weight.lora_b", up.astype(np.float16))
    _finish(writer)


_GGUF_NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "model.layers": "blk",
}


def _gguf_name(name: str) -> str:
    for theirs, ours in _GGUF_NAMES.items():
        name = name.replace(theirs, ours)
    return name


def _for_rope(array: np.ndarray, name: str, shape: Shape) -> np.ndarray:
    """GGUF's llama rotates neighbouring pairs, Hugging Face halves: reorder the rows of q and k."""
    heads = {"q_proj": shape.heads, "k_proj": shape.kv_heads}
    for projection, count in heads.items():
        if projection in name:
            split = array.reshape(count, 2, shape.head // 2, array.shape[1])
            return split.swapaxes(1, 2).reshape(array.shape)
    return array


def _finish(writer: gguf.GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
