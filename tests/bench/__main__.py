"""Run the benchmark and print its tables: `python -m tests.bench`. Twenty minutes on two quiet cores.

Everything goes to build/bench/: results.json, a page for docs/; inputs, packages and logs per shape.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

from calora_export.errors import CaloraError

from . import ours, peers
from .drivers import llama_swap_ms
from .environment import describe
from .exporting import export_all, lower_upstream, package
from .inputs import Inputs, write_inputs
from .measure import Subject, interleave
from .process import BenchError, apart
from .results import (
    BUILDER,
    BUILDER_ADAPTER,
    COREML,
    LLAMA,
    LLAMA_ADAPTER,
    LLAMA_Q4,
    LLAMA_Q4_ADAPTER,
    NATIVE,
    NATIVE_ADAPTER,
    NATIVE_MIX,
    OURS,
    OURS_ADAPTER,
    OURS_MIX,
    PLAIN,
    STOCK,
    STOCK_ADAPTER,
    STOCK_MIX,
    UPSTREAM,
    Memory,
    Results,
)
from .runner import Runner
from .shapes import ADAPTERS, SHAPES, Shape
from .table import markdown, page
from .worker import System, Worker

ROOT = Path(__file__).resolve().parents[2]
DOCS, DEMO = ROOT / "docs", ROOT / "calora_export" / "demo" / "bundle"


@dataclass(frozen=True)
class Options:
    """What the command line says."""

    shape: Shape
    out: Path
    work: Path
    rounds: int
    export_rounds: int
    threads: int
    upstream_full: bool


def main() -> None:
    """Inputs, exports, speeds, tables: one after the other, the parts of each interleaved."""
    options = _options()
    inputs = Inputs(options.work / "inputs")
    _say("writing the inputs")
    apart(write_inputs, options.shape, inputs, DOCS)
    exports = export_all(inputs, options.work, options.export_rounds, _say)
    if options.export_rounds:
        lower_upstream(inputs, options.shape, options.work, options.upstream_full, exports, _say)
    native = _native(options)
    models = _models(inputs, options.work)
    workers = [Worker(row, system, options.threads) for row, system in models.items()]
    subjects: list[Subject] = [*workers, *([native] if native else [])]
    if not subjects:
        raise BenchError("nothing to measure: neither calora-export nor a peer is installed")
    _say(f"{options.rounds} rounds over {', '.join(row for subject in subjects for row in subject.rows)}")
    results = Results(
        environment=describe(options.work.name, options.threads),
        fp32_bytes=4 * options.shape.parameters(),
        speeds=interleave(subjects, options.rounds, _say),
        exports=exports.runs,
        swap_ms=_swaps(inputs, options),
        add_adapter=exports.add_adapter,
        changed_files=exports.changed_files,
        model_bytes=_sizes(models, options.work),
        few_layers=exports.few_layers,
        memory=_memory(native) if native else None,
        reference=_reference(options),
    )
    table = markdown(results)
    (options.out / "results.json").write_text(json.dumps(asdict(results), indent=1) + "\n", encoding="utf-8")
    (options.out / "benchmarks.md").write_text(page(results), encoding="utf-8")
    print(table)


def _native(options: Options) -> Runner | None:
    """Our ExecuTorch package in its runner, if it was exported."""
    path = package(options.work, NATIVE)
    if not path.exists():
        return None
    rows = (NATIVE, NATIVE_ADAPTER, NATIVE_MIX)
    return Runner(rows, path, ADAPTERS, options.threads, options.work / "jobs")


def _memory(native: Runner) -> Memory:
    return Memory(native.peak_at_load(), ours.model_bytes(native.package), ours.kv_bytes(native.package))


def _reference(options: Options) -> dict[str, float]:
    """Of our Core ML package, and of the demo bundle's."""
    shape, logs = package(options.work, COREML), options.work / "logs"
    if not shape.exists():
        return {}
    demo = options.work / "packages" / "demo"
    shutil.rmtree(demo, ignore_errors=True)
    ours.export(DEMO, "coreml-int4", demo, logs / "demo.log")
    return {
        name: ours.decode_tok_s(path, "reference", logs / f"reference-{name}.log")
        for name, path in (("shape", shape), ("demo", demo))
    }


