"""What the commands print: tables for a person, one JSON document for a program."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
from rich.console import Console
from rich.markup import escape
from rich.table import Table

if TYPE_CHECKING:
    from calora_export.comparison import Comparison
    from calora_export.formats import Cell
    from calora_export.inspection import BundleView, CoremlView, PackageView, PrunedView
    from calora_export.neural_engine import Finding
    from calora_export.package import JointBasis, Manifest, Zeros
    from calora_export.report import BudgetRow, Latency, Report, Speed

# Without emoji: `apple:x: …` is the name of a device.
out, err = Console(soft_wrap=True, emoji=False), Console(stderr=True, soft_wrap=True, highlight=False, emoji=False)

PIPE = 10_000  # characters that a line may have


def emit(document: object) -> None:
    sys.stdout.write(msgspec.json.format(msgspec.json.encode(document), indent=2).decode() + "\n")


def show_rows(entries: Sequence[dict[str, str]], *, names: bool = True) -> None:
    """A column for each key. names: those of the first are to be copied, and stay whole."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for index, column in enumerate(entries[0] if entries else ()):
        table.add_column(escape(column), overflow="fold", no_wrap=names and index == 0)
    for entry in entries:
        table.add_row(*map(escape, entry.values()))
    whole = out if out.is_terminal else Console(emoji=False, width=PIPE)  # in a pipe a row is a line
    whole.print(table)


def show_formats(cells: Sequence[Cell]) -> None:
    """For each target a table of schemes, with a column for recipes that make the same of all of them."""
    schemes = tuple(dict.fromkeys(cell.scheme for cell in cells))
    for target in dict.fromkeys(cell.target for cell in cells):
        notes: dict[str, int] = {}
        columns: dict[str, dict[str, str]] = {}
        for cell in cells:
            if cell.target == target:
                columns.setdefault(cell.recipe, {})[cell.scheme] = _outcome(cell, notes)
        alike: dict[tuple[str, ...], list[str]] = {}
        for recipe, column in columns.items():
            alike.setdefault(tuple(column[scheme] for scheme in schemes), []).append(recipe.replace(f"{target}-", "…"))
        head = (f"{target}-…", *("\n".join(names) for names in alike.values()))
        show_rows([dict(zip(head, row, strict=True)) for row in zip(schemes, *alike, strict=True)], names=False)
        for note, number in notes.items():
            out.print(f"  ({number}) {note}", markup=False, highlight=False)
        out.print()
    out.print(
        "exact: the same numbers. dB: what rounding them keeps; all weights: only x is\n"
        "rounded otherwise. refused: export ends with 1, unless what is said is done.\n"
        "int4/32: int4 in groups of 32, /0 in rows; uint: with zero points; nf: with a\n"
        "codebook; a8: the base reads x in int8.",
        markup=False,
        highlight=False,
    )


def _outcome(cell: Cell, notes: dict[str, int]) -> str:
    """In a few words; why something is refused becomes a note of its own."""
    if cell.outcome == "refused":
        return f"refused ({notes.setdefault(cell.note, len(notes) + 1)})"
    return f"{'exact' if cell.outcome == 'exact' else cell.note}, {cell.held_as}"


def show_bundle(view: BundleView) -> None:
    base = view.base
    stored = ", ".join(f"{count} {kind}" for kind, count in base.stored.items())
    show_rows(
        [
            {
                "bundle": "base",
                view.name: f"{base.architecture}, {base.parameters:,} parameters, {megabytes(base.bytes)}",
            },
            {"bundle": "compression", view.name: "; ".join(base.compression) or "none"},
            {"bundle": "weights", view.name: stored},
            *({"bundle": "pruned", view.name: pruned(step)} for step in base.pruned),
            {"bundle": "fingerprint", view.name: base.fingerprint},
        ]
    )
    show_adapters(view)


def show_exported(made: Manifest, directory: Path) -> None:
    held = f"{many(len(made.adapters), 'adapter')}, {megabytes(made.nbytes)} in all"
    out.print(f"Wrote {directory}: {held}.", markup=False)
    if made.represented:
        worst = min(made.represented, key=lambda entry: entry.sqnr_db)
        out.print(
            f"Not exactly as the bundle has them: {many(len(made.represented), 'weight')} "
            f"(worst: {worst.module}, {worst.stored} held as {worst.held}, {worst.sqnr_db} dB).",
            markup=False,
        )
    if made.zeros:
        out.print(f"Zeros: {zeros(made.zeros)}.", markup=False)
    if made.joint_basis:
        show_joint(made.joint_basis)


