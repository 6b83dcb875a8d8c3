"""Validate: run a package on a device, run the bundle in torch, compare the two."""

from __future__ import annotations

import math
import re
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import msgspec
import numpy as np
from tokenizers import Tokenizer

from calora_export import devices, golden, latency, parity, profiles, questions, report
from calora_export import reference as references
from calora_export.bundle import Bundle
from calora_export.errors import CaloraError
from calora_export.jobs import InterruptedRun, Job, Trace
from calora_export.model import Rows, SlotModel
from calora_export.package import Package
from calora_export.profiles import Profile
from calora_export.questions import Examples
from calora_export.recipe import Parity, Tolerance
from calora_export.reference import Reference
from calora_export.report import DeviceInfo, ParityRow, Report, RouterRow, Sample, Series, TaskRow

FLOAT16_MAX = float(np.finfo(np.float16).max)


@dataclass(frozen=True)
class Outcome:
    """report: of all that was measured, incomplete where something broke; None: nothing was. fault: what broke."""

    report: tuple[Report, Series] | None
    fault: CaloraError | None = None


def validate(
    package: Package, bundle: Bundle, where: Sequence[str], progress: Callable[[str], None], profile: str = ""
) -> dict[str, Outcome]:
    """Parity, safety, router, tasks and latency of a package on each device, judged by a profile if one is named.
    Nothing is written."""
    known = profiles.load(profile) if profile else None
    progress("checking files")
    altered = package.altered()
    progress("building the references")
    reference = references.of(package, bundle)
    with tempfile.TemporaryDirectory(prefix="calora-validate-") as scratch:
        asked = questions.examples(bundle, reference, known)
        job = questions.job(package, bundle, reference, asked, Path(scratch), known)
        progress(f"running on {', '.join(where)}")
        traces = devices.run_each(where, package, job, progress)
    progress("comparing")
    made: dict[str, Outcome] = {}
    for device, trace in traces.items():
        fault = trace if isinstance(trace, CaloraError) else None
        whole = trace.begun if isinstance(trace, InterruptedRun) else None if isinstance(trace, CaloraError) else trace
        if whole is None:
            made[device] = Outcome(None, fault)
            continue
        as_there = references.as_on(whole.answer, reference, package, bundle)
        problems = [f"file: {line}" for line in altered] + ([" ".join(str(fault).split())] if fault else [])
        given = _Given(package, bundle, as_there, asked, job, whole, device, complete=fault is None)
        made[device] = Outcome(_report(given, problems, known, profile), fault)
    return made


@dataclass(frozen=True)
class _Given:
    """What a device was asked, what it answered, and what it should have."""

    package: Package
    bundle: Bundle
    reference: Reference
    examples: Mapping[str, Examples]
    job: Job
    trace: Trace
    device: str
    complete: bool


