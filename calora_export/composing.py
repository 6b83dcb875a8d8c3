"""The bundle's base as a model with slots: transformers builds it, ours take the place of what meets the device.

What a replacement computes is compared with what the library's own module did, by asking it; names are not trusted.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from calora_export import quiet
from calora_export.bundle import Bundle, read_base_config
from calora_export.compression import Activations
from calora_export.errors import BundleError, UnsupportedError, mismatch
from calora_export.heads import head_size, heads_by_layer
from calora_export.model import (
    ATTENTION,
    Current,
    Embedding,
    Group,
    Held,
    Linear,
    RMSNorm,
    RotaryTable,
    Rows,
    Shape,
    SlotModel,
    WeightOf,
)

with quiet.libraries():  # it imports every quantiser that is installed, and these talk
    import transformers

PROBE = 8  # tokens


def compose(bundle: Bundle, weight_of: WeightOf, *, context: int, activations: Activations = "float") -> SlotModel:
    """Build the bundle's base with slots on every linear layer.

    weight_of gives the weight of a module by its name: as stored for the source reference, re-represented for a target.
    context is the number of positions that the rotary tables cover, at most what the model was made for.
    """
    config = _read_config(bundle)
    context = min(context, config.max_position_embeddings)
    _check_rotary(config, context)
    config._attn_implementation = ATTENTION
    with _parameters_on_meta():
        lm = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation=ATTENTION)
    lm.requires_grad_(False).eval()
    current = Current()
    tied = bool(config.tie_word_embeddings)
    linears = _replace_weights(lm, bundle, weight_of, current, tied)
    left = [name for name, tensor in lm.named_parameters() if tensor.is_meta]
    if left:
        raise BundleError(mismatch("base/", left[0], "a tensor of that name", "none"))
    heads = heads_by_layer(lm, linears, bundle.structured)
    expected = _library_logits(lm)
    _replace_norms(lm)
    _replace_rotary(lm, context)
    model = SlotModel(lm, current, _shape(config, heads, context))
    _check_same(model, expected)
    _group_by_input(model, linears, activations)
    return model


def _read_config(bundle: Bundle) -> transformers.PretrainedConfig:
    model_type = read_base_config(bundle.path / "base", "base").model_type
    wanted = f"a causal LM that transformers {transformers.__version__} knows"
    if model_type in transformers.models.auto.modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        config = transformers.AutoConfig.from_pretrained(bundle.path / "base", local_files_only=True)
        causal = transformers.MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
        if causal._supports_attention_backend:  # type: ignore[attr-defined]
            return config
        wanted = "an architecture whose attention can be exchanged"
    raise UnsupportedError(mismatch("base/config.json", "model_type", wanted, model_type))


def _library_logits(lm: transformers.PreTrainedModel) -> Tensor:
    """Logits [1, PROBE, vocab] of the library's own attention, rotary embedding and norms."""
    lm.set_attn_implementation("eager")
    try:
        with torch.no_grad():
            logits = lm(input_ids=torch.arange(PROBE).unsqueeze(0), use_cache=False).logits
    except RuntimeError as error:  # of layers with widths of their own
        found = str(error).partition("\n")[0]
        raise BundleError(mismatch("base/", "widths", "layers that fit each other", found)) from error
    lm.set_attn_implementation(ATTENTION)
    return logits


def _check_same(model: SlotModel, expected: Tensor) -> None:
    """Refuse an architecture that is more than what ours replaces, such as interleaved rotary embedding."""
    with torch.no_grad():
        logits, _ = model(torch.arange(PROBE).unsqueeze(0), model.empty_cache(), Rows.none())
    error = float((logits - expected).abs().max() / expected.abs().max().clamp_min(1e-30))
    if not error < 1e-3:
        wanted = "half-split rotary embedding and plain softmax attention"
        found = f"{model.lm.config.model_type}, whose logits would be off by {error:.1%}"
        raise UnsupportedError(mismatch("base/config.json", "model_type", wanted, found))


