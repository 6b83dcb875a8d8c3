"""LoRA-Flow (arXiv 2402.11455): a gate per layer weighs an ordered set of LoRAs anew for every token.

    w = softmax(W_gate x / T) + b        x: the layer's input, before its norm
    y = base(x') + Σ_k w_k s_k B_k A_k x'        for every linear of the layer, with the same w

The authors' code (github.com/thunlp/LoRAFlow) saves `encoder.layers.<i>.lora_fusion_gate.weight` [k, hidden] and,
beside it, `weight_bias` [1, k]. It trains with T = 1 (train/ModelCenter/model_center/layer/blocks.py) and evaluates
with 1.1 where the gate is zh_math or ru_math, and with 1 elsewhere (UltraEval/URLs/url.py). The paper's has no T.
"""

from __future__ import annotations

import re
from typing import Annotated

import numpy as np
import typer

from calora_export.importers import Imported, _checkpoint, _lowrank
from calora_export.importers._checkpoint import Checkpoint as StateDict
from calora_export.importers._draft import Draft, directory_ids, draft
from calora_export.importers._lowrank import Experts, LowRank
from calora_export.importers._options import Adapters, Base, Checkpoint, Name, Out, require_positive
from calora_export.manifest import check_id
from calora_export.sites import natural_key, owners

Id = Annotated[str, typer.Option("--id", help="The id of the one adapter that they become.", show_default=False)]
Temperature = Annotated[
    float, typer.Option(help="What divides the gate's scores; the authors run zh_math and ru_math with 1.1.")
]

GATE, BIAS = "lora_fusion_gate.weight", "weight_bias"
_KEY = re.compile(rf"(?:.*\.)?layers\.(\d+)\.({re.escape(GATE)}|{BIAS})")


def run(
    base: Base,
    gate: Checkpoint,
    adapters: Adapters,
    out: Out,
    identifier: Id,
    temperature: Temperature = 1.0,
    name: Name = None,
) -> Imported:
    """LoRA-Flow: PEFT directories in the gate's order, and the gates that weigh them by token; one adapter.

    BundleError or UnsupportedError in one line.
    """
    require_positive("--temperature", temperature)
    check_id(identifier, "--id", "id")
    directory_ids(adapters)
    with draft(base, out, name, "lora-flow") as made:
        loras = [_lowrank.read(path, made.linears) for path in adapters]
        routers = _routers(_checkpoint.read(gate), made, len(loras), temperature)
        sites = sorted({site for lora in loras for site in lora}, key=natural_key)
        experts = {site: Experts.of([lora.get(site) for lora in loras]) for site in sites}
        adapter = LowRank({}, experts=experts, routers=routers)
        branches = _lowrank.write(adapter, made.adapter_dir(identifier), made.linears)
        made.add(identifier, branches, tuple(routers))
    return Imported(out, (identifier,))


def _routers(
    state: StateDict, made: Draft, count: int, temperature: float
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    layers: dict[int, dict[str, str]] = {}
    for key in state.tensors:
        found = _KEY.fullmatch(key)
        if found is None:
            raise state.wrong(key, f"encoder.layers.<i>.{GATE} or {BIAS}", "another key")
        layers.setdefault(int(found[1]), {})[found[2]] = key
    modules = {name for name in owners(made.linears) if re.fullmatch(r".*\.layers\.\d+", name)}
    if set(layers) != set(range(len(modules))):
        raise state.wrong("tensors", f"gates of {len(modules)} layers", f"of {len(layers)}")
    routers: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    for name in sorted(modules, key=natural_key):
        keys = layers[int(name.rpartition(".")[2])]
        for part in (GATE, BIAS):
            if part not in keys:
                raise state.wrong(f"encoder.{name.partition('.')[2]}.{part}", "a tensor", "nothing")
        rows, features = (*state.shape(keys[GATE]), 0, 0)[:2]
        if rows != count:
            hint = "name the LoRAs' directories in the gate's order"
            raise state.wrong(keys[GATE], f"a row for each of {count} LoRAs", rows, hint)
        weight, bias = state.take(keys[GATE], (count, features)), _bias(state, keys[BIAS], count)
        routers[name] = weight / np.float32(temperature), np.stack([np.zeros_like(bias), bias])
    return routers


def _bias(state: StateDict, key: str, count: int) -> np.ndarray:
    """[count]"""
    return state.take(key, (count,) if len(state.shape(key)) == 1 else (1, count)).reshape(count)