def _models(inputs: Inputs, work: Path) -> dict[str, System]:
    """What a Python driver can open here, by row."""
    systems = {}
    for rows in ((OURS, OURS_ADAPTER, OURS_MIX), (STOCK, STOCK_ADAPTER, STOCK_MIX)):
        path = package(work, rows[0])
        if path.exists():
            mix = apart(ours.write_mix, inputs.bundle, path, ADAPTERS, work / f"{path.name}.adapter")
            adapters = (None, ours.adapter_file(path, ADAPTERS[0]), mix)
            systems |= {row: System("genai", path, adapter) for row, adapter in zip(rows, adapters, strict=True)}
    for name in (BUILDER, BUILDER_ADAPTER):
        if package(work, name).exists():
            systems[name] = System("genai", package(work, name))
    if package(work, UPSTREAM).exists():
        systems[UPSTREAM] = System("executorch", package(work, UPSTREAM) / "model.pte")
    if peers.has("llama_cpp") and peers.has("gguf"):
        adapter = inputs.gguf(ADAPTERS[0])
        systems[LLAMA] = System("llama", inputs.gguf("Q8_0"))
        systems[LLAMA_ADAPTER] = System("llama", inputs.gguf("Q8_0"), adapter)
        systems[LLAMA_Q4] = System("llama", inputs.gguf("Q4_0"))
        systems[LLAMA_Q4_ADAPTER] = System("llama", inputs.gguf("Q4_0"), adapter)
    return systems


def _sizes(models: dict[str, System], work: Path) -> dict[str, int]:
    """Bytes of the models of rows without a swappable adapter."""
    paths = {row: system.model for row, system in models.items() if system.adapter is None}
    paths |= {row: package(work, row) for row in (NATIVE, COREML, PLAIN) if package(work, row).exists()}
    return {row: ours.model_bytes(path) for row, path in paths.items()}


def _swaps(inputs: Inputs, options: Options) -> dict[str, float]:
    """The p50 of a switch between two adapters in ms. The other peers can not switch."""
    swaps = {}
    rows = ((OURS_ADAPTER, OURS, "host"), (STOCK_ADAPTER, STOCK, "host"), (NATIVE_ADAPTER, NATIVE, "host:native"))
    for row, system, device in rows:
        if package(options.work, system).exists():
            log = options.work / "logs" / f"bench-{package(options.work, system).name}.log"
            swaps[row] = ours.swap_ms(package(options.work, system), device, log)
    if peers.has("llama_cpp") and peers.has("gguf"):
        adapters = [inputs.gguf(name) for name in ADAPTERS]
        swaps[LLAMA_ADAPTER] = apart(llama_swap_ms, inputs.gguf("Q8_0"), adapters, options.threads)
    return swaps


def _options() -> Options:
    parser = argparse.ArgumentParser(prog="python -m tests.bench", description="Compare with the peers.")
    parser.add_argument("--shape", choices=SHAPES, default="smollm2-135m", help="tiny: to try the harness")
    parser.add_argument("--rounds", type=int, default=15, help="of prefill and decode")
    parser.add_argument("--export-rounds", type=int, default=3, help="0: measure the packages of the last run")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--upstream-full", action="store_true", help="lower and run all layers with transformers' exporter: minutes"
    )
    parser.add_argument("--out", type=Path, default=Path("build/bench"))
    found = parser.parse_args()
    work = found.out / found.shape
    return Options(
        shape=SHAPES[found.shape],
        out=found.out,
        work=work,
        rounds=found.rounds,
        export_rounds=found.export_rounds,
        threads=found.threads,
        upstream_full=found.upstream_full,
    )


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    try:
        main()
    except (BenchError, CaloraError) as error:
        raise SystemExit(f"error: {error}") from None
