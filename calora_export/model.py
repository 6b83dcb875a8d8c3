"""A Hugging Face causal LM whose linear layers have slots.

The architecture stays the library's: attention, rotary embedding, norms and linears are ours, since they meet the
device; everything between them runs as transformers wrote it. Run eagerly it is the reference; traced, the graph.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, fields
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor, nn

from calora_export import moefied, ops, quiet
from calora_export.adapters import Adapter
from calora_export.compression import Activations, DenseWeight, PackedWeight
from calora_export.moefied import Experts

with quiet.libraries():  # it imports every quantiser that is installed, and these talk
    import transformers
    from transformers import AttentionInterface, AttentionMaskInterface

Weight = DenseWeight | PackedWeight
WeightOf = Callable[[str], Weight]

ATTENTION = "calora"


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
        self, site: str, held: Held, bias: Tensor, current: Current, own: Activations | None, experts: Experts | None
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

    def __init__(self, members: tuple[Linear, ...], current: Current, activations: Activations) -> None:
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


class Current:
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

    def __init__(self, lm: transformers.PreTrainedModel, current: Current, shape: Shape) -> None:
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
