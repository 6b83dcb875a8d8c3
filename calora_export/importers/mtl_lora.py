"""MTL-LoRA (arXiv 2410.09437): one A, a Λ per task, several B that every task mixes: cores in one basis.

    ΔW_t = s · Σ_b softmax(w_t / τ)_b · B_b · Λ_t · A        s = alpha / r, times sigmoid(lora_scaler) if there is one

So every task shares A and all B side by side, and has a core [n · r, r] of its own: softmax(w_t / τ)_b Λ_t, one
below the other. The state dict of the authors' code has, per adapted layer,
lora_A [1, r, in], lora_lambdas [tasks, r, r] or [tasks, r], lora_B [n, out, r] and lora_B_w [tasks, n].
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated

import numpy as np
import typer

from calora_export.importers import Imported, _checkpoint, _encoders, _lowrank
from calora_export.importers._checkpoint import Checkpoint as StateDict
from calora_export.importers._draft import draft
from calora_export.importers._lowrank import Core
from calora_export.importers._options import Alpha, Base, Checkpoint, Name, Out, Tasks, require_positive, task_names
from calora_export.manifest import RouterSpec
from calora_export.router_config import TableConfig

Temperature = Annotated[
    float, typer.Option(help="B_scale as trained: what divides lora_B_w.", show_default=False)
]

BASIS = "tasks"
MARKER = ".lora_"
_PARTS = {"A", "lambdas", "B", "B_w"}


def run(
    base: Base,
    checkpoint: Checkpoint,
    out: Out,
    alpha: Alpha,
    temperature: Temperature,
    tasks: Tasks,
    name: Name = None,
) -> Imported:
    """An MTL-LoRA checkpoint: one adapter per task, its id the task's name, and a router that takes a task's name.

    BundleError in one line.
    """
    names = task_names(tasks)
    require_positive("--alpha", alpha)
    require_positive("--temperature", temperature)
    with draft(base, out, name, "mtl-lora") as made:
        state = _checkpoint.read(checkpoint, "module.")
        found = state.sites(MARKER)
        layers = {site: _layer(state, site, parts, made.linears, len(names)) for site, parts in found.items()}
        basis = {f"{site}.{name}": matrix for site, layer in layers.items() for name, matrix in layer.basis.items()}
        _lowrank.write_basis(basis, made.path, BASIS)
        for index, task in enumerate(names):
            cores = {site: layer.task(index, alpha, temperature) for site, layer in layers.items()}
            made.add(task, _lowrank.write_cores(cores, BASIS, made.adapter_dir(task), made.linears))
        gates = np.eye(len(names), dtype=np.float32)
        config = TableConfig("table", len(names), len(names))
        _encoders.write(made.path / "router", config, {"gates": gates}, _encoders.task_tokenizer(names))
        made.router = RouterSpec("task_id", "prompt", "{text}", 1, "left", names)
    return Imported(out, names)


@dataclass(frozen=True)
class _Layer:
    """a [r, in], lambdas [tasks, r, r], b [n, out, r], weights [tasks, n]; factor is the sigmoid of lora_scaler."""

    a: np.ndarray
    lambdas: np.ndarray
    b: np.ndarray
    weights: np.ndarray
    factor: float

    @property
    def basis(self) -> dict[str, np.ndarray]:
        """down [r, in], up [out, n · r]"""
        return {"down": self.a, "up": np.concatenate(list(self.b), axis=1)}

    def task(self, index: int, alpha: float, temperature: float) -> Core:
        scores = self.weights[index] / temperature
        mixture = np.exp(scores - scores.max())
        mixture /= mixture.sum()
        core = np.kron(mixture.astype(np.float32)[:, None], self.lambdas[index])
        return Core(core, alpha / self.a.shape[0] * self.factor)


def _layer(state: StateDict, site: str, parts: set[str], linears: Mapping[str, tuple[int, int]], tasks: int) -> _Layer:
    key = f"{site}{MARKER}"
    rows, columns = state.site_shape(site, linears, f"{key}A")
    state.require(site, MARKER, parts, _PARTS | (parts & {"scaler"}))
    r = (*state.shape(f"{key}A"), 0, 0)[1]
    trained, diagonal = (*state.shape(f"{key}lambdas"), 0)[0], len(state.shape(f"{key}lambdas")) == 2
    if trained != tasks:
        raise state.wrong(f"{key}lambdas", f"one for each of {tasks} tasks", trained, "--tasks names them all")
    lambdas = state.take(f"{key}lambdas", (tasks, r) if diagonal else (tasks, r, r))
    count = (*state.shape(f"{key}B"), 0)[0]
    factor = 1 / (1 + np.exp(-float(state.take(f"{key}scaler", ())))) if "scaler" in parts else 1.0
    return _Layer(
        state.take(f"{key}A", (1, r, columns))[0],
        lambdas[:, :, None] * np.eye(r, dtype=np.float32) if diagonal else lambdas,
        state.take(f"{key}B", (count, rows, r)),
        state.take(f"{key}B_w", (tasks, count)),
        float(factor),
    )
