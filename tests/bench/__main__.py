"""Run the benchmark and print its tables: `python -m tests.bench`. Ten minutes on two quiet cores.

Everything goes to build/bench/: results.json, a page for docs/; inputs, packages and logs per shape.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

from . import ours, peers
from .drivers import llama_swap_ms
from .environment import describe
from .inputs import Inputs, write_inputs
from .measure import System, interleave
from .process import BenchError, Run, apart
from .results import (
    BUILDER,
    BUILDER_ADAPTER,
    LLAMA,
    LLAMA_ADAPTER,
    LLAMA_Q4,
    LLAMA_Q4_ADAPTER,
    OURS,
    OURS_ADAPTER,
    OURS_MIX,
    Results,
)
from .shapes import ADAPTERS, LATE_ADAPTER, SHAPES, Shape
from .table import markdown, page

DOCS = Path(__file__).resolve().parents[2] / "docs"


@dataclass(frozen=True)
class Options:
    """What the command line says."""

    shape: Shape
    out: Path
    work: Path
    rounds: int
    export_rounds: int
    threads: int


@dataclass(frozen=True)
class Exports:
    """Runs by system, the runs of add-adapter, and the files that it changed besides package.json."""

    runs: dict[str, list[Run]]
    add_adapter: list[Run]
    changed_files: list[str]


def main() -> None:
    """Inputs, exports, speeds, tables: one after the other, the parts of each interleaved."""
    options = _options()
    inputs = Inputs(options.work / "inputs")
    _say("writing the inputs")
    apart(write_inputs, options.shape, inputs, DOCS)
    exports = _export(inputs, options)
    systems = _systems(inputs, options.work)
    if not systems:
        raise BenchError("nothing to measure: neither calora-export nor a peer is installed")
    _say(f"{options.rounds} rounds over {', '.join(systems)}")
    results = Results(
        environment=describe(options.work.name, options.threads),
        fp32_bytes=4 * options.shape.parameters(),
        speeds=interleave(systems, options.rounds, options.threads, _say),
        exports=exports.runs,
        swap_ms=_swaps(inputs, options, list(systems)),
        add_adapter=exports.add_adapter,
        changed_files=exports.changed_files,
    )
    table = markdown(results)
    (options.out / "results.json").write_text(json.dumps(asdict(results), indent=1) + "\n", encoding="utf-8")
    (options.out / "benchmarks.md").write_text(page(results), encoding="utf-8")
    print(table)


def _export(inputs: Inputs, options: Options) -> Exports:
    """Export with everything that is installed, `export_rounds` times, into packages/<system>/."""
    exports = Exports({}, [], [])
    for index in range(options.export_rounds):
        for system in (OURS, BUILDER, BUILDER_ADAPTER):
            if not peers.has("calora_export.cli" if system == OURS else "onnxruntime_genai"):
                continue
            package, log = (
                _package(options.work, system),
                options.work / "logs" / f"{system.replace(' + ', '-')}-{index}.log",
            )
            shutil.rmtree(package, ignore_errors=True)
            if system == OURS:
                run = ours.export(inputs.bundle, package, log)
            else:
                adapter = inputs.adapter(ADAPTERS[0]) if system == BUILDER_ADAPTER else None
                run = peers.build(inputs.model, package, adapter, log)
            exports.runs.setdefault(system, []).append(run)
            _say(f"exported {system} in {run.seconds:.1f} s, {run.peak_rss / 1e6:.0f} MB")
            if system == OURS:
                _add_adapter(inputs, package, log.with_name(f"add-adapter-{index}.log"), exports)
    return exports


def _add_adapter(inputs: Inputs, package: Path, log: Path, exports: Exports) -> None:
    before = ours.state(package)
    adapter = inputs.bundle / "adapters" / LATE_ADAPTER
    exports.add_adapter.append(ours.add_adapter(package, adapter, log))
    after = ours.state(package)
    exports.changed_files.extend(name for name, state in before.items() if after.get(name) != state)


def _systems(inputs: Inputs, work: Path) -> dict[str, System]:
    """What can be measured here, by name."""
    systems = {}
    package = _package(work, OURS)
    if package.exists():
        systems[OURS] = System("genai", package)
        systems[OURS_ADAPTER] = System("genai", package, ours.adapter_file(package, ADAPTERS[0]))
        mix = apart(ours.write_mix, inputs.bundle, package, ADAPTERS, work / "mix.adapter")
        systems[OURS_MIX] = System("genai", package, mix)
    for name in (BUILDER, BUILDER_ADAPTER):
        if _package(work, name).exists():
            systems[name] = System("genai", _package(work, name))
    if peers.has("llama_cpp") and peers.has("gguf"):
        adapter = inputs.gguf(ADAPTERS[0])
        systems[LLAMA] = System("llama", inputs.gguf("Q8_0"))
        systems[LLAMA_ADAPTER] = System("llama", inputs.gguf("Q8_0"), adapter)
        systems[LLAMA_Q4] = System("llama", inputs.gguf("Q4_0"))
        systems[LLAMA_Q4_ADAPTER] = System("llama", inputs.gguf("Q4_0"), adapter)
    return systems


def _swaps(inputs: Inputs, options: Options, systems: list[str]) -> dict[str, float]:
    """The p50 of a switch between two adapters in ms. The builder's packages can not switch."""
    swaps = {}
    if OURS in systems:
        log = options.work / "logs" / "bench.log"
        swaps[OURS_ADAPTER] = ours.swap_ms(_package(options.work, OURS), log)
    if LLAMA in systems:
        adapters = [inputs.gguf(name) for name in ADAPTERS]
        swaps[LLAMA_ADAPTER] = apart(llama_swap_ms, inputs.gguf("Q8_0"), adapters, options.threads)
    return swaps


def _package(work: Path, system: str) -> Path:
    return work / "packages" / system.replace(" + ", "-")


def _options() -> Options:
    parser = argparse.ArgumentParser(prog="python -m tests.bench", description="Compare with the peers.")
    parser.add_argument("--shape", choices=SHAPES, default="smollm2-135m", help="tiny: to try the harness")
    parser.add_argument("--rounds", type=int, default=15, help="of prefill and decode")
    parser.add_argument("--export-rounds", type=int, default=3, help="0: measure the packages of the last run")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("build/bench"))
    found = parser.parse_args()
    work = found.out / found.shape
    return Options(SHAPES[found.shape], found.out, work, found.rounds, found.export_rounds, found.threads)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    try:
        main()
    except BenchError as error:
        raise SystemExit(f"error: {error}") from None
