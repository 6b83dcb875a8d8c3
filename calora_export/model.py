"""A Hugging Face causal LM whose linear layers have slots.

The architecture stays the library's: attention, rotary embedding, norms and linears are ours, since they meet the
device; everything between them runs as transformers wrote it. Run eagerly it is the reference; traced, the graph.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, fields
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from calora_export import moefied, ops, quiet
from calora_export.adapters import Adapter
from calora_export.bundle import Bundle, read_base_config
from calora_export.compression import Activations, DenseWeight, PackedWeight
from calora_export.errors import BundleError, UnsupportedError, mismatch
from calora_export.heads import head_size, heads_by_layer
from calora_export.moefied import Experts

with quiet.libraries():  # it imports every quantiser that is installed, and these talk
    import transformers
    from transformers import AttentionInterface, AttentionMaskInterface

Weight = DenseWeight | PackedWeight
WeightOf = Callable[[str], Weight]

ATTENTION = "calora"
PROBE = 8


@dataclass(frozen=True)
class Rows:
    """Adapter tensors for one forward pass: site → (down [R, in], up [out, R]), gate [R], recovery bool [R].

    scales: site → what multiplies the layer's input [in] and output [out], its slot between them. routers: name of a
    module → (weight [E, features], bias [2, E]) that weigh experts for each token by the module's input, for all sites
    below it; select [E, R] marks their rows.
    """

    sites: Mapping[str, tuple[Tensor, Tensor]]
    gate: Tensor
    recovery: Tensor
    scales: Mapping[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    routers: Mapping[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    select: Tensor | None = None

    @staticmethod
    def none() -> Rows:
        return Rows({}, torch.ones(0), torch.zeros(0, dtype=torch.bool))

    @staticmethod
    def of(adapter: Adapter) -> Rows:
        """An adapter whose scale is folded into `up`, so that every gate is one."""
        sites = {
            site: (
                torch.from_numpy(np.ascontiguousarray(rows.down)),
                torch.from_numpy(np.ascontiguousarray(rows.up)),
            )
            for site, rows in adapter.sites.items()
        }
        experts = torch.from_numpy(adapter.experts_of_rows())
        routers = {scope: (_tensor(router.weight), _tensor(router.bias)) for scope, router in adapter.routers.items()}
        count = max((len(weight) for weight, _ in routers.values()), default=0)
        select = (torch.arange(count)[:, None] == experts).float() if count else None
        return Rows(
            sites,
            (experts < 0).float(),
            torch.from_numpy(adapter.recovery),
            {site: (_tensor(before), _tensor(after)) for site, (before, after) in adapter.scales.items()},
            routers,
            select,
        )

    def scope(self, name: str) -> str | None:
        """The innermost module with a router that a site, or another such module, is below."""
        return max((scope for scope in self.routers if name.startswith(f"{scope}.")), key=len, default=None)


@dataclass
class _Pass:
    """What one forward pass carries past the library's code: cache, rotary tables, rows."""

    past: list[Tensor] = field(default_factory=list)
    present: list[Tensor] = field(default_factory=list)
    rows: Rows = field(default_factory=Rows.none)
    rope: tuple[Tensor, Tensor] | None = None
    inputs: list[tuple[str, Tensor]] | None = None
    gates: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Held:
    """A weight's tensors as the operators take them (`ops`): what there is not is empty, or None."""

    weight: Tensor
    scale: Tensor
    zero: Tensor | None = None
    codebook: Tensor | None = None
    order: Tensor | None = None

    @staticmethod
    def of(weight: Weight) -> Held:
        if isinstance(weight, PackedWeight):
            scale = np.asarray(weight.scale, dtype=np.float32)
            rest = (None if part is None else _tensor(part) for part in (weight.zero, weight.codebook, weight.order))
            return Held(_tensor(weight.q), _tensor(scale), *rest)
        return Held(torch.from_numpy(np.array(weight.values, dtype=np.float32)), torch.zeros(0))

    def register(self, module: nn.Module) -> None:
        """Make them buffers of a module."""
        for part in fields(self):
            module.register_buffer(part.name, getattr(self, part.name))


def _tensor(array: np.ndarray) -> Tensor:
    return torch.from_numpy(np.require(array, requirements="W"))  # torch warns of a mapped file, which is read-only


