"""What onnxruntime-genai looks for beside a model, so that a package opens there as it is."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from calora_export.package import Manifest


def write(manifest: Manifest, directory: Path) -> None:
    """genai_config.json, and a copy of the tokenizer where that library expects it. Nothing where layers have heads of
    their own: the library has one number of heads for all.
    """
    if not (isinstance(manifest.model.heads, int) and isinstance(manifest.model.kv_heads, int)):
        return
    for file in sorted((directory / "tokenizer").glob("*.*")):
        shutil.copyfile(file, directory / file.name)
    text = json.dumps(_config(manifest), indent=2)
    (directory / "genai_config.json").write_text(text + "\n", encoding="utf-8")


def _config(manifest: Manifest) -> dict[str, object]:
    model = manifest.model
    keys = [f"past_key_values.%d.{kv}" for kv in ("key", "value")]
    decoder = {
        "session_options": {"log_id": "onnxruntime-genai", "log_severity_level": 3, "provider_options": []},
        "filename": model.file,
        "head_size": model.head_dim,
        "hidden_size": model.hidden,
        "inputs": {
            "input_ids": "input_ids",
            "attention_mask": "attention_mask",
            "past_key_names": keys[0],
            "past_value_names": keys[1],
        },
        "outputs": {
            "logits": "logits",
            "present_key_names": keys[0].replace("past_key_values", "present"),
            "present_value_names": keys[1].replace("past_key_values", "present"),
        },
        "num_attention_heads": model.heads,
        "num_hidden_layers": model.layers,
        "num_key_value_heads": model.kv_heads,
    }
    return {
        "model": {
            "bos_token_id": model.bos if model.bos is not None else model.eos[0],
            "context_length": model.context,
            "decoder": decoder,
            "eos_token_id": list(model.eos),
            "pad_token_id": model.eos[0],
            "type": "decoder",
            "vocab_size": model.vocab,
        },
        "search": {"do_sample": False, "max_length": model.context, "past_present_share_buffer": True},
    }
