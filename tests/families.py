"""Model families in miniature: transformers' own model, PEFT and CA-LoRA adapters, the bundle of all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

import peft
import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from calora_export.importers.peft import run as import_peft
from tests.bundles import write_json, write_tokenizer

VOCAB, CONTEXT, LAYERS = 300, 64, 2
PREFILL, STEPS = 12, 8
ALL_LINEAR = "all-linear"

Settings = dict[str, object]

_SIZES: Settings = {
    "hidden_size": 64,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCAB,
    "intermediate_size": 96,
    "max_position_embeddings": CONTEXT,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_SLIDING: Settings = {"head_dim": 16, "sliding_window": 6}
_LAYER_TYPES = ["sliding_attention", "full_attention"]
_ROPE = {"rope_type": "default", "rope_theta": 10000.0}

# Name → model type, and what sets the family apart.
_FAMILIES: dict[str, tuple[str, Settings]] = {
    "llama": ("llama", {"tie_word_embeddings": False}),
    "llama-tied": ("llama", {"tie_word_embeddings": True}),
    "qwen2": ("qwen2", {}),  # bias on q, k and v
    "qwen3": ("qwen3", {"head_dim": 32}),  # norms on q and k, heads wider than hidden / heads
    "gemma2": ("gemma2", {**_SLIDING, "attn_logit_softcapping": 2.0}),
    # A rotary table per kind of layer, a scaled and tied embedding, norms around every branch.
    "gemma3": ("gemma3_text", {**_SLIDING, "layer_types": _LAYER_TYPES}),
    "mistral": ("mistral", {"sliding_window": 6}),
    "phi3": ("phi3", {}),  # q, k and v in one linear layer, gate and up in another
}
_OTHERS: dict[str, tuple[str, Settings]] = {
    "phi": ("phi", {}),  # layer norms instead of RMS norms; half of each head is rotated
    "mistral-full": ("mistral", {"sliding_window": CONTEXT}),  # a window that is never left
    "cohere": ("cohere", {}),  # rotates neighbouring values, not halves
    "gpt_oss": ("gpt_oss", {"head_dim": 16, "num_experts_per_tok": 1, "rope_parameters": _ROPE}),  # sinks
    "stablelm": ("stablelm", {}),  # attention that can not be exchanged
}
NAMES = tuple(_FAMILIES)


@dataclass(frozen=True)
class CaLora:
    """One CA-LoRA adapter: site → lora_A and lora_B, lora_a1 and lora_a2, or all four."""

    r: int
    alpha: int
    tensors: Mapping[str, Mapping[str, Tensor]]

    @staticmethod
    def draw(
        hf: nn.Module, ranks: tuple[int, int], alpha: int, lora: Sequence[str], recovery: Sequence[str]
    ) -> CaLora:
        """Random tensors; ranks: of the LoRA, of the recovery; sites are named by their last part."""
        generator = torch.Generator().manual_seed(sum(ranks))
        tensors: dict[str, dict[str, Tensor]] = {}
        for site, module in hf.named_modules():
            leaf = site.rpartition(".")[2]
            for names, r, leaves in ((("A", "B"), ranks[0], lora), (("a1", "a2"), ranks[1], recovery)):
                if isinstance(module, nn.Linear) and leaf in leaves:
                    down = torch.randn(r, module.in_features, generator=generator) * module.in_features**-0.5
                    up = torch.randn(module.out_features, r, generator=generator) * 0.3
                    own = tensors.setdefault(site, {})
                    own |= {f"lora_{names[0]}": down, f"lora_{names[1]}": up}
        return CaLora(ranks[0], alpha, tensors)

    def delta(self, site: str, x: Tensor) -> Tensor:
        """CA-LoRA (arXiv 2307.07705): alpha / r · (B(A x) + a2(gelu(a1 x)))."""
        own, y = self.tensors[site], torch.zeros(())
        if "lora_A" in own:
            y = y + x @ own["lora_A"].T @ own["lora_B"].T
        if "lora_a1" in own:
            y = y + F.gelu(x @ own["lora_a1"].T) @ own["lora_a2"].T
        return self.alpha / self.r * y

    def save(self, directory: Path) -> Path:
        """As docs/bundle.md has it: PEFT's two files."""
        directory.mkdir(parents=True)
        leaves = sorted({site.rpartition(".")[2] for site in self.tensors})
        settings = {"peft_type": "LORA", "r": self.r, "lora_alpha": self.alpha, "target_modules": leaves}
        write_json(directory / "adapter_config.json", settings)
        named = {
            f"base_model.model.{site}.{name}.weight": tensor
            for site, own in self.tensors.items()
            for name, tensor in own.items()
        }
        save_file(named, directory / "adapter_model.safetensors")
        return directory


