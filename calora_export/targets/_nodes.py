"""Reading a traced graph: what every lowering asks of its nodes."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TypeVar

import numpy as np
import torch
from msgspec import UNSET, UnsetType
from torch.fx import Node

from calora_export.compression import fewest_bits
from calora_export.errors import UnsupportedError, mismatch
from calora_export.graph import Graph
from calora_export.package import Routed, SlotTensor

Handler = TypeVar("Handler")
ATEN, CALORA = torch.ops.aten, torch.ops.calora
VIEWS = (ATEN.view.default, ATEN.reshape.default, ATEN.unflatten.int)
W8A8 = "int8_absmax"  # the `activations` of layers that round x themselves
SAME = (ATEN.to.dtype, ATEN.contiguous.default, ATEN.dropout.default)
"""Casts to fp32 of what is fp32, clones, dropout at inference."""


@dataclass(frozen=True)
class Layout:
    """How a weight is held: what is alike in all of these can be one matmul. group is 0 for a dense weight."""

    bits: int
    group: int
    biased: bool
    asymmetric: bool
    codebook: bytes
    order: bytes


@dataclass(frozen=True)
class Weight:
    """A linear layer's or the token table's weight: values [out, in], scale [out, groups] or empty, bias or empty.

    weight = (values - zero) · scale, zero int8 [out, groups] or None for 0; or codebook[values] · scale, codebook fp32
    [2^bits]. order int64 [in]: which feature of the input each column is for, None for their own order.
    """

    name: str
    values: torch.Tensor
    scale: torch.Tensor
    bias: torch.Tensor
    zero: torch.Tensor | None = None
    codebook: torch.Tensor | None = None
    order: torch.Tensor | None = None

    @cached_property
    def bits(self) -> int:
        """0 for a dense weight, else the fewest bits of 4 and 8 that hold its integers and zero points."""
        if self.scale.numel() == 0:
            return 0
        if self.codebook is not None:
            return len(self.codebook).bit_length() - 1
        return fewest_bits(self.values.numpy(), None if self.zero is None else self.zero.numpy())

    @property
    def layout(self) -> Layout:
        """What decides whether this and another weight can be one matmul."""
        group = self.values.shape[1] // self.scale.shape[1] if self.bits else 0
        codebook, order = (b"" if part is None else part.numpy().tobytes() for part in (self.codebook, self.order))
        return Layout(self.bits, group, self.bias.numel() > 0, self.zero is not None, codebook, order)

    def packed(self) -> np.ndarray:
        """uint8 [out, groups, group · bits / 8], the first value in the low nibble; values that are no positions in a
        codebook are offset by 2^(bits-1)."""
        offset = 0 if self.codebook is not None else 1 << (self.bits - 1)
        unsigned = (self.values.numpy().astype(np.int16) + offset).astype(np.uint8)
        grouped = unsigned.reshape(unsigned.shape[0], -1, self.layout.group)
        return grouped if self.bits == 8 else grouped[..., 0::2] | (grouped[..., 1::2] << 4)


def calls(graph: Graph) -> list[Node]:
    """The operators, in the order in which they are computed."""
    return [found for found in graph.program.graph.nodes if found.op == "call_function"]


def results(graph: Graph) -> list[Node]:
    """What the program returns: logits, then keys and values by layer."""
    return [node(arg) for arg in list(graph.program.graph.nodes)[-1].args[0]]


def weights(graph: Graph, roles: dict[str, str], linears: Node) -> list[Weight]:
    """The weights of a group of linear layers."""
    parts = [items(arg) for arg in (*linears.args[1:4], *linears.args[10:13])]
    return [_weight(graph, roles, arguments) for arguments in zip(*parts, strict=True)]


def masks(linears: Node) -> list[Node | None]:
    """Of each member of a group, which of its neurons compute: None for all."""
    return [None if mask is None else node(mask) for mask in items(linears.args[13])]


def table(graph: Graph, roles: dict[str, str], embedding: Node) -> Weight:
    """The weight of the token table."""
    values, scale, *rest = embedding.args[1:]
    return replace(_weight(graph, roles, (values, scale, None, *rest)), bias=torch.zeros(0))


def _weight(graph: Graph, roles: dict[str, str], arguments: Sequence[object]) -> Weight:
    """From values, scale, bias, zero, codebook and order, where those at the end may be left out or None."""
    tensors = [None if argument is None else graph.tensors[roles[node(argument).name]] for argument in arguments]
    return Weight(short(roles[node(arguments[0]).name]), *tensors)  # type: ignore[arg-type]


def live(outputs: Sequence[Node], operands: Callable[[Node], Sequence[Node]]) -> set[Node]:
    """The operators that the outputs need, given what a lowering reads of each."""
    found: set[Node] = set()
    pending = list(outputs)
    while pending:
        needed = pending.pop()
        if needed not in found and needed.op == "call_function":
            found.add(needed)
            pending.extend(operands(needed))
    return found


def handler(target: str, handlers: Mapping[object, Handler], found: Node) -> Handler:
    """What lowers a node; UnsupportedError for an operator that the target does not lower."""
    if found.target not in handlers:
        wanted = "one that this target lowers"
        raise UnsupportedError(mismatch(target, "operator", wanted, f"{found.target} in the model's graph"))
    return handlers[found.target]


def node(arg: object) -> Node:
    assert isinstance(arg, Node), arg
    return arg


def integer(arg: object) -> int:
    assert isinstance(arg, int), arg
    return arg


def real(arg: object) -> float:
    assert isinstance(arg, float), arg
    return arg


def items(arg: object) -> Sequence[object]:
    assert isinstance(arg, (list, tuple)), arg
    return arg


def short(name: str) -> str:
    """The Hugging Face name of a tensor in the traced module."""
    return name.removeprefix("model.lm.")


def viewed(view: Node) -> Node:
    """What a chain of views looks at."""
    while view.target in VIEWS:
        view = node(view.args[0])
    return view


def heads(arg: object) -> tuple[Node, bool]:
    """Follow [B, H, S, D] back over its transpose and view; says whether what it found is [B, S, H·D]."""
    found = node(arg)
    if found.target is not ATEN.transpose.int or tuple(found.args[1:]) != (1, 2):
        return found, False
    before = node(found.args[0])
    source = viewed(before)
    return (source, True) if source.meta["val"].dim() == 3 else (before, False)


def head_counts(attention: Node) -> tuple[int, int]:
    """Query and key-value heads of an attention."""
    query, key = (node(arg).meta["val"].shape[1] for arg in attention.args[:2])
    return integer(query), integer(key)


def slot_sites(roles: dict[str, str], linears: Node) -> list[tuple[int, str]]:
    """Which members of a group have slots: index in the group, site."""
    members = [integer(index) for index in items(linears.args[4])]
    sites = [roles[node(down).name].removeprefix("down.") for down in items(linears.args[5])]
    return list(zip(members, sites, strict=True))


def slot_tensors(graph: Graph) -> tuple[SlotTensor, ...]:
    """Every slot in the order in which adapter files hold it: group by group, first their downs, then their ups."""
    roles, sizes = graph.roles(), {slot.site: slot for slot in graph.slots}
    tensors: list[SlotTensor] = []
    for node in calls(graph):
        sites = [site for _, site in slot_sites(roles, node)] if node.target is CALORA.linears.default else []
        prefix = "+".join([*sites[:1], *(site.split(".")[-1] for site in sites[1:])])
        for i, site in enumerate(sites):
            slot = sizes[site]
            tensors.append(SlotTensor(site, f"{prefix}.down", i, len(sites), f"{site}.up", slot.inputs, slot.outputs))
    return tuple(tensors)


def extras(graph: Graph) -> tuple[tuple[str, ...] | UnsetType, Routed | UnsetType]:
    """What package.json says of a graph's extras: `scaled` and `routed` of its slots."""
    found = graph.extras
    routed = Routed(found.scopes, found.experts, found.features) if found.scopes else UNSET
    return found.scaled or UNSET, routed


def named_extra(role: str) -> str:
    """`before.<site>` → `<site>.before`: what an adapter's tensor for a graph's input is called."""
    part, _, owner = role.partition(".")
    return f"{owner}.{part}" if owner else part


def member(getitem: Node) -> tuple[Node, int]:
    """The node and the position that a getitem reads."""
    assert getitem.target is operator.getitem
    return node(getitem.args[0]), integer(getitem.args[1])
