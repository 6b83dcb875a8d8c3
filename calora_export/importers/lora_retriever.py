"""LoraRetriever (arXiv 2402.09997): plain LoRAs, found by the similarity of a prompt with samples of their tasks.

A LoRA's place is the mean of its samples' sentence embeddings; the k with the highest cosine are mixed in equal parts.
The encoder is a sentence-transformers directory: config.json, model.safetensors, tokenizer.json, 1_Pooling/config.json.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated

import msgspec
import numpy as np
import typer

from calora_export import strict_json
from calora_export.errors import BundleError, UnsupportedError, mismatch
from calora_export.importers import Imported, _checkpoint, _encoders
from calora_export.importers._draft import Draft, directory_ids, draft
from calora_export.importers._options import Adapters, Base, Name, Out
from calora_export.importers.peft import copy_adapter
from calora_export.manifest import RouterSpec, Selection
from calora_export.router_config import EncoderConfig

Encoder = Annotated[Path, typer.Option(help="A sentence-transformers directory.", show_default=False)]
Samples = Annotated[
    Path, typer.Option(help="Directory with <adapter>.txt: a prompt of its task per line.", show_default=False)
]
TopK = Annotated[int, typer.Option(min=1, help="How many adapters are mixed.")]
MaxLength = Annotated[int, typer.Option(min=1, help="How many tokens of a prompt the encoder reads.")]
Template = Annotated[str, typer.Option(help="What the encoder reads, with {text} for the prompt.")]


class _Pooling(msgspec.Struct, frozen=True):
    pooling_mode_cls_token: bool = False
    pooling_mode_mean_tokens: bool = False
    pooling_mode_max_tokens: bool = False
    pooling_mode_mean_sqrt_len_tokens: bool = False


def run(
    base: Base,
    adapters: Adapters,
    out: Out,
    encoder: Encoder,
    samples: Samples,
    top_k: TopK = 3,
    max_length: MaxLength = 256,
    template: Template = "{text}",
    name: Name = None,
) -> Imported:
    """LoraRetriever: LoRAs with a sentence encoder that finds the nearest ones for a prompt.

    BundleError or UnsupportedError in one line.
    """
    ids = directory_ids(adapters)
    texts = {identifier: _samples(samples / f"{identifier}.txt") for identifier in ids}
    with draft(base, out, name, "lora-retriever") as made:
        for identifier, source in zip(ids, adapters, strict=True):
            made.add(identifier, copy_adapter(source, made.adapter_dir(identifier), made.linears))
        selection = Selection("top_k", "uniform", 1.0, k=min(top_k, len(ids)))
        spec = RouterSpec(
            "retrieval", "prompt", template, max_length, "right", tuple(ids), selection, special_tokens=True
        )
        _write_router(made, spec, encoder, texts)
    return Imported(out, tuple(ids))


def _samples(file: Path) -> list[str]:
    lines = strict_json.read_bytes(file, str(file)).decode("utf-8", "replace").splitlines()
    if not any(line.strip() for line in lines):
        raise BundleError(mismatch(file, "lines", "prompts of its task", "none"))
    return [line for line in lines if line.strip()]


def _write_router(draft: Draft, spec: RouterSpec, directory: Path, texts: Mapping[str, Sequence[str]]) -> None:
    from safetensors.numpy import save_file

    source = _encoders.read(directory)
    file = directory / "1_Pooling" / "config.json"
    pooling = strict_json.read(file, _Pooling, str(file))
    if pooling not in (_Pooling(pooling_mode_mean_tokens=True), _Pooling(pooling_mode_cls_token=True)):
        raise UnsupportedError(mismatch(file, "pooling_mode", "the mean or the first token", "another"))
    config = source.router(len(spec.classes), "mean" if pooling.pooling_mode_mean_tokens else "first", "cosine")
    tensors = source.tensors(_checkpoint.read(directory / "model.safetensors"), config)
    tensors["centroids"] = np.zeros((len(spec.classes), config.hidden_size), np.float32)
    _encoders.write(draft.path / "router", config, tensors, _encoders.tokenizer(directory))
    centroids = _centroids(draft.path / "router", spec, config, [texts[name] for name in spec.classes])
    save_file(tensors | {"centroids": centroids}, draft.path / "router" / "model.safetensors")
    draft.router = spec


def _centroids(router: Path, spec: RouterSpec, config: EncoderConfig, texts: Sequence[Sequence[str]]) -> np.ndarray:
    """[classes, hidden]: the mean of the samples' embeddings, each of length one."""
    import torch
    from safetensors.torch import load_file

    from calora_export import encoder
    from calora_export.router_text import RouterText

    reader = RouterText(spec, router / "tokenizer.json")
    model = encoder.Encoder(config).eval()
    model.load_state_dict(load_file(router / "model.safetensors"))
    with torch.no_grad():
        rows = [
            torch.cat([encoder.unit(model.embed(torch.tensor([reader.ids(text)]))) for text in own]).mean(0)
            for own in texts
        ]
    return torch.stack(rows).numpy()
