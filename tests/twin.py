"""transformers' own model of a compressed bundle: what a package is compared with, and nothing of ours computes."""

from __future__ import annotations

from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor

from tests.bundles import ALPHA
from tests.families import CaLora, Family
from tests.onnx_file import bundle_weights


def dense_twin(bundle: Path) -> Family:
    """The base with its weights unpacked, in fp32."""
    config = transformers.AutoConfig.from_pretrained(str(bundle / "base"))
    del config.quantization_config
    hf = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for module, weight in bundle_weights(bundle).items():
            hf.get_submodule(module).weight.copy_(torch.from_numpy(weight))
    return Family("twin", hf, bundle)


def calora(bundle: Path, adapter: str, r: int, dtype: torch.dtype = torch.float32) -> CaLora:
    """A CA-LoRA adapter of a tiny bundle; dtype: what its matrices, `up` with its scale, are rounded to."""
    tensors: dict[str, dict[str, Tensor]] = {}
    for key, tensor in load_file(bundle / "adapters" / adapter / "adapter_model.safetensors").items():
        site, _, name = key.removeprefix("base_model.model.").removesuffix(".weight").rpartition(".")
        scale = ALPHA / r if name in ("lora_B", "lora_a2") else 1.0
        tensors.setdefault(site, {})[name] = (tensor * scale).to(dtype).float() / scale
    return CaLora(r, ALPHA, tensors)
