"""The model as one traced program: what a target gets to see."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.export import Dim

from calora_export.model import Rows, Shape, SlotModel


@dataclass(frozen=True)
class Slot:
    """A site's slot: down [R, in], up [out, R]; R is one number for the whole graph."""

    site: str
    inputs: int
    outputs: int


@dataclass(frozen=True)
class Extras:
    """What adapters of a bundle need beside rows: sites that they scale; modules by whose input they weigh experts for
    each token, and how many experts; features: the width of these inputs."""

    scaled: tuple[str, ...] = ()
    scopes: tuple[str, ...] = ()
    experts: int = 0
    features: int = 0

    def roles(self) -> list[str]:
        """Of the inputs that they add, in their order."""
        scales = [f"{part}.{site}" for part in ("before", "after") for site in self.scaled]
        routers = [f"{part}.{scope}" for part in ("router", "router_bias") for scope in self.scopes]
        return [*scales, *routers, *(["select"] if self.scopes else [])]

    def sizes(self, slots: Sequence[Slot]) -> dict[str, tuple[int, ...]]:
        """Role → shape of those that do not grow with the rank, in their order."""
        linears = {slot.site: slot for slot in slots}
        shapes: dict[str, tuple[int, ...]] = {f"before.{site}": (linears[site].inputs,) for site in self.scaled}
        shapes |= {f"after.{site}": (linears[site].outputs,) for site in self.scaled}
        shapes |= {f"router.{scope}": (self.experts, self.features) for scope in self.scopes}
        return shapes | {f"router_bias.{scope}": (2, self.experts) for scope in self.scopes}


NOTHING = Extras()


@dataclass(frozen=True)
class Graph:
    """A traced model. `program` takes ids [1, S], past, downs, ups, gate [R], recovery [R] and returns logits, present.

    Behind them, where an adapter of the bundle has such: the scales of `scaled` sites, first those of all inputs; the
    routers of `scopes`, first all weights [experts, features], then all biases [2, experts]; and select [experts, R].

    groups are the sites that share an input, in the order in which the model calls them, head included. adapters, by
    id, are for targets that make each a part of the model; their scales are folded into `up`.
    """

    program: torch.export.ExportedProgram
    shape: Shape
    slots: tuple[Slot, ...]
    groups: tuple[tuple[str, ...], ...]
    last_only: bool
    recovery: bool
    tensors: Mapping[str, Tensor]
    adapters: Mapping[str, Rows] = field(default_factory=dict)
    extras: Extras = NOTHING

    def roles(self) -> dict[str, str]:
        """Placeholder → role: `ids`, `past.3`, `down.<site>`, `up.<site>`, `gate`, `recovery` or a tensor's name."""
        signature = self.program.graph_signature
        held = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
        constants = dict(signature.inputs_to_lifted_tensor_constants)
        sites = [slot.site for slot in self.slots]
        names = ["ids", *(f"past.{i}" for i in range(2 * self.shape.layers))]
        names += [f"down.{site}" for site in sites] + [f"up.{site}" for site in sites] + ["gate", "recovery"]
        names += self.extras.roles()
        roles: dict[str, str] = {}
        for spec in signature.input_specs:
            name = spec.arg.name
            roles[name] = held.get(name) or constants.get(name) or names[len(roles) - sum(n in held for n in roles)]
        return roles


class _Flat(nn.Module):
    def __init__(self, model: SlotModel, sites: tuple[str, ...], last_only: bool, extras: Extras) -> None:
        super().__init__()
        self.model, self.sites, self.last_only, self.extras = model, sites, last_only, extras

    def forward(
        self,
        ids: Tensor,
        past: list[Tensor],
        downs: list[Tensor],
        ups: list[Tensor],
        gate: Tensor,
        recovery: Tensor,
        extras: Sequence[Tensor] = (),
    ) -> tuple[Tensor, list[Tensor]]:
        given = dict(zip(self.extras.roles(), extras, strict=True))
        rows = Rows(
            dict(zip(self.sites, zip(downs, ups, strict=True), strict=True)),
            gate,
            recovery,
            {site: (given[f"before.{site}"], given[f"after.{site}"]) for site in self.extras.scaled},
            {scope: (given[f"router.{scope}"], given[f"router_bias.{scope}"]) for scope in self.extras.scopes},
            given.get("select"),
        )
        return self.model(ids, past, rows, self.last_only)


def trace(
    model: SlotModel, slots: tuple[Slot, ...], *, last_only: bool, recovery: bool, extras: Extras = NOTHING
) -> Graph:
    """Trace with a dynamic sequence. Rank and cache length are free without being traced: only `linears` and
    `attention` see them, and these stay whole. recovery says whether any row may be non-linear.
    """
    new, cached, rank = 4, 3, 5
    s = model.shape
    ids = torch.zeros(1, new, dtype=torch.long)
    past = [torch.zeros(1, heads, cached, s.head_dim) for heads in s.kv_heads for _ in range(2)]
    downs = [torch.zeros(rank, slot.inputs) for slot in slots]
    ups = [torch.zeros(slot.outputs, rank) for slot in slots]
    shapes = (
        {1: Dim("sequence", min=1)},
        [None] * len(past),
        [None] * len(downs),
        [None] * len(ups),
        None,
        None,
    )
    more = _examples(slots, extras, rank)
    flat = _Flat(model, tuple(slot.site for slot in slots), last_only, extras).eval()
    example = (ids, past, downs, ups, torch.zeros(rank), torch.zeros(rank, dtype=torch.bool))
    if more:
        example, shapes = (*example, more), (*shapes, [None] * len(more))
    with torch.no_grad():
        program = torch.export.export(flat, example, dynamic_shapes=shapes, strict=False)
    tensors = {**program.state_dict, **program.constants}
    return Graph(program, s, slots, model.groups, last_only, recovery, tensors, extras=extras)


def _examples(slots: Sequence[Slot], extras: Extras, rank: int) -> list[Tensor]:
    """Tensors of the sizes that the extras have, in their order."""
    fixed = [torch.zeros(shape) for shape in extras.sizes(slots).values()]
    return [*fixed, *([torch.zeros(extras.experts, rank)] if extras.scopes else [])]
