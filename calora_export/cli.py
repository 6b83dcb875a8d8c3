"""The command line: parses, calls the library, has `screen` print. Nothing else in this package prints or exits."""

from __future__ import annotations

import contextlib
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from enum import StrEnum
from inspect import Parameter, signature
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import msgspec
import typer
from typer.core import TyperCommand, TyperGroup
from typer.main import get_command

from calora_export import importers
from calora_export.errors import CaloraError
from calora_export.screen import (
    emit,
    err,
    many,
    out,
    show_budget,
    show_bundle,
    show_comparison,
    show_exported,
    show_formats,
    show_latency,
    show_package,
    show_report,
    show_rows,
)
from calora_export.version import VERSION

if TYPE_CHECKING:
    from calora_export.generation import Chat
    from calora_export.pipeline import Progress
    from calora_export.runtimes import Mix

WRONG_INPUT, FAILED = 1, 3

app = typer.Typer(
    help="Export a trained CA-LoRA bundle to a phone: one base; adapters swapped, mixed and routed at run time.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
Json = Annotated[bool, typer.Option("--json", help="One JSON document on stdout, everything else on stderr.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
Device = Annotated[
    str, typer.Option("--device", help="Where to run: host, adb:SERIAL, ssh:HOST, browser …")
]
Devices = Annotated[
    list[str], typer.Option("--device", help="Where to run, once or more: host, adb:SERIAL, ssh:HOST, browser …")
]
ProfileName = Annotated[
    str, typer.Option("--profile", help="A device profile: its threads, cores and examples, its budgets to judge by.")
]
PackagePath = Annotated[Path, typer.Argument(help="A package directory.", metavar="PACKAGE", show_default=False)]


class Importers(TyperGroup):
    """One command per module of importers/, imported when its help or itself is asked for."""

    def list_commands(self, ctx: typer.Context) -> list[str]:  # type: ignore[override]
        return list(importers.names())

    def get_command(self, ctx: typer.Context, cmd_name: str) -> TyperCommand | None:  # type: ignore[override]
        if cmd_name not in importers.names():
            return None
        single = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
        single.command(cmd_name)(import_command(importers.load(cmd_name).run))
        return get_command(single)  # type: ignore[return-value]


imports = typer.Typer(cls=Importers, help="Build a bundle from what trainers publish.", no_args_is_help=True)
app.add_typer(imports, name="import")


class Listable(StrEnum):
    targets = "targets"
    recipes = "recipes"
    devices = "devices"
    adapters = "adapters"
    routers = "routers"
    formats = "formats"


@app.callback(invoke_without_command=True)
def options(version: Annotated[bool, typer.Option("--version", help="Show the version.")] = False) -> None:
    if version:
        print(f"calora-export {VERSION}")
        raise typer.Exit


@app.command()
def demo(
    out_dir: Annotated[Path, typer.Argument(metavar="OUT", show_default=False)],
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Write the embedded demo bundle: a small base, eight adapters and a router, really trained."""
    with reporting(debug):
        from calora_export import demo as demo_bundle

        demo_bundle.write(out_dir)
        if json:
            emit({"bundle": str(out_dir)})
        else:
            out.print(f"Wrote the demo bundle to {out_dir}. Next: calora-export inspect {out_dir}", markup=False)


@app.command()
def inspect(
    path: Annotated[Path, typer.Argument(help="A bundle or a package.", show_default=False)],
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Show what is in a bundle or a package: sizes, hashes, compression, slots, adapters."""
    with reporting(debug):
        from calora_export import inspection

        view = inspection.inspect(path)
        if json:
            emit(view)
        elif isinstance(view, inspection.BundleView):
            show_bundle(view)
        else:
            show_package(view)


@app.command()
def export(
    bundle: Annotated[Path, typer.Argument(help="A bundle directory.", metavar="BUNDLE", show_default=False)],
    out_dir: Annotated[Path, typer.Option("-o", "--out", metavar="PACKAGE", show_default=False)],
    recipe: Annotated[str, typer.Option("--recipe", help="A recipe's name or file.", show_default=False)],
    device: Annotated[str | None, typer.Option("--device", help="Refuse what this device cannot run or hold.")] = None,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Lower a bundle into a package. The old package, if any, is replaced only when the new one is complete."""
    with reporting(debug), progress() as say:
        from calora_export import fitness, pipeline

        package = pipeline.export(bundle, out_dir, recipe, say, device)
        for line in fitness.check(device, out_dir) if device is not None else ():
            err.print(f"note: {line}", markup=False)
        made = package.manifest
        if json:
            emit(
                {"package": str(out_dir), "target": made.target, "bytes": made.nbytes, "represented": made.represented}
                | ({} if made.zeros is msgspec.UNSET else {"zeros": made.zeros})
                | ({} if made.joint_basis is msgspec.UNSET else {"joint_basis": made.joint_basis})
            )
        else:
            show_exported(made, out_dir)


@app.command("add-adapter")
def add_adapter(
    package: PackagePath,
    adapter: Annotated[Path, typer.Argument(help="An adapter directory.", metavar="ADAPTER", show_default=False)],
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Encode one more adapter into a package; the base's files do not change."""
    with reporting(debug):
        from calora_export import pipeline

        entry = pipeline.add_adapter(package, adapter)
        if not entry.stated:
            line = f"note: {adapter} does not say which base it was trained for; taken to be this package's."
            err.print(line, markup=False)
        if json:
            emit(entry)
        else:
            out.print(f"Added {entry.id}: {entry.sites} sites, rank {entry.rank}, {package / entry.file}", markup=False)


@app.command()
def validate(
    package: PackagePath,
    bundle: Annotated[Path, typer.Option("--bundle", help="The bundle it was made from.", show_default=False)],
    device: Devices = ["host"],  # noqa: B006  # typer makes a new one for each call
    profile: ProfileName = "",
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Prove it: parity, safety, routing, task accuracy and latency, into PACKAGE/report. Exit code 3 if it failed."""
    where = list(dict.fromkeys(device))
    with reporting(debug), progress() as say:
        from calora_export import pipeline

        answers = pipeline.validate_each(package, bundle, where, say, profile)
        for name, answer in answers.items():
            if answer.fault is not None and answer.report is not None:
                kept = pipeline.report_directory(package, name, where) / "report.html"
                err.print(f"note: {name}: what was measured before is in {kept}, marked as incomplete", markup=False)
        only = next(iter(answers.values()))
        if len(where) == 1 and only.fault is not None:
            raise only.fault
    reports = {name: made.report for name, made in answers.items() if made.report and made.fault is None}
    faults = {name: " ".join(str(made.fault).split()) for name, made in answers.items() if made.fault is not None}
    if json and len(where) == 1:
        sys.stdout.write(reports[where[0]].to_json() + "\n")
    elif json:
        emit({"package": str(package), "reports": reports, "faults": faults})
    else:
        for name, made in reports.items():
            show_report(made, pipeline.report_directory(package, name, where))
    for line in faults.values():
        err.print(f"error: {line}", markup=False)
    if faults:
        raise typer.Exit(WRONG_INPUT)
    if not all(made.passed for made in reports.values()):
        raise typer.Exit(FAILED)


@app.command()
def bench(
    package: PackagePath,
    device: Device = "host",
    profile: ProfileName = "",
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Measure latency and memory only. Exit code 3 if it is over a budget of --profile."""
    with reporting(debug), progress() as say:
        from calora_export import measuring

        made = measuring.bench(package, device, say, profile)
    if json:
        emit(made)
    else:
        show_latency(made.latency, made.speed)
        show_budget(made.budget)
        if made.emulated:
            err.print("note: an emulated device; its times mean nothing and are not to be compared.")
    if any(row.passed is False for row in made.budget):
        raise typer.Exit(FAILED)


@app.command()
def compare(
    before: Annotated[Path, typer.Argument(help="A report.json, or what bench --json said.", metavar="A")],
    after: Annotated[Path, typer.Argument(help="The same of another run.", metavar="B")],
    tolerance: Annotated[
        float, typer.Option("--tolerance", min=0, help="By how much latency and memory may grow: 0.1 is a tenth.")
    ] = 0.1,
    page: Annotated[Path | None, typer.Option("--html", help="Write a page that shows both.")] = None,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Compare two reports: what B does worse than A. Exit code 3 if there is anything."""
    with reporting(debug):
        from calora_export import comparison

        made = comparison.compare(before, after, tolerance)
        if page is not None:
            comparison.write_page(made, page)
    if json:
        emit(made)
    else:
        show_comparison(made)
    if made.regressions:
        raise typer.Exit(FAILED)


@app.command()
def run(
    package: PackagePath,
    prompt: Annotated[
        list[str], typer.Option("--prompt", help="Several are the turns of one chat.", show_default=False)
    ],
    adapter: Annotated[str, typer.Option("--adapter", help="auto, none, ID or ID=0.7,ID=0.3")] = "auto",
    task: Annotated[str | None, typer.Option("--task", help="The task's name, for a router that goes by it.")] = None,
    limit: Annotated[int, typer.Option("--max-tokens", min=1, help="New tokens per answer.")] = 128,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Try a package on this machine: the router picks adapters for each prompt, the answer streams."""
    with reporting(debug):
        from calora_export import generation, latency, runtimes
        from calora_export import package as packages

        opened = packages.load(package)
        mix = generation.parse_mix(adapter)
        if mix is None and opened.manifest.router is None:
            err.print("note: this package has no router; running the base. Name an adapter with --adapter.")
            mix = {}
        session = runtimes.load(opened.manifest.target).open_session(opened, latency.threads(None))
        chat = generation.Chat(opened, session)
        turns = [take_turn(chat, text, mix, task, limit, quiet=json) for text in prompt]
        if json:
            emit({"package": str(package), "turns": turns})


def take_turn(
    chat: Chat, prompt: str, mix: Mix | None, task: str | None, limit: int, *, quiet: bool
) -> dict[str, object]:
    turn = chat.start(prompt, mix, task)
    chosen = ", ".join(f"{name} {gate:.2f}" for name, gate in turn.mix.items()) or "none, the base alone"
    if not quiet:
        err.print(f"[dim]adapters: {chosen} ({'routed' if turn.routed else 'named'}); cache {turn.cache}[/dim]")
    pieces = []
    for piece in chat.stream(limit):
        pieces.append(piece)
        if not quiet:
            sys.stdout.write(piece)
            sys.stdout.flush()
    if not quiet:
        sys.stdout.write("\n")
        for part in chat.sentences[1:]:
            named = ", ".join(f"{name} {gate:.2f}" for name, gate in part.mix.items())
            err.print(f"[dim]from token {part.token} on: {named} (routed)[/dim]")
    return {
        "prompt": prompt,
        "adapters": turn.mix,
        "routed": turn.routed,
        "prefilled_tokens": turn.prefill,
        "cache": turn.cache,
        "sentences": [
            {"token": part.token, "adapters": part.mix, "prefilled_tokens": part.prefill} for part in chat.sentences
        ],
        "text": "".join(pieces),
    }


@app.command("list")
def list_things(
    what: Annotated[Listable, typer.Argument(show_default=False)], json: Json = False, debug: Debug = False
) -> None:
    """List what this tool knows: targets, recipes, devices, kinds of adapters and routers, weight formats."""
    with reporting(debug):
        from calora_export import catalogue, formats

        if what is Listable.formats and not json:
            show_formats(formats.matrix())
            return
        entries = catalogue.entries(what.value)
        if json:
            emit({what.value: entries})
        else:
            show_rows(entries)


def import_command(run: Callable[..., importers.Imported]) -> Callable[..., None]:
    """An importer's `run` as a command: its own parameters and first line of help, then --json and --debug."""

    def command(json: bool, debug: bool, **parameters: object) -> None:
        with reporting(debug):
            made = run(**parameters)
            if json:
                emit({"bundle": str(made.bundle), "adapters": made.adapters})
            else:
                count = many(len(made.adapters), "adapter")
                out.print(f"Wrote {made.bundle}: {count}. Next: calora-export inspect {made.bundle}", markup=False)

    own = signature(run, eval_str=True)
    switches = {"json": Json, "debug": Debug}
    more = [Parameter(name, Parameter.KEYWORD_ONLY, default=False, annotation=kind) for name, kind in switches.items()]
    command.__signature__ = own.replace(parameters=[*own.parameters.values(), *more])  # type: ignore[attr-defined]
    command.__annotations__ = {name: parameter.annotation for name, parameter in own.parameters.items()} | switches
    command.__doc__ = (run.__doc__ or "").partition("\n\n")[0]
    return command


@contextlib.contextmanager
def progress() -> Iterator[Progress]:
    """A spinner with the stage's name on a terminal, silence in a pipe; what a person is asked to do stays."""
    from calora_export.devices import Request

    with err.status("starting") if err.is_terminal else contextlib.nullcontext() as status:

        def say(stage: str) -> None:
            if isinstance(stage, Request):
                err.print(stage, markup=False)
            elif status is not None:
                status.update(stage)

        yield say


@contextlib.contextmanager
def reporting(debug: bool) -> Iterator[None]:
    """A user's mistake is one line on stderr and exit code 1."""
    try:
        yield
    except CaloraError as error:
        if debug:
            traceback.print_exc()
        fail(" ".join(str(error).split()))
    except KeyboardInterrupt:
        fail("interrupted; nothing was changed")
    except ModuleNotFoundError as error:
        if debug:
            traceback.print_exc()
        from calora_export import targets

        fail(targets.missing(error.name or str(error)))


def fail(line: str) -> NoReturn:
    err.print(f"error: {line}", markup=False)
    raise typer.Exit(WRONG_INPUT)


def main() -> None:
    # The reference's matrices are small: two threads of torch export a 135M model more slowly than one, and on a busy
    # machine they wait for each other, spinning. Read when torch is imported.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    app()
