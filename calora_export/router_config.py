"""router/config.json: what computes a router's scores, and the tensors that it needs.

mlp        embeddings, averaged over the tokens, through linear layers          the mini-MLP of DLP-LoRA
encoder    BERT, RoBERTa or ALBERT, then a classifier or centroids              DLP-LoRA's code; LoraRetriever
table      a row of gates per task, or one row for all prompts                  MTL-LoRA; a fixed mixture
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from msgspec import Meta, Struct

from calora_export import strict_json
from calora_export.errors import BundleError, UnsupportedError, mismatch

Count = Annotated[int, Meta(ge=1)]
Shapes = dict[str, tuple[int, ...]]

# What each kind of router can be computed by.
FORMS = {"classifier": ("mlp", "encoder"), "retrieval": ("encoder",), "task_id": ("table",), "static": ("table",)}


class MlpConfig(Struct, frozen=True, forbid_unknown_fields=True):
    """Embeddings [vocab, embedding], averaged over the tokens, then linear layers with ReLU between them."""

    form: str
    vocab_size: Count
    embedding_size: Count
    hidden_sizes: tuple[Count, ...]
    num_classes: Count

    def shapes(self) -> Shapes:
        sizes = (self.embedding_size, *self.hidden_sizes, self.num_classes)
        shapes: Shapes = {"embedding.weight": (self.vocab_size, self.embedding_size)}
        for index in range(len(sizes) - 1):
            shapes |= _linear(f"layers.{index}", sizes[index], sizes[index + 1])
        return shapes


class EncoderConfig(Struct, frozen=True, forbid_unknown_fields=True):
    """An encoder with norms after attention and feed-forward, as BERT has them.

    projected: embeddings go through a linear layer first, and shared_layers: one layer is run `layers` times, both as
    ALBERT does. position_offset: the first token's position (RoBERTa's is 2). pooling: the first token, or the mean.
    head: `norm_linear` scores classes; `cosine` compares with one centroid per class.
    """

    form: str
    vocab_size: Count
    embedding_size: Count
    hidden_size: Count
    intermediate_size: Count
    layers: Count
    heads: Count
    positions: Count
    position_offset: Annotated[int, Meta(ge=0)]
    activation: Literal["gelu", "gelu_tanh", "relu"]
    eps: Annotated[float, Meta(gt=0)]
    projected: bool
    shared_layers: bool
    pooling: Literal["first", "mean"]
    head: Literal["norm_linear", "cosine"]
    num_classes: Count

    def shapes(self) -> Shapes:
        h, e = self.hidden_size, self.embedding_size
        shapes: Shapes = {
            "embeddings.word.weight": (self.vocab_size, e),
            "embeddings.position.weight": (self.positions, e),
            "embeddings.segment.weight": (1, e),
        }
        shapes |= _norm("embeddings.norm", e)
        shapes |= _linear("embeddings.project", e, h) if self.projected else {}
        for index in range(1 if self.shared_layers else self.layers):
            key = f"layers.{index}"
            for name in ("query", "key", "value", "output"):
                shapes |= _linear(f"{key}.{name}", h, h)
            shapes |= _linear(f"{key}.up", h, self.intermediate_size)
            shapes |= _linear(f"{key}.down", self.intermediate_size, h)
            shapes |= _norm(f"{key}.attention_norm", h) | _norm(f"{key}.output_norm", h)
        if self.head == "cosine":
            return shapes | {"centroids": (self.num_classes, h)}
        return shapes | _norm("norm", h) | _linear("classifier", h, self.num_classes)


class TableConfig(Struct, frozen=True, forbid_unknown_fields=True):
    """Gates [rows, classes] as they are; a row is a task, or the only one."""

    form: str
    rows: Count
    num_classes: Count

    def shapes(self) -> Shapes:
        return {"gates": (self.rows, self.num_classes)}


RouterConfig = MlpConfig | EncoderConfig | TableConfig
_CONFIGS: dict[str, type[RouterConfig]] = {"mlp": MlpConfig, "encoder": EncoderConfig, "table": TableConfig}


class _Form(Struct, frozen=True):
    form: str


def read(directory: Path, label: str, kind: str) -> RouterConfig:
    """config.json of a router of that kind; BundleError for a form that it cannot have."""
    file = f"{label}/config.json"
    form = strict_json.read(directory / "config.json", _Form, file).form
    if form not in FORMS[kind]:
        found, expected = strict_json.plain(form), f"{' or '.join(FORMS[kind])} with the kind {kind}"
        raise UnsupportedError(mismatch(file, "form", expected, found))
    config = strict_json.read(directory / "config.json", _CONFIGS[form], file)
    if isinstance(config, EncoderConfig):
        _check_encoder(config, file, kind)
    if isinstance(config, TableConfig) and kind == "static" and config.rows != 1:
        raise BundleError(mismatch(file, "rows", "1 with the kind static", config.rows))
    return config


def _check_encoder(config: EncoderConfig, file: str, kind: str) -> None:
    head = "cosine" if kind == "retrieval" else "norm_linear"
    if config.head != head:
        raise BundleError(mismatch(file, "head", f"{head} with the kind {kind}", config.head))
    if config.hidden_size % config.heads:
        raise BundleError(mismatch(file, "heads", f"a divisor of hidden_size {config.hidden_size}", config.heads))
    if not config.projected and config.embedding_size != config.hidden_size:
        expected = f"hidden_size {config.hidden_size}, without a projection"
        raise BundleError(mismatch(file, "embedding_size", expected, config.embedding_size))
    if config.position_offset >= config.positions:
        raise BundleError(mismatch(file, "position_offset", f"less than {config.positions}", config.position_offset))


def _linear(name: str, inputs: int, outputs: int) -> Shapes:
    return {f"{name}.weight": (outputs, inputs), f"{name}.bias": (outputs,)}


def _norm(name: str, size: int) -> Shapes:
    return {f"{name}.weight": (size,), f"{name}.bias": (size,)}
