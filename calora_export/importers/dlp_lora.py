"""DLP-LoRA (arXiv 2410.01497): plain LoRAs and a classifier that picks some of them for every sentence.

The adapters' list is a text file with a PEFT directory per line: its order is the classifier's order of classes. The
classifier is the mini-MLP of the paper, `embedding.weight` and `layers.<i>.{weight, bias}`, or the encoder of the
authors' code, `model.*`, `norm.*` and `Decode.*`: ALBERT's or RoBERTa's first vector, normed, through a linear layer.
"""

from __future__ import annotations

from pathlib import Path, PureWindowsPath
from typing import Annotated

import numpy as np
import typer

from calora_export import strict_json
from calora_export.errors import BundleError, mismatch
from calora_export.importers import Imported, _checkpoint, _encoders
from calora_export.importers._checkpoint import Checkpoint
from calora_export.importers._draft import Draft, directory_ids, draft
from calora_export.importers._options import Base, Name, Out
from calora_export.importers.peft import copy_adapter
from calora_export.manifest import RouterSpec, Selection
from calora_export.router_config import EncoderConfig, MlpConfig, RouterConfig

List = Annotated[Path, typer.Argument(help="Text file: a PEFT directory per line, in the order of classes.")]
Classifier = Annotated[Path, typer.Option(help="The classifier's state dict.", show_default=False)]
Tokenizer = Annotated[
    Path, typer.Option(help="Directory with its tokenizer.json, and an encoder's config.json.", show_default=False)
]
TopP = Annotated[float, typer.Option(min=0.0, max=1.0, help="Probability that the chosen adapters reach together.")]
TopK = Annotated[int | None, typer.Option(min=1, help="Choose this many adapters instead.")]
MaxLength = Annotated[int, typer.Option(min=1, help="How many of the last tokens the classifier reads.")]


def run(
    base: Base,
    adapter_list: List,
    out: Out,
    classifier: Classifier,
    tokenizer: Tokenizer,
    top_p: TopP = 0.6,
    top_k: TopK = None,
    max_length: MaxLength = 256,
    name: Name = None,
) -> Imported:
    """DLP-LoRA: LoRAs in the order of a list, and the mini-MLP or encoder that routes every sentence to some of them.

    BundleError or UnsupportedError in one line.
    """
    adapters = _listed(adapter_list)
    ids = directory_ids(adapters)
    with draft(base, out, name, "dlp-lora") as made:
        for identifier, source in zip(ids, adapters, strict=True):
            made.add(identifier, copy_adapter(source, made.adapter_dir(identifier), made.linears))
        selection = Selection("top_p", "softmax_probs", 1.0, p=top_p)
        if top_k is not None:
            selection = Selection("top_k", "softmax_logits", 1.0, k=top_k)
        _write_router(made, classifier, tokenizer, max_length, selection)
    return Imported(out, tuple(ids))


def _listed(file: Path) -> list[Path]:
    """The directories of a list; its paths are relative to it or, as the authors' script has them, to its parent."""
    lines = strict_json.read_bytes(file, str(file)).decode("utf-8", "replace").splitlines()
    names = [PureWindowsPath(line.strip()).as_posix() for line in lines if line.strip()]
    if not names:
        raise BundleError(mismatch(file, "lines", "a PEFT directory on each", "none"))
    found: list[Path] = []
    for number, name in enumerate(names, start=1):
        places = [parent / name for parent in (file.resolve().parent, file.resolve().parent.parent)]
        place = next((place for place in places if place.is_dir()), None)
        if place is None:
            raise BundleError(mismatch(file, f"line {number}", "a directory beside the list", strict_json.plain(name)))
        found.append(place)
    return found


def _write_router(draft: Draft, classifier: Path, tokenizer: Path, max_length: int, selection: Selection) -> None:
    state = _checkpoint.read(classifier, "module.")
    classes = tuple(adapter.id for adapter in draft.adapters)
    template = "{text}"
    config: RouterConfig
    if "Decode.weight" in state.tensors:
        source = _encoders.read(tokenizer)
        config, tensors = _encoder(source, state, len(classes))
        template = "[CLS]{text}[SEP]" if source.config.model_type in ("albert", "bert") else "<s>{text}</s>"
    else:
        config, tensors = _mlp(state, len(classes))
    _encoders.write(draft.path / "router", config, tensors, _encoders.tokenizer(tokenizer))
    draft.router = RouterSpec("classifier", "sentence", template, max_length, "left", classes, selection)


def _encoder(source: _encoders.Source, state: Checkpoint, classes: int) -> tuple[EncoderConfig, dict[str, np.ndarray]]:
    config = source.router(classes, "first", "norm_linear")
    shapes = config.shapes()
    heads = {"norm.weight": "norm.weight", "norm.bias": "norm.bias"}
    heads |= {f"classifier.{part}": f"Decode.{part}" for part in ("weight", "bias")}
    body = {key: tensor for key, tensor in state.tensors.items() if key not in heads.values()}
    for key in body:
        if not key.startswith("model."):
            raise state.wrong(key, "model.*, norm.* or Decode.*", "another key")
    tensors = source.tensors(Checkpoint(state.file, body), config, "model.")
    return config, tensors | {ours: state.take(theirs, shapes[ours]) for ours, theirs in heads.items()}


def _mlp(state: Checkpoint, classes: int) -> tuple[MlpConfig, dict[str, np.ndarray]]:
    if "embedding.weight" not in state.tensors:
        expected = "embedding.weight of a mini-MLP, or Decode.weight of an encoder"
        raise state.wrong("tensors", expected, next(iter(state.tensors), "none"))
    vocab, size = (*state.shape("embedding.weight"), 0, 0)[:2]
    count = sum(key.endswith(".weight") and key.startswith("layers.") for key in state.tensors)
    hidden = tuple(state.shape(f"layers.{index}.weight")[0] for index in range(count - 1))
    config = MlpConfig("mlp", vocab, size, hidden, classes)
    shapes = config.shapes()
    for key in state.tensors:
        if key not in shapes:
            raise state.wrong(key, "embedding.weight, layers.<i>.weight or layers.<i>.bias", "another key")
    return config, {key: state.take(key, shape) for key, shape in shapes.items()}
