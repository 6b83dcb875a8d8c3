"""The inputs of the benchmark: a model, its tokenizer and adapters for it, as they come from training."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

RANK = 16
ALPHA = 32
BITS, GROUP = 4, 32
ADAPTERS = ("one", "two")  # in the bundle
LATE_ADAPTER = "three"  # comes after the export, through add-adapter
BOS, EOS = 0, 1


@dataclass(frozen=True)
class Shape:
    """The numbers of a Llama model with tied embeddings."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    intermediate: int
    vocab: int

    @property
    def head(self) -> int:
        return self.hidden // self.heads

    def linears(self) -> Iterator[tuple[str, int, int]]:
        """Every adaptable linear as (module name, out, in)."""
        sizes = {
            "self_attn.q_proj": (self.hidden, self.hidden),
            "self_attn.k_proj": (self.kv_heads * self.head, self.hidden),
            "self_attn.v_proj": (self.kv_heads * self.head, self.hidden),
            "self_attn.o_proj": (self.hidden, self.hidden),
            "mlp.gate_proj": (self.intermediate, self.hidden),
            "mlp.up_proj": (self.intermediate, self.hidden),
            "mlp.down_proj": (self.hidden, self.intermediate),
        }
        for layer in range(self.layers):
            for name, (out, into) in sizes.items():
                yield f"model.layers.{layer}.{name}", out, into

    def parameters(self) -> int:
        """How many weights the model has, the tied embedding once."""
        norms = (2 * self.layers + 1) * self.hidden
        return sum(out * into for _, out, into in self.linears()) + self.vocab * self.hidden + norms


SHAPES = {
    "smollm2-135m": Shape(hidden=576, layers=30, heads=9, kv_heads=3, intermediate=1536, vocab=49152),
    "tiny": Shape(hidden=128, layers=2, heads=4, kv_heads=2, intermediate=256, vocab=2048),
}


def write_model(shape: Shape, directory: Path, corpus: Path) -> None:
    """A Hugging Face model with random fp32 weights; its tokenizer is trained on Markdown below `corpus`."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.utils import logging

    config = LlamaConfig(
        hidden_size=shape.hidden,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        intermediate_size=shape.intermediate,
        vocab_size=shape.vocab,
        max_position_embeddings=2048,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        bos_token_id=BOS,
        eos_token_id=EOS,
        pad_token_id=EOS,
    )
    torch.manual_seed(0)
    logging.disable_progress_bar()
    LlamaForCausalLM(config).save_pretrained(directory)
    write_tokenizer(directory, corpus)


def write_tokenizer(directory: Path, corpus: Path) -> None:
    """A byte-level BPE of about 1024 tokens. The model's vocabulary is larger, as padded vocabularies are."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=1024, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet, show_progress=False
    )
    texts = [path.read_text(encoding="utf-8") for path in sorted(corpus.rglob("*.md"))]
    tokenizer.train_from_iterator(texts, trainer)
    special = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(directory)


def write_adapter(shape: Shape, directory: Path, seed: int) -> None:
    """A PEFT LoRA on every linear, with a B that is not zero."""
    import torch
    from safetensors.torch import save_file

    random = torch.Generator().manual_seed(100 + seed)
    tensors = {}
    for site, out, into in shape.linears():
        tensors[f"base_model.model.{site}.lora_A.weight"] = torch.randn(RANK, into, generator=random) * 0.02
        tensors[f"base_model.model.{site}.lora_B.weight"] = torch.randn(out, RANK, generator=random) * 0.02
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": None,
        "r": RANK,
        "lora_alpha": ALPHA,
        "lora_dropout": 0.0,
        "bias": "none",
        "use_rslora": False,
        "target_modules": sorted({site.rpartition(".")[2] for site, _, _ in shape.linears()}),
        "inference_mode": True,
    }
    directory.mkdir(parents=True)
    save_file(tensors, directory / "adapter_model.safetensors")
    (directory / "adapter_config.json").write_text(json.dumps(config, indent=2))