class Linear(nn.Module):
    """Stands where the library's nn.Linear stood: weight [out, in] dense or packed, bias [out] or empty."""

    def __init__(
        self, site: str, held: Held, bias: Tensor, current: _Current, own: Activations | None, experts: Experts | None
    ) -> None:
        """own: how the base itself reads x, where that is not for a recipe to say."""
        super().__init__()
        self.own: Activations | None = own
        self.site = site
        self.out_features, self.in_features = held.weight.shape
        held.register(self)
        self.register_buffer("bias", bias)
        self.top_k = 0 if experts is None else experts.top_k
        for part in moefied.PARTS if experts is not None else ():
            self.register_buffer(part, _tensor(getattr(experts, part)))
        self.group = Group((self,), current, "float")

    def forward(self, x: Tensor) -> Tensor:
        return self.group.output(x, self.site)

    def mask(self, x: Tensor) -> Tensor | None:
        """Which neurons compute, where the layer was MoEfied."""
        if not self.top_k:
            return None
        return ops.experts(x, *(self.get_buffer(part) for part in ("hidden", "scores", "labels")), self.top_k)


class Group:
    """Linear layers that share an input: the first call computes all of them, the others take their share."""

    def __init__(self, members: tuple[Linear, ...], current: _Current, activations: Activations) -> None:
        self.members, self.activations = members, activations
        self.sites = tuple(member.site for member in members)
        self._current = current
        self._seen: Tensor | None = None
        self._outputs: list[Tensor] = []

    def output(self, x: Tensor, site: str) -> Tensor:
        """The output of one member; x is the object that every member of the group is called with."""
        if self._current.value.inputs is not None:
            self._current.value.inputs.append((site, x))
        if x is not self._seen:
            self._seen, self._outputs = x, self._compute(x)
        y = self._outputs[self.sites.index(site)]
        if site == self.sites[-1]:
            self._seen, self._outputs = None, []
        return y

    def _compute(self, x: Tensor) -> list[Tensor]:
        """All members at once, but each by itself that an adapter may scale."""
        scales = self._current.value.rows.scales
        together = [member for member in self.members if member.site not in scales]
        made = dict(zip((member.site for member in together), self._linears(x, together), strict=True))
        for member in self.members:
            if member.site in scales:
                before, after = scales[member.site]
                made[member.site] = self._linears(x * before, [member])[0] * after
        return [made[site] for site in self.sites]

    def _linears(self, x: Tensor, members: Sequence[Linear]) -> list[Tensor]:
        if not members:
            return []
        run = self._current.value
        rows, sites = run.rows, [member.site for member in members]
        slotted = [i for i, site in enumerate(sites) if site in rows.sites]
        scope = rows.scope(sites[0]) if slotted else None

        def each(name: str) -> list[Tensor]:
            return [member.get_buffer(name) for member in members]

        return ops.linears(
            x,
            each("weight"),
            each("scale"),
            each("bias"),
            slotted,
            [rows.sites[sites[i]][0] for i in slotted],
            [rows.sites[sites[i]][1] for i in slotted],
            rows.gate if scope is None else run.gates[scope],
            rows.recovery,
            self.activations,
            each("zero"),
            each("codebook"),
            each("order"),
            [member.mask(x) for member in members],
        )


class Embedding(nn.Module):
    """The token table, dense or packed, times a constant that some families apply (1 for most)."""

    def __init__(self, held: Held, factor: float) -> None:
        super().__init__()
        held.register(self)
        self.factor = factor

    def forward(self, ids: Tensor) -> Tensor:
        parts = [self.get_buffer(name) for name in ("weight", "scale", "zero", "codebook")]
        rows = ops.embedding(ids, *parts)
        return rows if self.factor == 1.0 else rows * self.factor


class RMSNorm(nn.Module):
    def __init__(self, weight: Tensor, eps: float) -> None:
        super().__init__()
        self.register_buffer("weight", weight)
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return ops.rms_norm(x, self.get_buffer("weight"), self.eps)


class RotaryTable(nn.Module):
    """Gives every position's cosines and sines at once, [context, rotary / 2]: attention picks its own rows."""

    def __init__(self, tables: Mapping[str | None, tuple[Tensor, Tensor]]) -> None:
        super().__init__()
        self.names = {kind: f"{kind or 'all'}" for kind in tables}
        for kind, (cos, sin) in tables.items():
            self.register_buffer(f"cos_{self.names[kind]}", cos)
            self.register_buffer(f"sin_{self.names[kind]}", sin)

    def forward(
        self, x: Tensor, position_ids: Tensor | None = None, layer_type: str | None = None
    ) -> tuple[Tensor, Tensor]:
        name = self.names[layer_type]
        return self.get_buffer(f"cos_{name}"), self.get_buffer(f"sin_{name}")


