"""What many adapters cost and what a joint basis saves: `python -m tests.bench.adapters`. Some minutes.

Prints the tables of docs/importing.md. Milliseconds of `add-adapter`, `inspect` and opening are the processor's. A swap
and a router's answer are timed by the clock, a few adapters and many in turns, and the quickest turn counts.
"""

from __future__ import annotations

import itertools
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np
from safetensors.numpy import load_file, save_file

from calora_export import bundle as bundles
from calora_export import demo, inspection, pipeline, resources, runtimes
from calora_export import package as packages
from calora_export.importers import peft
from calora_export.package import JointBasis, Package
from calora_export.runtimes import Session
from tests.bundles import edit_json, edit_tensors

from .environment import describe
from .process import Run, run

DEMO = Path(demo.__file__).parent / "bundle"
RECIPE = "onnx-int4"
FEW, MANY = 8, 1000
COLUMNS = (8, 16, 32, 64)
HUNDRED = 100
TURNS, TIMES = 5, 200
PROMPT = tuple(range(1, 33))

Rows = list[list[str]]


@dataclass(frozen=True)
class Crowd:
    """A package of many copies of one adapter; export: what its process cost."""

    package: Package
    export: Run


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        few, many = (crowd(scratch / str(count), count) for count in (FEW, MANY))
        show(["", f"{FEW} adapters", f"{MANY:,} adapters"], side_by_side(few, many))
        loras = plain_loras(scratch / "loras")
        show(["columns", "least error", "largest", "bytes each", "as plain LoRA", "basis"], joint(loras, scratch))
        show(["", "bytes each", "basis", "in all"], hundred(scratch))
    facts = describe("", 1)
    print(", ".join(f"{name} {facts[name]}" for name in ("CPU", "cores", "calora-export", "onnxruntime", "torch")))


def show(head: Sequence[str], rows: Rows) -> None:
    """A table in Markdown, numbers to the right."""
    rule = ["---", *["---:"] * (len(head) - 1)]
    print("\n".join(f"| {' | '.join(row)} |" for row in (head, rule, *rows)), end="\n\n", flush=True)


# ── a thousand ──────────────────────────────────────────────────────────────────────────────────────────────


def crowd(directory: Path, count: int) -> Crowd:
    """Exported by the command, in a process of its own."""
    directory.mkdir()
    bundle, out = crowded(directory / "bundle", count), directory / "package"
    command = [sys.executable, "-m", "calora_export", "export", bundle, "-o", out, "--recipe", RECIPE]
    cost = run(command, directory / "export.log")
    return Crowd(packages.load(out), cost)


def crowded(path: Path, count: int) -> Path:
    """The demo's bundle with so many copies of its first adapter, and a router of as many classes."""
    shutil.copytree(DEMO, path, ignore=shutil.ignore_patterns("eval", "adapters"))
    manifest = bundles.read_manifest(DEMO)
    first, router = manifest.adapters[0], manifest.router
    assert router is not None
    names = tuple(f"task{number:04d}" for number in range(count))
    for name in names:
        shutil.copytree(DEMO / "adapters" / first.id, path / "adapters" / name)
    specs = tuple(msgspec.structs.replace(first, id=name, task=name, class_index=i) for i, name in enumerate(names))
    router = msgspec.structs.replace(router, classes=names)
    bundles.write_manifest(path, msgspec.structs.replace(manifest, adapters=specs, router=router, tasks=()))
    edit_json(path / "router" / "config.json", lambda config: config.update(num_classes=count))

    def widen(tensors: dict[str, np.ndarray]) -> None:
        last = max(name for name in tensors if name.startswith("layers."))
        shape = (count, tensors[last].shape[1])
        tensors[last] = np.random.default_rng(0).normal(scale=0.1, size=shape).astype(np.float32)
        tensors[last.replace("weight", "bias")] = np.zeros(count, np.float32)

    edit_tensors(path / "router" / "model.safetensors", widen)
    return path


def side_by_side(few: Crowd, many: Crowd) -> Rows:
    both = (few, many)
    each = 1000 * (many.export.cpu_seconds - few.export.cpu_seconds) / (MANY - FEW)
    sessions = [opened(found.package) for found in both]
    swaps, routes = in_turns([swapping(session) for session in sessions]), in_turns([routing(s) for s in sessions])
    return [
        ["export", f"{few.export.cpu_seconds:.1f} s", f"{many.export.cpu_seconds:.1f} s: {each:.0f} ms for each more"],
        ["peak memory of the export", *(f"{found.export.peak_rss / 1e6:.0f} MB" for found in both)],
        ["`add-adapter`, after start-up", *(f"{adding(found.package):.0f} ms" for found in both)],
        ["`inspect`", *(f"{spent(inspecting(found.package)):.0f} ms" for found in both)],
        ["open the package", *(f"{spent(opening(found.package)):.0f} ms" for found in both)],
        ["swap, p50 of the clock", f"{swaps[0]:.3f} ms", f"{swaps[1]:.3f} ms: {swaps[1] / swaps[0]:.2f} times that"],
        ["router, top-p over all classes, p50 of the clock", *(f"{ms:.3f} ms" for ms in routes)],
    ]


