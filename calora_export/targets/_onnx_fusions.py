"""Which operators of a traced graph become one of ONNX Runtime's, or of ours."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from torch.fx import Node

from calora_export.targets import _nodes
from calora_export.targets._nodes import ATEN, CALORA, Weight


def norms_after_add(calls: Sequence[Node]) -> dict[Node, Node]:
    """Residual additions whose sum goes through an RMS norm: add → norm."""
    fused: dict[Node, Node] = {}
    for node in calls:
        source = node.args[0] if node.target is CALORA.rms_norm.default else None
        if isinstance(source, Node) and source.target is ATEN.add.Tensor:
            shapes = [arg.meta["val"].shape for arg in source.args if isinstance(arg, Node)]
            if len(shapes) == 2 and shapes[0] == shapes[1]:
                fused.setdefault(source, node)
    return fused


def packed_projections(calls: Sequence[Node], weights: Callable[[Node], Sequence[Weight]]) -> dict[Node, Node]:
    """Attention nodes whose q, k and v are the three outputs of one `linears`, which becomes one matmul: attention →
    linears."""
    packed: dict[Node, Node] = {}
    for node in calls:
        if node.target is not CALORA.attention.default:
            continue
        sources = [_nodes.heads(arg) for arg in node.args[:3]]
        if not all(flat and source.target is operator.getitem for source, flat in sources):
            continue
        members = [_nodes.member(source) for source, _ in sources]
        linears = members[0][0]
        slots = len(_nodes.items(linears.args[4]))
        in_order = members == [(linears, 0), (linears, 1), (linears, 2)]
        if in_order and len(weights(linears)) == 3 and _alike(linears, weights) and slots in (0, 3):
            packed[node] = linears
    return packed


def gated_units(calls: Sequence[Node], weights: Callable[[Node], Sequence[Weight]]) -> dict[Node, Node]:
    """Products silu(gate) · up of the two outputs of one `linears` that have slots both: product → linears."""
    units: dict[Node, Node] = {}
    for node in calls:
        if node.target is not ATEN.mul.Tensor or not all(isinstance(arg, Node) for arg in node.args):
            continue
        silu, up = _nodes.node(node.args[0]), _nodes.node(node.args[1])
        if silu.target is not ATEN.silu.default or up.target is not operator.getitem:
            continue
        gate = _nodes.node(silu.args[0])
        if gate.target is not operator.getitem or any(len(part.users) > 1 for part in (silu, gate, up)):
            continue
        (linears, first), (other, second) = _nodes.member(gate), _nodes.member(up)
        whole = len(weights(linears)) == len(_nodes.items(linears.args[4])) == 2
        if linears is other and (first, second) == (0, 1) and whole and _alike(linears, weights):
            units[node] = linears
    return units


@dataclass(frozen=True)
class Normed:
    """A residual addition of a lone linear with a slot, and the RMS norm of their sum."""

    add: Node
    norm: Node
    skip: Node


def normed(norm_of: Mapping[Node, Node]) -> dict[Node, Normed]:
    """Linears whose output meets the residual and goes through an RMS norm: linears → what comes after it."""
    found: dict[Node, Normed] = {}
    for add, norm in norm_of.items():
        sides = [_nodes.node(arg) for arg in add.args[:2]]
        for output, skip in (sides, sides[::-1]):
            if output.target is operator.getitem and len(output.users) == 1 and output is not skip:
                linears, _ = _nodes.member(output)
                lone = linears.target is CALORA.linears.default and len(_nodes.items(linears.args[1])) == 1
                if lone and _nodes.items(linears.args[4]) and not any(_nodes.masks(linears)):
                    found[linears] = Normed(add, norm, skip)
    return found


def _alike(linears: Node, weights: Callable[[Node], Sequence[Weight]]) -> bool:
    """Whether one matmul can be all of these linears."""
    return len({weight.layout for weight in weights(linears)}) == 1 and not any(_nodes.masks(linears))
