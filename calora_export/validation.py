"""Validate: run a package on a device, run the bundle in torch, compare the two."""

from __future__ import annotations

import math
import re
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import TypeVar

import msgspec
import numpy as np
import torch
from msgspec import UNSET
from tokenizers import Tokenizer

from calora_export import adapters as rows
from calora_export import (
    composing,
    devices,
    generation,
    golden,
    joint_basis,
    latency,
    parity,
    profiles,
    report,
    routers,
    runtimes,
)
from calora_export.adapters import Adapter
from calora_export.bundle import Bundle
from calora_export.errors import CaloraError
from calora_export.jobs import Answer, Case, Completion, InterruptedRun, Job, Safety, Trace
from calora_export.model import Rows, SlotModel
from calora_export.package import Package
from calora_export.profiles import Profile
from calora_export.recipe import Parity, Tolerance
from calora_export.report import DeviceInfo, ParityRow, Report, RouterRow, Sample, Series, TaskRow
from calora_export.router_text import RouterText
from calora_export.weights import Weights

PREFILL, DECODE = 32, 32
ROUTES = 50
CHECKED = 64  # adapters, of more
MIXED = 8  # adapters of a routed mix that is compared
SENTENCES, LONGEST = 4, 256  # of an answer whose sentences are routed; its tokens
EXAMPLES = 200
FLOAT16_MAX = float(np.finfo(np.float16).max)
FORGED = "sha256:" + "0" * 64
T = TypeVar("T")


@dataclass(frozen=True)
class Reference:
    """The bundle in torch: `source` as trained, `target` with the changes that the recipe made, if it made any.

    adapters: those that are checked; held: those that the recipe changed, as the package has them; int8: rows are
    rounded to what its files hold.
    """

    bundle: Bundle
    source: SlotModel
    target: SlotModel | None
    adapters: Mapping[str, Adapter]
    held: Mapping[str, Adapter]
    int8: bool
    router: routers.Router | None
    text: RouterText | None

    def models(self) -> dict[str, SlotModel]:
        return {"source": self.source} | ({"target": self.target} if self.target is not None else {})

    def mix(self, mix: Mapping[str, float], against: str = "source") -> Rows:
        known = self.adapters if against == "source" else {**self.adapters, **self.held}
        parts = [(known.get(i) or rows.load_adapter(self.bundle, i), gate) for i, gate in mix.items()]
        if against == "target" and self.int8:
            parts = [(rows.in_int8(adapter), gate) for adapter, gate in parts]
        return Rows.of(rows.mix(parts)) if parts else Rows.none()


@dataclass(frozen=True)
class Examples:
    """Of a task those that are scored, as (prompt, completion), and how many it has."""

    scored: Sequence[tuple[str, str]]
    of: int


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
    reference = _reference(package, bundle)
    with tempfile.TemporaryDirectory(prefix="calora-validate-") as scratch:
        asked = _examples(bundle, reference, known)
        job = _job(package, bundle, reference, asked, Path(scratch), known)
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
        as_there = _as_on(whole.answer, reference, package, bundle)
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


def _reference(package: Package, bundle: Bundle) -> Reference:
    context = package.manifest.model.context
    settings = package.manifest.settings
    source = composing.compose(bundle, bundle.weight, context=context)
    target = None
    columns = settings.joint_basis
    int8 = settings.adapters == "int8"
    if package.manifest.represented or settings.activations != "float" or int8 or columns is not UNSET:
        weights = Weights(bundle, settings)
        target = composing.compose(bundle, weights, context=context, activations=settings.activations)
    known = {spec.id for spec in bundle.manifest.adapters}
    shipped = [entry.id for entry in package.manifest.adapters if entry.id in known]
    adapters = {identifier: rows.load_adapter(bundle, identifier) for identifier in _spaced(shipped, CHECKED)}
    held = {}
    if columns is not UNSET:
        joint = joint_basis.compress(bundle, columns)
        held = {identifier: joint.rows(rows.opened(bundle, identifier)) for identifier in adapters}
    router = routers.load(bundle) if package.manifest.router else None
    spec = bundle.manifest.router
    text = RouterText(spec, bundle.path / "router" / "tokenizer.json") if spec else None
    return Reference(bundle, source, target, adapters, held, int8, router, text)


def _spaced(items: Sequence[T], most: int) -> list[T]:
    """All of them, or `most` that are evenly spaced, the first and, if it is not the only one, the last among them."""
    if len(items) <= most:
        return list(items)
    return [items[round(i * (len(items) - 1) / max(most - 1, 1))] for i in range(most)]