def opened(package: Package) -> Session:
    return runtimes.load(package.manifest.target).open_session(package, 1)


def opening(package: Package) -> Callable[[], object]:
    return lambda: opened(packages.load(package.path))


def inspecting(package: Package) -> Callable[[], object]:
    return lambda: inspection.inspect(package.path)


def swapping(session: Session) -> Callable[[], object]:
    """From one to the next of eight, which were all used before."""
    mixes = itertools.cycle([{f"task{number:04d}": 1.0} for number in range(FEW)])
    for _ in range(FEW):
        session.select(next(mixes))
    return lambda: session.select(next(mixes))


def routing(session: Session) -> Callable[[], object]:
    return lambda: session.route(PROMPT)


def adding(package: Package) -> float:
    """Milliseconds of the processor that one more adapter takes, the median of several."""
    source = DEMO / "adapters" / bundles.read_manifest(DEMO).adapters[0].id
    with tempfile.TemporaryDirectory() as scratch:
        late = iter([shutil.copytree(source, Path(scratch) / f"late{turn}") for turn in range(2 * TURNS)])
        return spent(lambda: pipeline.add_adapter(package.path, next(late)))


def spent(action: Callable[[], object]) -> float:
    """Milliseconds of the processor, the median of several after a first."""
    found = []
    for _ in range(1 + TURNS):
        start = time.process_time_ns()
        action()
        found.append((time.process_time_ns() - start) / 1e6)
    return statistics.median(found[1:])


def in_turns(actions: Sequence[Callable[[], object]]) -> list[float]:
    """p50 in milliseconds of the clock of each action, of its quickest turn."""
    best = [float("inf")] * len(actions)
    for _ in range(TURNS):
        for place, action in enumerate(actions):
            found = []
            for _ in range(TIMES):
                start = time.perf_counter_ns()
                action()
                found.append((time.perf_counter_ns() - start) / 1e6)
            best[place] = min(best[place], statistics.median(found))
    return best


# ── a joint basis ───────────────────────────────────────────────────────────────────────────────────────────


def plain_loras(directory: Path) -> Path:
    """The demo's eight adapters without their recovery, which is not linear; on the demo's base."""
    parts = []
    for source in sorted((DEMO / "adapters").iterdir()):
        parts.append(directory / "parts" / source.name)
        parts[-1].mkdir(parents=True)
        tensors = load_file(source / "adapter_model.safetensors")
        lora = {name: tensor for name, tensor in tensors.items() if ".lora_A." in name or ".lora_B." in name}
        save_file(lora, parts[-1] / "adapter_model.safetensors")
        shutil.copy(source / "adapter_config.json", parts[-1])
    return peft.run(DEMO / "base", parts, directory / "bundle").bundle


def joint(bundle: Path, scratch: Path) -> Rows:
    """Errors are those that `export` reports: ‖ΔW − U Σ Vᵀ‖ / ‖ΔW‖."""
    rows = []
    for columns in COLUMNS:
        made = compressed(bundle, scratch / f"joint{columns}", columns)
        errors, entry = [found.error for found in made.adapters], made.adapters[0]
        shown = [f"{100 * error:.1f} %" for error in (min(errors), max(errors))]
        rows.append([str(columns), *shown, *(f"{size:,}" for size in (entry.bytes, entry.plain_bytes, made.bytes))])
    return rows


def compressed(bundle: Path, out: Path, columns: int) -> JointBasis:
    out.mkdir()
    text = resources.recipes()[RECIPE].read_text()
    (out / "recipe.toml").write_text(f"joint_basis = {columns}\n{text}")
    made = pipeline.export(bundle, out / "package", str(out / "recipe.toml")).manifest.joint_basis
    assert isinstance(made, JointBasis)
    return made


def hundred(scratch: Path) -> Rows:
    """Copies of one LoRA under other names: only their bytes are looked at."""
    source = scratch / "loras" / "parts"
    first = sorted(source.iterdir())[0]
    parts = [shutil.copytree(first, scratch / "hundred" / f"a{number:03d}") for number in range(HUNDRED)]
    bundle = peft.run(DEMO / "base", parts, scratch / "hundred-bundle").bundle
    made = compressed(bundle, scratch / "hundred-joint", 16)
    each, plain = made.adapters[0].bytes, made.adapters[0].plain_bytes
    return [
        [f"{HUNDRED} plain LoRAs of rank 8", f"{plain:,}", "–", f"{HUNDRED * plain:,}"],
        ["in a joint basis of 16 columns", f"{each:,}", f"{made.bytes:,}", f"{HUNDRED * each + made.bytes:,}"],
    ]


if __name__ == "__main__":
    main()