class _Current:
    """Holds the pass that is running; a plain object, so that modules can share it without owning it."""

    def __init__(self) -> None:
        self.value = _Pass()


@dataclass(frozen=True)
class Shape:
    """What a runtime must know of the model; heads and kv_heads by layer."""

    heads: tuple[int, ...]
    kv_heads: tuple[int, ...]
    head_dim: int
    hidden: int
    vocab: int
    context: int

    @property
    def layers(self) -> int:
        return len(self.kv_heads)


class SlotModel(nn.Module):
    """The compressed base with slots. All tensors fp32 unless packed; batch 1."""

    def __init__(self, lm: transformers.PreTrainedModel, current: _Current, shape: Shape) -> None:
        super().__init__()
        self.lm, self.shape, self.current = lm, shape, current
        self.groups: tuple[tuple[str, ...], ...] = ()
        self._modeling = sys.modules[type(lm).__module__]

    def forward(
        self, ids: Tensor, past: list[Tensor], rows: Rows, last_only: bool = False
    ) -> tuple[Tensor, list[Tensor]]:
        """ids [1, S], past 2·layers tensors [1, KV, P, D] → logits [1, S or 1, vocab], present [1, KV, P + S, D]."""
        run = _Pass(past=past, rows=rows)
        return self.logits(ids, run, last_only), run.present

    def logits(self, ids: Tensor, run: _Pass, last_only: bool) -> Tensor:
        """One pass through the library's own forward, which scales or caps its logits where the family does."""

        def remember(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1) -> tuple[Tensor, Tensor]:
            run.rope = (cos, sin)
            return q, k

        self.current.value = run
        positions = torch.arange(ids.shape[1]).unsqueeze(0)
        with patch.object(self._modeling, "apply_rotary_pos_emb", remember), self._weighing(run):
            out = self.lm(
                input_ids=ids,
                position_ids=positions,
                use_cache=False,
                logits_to_keep=int(last_only),
                calora=run,
            )
        return out.logits

    @contextmanager
    def _weighing(self, run: _Pass) -> Iterator[None]:
        """While a pass runs, read the inputs of the modules that have token routers."""

        def hook(scope: str) -> Callable[..., None]:
            def weigh(module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
                x = args[0] if args else kwargs["hidden_states"]
                assert run.rows.select is not None
                outer = run.rows.scope(scope)  # ran before: what it weighs, it weighs here too
                gate = run.rows.gate if outer is None else run.gates[outer]
                run.gates[scope] = ops.token_gates(x, *run.rows.routers[scope], run.rows.select, gate)

            return weigh

        with ExitStack() as stack:
            for scope in run.rows.routers:
                module = self.lm.get_submodule(scope)
                stack.callback(module.register_forward_pre_hook(hook(scope), with_kwargs=True).remove)
            yield

    def inputs(self, ids: Tensor) -> list[tuple[str, Tensor]]:
        """Which linear layers are called, in order, each with what it reads, [1, S, in]."""
        seen: list[tuple[str, Tensor]] = []
        with torch.no_grad():
            self.logits(ids, _Pass(past=self.empty_cache(), inputs=seen), True)
        return seen

    def empty_cache(self) -> list[Tensor]:
        return [torch.zeros(1, heads, 0, self.shape.head_dim) for heads in self.shape.kv_heads for _ in range(2)]


def _attend(
    module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, **options: object
) -> tuple[Tensor, None]:
    """The attention that transformers calls; its keyword arguments are the library's protocol, `calora` is ours."""
    run = options["calora"]
    assert isinstance(run, _Pass)
    cos, sin = run.rope if run.rope is not None else (torch.zeros(0, 0), torch.zeros(0, 0))
    layer = len(run.present) // 2
    out, key, value = ops.attention(
        q,
        k,
        v,
        run.past[2 * layer],
        run.past[2 * layer + 1],
        cos,
        sin,
        float(options["scaling"]),  # type: ignore[arg-type]
        int(options.get("sliding_window") or 0),  # type: ignore[call-overload]
        float(options.get("softcap") or 0.0),  # type: ignore[arg-type]
    )
    run.present += [key, value]
    run.rope = None
    return out.unflatten(-1, (q.shape[1], -1)), None


AttentionInterface.register(ATTENTION, _attend)
AttentionMaskInterface.register(ATTENTION, lambda *args, **options: None)


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
    current = _Current()
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
    current: _Current,
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
