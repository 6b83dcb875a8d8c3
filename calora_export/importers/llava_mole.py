"""LLaVA-MoLE (arXiv 2401.16160), its language part: expert LoRAs on the MLP, weighed for every token by a router.

    w = softmax(W_router x + c)        x: the MLP's input
    y = base(x') + Σ_e w_e · (alpha / r) B_e A_e x'        for its gate, up and down projections, with the same w

The authors' code runs this dense mixture (`dense_moe`); per layer it saves `mlp.router.{weight, bias}` and, for each
expert e, `mlp.{moe_gate, moe_up, moe_down}.<e>.{lora_A, lora_B}`.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from calora_export.importers import Imported, _checkpoint, _lowrank
from calora_export.importers._checkpoint import Checkpoint as StateDict
from calora_export.importers._draft import Draft, adapter_id, directory_ids, draft
from calora_export.importers._lowrank import Experts, LowRank, Pair
from calora_export.importers._options import Alpha, Base, Checkpoint, Name, Out, require_positive

Lora = Annotated[
    Path | None, typer.Option(help="The plain LoRA on the attention, as a PEFT directory.", show_default=False)
]

_EXPERT = r"moe_(?P<part>gate|up|down)\.(?P<e>\d+)\.lora_[AB]"
_KEY = re.compile(rf"(?P<scope>.*layers\.\d+\.mlp)\.(?:router\.(?:weight|bias)|{_EXPERT})")


def run(
    base: Base, checkpoint: Checkpoint, out: Out, alpha: Alpha, lora: Lora = None, name: Name = None
) -> Imported:
    """LLaVA-MoLE, language part: the experts of a checkpoint and the routers that weigh them by token: one adapter.

    BundleError or UnsupportedError in one line.
    """
    require_positive("--alpha", alpha)
    identifier = adapter_id(checkpoint, [])
    directory_ids([] if lora is None else [lora])
    with draft(base, out, name, "llava-mole") as made:
        state = _checkpoint.read(checkpoint)
        experts: dict[str, Experts] = {}
        routers: dict[str, tuple[np.ndarray, np.ndarray]] = {}
        for scope, (parts, count) in _scopes(state).items():
            for part in parts:
                experts[f"{scope}.{part}_proj"] = _experts(state, scope, part, count, made, alpha)
            features = (*state.shape(f"{scope}.router.weight"), 0, 0)[1]
            bias = state.take(f"{scope}.router.bias", (count,))
            weight = state.take(f"{scope}.router.weight", (count, features))
            routers[scope] = weight, np.stack([bias, np.zeros_like(bias)])
        plain = {} if lora is None else _lowrank.read(lora, made.linears)
        adapter = LowRank(plain, experts=experts, routers=routers)
        branches = _lowrank.write(adapter, made.adapter_dir(identifier), made.linears)
        made.add(identifier, branches, tuple(routers))
    return Imported(out, (identifier,))


def _scopes(state: StateDict) -> dict[str, tuple[list[str], int]]:
    """Every MLP with its projections that have experts, and how many."""
    found: dict[str, dict[str, int]] = {}
    for key in state.tensors:
        match = _KEY.fullmatch(key)
        if match is None:
            hint = "keep only the experts': {k: v for k, v in state.items() if '.mlp.moe_' in k or '.mlp.router.' in k}"
            raise state.wrong(key, "<layer>.mlp.moe_gate, moe_up, moe_down and router", "another key", hint)
        parts = found.setdefault(match["scope"], {})
        if match["part"]:
            parts[match["part"]] = max(parts.get(match["part"], 0), int(match["e"]) + 1)
    for scope, parts in found.items():
        if not parts or len(set(parts.values())) > 1:
            raise state.wrong(f"{scope}.moe_*", "as many experts in each projection", sorted(parts.values()) or "none")
    return {scope: (list(parts), next(iter(parts.values()))) for scope, parts in found.items()}


def _experts(state: StateDict, scope: str, part: str, count: int, made: Draft, alpha: float) -> Experts:
    site = f"{scope}.{part}_proj"
    pairs = []
    for e in range(count):
        key = f"{scope}.moe_{part}.{e}.lora_"
        rows, columns = state.site_shape(site, made.linears, f"{key}A")
        r = (*state.shape(f"{key}A"), 0)[0]
        pairs.append(Pair(state.take(f"{key}A", (r, columns)), state.take(f"{key}B", (rows, r)), alpha / r))
    return Experts.of(pairs)