def show_joint(joint: JointBasis) -> None:
    """What compressing adapters into a basis saved, and what it cost each of them."""
    whole = joint.bytes + sum(entry.bytes for entry in joint.adapters)
    plain = sum(entry.plain_bytes for entry in joint.adapters)
    worst = max(entry.error for entry in joint.adapters)
    out.print(
        f"Joint basis: {len(joint.adapters)} adapters in {megabytes(whole)}, {megabytes(joint.bytes)} of it shared; "
        f"as plain LoRAs {megabytes(plain)}. Largest error {worst:.3%}.",
        markup=False,
    )
    if joint.kept:
        out.print(f"Left as they are, since they are not linear: {', '.join(joint.kept)}.", markup=False)
    out.print()
    show_rows(
        [
            {
                "adapter": entry.id,
                "error": f"{entry.error:.3%}",
                "bytes": f"{entry.bytes:,}",
                "as plain LoRA": f"{entry.plain_bytes:,}",
            }
            for entry in joint.adapters
        ]
    )


def show_package(view: PackageView) -> None:
    model = view.model
    size = sum(entry.size for entry in view.files.values())
    changed = (
        f"{len(view.represented)} weights not exactly the bundle's" if view.represented else "the bundle's own weights"
    )
    show_rows(
        [
            {"package": "target", view.name: f"{view.target}, recipe {view.recipe}, {megabytes(size)}"},
            {
                "package": "model",
                view.name: f"{model.architecture}, {model.layers} layers, {model.context} positions",
            },
            {"package": "weights", view.name: changed},
            *([] if view.zeros is None else [{"package": "zeros", view.name: zeros(view.zeros)}]),
            {"package": "slots", view.name: f"{view.slots} sites, gate {view.gate}"},
            {"package": "base", view.name: view.base_fingerprint},
        ]
    )
    show_adapters(view)
    if view.coreml is not None:
        show_coreml(view.coreml)
    out.print()
    show_rows(
        [
            {"file": name, "size": megabytes(entry.size), "sha256": entry.sha256[:16]}
            for name, entry in view.files.items()
        ]
    )


def show_coreml(view: CoremlView) -> None:
    for name, part in view.parts.items():
        systems = ", ".join(f"{system} {version}" for system, version in part.os.items())
        shares = (
            f"weights {megabytes(part.weights)}, states {megabytes(part.states)}, "
            f"inputs {megabytes(part.inputs)}, activations {megabytes(part.activations)}"
        )
        why = ", because" if part.findings else ""
        out.print()
        show_rows(
            [
                {"Core ML": "needs", name: f"{systems} or newer"},
                {"Core ML": "memory", name: f"{megabytes(part.memory)} at the most: {shares}"},
                {"Core ML": "if expanded", name: f"weights {megabytes(part.expanded)}, where a compute unit does that"},
                {"Core ML": "functions", name: ", ".join(part.functions)},
                {"Core ML": "operators", name: f"{sum(part.operators.values())}: {counts(part.operators)}"},
                {"Core ML": "off the engine", name: f"{part.off_engine} of them on the CPU or GPU{why}"},
                *({"Core ML": entry.rule, name: explain(entry)} for entry in part.findings),
                *({"Core ML": "warning", name: line} for line in part.warnings),
            ]
        )
    out.print()
    show_rows(
        [
            {
                "device": name,
                "suits": "no" if verdict.problems else "yes",
                "": "; ".join((*verdict.problems, *verdict.warnings)),
            }
            for name, verdict in view.devices.items()
        ]
    )


def explain(finding: Finding) -> str:
    return f"{finding.reason} ({finding.basis}): {counts(finding.operators)}"


def counts(operators: Mapping[str, int], most: int = 8) -> str:
    """The most frequent ones."""
    shown = [f"{name} {count}" for name, count in list(operators.items())[:most]]
    return ", ".join([*shown, "…"] if len(operators) > most else shown)


def show_adapters(view: BundleView | PackageView) -> None:
    out.print()
    show_rows(
        [
            {
                "adapter": entry.id,
                "task": entry.task,
                "branches": ", ".join(entry.branches),
                "sites": str(entry.sites),
                "rank": str(entry.rank),
                "size": megabytes(entry.bytes),
            }
            for entry in view.adapters
        ]
    )
    out.print()
    router = view.router
    if router is None:
        out.print("router: none")
    else:
        text = f"{router.kind}, {router.classes} classes, per {router.granularity}, {router.selection}"
        out.print(f"router: {text}, {megabytes(router.bytes)}")