def _report(given: _Given, problems: list[str], profile: Profile | None, profile_name: str) -> tuple[Report, Series]:
    package, reference, trace = given.package, given.reference, given.trace
    settings, limits, answer = package.manifest.settings.parity, _limits(package), trace.answer
    parity_rows, errors = _parity(package, reference, given.job, trace)
    for row in parity_rows:
        numbers = {
            name: getattr(row, name) for name in row.__struct_fields__ if name not in ("case", "against", "passed")
        }
        problems += [
            f"{row.case} against {row.against}: {line}" for line in parity.failures(numbers, limits[row.against])
        ]
    safety, lines = _judge_safety(given)
    problems += lines
    router = _judge_router(package, given.bundle, reference, trace) if answer.gates or given.complete else None
    if router is not None and not router.decisions_equal:
        problems.append("router: the device chose other adapters than the reference")
    if router is not None and not (router.gates_max_abs or 0.0) <= settings.gates_max_abs:
        problems.append(f"router: gates_max_abs {router.gates_max_abs:.3g} is above {settings.gates_max_abs:.3g}")
    activations = _layers(answer.peaks)
    problems += [
        f"activations: {layer} reaches {peak:.4g}, float16 ends at {FLOAT16_MAX:.0f}"
        for layer, peak in activations.items()
        if not peak <= FLOAT16_MAX
    ]
    ends, quantised = set(package.manifest.model.eos), package.manifest.quantised
    tasks: tuple[TaskRow, ...] = ()
    if answer.completions or given.complete:
        tasks = _judge_tasks(given, ends, settings.task_points, quantised=quantised)
    problems += [
        f"task {row.adapter}: {row.metric} {row.device} on the device, {row.reference} in the reference, "
        f"examples {row.examples}"
        for row in tasks
        if not row.passed
    ]
    found = latency.summarise(given.job, answer)
    budget = latency.judge(profile, found, answer.emulated) if profile else ()
    problems += latency.over(budget, profile_name)
    kind, _, _ = given.device.partition(":")
    known = {spec.id for spec in given.bundle.manifest.adapters}
    shipped = sum(entry.id in known for entry in package.manifest.adapters)
    made = Report(
        added=tuple(entry.id for entry in package.manifest.adapters if entry.id not in known),
        sample=None if shipped == len(reference.adapters) else Sample(checked=len(reference.adapters), of=shipped),
        package=package.manifest.name,
        target=package.manifest.target,
        passed=not problems,
        device=DeviceInfo(
            name=answer.device,
            kind=msgspec.convert(kind, report.DeviceKind),
            arch=answer.arch,
            os=answer.os,
            emulated=answer.emulated,
        ),
        parity=parity_rows,
        safety=safety,
        router=router,
        tasks=tasks,
        latency=found,
        problems=tuple(problems),
        versions=package.manifest.versions,
        recipe=package.manifest.recipe,
        tolerances=_tolerances(limits, settings),
        activations=activations,
        represented=dict(Counter(f"{entry.stored} as {entry.held}" for entry in package.manifest.represented)),
        zeros=package.manifest.zeros or None,
        runtime=answer.runtime,
        complete=given.complete,
        profile=profile_name,
        budget=budget,
        speed=latency.speed(answer),
    )
    timing = answer.timing
    series = Series(
        error=errors,
        prefill=1,
        decode_ms=timing.decode if timing else {},
        swap_ms=timing.swap if timing else (),
    )
    return made, series


def _layers(peaks: Mapping[str, float] | None) -> dict[str, float]:
    """The largest |value| of each layer, in the order in which they run: an operator with no layer in its name
    belongs to the layer before it. What hides positions is as low as float16 goes, and no activation."""
    found: dict[str, float] = {}
    layer = "embedding"
    seen = {name: peak for name, peak in (peaks or {}).items() if not name.startswith("mask")}
    for operator, peak in seen.items():
        named = re.search(r"(?:^|_)layers_(\d+)_", operator)
        layer = f"layer {named[1]}" if named else "head" if operator.startswith(("lm_head", "logits")) else layer
        found[layer] = float(np.fmax(found.get(layer, 0.0), peak)) if np.isfinite(peak) else math.inf
    return found


def _limits(package: Package) -> dict[str, Tolerance]:
    """Which tolerances hold against which reference."""
    settings = package.manifest.settings.parity
    coarse = settings.quantised if package.manifest.quantised else None
    return {"source": coarse or settings.source, "target": settings.target}


def _parity(
    package: Package, reference: Reference, job: Job, trace: Trace
) -> tuple[tuple[ParityRow, ...], dict[tuple[str, str], list[float]]]:
    limits = _limits(package)
    made: list[ParityRow] = []
    errors: dict[tuple[str, str], list[float]] = {}
    for against, torch_model in reference.models().items():
        base: np.ndarray | None = None
        for case in job.cases:
            if case.name not in trace.logits:  # something broke before
                continue
            expected = golden.reference_logits(torch_model, reference.mix(case.mix, against), case.ids, case.prefill)
            found = trace.logits[case.name]
            base = expected if base is None else base
            alike = case.mix and not case.name.startswith("sentence:")  # of the base's own tokens
            effect = parity.effect_ratio(expected, base, found, trace.logits["base"]) if alike else None
            made.append(parity.compare(case.name, against, expected, found, effect, limits[against]))
            errors[case.name, against] = np.abs(expected - found).max(-1).tolist()
    return tuple(made), errors


def _judge_safety(given: _Given) -> tuple[report.Safety, list[str]]:
    """A package without adapters has nothing to swap and passes."""
    seen = given.trace.answer.safety
    if seen is None:
        passed = True if given.complete else None
        return report.Safety(aba_bit_identical=passed, kv_isolated=passed, wrong_base_refused=passed), []
    problems = []
    if not seen.aba:
        problems.append("safety: the first adapter's logits changed after a swap to another and back")
    if not seen.fresh:
        problems.append("safety: a KV cache filled under one adapter was read under another")
    if not seen.stale:
        problems.append("safety: reading a stale KV cache changed nothing, so its isolation could not be checked")
    if not seen.refused:
        problems.append("safety: an adapter that says it is for another base was not refused")
    made = report.Safety(
        aba_bit_identical=seen.aba, kv_isolated=seen.fresh and seen.stale, wrong_base_refused=seen.refused
    )
    return made, problems


