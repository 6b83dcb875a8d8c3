"""Export with everything that is installed, round by round."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from calora_export import native

from . import ours, peers, plain_coreml, upstream
from .inputs import Inputs
from .process import Run
from .results import BUILDER, BUILDER_ADAPTER, COREML, NATIVE, OURS, PLAIN, STOCK, UPSTREAM, UPSTREAM_FEW
from .shapes import ADAPTERS, LATE_ADAPTER, Shape

Exporter = Callable[[Path, Path], Run]  # the package to write, a log


@dataclass(frozen=True)
class Exports:
    """Runs by system, the runs of add-adapter, and the files that it changed besides package.json; see Results."""

    runs: dict[str, list[Run]] = field(default_factory=dict)
    add_adapter: list[Run] = field(default_factory=list)
    changed_files: list[str] = field(default_factory=list)
    few_layers: dict[int, Run] = field(default_factory=dict)


def package(work: Path, system: str) -> Path:
    """Where a system's package lies."""
    return work / "packages" / _file_name(system)


def export_all(inputs: Inputs, work: Path, rounds: int, say: Callable[[str], None]) -> Exports:
    """`rounds` times each. `say` gets progress."""
    exports = Exports()
    for index in range(rounds):
        for system, export in _exporters(inputs):
            log = work / "logs" / f"{_file_name(system)}-{index}.log"
            shutil.rmtree(package(work, system), ignore_errors=True)
            exports.runs.setdefault(system, []).append(export(package(work, system), log))
            _say_cost(say, system, exports.runs[system][-1])
            if system == OURS:
                _add_adapter(inputs, package(work, system), log.with_name(f"add-adapter-{index}.log"), exports)
    return exports


def lower_upstream(
    inputs: Inputs, shape: Shape, work: Path, full: bool, exports: Exports, say: Callable[[str], None]
) -> None:
    """Add transformers' exporter to `exports`, once: a few layers, extrapolated, and all when `full`."""
    if not upstream.installed():
        return

    def lower(layers: int, system: str) -> Run:
        log = work / "logs" / f"upstream-{layers}.log"
        cost = upstream.lower(inputs.model, layers, package(work, system) / "model.pte", log)
        _say_cost(say, f"{layers} layers with {UPSTREAM}", cost)
        return cost

    exports.few_layers.update({layers: lower(layers, UPSTREAM_FEW) for layers in upstream.LAYERS})
    exports.runs[UPSTREAM_FEW] = [upstream.extrapolate(exports.few_layers, shape.layers)]
    if full:
        exports.runs[UPSTREAM] = [lower(shape.layers, UPSTREAM)]


def _exporters(inputs: Inputs) -> Iterator[tuple[str, Exporter]]:
    yield OURS, partial(_fused, inputs.bundle)
    yield STOCK, partial(ours.export, inputs.bundle, "onnx-int4")
    if peers.has("executorch"):
        yield NATIVE, partial(ours.export, inputs.bundle, "executorch-8da4w")
    if plain_coreml.installed():
        yield COREML, partial(ours.export, inputs.bundle, "coreml-int4")
        yield PLAIN, partial(_plain, inputs.model)
    if peers.has("onnxruntime_genai"):
        yield BUILDER, partial(peers.build, inputs.model, None)
        yield BUILDER_ADAPTER, partial(peers.build, inputs.model, inputs.adapter(ADAPTERS[0]))


def _fused(bundle: Path, directory: Path, log: Path) -> Run:
    cost = ours.export(bundle, "onnx-int4-fused", directory, log)
    shutil.copy2(native.kernels("onnx"), directory)  # where onnxruntime-genai may load it from; compiled on first use
    return cost


def _plain(model: Path, directory: Path, log: Path) -> Run:
    return plain_coreml.convert(model, directory / "model.mlpackage", log)


def _add_adapter(inputs: Inputs, path: Path, log: Path, exports: Exports) -> None:
    before = ours.state(path)
    exports.add_adapter.append(ours.add_adapter(path, inputs.bundle / "adapters" / LATE_ADAPTER, log))
    after = ours.state(path)
    exports.changed_files.extend(name for name, state in before.items() if after.get(name) != state)


def _file_name(system: str) -> str:
    return system.translate(str.maketrans({"(": "", ")": "", "+": "", ",": ""})).replace("  ", " ").replace(" ", "-")


def _say_cost(say: Callable[[str], None], what: str, cost: Run) -> None:
    say(f"exported {what} in {cost.seconds:.1f} s, {cost.peak_rss / 1e6:.0f} MB")