def show_report(made: Report, directory: Path) -> None:
    show_rows(
        [
            {
                "case": row.case,
                "against": row.against,
                "max abs": number(max(row.prefill_max_abs or 0, row.decode_max_abs or 0)),
                "KL": number(row.kl_max),
                "top-1": number(row.top1_agreement),
                "SQNR dB": number(row.sqnr_db),
                "effect": number(row.effect_ratio),
                "": "ok" if row.passed else "FAILED",
            }
            for row in made.parity
        ]
    )
    out.print()
    if made.tasks:
        rounded = any(row.target is not None for row in made.tasks)
        show_rows(
            [
                {"task": row.adapter, "metric": row.metric, "examples": str(row.examples or "–")}
                | {"as trained": number(row.source)}
                | ({"as rounded": number(row.target)} if rounded else {})
                | {"device": number(row.device), "": "ok" if row.passed else "FAILED"}
                for row in made.tasks
            ]
        )
        if rounded:
            costs = [(row.target or 0.0) - (row.source or 0.0) for row in made.tasks]
            out.print(f"what the recipe rounded costs {sum(costs) / len(costs):+.2f} points on average")
        out.print()
    words = {True: "yes", False: "NO", None: "–"}
    safety = {name: words[getattr(made.safety, name)] for name in made.safety.__struct_fields__}
    out.print("  ".join(f"{name} {value}" for name, value in safety.items()))
    if made.router is not None:
        equal = "all equal" if made.router.decisions_equal else "NOT equal"
        out.print(f"router: {made.router.cases} decisions {equal}, accuracy {number(made.router.accuracy)}")
    show_latency(made.latency, made.speed)
    show_budget(made.budget)
    if made.added:
        named = ", ".join(made.added)
        out.print(f"Not compared, since the bundle does not have them: {named}.", markup=False, highlight=False)
    if made.sample is not None:
        out.print(f"{made.sample} adapters were compared, evenly spaced; no other was.")
    for problem in made.problems:
        out.print(f"[red]✗[/red] {escape(problem)}", highlight=False)
    if made.device.emulated:
        out.print("An emulated device: its times mean nothing and are not to be compared.")
    verdict = "[green]PASSED[/green]" if made.passed else "[red]FAILED[/red]"
    page = escape(str(directory / "report.html"))
    out.print(f"{verdict} {escape(made.package)} on {made.device.name}. Report: {page}")


def show_latency(made: Latency, speed: Speed | None) -> None:
    mapped = f", mapped files {number(speed.mapped_mb)} MB" if speed is not None and speed.mapped_mb else ""
    out.print(
        f"load {number(made.load_ms)} ms  swap p50 {number(made.swap_ms.p50)} ms  "
        f"prefill {number(made.prefill_tok_s)} tok/s  decode {number(made.decode_tok_s)} tok/s  "
        f"adapter tax {number(made.adapter_tax)}  mix of 2 {number(made.mix2_tax)}  "
        f"router {number(made.router_ms)} ms  peak {number(made.peak_rss_mb)} MB{mapped}  ({made.threads} threads)",
        highlight=False,
    )
    if speed is not None and speed.lengths:
        lengths = "  ".join(
            f"{row.tokens}: {number(row.prefill_tok_s)}, then {number(row.decode_tok_s)}" for row in speed.lengths
        )
        out.print(f"tok/s by length, prefill, then decode  {lengths}", highlight=False)


def show_budget(rows: Sequence[BudgetRow]) -> None:
    words = {True: "ok", False: "OVER", None: "not judged"}
    if rows:
        out.print(
            "budget "
            + "  ".join(f"{row.name} {number(row.found)} of {row.limit:g} {words[row.passed]}" for row in rows),
            highlight=False,
        )


def show_comparison(made: Comparison) -> None:
    show_rows(
        [
            {
                "": row.name,
                "A": row.a if isinstance(row.a, str) else number(row.a),
                "B": row.b if isinstance(row.b, str) else number(row.b),
                "change": "–" if row.change is None else f"{100 * row.change:+.1f} %",
                " ": "WORSE" if row.worse else "" if row.judged else "not judged",
            }
            for row in made.rows
        ]
    )
    out.print()
    for line in made.notes:
        out.print(f"note: {line}", markup=False, highlight=False)
    stated = "  ".join(f"{name} {value:g}" for name, value in made.tolerances.items())
    out.print(f"tolerances: {stated}", highlight=False)
    if made.regressions:
        out.print(f"[red]WORSE[/red] in {len(made.regressions)}: {escape(', '.join(made.regressions))}")
    else:
        out.print("[green]NOT WORSE[/green]")


def pruned(step: PrunedView) -> str:
    size = f"{step.weights} weights, {step.pattern}: {megabytes(step.bytes)}"
    return size if step.zero_bytes is None else f"{size}, of which zeros take at least {megabytes(step.zero_bytes)}"


def zeros(found: Zeros) -> str:
    share = f"{found.zeros:,} of {found.numbers:,} numbers in {found.weights} pruned weights"
    if found.stored == "sparse":
        return f"{share}, left out: their mask takes {megabytes(found.bytes)}"
    return f"{share}, stored dense: they take {megabytes(found.bytes)}"


def many(count: int, noun: str) -> str:
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"


def megabytes(size: int) -> str:
    return f"{size / 1e6:.2f} MB" if size >= 10_000 else f"{size} B"
