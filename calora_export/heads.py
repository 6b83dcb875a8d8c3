"""How many heads each layer's attention has, also where pruning took some."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Protocol

from calora_export.errors import BundleError, UnsupportedError, mismatch

if TYPE_CHECKING:
    import transformers

PROJECTIONS = (".q_proj", ".k_proj", ".v_proj", ".o_proj")


class Sized(Protocol):
    """A linear layer, as far as its shape goes."""

    out_features: int
    in_features: int


def head_size(config: transformers.PretrainedConfig) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def heads_by_layer(
    lm: transformers.PreTrainedModel, linears: Mapping[str, Sized], structured: Collection[str]
) -> list[tuple[int, int]]:
    """Query and key-value heads of every layer. Where pruning took some, LLM-Pruner (arXiv 2305.11627) keeps each as
    wide as it was, and so do we count them; the library's own attention is told."""
    config, width = lm.config, head_size(lm.config)
    found = [(config.num_attention_heads, config.num_key_value_heads)] * config.num_hidden_layers
    for owner in sorted({site.rpartition(".")[0] for site in structured if site.endswith(PROJECTIONS)}):
        if missing := [name for name in PROJECTIONS if owner + name not in linears]:
            raise UnsupportedError(mismatch("base/", owner, f"{missing[0][1:]}, which tells its heads", "none"))
        query, key, value, output = (linears[owner + name] for name in PROJECTIONS)
        widths = query.out_features, key.out_features, value.out_features, output.in_features
        heads, kv_heads = widths[0] // width, widths[1] // width
        whole = tuple(count * width for count in (heads, kv_heads, kv_heads, heads))
        if not kv_heads or heads % kv_heads or widths != whole:
            wanted = f"q and o of a multiple of the {width} features that k and v share a head of"
            raise BundleError(mismatch("base/", f"{owner}: q, k, v, o", wanted, ", ".join(map(str, widths))))
        attention = lm.get_submodule(owner)
        attention.num_key_value_groups = heads // kv_heads  # type: ignore[assignment]  # torch: tensors and modules
        found[attention.layer_idx] = (heads, kv_heads)  # type: ignore[index]
    return found