def _check_rotary(config: transformers.PretrainedConfig, context: int) -> None:
    rope = getattr(config, "rope_parameters", None) or {}
    kinds = [rope] if "rope_type" in rope else [r for r in rope.values() if isinstance(r, dict)]
    for kind in kinds:
        if kind.get("rope_type") in ("dynamic", "longrope"):
            limit = kind.get("original_max_position_embeddings") or config.max_position_embeddings
            if context > limit:
                raise UnsupportedError(
                    mismatch("recipe", "context", f"at most {limit} for rope_type {kind['rope_type']}", context)
                )


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Parameters take no memory until they are loaded; buffers, which checkpoints do not hold, are computed."""
    register = nn.Module.register_parameter

    def on_meta(module: nn.Module, name: str, param: nn.Parameter | None) -> None:
        if param is not None and not param.is_meta:
            param = nn.Parameter(param.to("meta"), requires_grad=False)
        register(module, name, param)

    with patch.object(nn.Module, "register_parameter", on_meta):
        yield


def _replace_weights(
    lm: transformers.PreTrainedModel,
    bundle: Bundle,
    weight_of: WeightOf,
    current: Current,
    tied: bool,
) -> dict[str, Linear]:
    """Put ours in the place of every nn.Linear and the token table; load what is left. Returns the linears by site."""
    linears: dict[str, Linear] = {}
    table: Held | None = None
    head = next((name for name, module in lm.named_modules() if module is lm.get_output_embeddings()), "lm_head")
    for name, module in list(lm.named_modules()):
        if isinstance(module, nn.Embedding):
            if module is not lm.get_input_embeddings():
                raise UnsupportedError(mismatch("base/", name, "no embedding but that of the tokens", "another one"))
            table = Held.of(weight_of(name))
            if table.order is not None:
                raise UnsupportedError(mismatch("base/", name, "columns in order", "a table in activation order"))
            lm.set_submodule(name, Embedding(table, _factor(module)))
        elif isinstance(module, nn.Linear):
            if not (tied and name == head):
                weight = weight_of(name)
                held, own = Held.of(weight), weight.activations
            elif table is None:
                raise UnsupportedError(mismatch("base/config.json", "tie_word_embeddings", "a token table", "none"))
            else:
                held, own = table, None
            expected, found = [module.out_features, module.in_features], list(held.weight.shape)
            if found != expected and name not in bundle.structured:
                hint = "a base whose layers have widths of their own says so: base.compression, pattern structured"
                raise BundleError(mismatch("base/", f"{name}.weight", expected, found, hint))
            bias = torch.zeros(0)
            if module.bias is not None:
                bias = torch.from_numpy(np.array(bundle.base.float32(f"{name}.bias")))
                if len(bias) != found[0]:
                    raise BundleError(mismatch("base/", f"{name}.bias", found[:1], list(bias.shape)))
            linears[name] = Linear(name, held, bias, current, own, bundle.experts(name))
            lm.set_submodule(name, linears[name])
    for name, param in list(lm.named_parameters()):
        if param.is_meta and name in bundle.base.names():
            values = torch.from_numpy(np.array(bundle.base.float32(name)))
            if values.shape != param.shape:
                raise BundleError(mismatch("base/", name, list(param.shape), list(values.shape)))
            owner, _, leaf = name.rpartition(".")
            setattr(lm.get_submodule(owner), leaf, nn.Parameter(values, requires_grad=False))
    return linears


def _factor(table: nn.Embedding) -> float:
    """What the library multiplies the token rows by (Gemma: √hidden), found by asking the module itself."""
    table.padding_idx = None
    table.weight = nn.Parameter(torch.ones(1, 1), requires_grad=False)
    return float(table(torch.zeros(1, dtype=torch.long)))


def _replace_norms(lm: nn.Module) -> None:
    """Put the whole operator in the place of every module that computes it, as a probe shows; names are not trusted."""
    for name, module in list(lm.named_modules()):
        params = dict(module.named_parameters())
        eps = [value for value in vars(module).values() if isinstance(value, float)]
        if set(params) != {"weight"} or params["weight"].dim() != 1 or params["weight"].is_meta or len(eps) != 1:
            continue
        weight = params["weight"].detach()
        probe = torch.linspace(-2, 3, weight.numel()).unsqueeze(0) + 0.1
        for candidate in (weight, 1 + weight):
            if torch.allclose(module(probe), F.rms_norm(probe, probe.shape[1:], candidate, eps[0]), atol=1e-5):
                lm.set_submodule(name, RMSNorm(candidate.clone(), eps[0]))
                break


def _replace_rotary(lm: transformers.PreTrainedModel, context: int) -> None:
    for name, module in list(lm.named_modules()):
        if not type(module).__name__.endswith("RotaryEmbedding"):
            continue
        kinds = sorted(set(getattr(lm.config, "layer_types", None) or [])) if _takes_layer_type(module) else [None]
        positions, x = torch.arange(context).unsqueeze(0), torch.zeros(1)
        tables = {}
        for kind in kinds:
            cos, sin = module(x, positions) if kind is None else module(x, positions, kind)
            half = cos.shape[-1] // 2
            tables[kind] = (cos[0, :, :half].contiguous(), sin[0, :, :half].contiguous())
        lm.set_submodule(name, RotaryTable(tables))


def _takes_layer_type(module: nn.Module) -> bool:
    return "layer_type" in inspect.signature(module.forward).parameters


def _group_by_input(model: SlotModel, linears: Mapping[str, Linear], activations: Activations) -> None:
    """Run one token and see which linear layers are called, one after the other, with the very same tensor."""
    seen = model.inputs(torch.zeros(1, 1, dtype=torch.long))
    runs: list[tuple[Tensor, list[str]]] = []
    for site, x in seen:
        if runs and runs[-1][0] is x and linears[runs[-1][1][-1]].own == linears[site].own:
            runs[-1][1].append(site)
        else:
            runs.append((x, [site]))
    for _, sites in runs:
        own = linears[sites[0]].own
        group = Group(tuple(linears[site] for site in sites), model.current, own or activations)
        for member in group.members:
            member.group = group
    model.groups = tuple(tuple(sites) for _, sites in runs)


def _shape(config: transformers.PretrainedConfig, heads: Sequence[tuple[int, int]], context: int) -> Shape:
    return Shape(
        heads=tuple(query for query, _ in heads),
        kv_heads=tuple(key for _, key in heads),
        head_dim=head_size(config),
        hidden=config.hidden_size,
        vocab=config.vocab_size,
        context=context,
    )