def _judge_router(package: Package, bundle: Bundle, reference: Reference, trace: Trace) -> RouterRow | None:
    """Gates by adapter: the package's own template, tokenizer and order of classes must lead to the bundle's choice."""
    entry = package.manifest.router
    if reference.router is None or reference.text is None or entry is None:
        return None
    texts = questions.router_texts(package, bundle)
    expected = np.stack([reference.gates(text) for text in texts])
    found = np.array(trace.answer.gates, np.float32)
    if found.shape != expected.shape or set(entry.spec.classes) != set(reference.classes):
        return RouterRow(cases=len(texts), decisions_equal=False, gates_max_abs=None, accuracy=None)
    found = found[:, [entry.spec.classes.index(name) for name in reference.classes]]
    same_top = expected.argmax(1) == found.argmax(1)
    least = np.finfo(np.float32).tiny  # vector units flush smaller ones, such as 4e-40, to 0; they choose nothing
    owners = {prompt: adapter for adapter, pairs in golden.examples(bundle).items() for prompt, _ in pairs}
    truth = [owners.get(text) for text in texts]
    classes = reference.classes
    right = [classes[row.argmax()] == owner for row, owner in zip(found, truth, strict=True) if owner is not None]
    return RouterRow(
        cases=len(texts),
        decisions_equal=bool(np.array_equal(expected >= least, found >= least) and same_top.all()),
        gates_max_abs=parity.max_abs(expected, found),
        accuracy=float(np.mean(right)) if right else None,
    )


def _judge_tasks(given: _Given, ends: set[int], points: float, *, quantised: bool) -> tuple[TaskRow, ...]:
    """Exact match in percent. Greedy generation is right when every arg max is: one pass each for the reference.

    That is the bundle as trained, unless the recipe quantised it: then the same model, quantised.
    """
    models = given.reference.models()
    judge = "target" if quantised and "target" in models else "source"
    tokenizer = Tokenizer.from_file(str(given.bundle.path / "base" / "tokenizer.json"))
    completions = iter(given.trace.answer.completions)
    made_rows = []
    for adapter, task in given.examples.items():
        mixes = {name: given.reference.mix({adapter: 1.0}, name) for name in models}
        right: dict[str, list[bool]] = {name: [] for name in (*models, "device")}
        for (prompt, text), made in zip(task.scored, islice(completions, len(task.scored)), strict=True):
            wanted, ids = tuple(tokenizer.encode(text, add_special_tokens=False).ids), tokenizer.encode(prompt).ids
            for name, torch_model in models.items():
                right[name].append(_completes(torch_model, mixes[name], ids, wanted, ends))
            right["device"].append(made[:-1] == wanted and made[-1] in ends)
        scores = {name: 100 * float(np.mean(found)) for name, found in right.items()}
        passed = abs(scores[judge] - scores["device"]) <= points + 1e-9
        examples = Sample(checked=len(task.scored), of=task.of)
        made_rows.append(
            TaskRow(
                adapter=adapter,
                metric="exact_match",
                reference=scores[judge],
                passed=passed,
                examples=examples,
                **scores,
            )
        )
    return tuple(made_rows)


def _completes(torch_model: SlotModel, mix: Rows, prompt: Sequence[int], wanted: Sequence[int], ends: set[int]) -> bool:
    logits = golden.reference_logits(torch_model, mix, [*prompt, *wanted], len(prompt))
    best = logits.argmax(-1).tolist()
    return best[:-1] == list(wanted) and best[-1] in ends


def _tolerances(limits: Mapping[str, Tolerance], settings: Parity) -> dict[str, float]:
    """Flat, as the report shows them: `source.kl_max` …"""
    flat = {"task_points": settings.task_points, "gates_max_abs": settings.gates_max_abs}
    for against, limit in limits.items():
        low, high = limit.effect_ratio
        named = {
            "prefill_max_abs": limit.max_abs,
            "decode_max_abs": limit.max_abs,
            "kl_max": limit.kl_max,
            "top1_agreement": limit.top1_agreement,
            "sqnr_db": limit.sqnr_db,
            "effect_ratio_min": low,
            "effect_ratio_max": high,
        }
        flat |= {f"{against}.{name}": value for name, value in named.items()}
    return flat
