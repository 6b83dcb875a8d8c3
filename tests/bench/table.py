"""The results as Markdown."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from .measure import PROMPT, Spread, quiet
from .results import SYSTEMS, Goal, Results, goals

PAGE = """# Benchmarks

`make bench` builds a model of SmolLM2-135M's shape (random weights, int4 in groups of 32, LoRA of rank 16
on all seven linears of 30 layers) in the form that each system reads, and measures all systems side by
side. This page is what it printed.

- **ours** is one package of the recipe `onnx-int4-fused`, whose adapters can be swapped, through
  `onnxruntime-genai`, which loads our operators. The mix is of two adapters. **ours, stock operators** is one of
  `onnx-int4`, which needs nothing of ours; the goals are about the first.
- **builder** is `onnxruntime_genai.models.builder` through the same driver, with its LM head pruned to
  the last token as ours is. It bakes an adapter in, as int4, for good.
- **ours (ExecuTorch)** is one package of the recipe `executorch-8da4w` in the native runner, with fp16
  adapters that can be swapped.
- **transformers (ExecuTorch)** is that library's exporter, quantised by torchao (`8da4w` linears, int8
  embedding) and lowered as optimum-executorch does it, in the Python runtime. It has no adapters. Its cost
  grows with each layer, so 2 and 4 layers are lowered and 30 are extrapolated from these in a straight
  line; `python -m tests.bench --upstream-full` lowers and runs all of them.
- **ours (Core ML)** is one package of the recipe `coreml-int4`; **coremltools alone (Core ML)** converts the same
  model with that library only, without slots, adapters, router or KV cache, and compresses it to int4 in blocks of 32.
  Core ML runs on Apple's systems alone, so of speed there is only that of the reference runtime, which executes the
  saved file operator by operator.
- **llama.cpp** has Q4_0 linears and fp16 adapters that can be swapped. Its quantiser holds an embedding
  of this width as Q8_0; the rows with a Q4_0 embedding read as few bytes as ours. ExecuTorch's goals compare
  with these, ONNX Runtime's with the others.

A round is a prefill of 128 tokens and 64 tokens after it, one system after the other; a system's token is
the median of its 64. The native runner measures its three rows in one process per round, by its own clock
and without choosing a token (some 0.02 ms); its prefill with an adapter holds a swap.

The first table has medians. A goal is a ratio within a round, so that the machine's drift cancels; the median
decides. An export is a command from start to end. Models are loaded from warm files, a swap is between adapters
that are loaded, and the last column is the peak of the process that decodes. Rounds in which other processes used
the processors are left out where at least three others remain; the column "of" says how many figures a median is of.

"""


def page(results: Results) -> str:
    """A page for the documentation: what was measured, and the tables."""
    return PAGE + markdown(results)


def markdown(results: Results) -> str:
    """The environment in a line, a table of systems, a table of goals."""
    environment = ", ".join(f"{key} {value}" for key, value in results.environment.items())
    used = [one for speed in results.speeds.values() for (one,) in quiet(speed)]
    every = sum(len(speed.rounds) for speed in results.speeds.values())
    others = statistics.mean(one.others for one in used)
    company = f"From {len(used)} of {every} rounds; in these, other processes used {others:.0%} of the processors."
    lines = [environment, "", company, "", *_systems(results), ""]
    for target, rows in goals(results).items():
        lines += [*_goals(target, rows), ""]
    return "\n".join(lines)


def _systems(results: Results) -> list[str]:
    costs = ("export s", "export CPU s", "export peak MB", "model MB", "load ms")
    speeds = ("prefill tok/s", "decode tok/s", "adapter tax", "swap ms", "peak MB")
    return _table(("system", *costs, *speeds), [(name, *_system(results, name)) for name in SYSTEMS])


def _system(results: Results, name: str) -> Sequence[str]:
    speed, runs, tax = results.speeds.get(name), results.exports.get(name), results.tax(name)
    if speed is None and not runs:
        return ("not measured", *[""] * 9)
    return (
        f"{statistics.median(run.seconds for run in runs):.1f}" if runs else "–",
        f"{statistics.median(run.cpu_seconds for run in runs):.1f}" if runs else "–",
        f"{statistics.median(run.peak_rss for run in runs) / 1e6:.0f}" if runs else "–",
        f"{results.model_bytes[name] / 1e6:.0f}" if name in results.model_bytes else "–",
        f"{speed.load_s * 1e3:.0f}" if speed else "–",
        f"{len(PROMPT) / speed.prefill_s:.0f}" if speed and speed.prefill_s else "–",
        f"{1 / speed.step_s:.1f}" if speed else "–",
        f"{tax.median:.2f}×" if tax else "–",
        f"{results.swap_ms[name]:.3f}" if name in results.swap_ms else "–",
        f"{speed.peak_rss / 1e6:.0f}" if speed else "–",
    )


def _goals(target: str, rows: Sequence[Goal]) -> list[str]:
    header = (f"goal, {target}", "bound", "median", "min – max", "of", "verdict")
    cells = [(goal.text, _bound(goal), *_found(goal.found, goal.unit), goal.verdict) for goal in rows]
    return _table(header, cells)


def _bound(goal: Goal) -> str:
    return f"{'≥' if goal.at_least else '≤'} {goal.bound:.3g}{goal.unit}"


def _found(found: Spread | None, unit: str) -> tuple[str, str, str]:
    if found is None:
        return "–", "–", "–"
    return f"{found.median:.3g}{unit}", f"{found.low:.3g} – {found.high:.3g}", str(found.count)


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return ["| " + " | ".join(cells) + " |" for cells in (header, ["---"] * len(header), *rows)]
