"""The null target: the traced program as it is, for PyTorch on this machine. It needs no device's runtime."""

from __future__ import annotations

from pathlib import Path

import torch

from calora_export import program
from calora_export.graph import Graph
from calora_export.package import Manifest, Slots, SlotTensor
from calora_export.recipe import Recipe
from calora_export.routers import Router
from calora_export.targets import Origin, _nodes

MODEL = "model.safetensors"


def lower(graph: Graph, recipe: Recipe, directory: Path, origin: Origin) -> Slots:
    """Write model.safetensors; its inputs are those of the graph, and every site has tensors of its own."""
    program.write(graph.program, directory / MODEL)
    scaled, routed = _nodes.extras(graph)
    return Slots(
        rank="dynamic",
        gate="gate",
        recovery="recovery" if graph.recovery else None,
        fingerprint="base_fingerprint",
        dtype=recipe.adapters,
        tensors=tuple(
            SlotTensor(slot.site, f"{slot.site}.down", 0, 1, f"{slot.site}.up", slot.inputs, slot.outputs)
            for slot in graph.slots
        ),
        scaled=scaled,
        routed=routed,
    )


def lower_router(router: Router, directory: Path) -> str:
    """Write router.safetensors: ids [1, tokens] → gates [classes]."""
    file, example = "router.safetensors", torch.zeros(1, 8, dtype=torch.long)
    tokens = torch.export.Dim("tokens", min=1)
    with torch.no_grad():
        traced = torch.export.export(router.eval(), (example,), dynamic_shapes={"ids": {1: tokens}})
    program.write(traced, directory / file)
    return file


def accompany(manifest: Manifest, directory: Path) -> None:
    """Nothing: no other tool opens this package."""
