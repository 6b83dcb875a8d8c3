"""A Hugging Face encoder directory as a router's encoder: BERT, RoBERTa and ALBERT, their tensors by our names."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import msgspec
import numpy as np

from calora_export import strict_json
from calora_export.errors import BundleError, UnsupportedError, mismatch
from calora_export.importers._checkpoint import Checkpoint
from calora_export.router_config import EncoderConfig
from calora_export.strict_json import plain

Count = Annotated[int, msgspec.Meta(ge=1)]
Head = Literal["norm_linear", "cosine"]
Pooling = Literal["first", "mean"]
Arrays = dict[str, np.ndarray]

_ACTIVATIONS = {"gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "relu": "relu"}
_EMBEDDINGS = {
    "word.weight": "word_embeddings.weight",
    "position.weight": "position_embeddings.weight",
    "segment.weight": "token_type_embeddings.weight",
    "norm.weight": "LayerNorm.weight",
    "norm.bias": "LayerNorm.bias",
}
_BERT = {
    "query": "attention.self.query",
    "key": "attention.self.key",
    "value": "attention.self.value",
    "output": "attention.output.dense",
    "attention_norm": "attention.output.LayerNorm",
    "up": "intermediate.dense",
    "down": "output.dense",
    "output_norm": "output.LayerNorm",
}
_ALBERT = {
    "query": "attention.query",
    "key": "attention.key",
    "value": "attention.value",
    "output": "attention.dense",
    "attention_norm": "attention.LayerNorm",
    "up": "ffn",
    "down": "ffn_output",
    "output_norm": "full_layer_layer_norm",
}
_ALBERT_LAYER = "encoder.albert_layer_groups.0.albert_layers.0"
_LEFT = ("pooler.", "embeddings.position_ids", "embeddings.token_type_ids")  # not used for a token's vector


class _Config(msgspec.Struct, frozen=True):
    """What of an encoder's config.json decides the result."""

    model_type: str
    vocab_size: Count
    hidden_size: Count
    num_hidden_layers: Count
    num_attention_heads: Count
    intermediate_size: Count
    max_position_embeddings: Count
    hidden_act: str = "gelu"
    layer_norm_eps: Annotated[float, msgspec.Meta(gt=0)] = 1e-12
    embedding_size: Count | None = None
    pad_token_id: int | None = None
    position_embedding_type: str = "absolute"
    num_hidden_groups: Count = 1
    inner_group_num: Count = 1


@dataclass(frozen=True)
class Source:
    """An encoder's directory: config.json and tokenizer.json."""

    directory: Path
    config: _Config

    @property
    def albert(self) -> bool:
        return self.config.model_type == "albert"

    def router(self, classes: int, pooling: Pooling, head: Head) -> EncoderConfig:
        """The config of a router with this encoder."""
        c = self.config
        roberta = c.model_type in ("roberta", "xlm-roberta")
        return EncoderConfig(
            form="encoder",
            vocab_size=c.vocab_size,
            embedding_size=(c.embedding_size if self.albert else None) or c.hidden_size,
            hidden_size=c.hidden_size,
            intermediate_size=c.intermediate_size,
            layers=c.num_hidden_layers,
            heads=c.num_attention_heads,
            positions=c.max_position_embeddings,
            position_offset=(1 if c.pad_token_id is None else c.pad_token_id) + 1 if roberta else 0,
            activation=_ACTIVATIONS[c.hidden_act],  # type: ignore[arg-type]
            eps=c.layer_norm_eps,
            projected=self.albert,
            shared_layers=self.albert,
            pooling=pooling,
            head=head,
            num_classes=classes,
        )

    def tensors(self, state: Checkpoint, config: EncoderConfig, prefix: str = "") -> Arrays:
        """The encoder's tensors by our names; `prefix` is before theirs. BundleError for one that is left over."""
        names = {f"{prefix}{theirs}": ours for ours, theirs in self._names(config).items()}
        for key in state.tensors:
            if key.startswith(prefix) and key not in names and not key.removeprefix(prefix).startswith(_LEFT):
                raise state.wrong(key, f"only tensors of {self.config.model_type}", "this key")
        shapes = config.shapes()
        made: Arrays = {}
        for theirs, ours in names.items():
            shape = shapes[ours]
            if ours == "embeddings.segment.weight":  # a router's text is all of the first segment
                made[ours] = state.take(theirs, ((*state.shape(theirs), 0)[0], *shape[1:]))[:1]
            else:
                made[ours] = state.take(theirs, shape)
        return made

    def _names(self, config: EncoderConfig) -> dict[str, str]:
        names = {f"embeddings.{ours}": f"embeddings.{theirs}" for ours, theirs in _EMBEDDINGS.items()}
        layer = _ALBERT if self.albert else _BERT
        for part in ("weight", "bias"):
            if self.albert:
                names[f"embeddings.project.{part}"] = f"encoder.embedding_hidden_mapping_in.{part}"
            for index in range(1 if config.shared_layers else config.layers):
                place = _ALBERT_LAYER if self.albert else f"encoder.layer.{index}"
                names |= {f"layers.{index}.{ours}.{part}": f"{place}.{theirs}.{part}" for ours, theirs in layer.items()}
        return names


def read(directory: Path) -> Source:
    """An encoder's directory; UnsupportedError for an architecture or a variant that a router does not have."""
    file = directory / "config.json"
    config = strict_json.read(file, _Config, str(file))
    known = ("albert", "bert", "roberta", "xlm-roberta")
    for key, expected, found in (
        ("model_type", known, config.model_type),
        ("hidden_act", tuple(_ACTIVATIONS), config.hidden_act),
        ("position_embedding_type", ("absolute",), config.position_embedding_type),
        ("num_hidden_groups", (1,), config.num_hidden_groups),
        ("inner_group_num", (1,), config.inner_group_num),
    ):
        if found not in expected:
            raise UnsupportedError(mismatch(file, key, " or ".join(map(str, expected)), plain(str(found))))
    if not (directory / "tokenizer.json").is_file():
        hint = "AutoTokenizer.from_pretrained(…).save_pretrained(…) writes it"
        raise BundleError(mismatch(directory / "tokenizer.json", "file", "a file", "nothing", hint))
    return Source(directory, config)


def write(directory: Path, config: msgspec.Struct, tensors: Mapping[str, np.ndarray], tokenizer: bytes) -> None:
    """The files of a router."""
    from safetensors.numpy import save_file

    directory.mkdir()
    save_file({name: np.ascontiguousarray(array) for name, array in tensors.items()}, directory / "model.safetensors")
    (directory / "config.json").write_bytes(msgspec.json.format(msgspec.json.encode(config), indent=2) + b"\n")
    (directory / "tokenizer.json").write_bytes(tokenizer)


def tokenizer(directory: Path) -> bytes:
    """tokenizer.json without the padding and truncation of its own that some bring."""
    from tokenizers import Tokenizer

    loaded: Tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    loaded.no_padding()
    loaded.no_truncation()
    return loaded.to_str(pretty=True).encode() + b"\n"


def task_tokenizer(tasks: tuple[str, ...]) -> bytes:
    """A tokenizer.json that knows the tasks' names and nothing else."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel

    vocabulary = {task: row for row, task in enumerate(tasks)}
    return Tokenizer(WordLevel(vocabulary, unk_token=tasks[0])).to_str(pretty=True).encode() + b"\n"