def _as_on(answer: Answer, reference: Reference, package: Package, bundle: Bundle) -> Reference:
    """The reference with the rounding of this device's kernels, where that is another than the recipe's."""
    settings, rounding = package.manifest.settings, answer.rounding
    if rounding in (None, settings.activations) or settings.activations == "float":
        return reference
    weights, context = Weights(bundle, settings), package.manifest.model.context
    return replace(reference, target=composing.compose(bundle, weights, context=context, activations=rounding))


# ── what the device is asked ──────────────────────────────────────────────────────────────────────────────────────────


def _job(
    package: Package,
    bundle: Bundle,
    reference: Reference,
    examples: Mapping[str, Examples],
    scratch: Path,
    profile: Profile | None,
) -> Job:
    ids = golden.stream(bundle, min(PREFILL + DECODE, package.manifest.model.context))
    prefill = len(ids) - DECODE
    shipped = list(reference.adapters)
    mixable = package.manifest.settings.adapter_inputs != "functions"
    mixes: dict[str, dict[str, float]] = {"base": {}} | {f"adapter:{i}": {i: 1.0} for i in shipped}
    pair = _addable(reference.adapters)
    if len(pair) > 1 and mixable:
        mixes[f"mix:{pair[0]}+{pair[1]}"] = {pair[0]: 0.6, pair[1]: 0.4}
    sentences = _sentences(bundle, min(LONGEST, package.manifest.model.context))
    texts = [*_router_texts(bundle), *(sentence.text for sentence in sentences)]
    cases = []
    if reference.router is not None and reference.text is not None:
        for text in texts[:3]:
            mix = _routed(reference, text, mixable)
            if len(mix) <= MIXED:
                mixes.setdefault(f"route:{'+'.join(mix)}", mix)
        for number, sentence in enumerate(sentences, start=1):
            mix = _routed(reference, sentence.text, mixable)
            if len(mix) <= MIXED:
                name = f"sentence:{number}:{'+'.join(mix)}"
                cases.append(Case(name=name, mix=mix, ids=sentence.ids, prefill=sentence.start))
    entry = package.manifest.router
    asked = RouterText(entry.spec, package.path / entry.tokenizer) if entry and reference.router else None
    timing_prompt = golden.stream(bundle, latency.PROMPT)
    return Job(
        threads=latency.threads(profile),
        cores=profile.cores if profile else (),
        cases=(*(Case(name=name, mix=mix, ids=ids, prefill=prefill) for name, mix in mixes.items()), *cases),
        routes=tuple(tuple(asked.ids(text)) for text in texts) if asked else (),
        completions=tuple(_completions(bundle, examples)),
        safety=_safety(package, reference, ids, scratch),
        timing=latency.timing(package, timing_prompt),
    )


def _addable(adapters: Mapping[str, Adapter]) -> list[str]:
    """Adapters that can be in one mix, those of rows alone first."""
    order = {"rows": 0, "routed": 1}
    found = sorted((a for a in adapters.values() if a.kind in order), key=lambda adapter: order[adapter.kind])
    one_routed = [adapter.id for adapter in found if adapter.kind == "routed"][:1]
    return [adapter.id for adapter in found if adapter.kind == "rows" or adapter.id in one_routed]


def _routed(reference: Reference, text: str, mixable: bool) -> dict[str, float]:
    """The router's choice; where adapters can not be mixed, its best."""
    assert reference.router is not None and reference.text is not None
    gates = _gates(reference.router, reference.text.ids(text))
    mix = {name: float(gate) for name, gate in zip(_classes(reference.bundle), gates, strict=True) if gate > 0}
    return mix if mixable else {max(mix, key=lambda name: mix[name]): 1.0}


@dataclass(frozen=True)
class _Sentence:
    """Of an answer: what the router reads at its first token, ids up to its end, and how many there are before it."""

    text: str
    ids: tuple[int, ...]
    start: int


def _sentences(bundle: Bundle, most: int) -> list[_Sentence]:
    """The sentences of an answer, where the router reads each: tasks' own texts in turn, at most that many tokens.

    A sentence is written under what the router chooses at its first token, and its cache is filled again under that
    (`generation`): one case each, which prefills all before it and is teacher-forced through it.
    """
    spec = bundle.manifest.router
    if spec is None or spec.granularity != "sentence" or spec.kind in ("task_id", "static"):
        return []
    tokenizer = Tokenizer.from_file(str(bundle.path / "base" / "tokenizer.json"))
    pairs = [pair for pairs in golden.examples(bundle).values() for pair in pairs[:1]]
    if not pairs:
        return []
    prompt, answer = pairs[0][0], "".join([pairs[0][1], *(f"\n{asked}{told}" for asked, told in pairs[1:])])
    ends = [0, *generation.sentence_ends(answer)]
    ids, found = tuple(tokenizer.encode(prompt).ids), list[_Sentence]()
    for start, end in zip(ends, ends[1:], strict=False):
        more = tuple(tokenizer.encode(answer[start:end], add_special_tokens=False).ids)
        if len(found) == SENTENCES or len(ids) + len(more) > most:
            break
        found.append(_Sentence(prompt + answer[:start], (*ids, *more), len(ids)))
        ids = (*ids, *more)
    return found