@dataclass(frozen=True)
class Family:
    """`hf`: the model as transformers runs it; `directory` holds base/, peft/<id>/ and bundle/."""

    name: str
    hf: transformers.PreTrainedModel
    directory: Path

    @property
    def bundle(self) -> Path:
        return self.directory / "bundle"

    def logits(self, ids: Tensor) -> Tensor:
        """transformers' own logits [1, S, vocab], of one full forward pass."""
        with torch.no_grad():
            return self.hf(ids).logits

    def peft_logits(self, adapter: str, ids: Tensor) -> Tensor:
        """Logits [1, S, vocab] of PEFT's own model; `hf` is left as it was."""
        model = peft.PeftModel.from_pretrained(self.hf, str(self.directory / "peft" / adapter)).eval()
        try:
            with torch.no_grad():
                return model(ids).logits
        finally:
            model.unload()

    def mixed_logits(self, parts: Sequence[tuple[CaLora, float]], ids: Tensor) -> Tensor:
        """Logits [1, S, vocab] of transformers' model with Σ weight · delta added at every site, by hooks."""
        with ExitStack() as stack:
            for site, module in self.hf.named_modules():
                for adapter, weight in parts:
                    if site in adapter.tensors:
                        stack.enter_context(module.register_forward_hook(_hook(adapter, weight, site)))
            return self.logits(ids)


def _hook(adapter: CaLora, weight: float, site: str):
    return lambda module, inputs, output: output + weight * adapter.delta(site, inputs[0])


def make(name: str, directory: Path) -> Family:
    """A family with its adapters, on disk and imported."""
    hf = base(name)
    hf.save_pretrained(directory / "base")
    write_tokenizer(directory / "base")
    paths = [_save_lora(hf, directory / "peft" / key, settings) for key, settings in loras(name).items()]
    paths += [adapter.save(directory / "peft" / key) for key, adapter in caloras(name, hf).items()]
    import_peft(directory / "base", paths, directory / "bundle")
    return Family(name, hf, directory)


def loras(name: str) -> dict[str, peft.LoraConfig]:
    """PEFT adapters by id; most scales are no power of two, so that they do not commute with rounding."""
    if name in _OTHERS:
        return {}
    if name == "mistral":  # some linear layers of a group, and no other
        return {"all": _lora(4, 10, ["q_proj", "v_proj"])}
    if name != "llama":
        return {"all": _lora(4, 10, ALL_LINEAR)}
    patterns = {"rank_pattern": {"q_proj": 2, "layers.1.mlp.down_proj": 6}, "alpha_pattern": {"q_proj": 7}}
    return {
        "a8": _lora(4, 8, ALL_LINEAR),
        "a16": _lora(8, 16, ["q_proj", "v_proj"]),
        "a32": _lora(6, 32, ALL_LINEAR, rslora=True),
        "pattern": replace(_lora(4, 10, ALL_LINEAR), **patterns),
    }


def caloras(name: str, hf: nn.Module) -> dict[str, CaLora]:
    """CA-LoRA adapters by id; LoRA and recovery meet at some sites and not at others, as in the paper."""
    if name != "llama":
        return {}
    attention = ("q_proj", "k_proj", "v_proj", "o_proj")
    return {
        "one": CaLora.draw(hf, (4, 3), 10, attention, (*attention, "gate_proj", "up_proj", "down_proj")),
        "two": CaLora.draw(hf, (2, 5), 3, ("q_proj", "down_proj"), ("v_proj", "down_proj")),
    }


def base(name: str) -> transformers.PreTrainedModel:
    """Random weights, the same every time; logits of several units and peaked attention show every error."""
    with torch.random.fork_rng():
        torch.manual_seed(7)
        model_type, apart = (_FAMILIES | _OTHERS)[name]
        config = transformers.AutoConfig.for_model(model_type, **(_SIZES | apart))
        hf = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
        for parameter in hf.parameters():
            if parameter.dim() == 2:
                parameter.data.normal_(0, 1.3 * parameter.shape[1] ** -0.5)
            else:
                parameter.data.add_(torch.randn_like(parameter) * 0.2)
    return hf


def tokens(count: int) -> Tensor:
    """int64 [1, count], none of them special."""
    return torch.randint(3, VOCAB, (1, count), generator=torch.Generator().manual_seed(0))


def _lora(r: int, alpha: int, targets: str | list[str], rslora: bool = False) -> peft.LoraConfig:
    """A LoRA whose B is not zero."""
    return peft.LoraConfig(
        r=r,
        lora_alpha=alpha,
        target_modules=targets,
        use_rslora=rslora,
        init_lora_weights=False,
        task_type="CAUSAL_LM",
    )


def _save_lora(hf: transformers.PreTrainedModel, path: Path, settings: peft.LoraConfig) -> Path:
    with torch.random.fork_rng():
        torch.manual_seed(len(path.name))
        model = peft.get_peft_model(hf, settings)
    model.save_pretrained(str(path), save_embedding_layers=False)
    model.unload()
    return path