def _safety(package: Package, reference: Reference, ids: tuple[int, ...], scratch: Path) -> Safety | None:
    """Two mixes that differ, and one of the package's own adapters made to say that it is for another base."""
    shipped = list(reference.adapters)
    if not shipped:
        return None
    runtime = runtimes.load(package.manifest.target)
    forged = scratch / f"forged{runtime.suffix()}"
    runtime.encode_adapter(reference.adapters[shipped[0]], package.manifest.slots, FORGED, forged)
    second = {shipped[1]: 1.0} if len(shipped) > 1 else {}
    return Safety(first={shipped[0]: 1.0}, second=second, ids=ids, forged=str(forged))


def _completions(bundle: Bundle, examples: Mapping[str, Examples]) -> list[Completion]:
    """Every prompt that is scored, with room for its completion and the end token."""
    tokenizer = Tokenizer.from_file(str(bundle.path / "base" / "tokenizer.json"))
    asked = []
    for adapter, task in examples.items():
        for prompt, answer in task.scored:
            limit = len(tokenizer.encode(answer, add_special_tokens=False).ids) + 1
            asked.append(Completion(adapter=adapter, ids=tuple(tokenizer.encode(prompt).ids), limit=limit))
    return asked


def _examples(bundle: Bundle, reference: Reference, profile: Profile | None) -> dict[str, Examples]:
    """By adapter: as many as the device's profile says, or EXAMPLES."""
    most = profile.examples if profile is not None and profile.examples is not None else EXAMPLES
    return {
        adapter: Examples(_spaced(pairs, most), len(pairs))
        for adapter, pairs in golden.examples(bundle).items()
        if adapter in reference.adapters and pairs
    }


def _router_texts(bundle: Bundle) -> list[str]:
    """At least ROUTES texts: prompts of every task in turn, and pairs of them when those are too few.

    A task_id router reads names of tasks: all that it knows.
    """
    spec = bundle.manifest.router
    if spec is not None and (names := RouterText(spec, bundle.path / "router" / "tokenizer.json").tasks):
        return list(names)
    tasks = list(golden.examples(bundle).values())
    each = max(1, -(-ROUTES // max(len(tasks), 1)))
    texts = [pairs[turn][0] for turn in range(each) for pairs in tasks if turn < len(pairs)]
    singles = list(texts) or [f"{number} {number * 7919 % 1000}" for number in range(ROUTES)]
    for step in range(1, ROUTES):
        if len(texts) >= ROUTES:
            break
        texts += [f"{a} {b}" for a, b in zip(singles, singles[step:] + singles[:step], strict=True)]
    return texts


def _classes(bundle: Bundle) -> tuple[str, ...]:
    assert bundle.manifest.router is not None
    return bundle.manifest.router.classes


def _gates(router: routers.Router, ids: Sequence[int]) -> np.ndarray:
    with torch.no_grad():
        return router(torch.tensor([list(ids)])).numpy()


# ── what it answered ──────────────────────────────────────────────────────────────────────────────────────────────────


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
    sentences = _sentences(bundle, min(LONGEST, package.manifest.model.context))
    texts = [*_router_texts(bundle), *(sentence.text for sentence in sentences)]
    expected = np.stack([_gates(reference.router, reference.text.ids(text)) for text in texts])
    found = np.array(trace.answer.gates, np.float32)
    if found.shape != expected.shape or set(entry.spec.classes) != set(_classes(bundle)):
        return RouterRow(cases=len(texts), decisions_equal=False, gates_max_abs=None, accuracy=None)
    found = found[:, [entry.spec.classes.index(name) for name in _classes(bundle)]]
    same_top = expected.argmax(1) == found.argmax(1)
    least = np.finfo(np.float32).tiny  # vector units flush smaller ones, such as 4e-40, to 0; they choose nothing
    owners = {prompt: adapter for adapter, pairs in golden.examples(bundle).items() for prompt, _ in pairs}
    truth = [owners.get(text) for text in texts]
    classes = _classes(bundle)
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
