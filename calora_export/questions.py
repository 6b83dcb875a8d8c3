"""What a device is asked, so that its answers can be compared with the reference's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer

from calora_export import generation, golden, latency, runtimes
from calora_export.adapters import Adapter
from calora_export.bundle import Bundle
from calora_export.jobs import Case, Completion, Job, Safety
from calora_export.package import Package
from calora_export.profiles import Profile
from calora_export.reference import Reference, spaced
from calora_export.router_text import RouterText

PREFILL, DECODE = 32, 32
ROUTES = 50
MIXED = 8  # adapters of a routed mix that is compared
SENTENCES, LONGEST = 4, 256  # of an answer whose sentences are routed; its tokens
EXAMPLES = 200
FORGED = "sha256:" + "0" * 64


@dataclass(frozen=True)
class Examples:
    """Of a task those that are scored, as (prompt, completion), and how many it has."""

    scored: Sequence[tuple[str, str]]
    of: int


def job(
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
    texts = router_texts(package, bundle)
    cases = []
    if reference.router is not None and reference.text is not None:
        for text in texts[:3]:
            mix = _routed(reference, text, mixable)
            if len(mix) <= MIXED:
                mixes.setdefault(f"route:{'+'.join(mix)}", mix)
        for number, sentence in enumerate(_sentences(package, bundle), start=1):
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
    gates = reference.gates(text)
    mix = {name: float(gate) for name, gate in zip(reference.classes, gates, strict=True) if gate > 0}
    return mix if mixable else {max(mix, key=lambda name: mix[name]): 1.0}


def _sentences(package: Package, bundle: Bundle) -> list[Sentence]:
    return sentences(bundle, min(LONGEST, package.manifest.model.context))


@dataclass(frozen=True)
class Sentence:
    """Of an answer: what the router reads at its first token, ids up to its end, and how many there are before it."""

    text: str
    ids: tuple[int, ...]
    start: int


def sentences(bundle: Bundle, most: int) -> list[Sentence]:
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
    ids, found = tuple(tokenizer.encode(prompt).ids), list[Sentence]()
    for start, end in zip(ends, ends[1:], strict=False):
        more = tuple(tokenizer.encode(answer[start:end], add_special_tokens=False).ids)
        if len(found) == SENTENCES or len(ids) + len(more) > most:
            break
        found.append(Sentence(prompt + answer[:start], (*ids, *more), len(ids)))
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


def examples(bundle: Bundle, reference: Reference, profile: Profile | None) -> dict[str, Examples]:
    """By adapter: as many as the device's profile says, or EXAMPLES."""
    most = profile.examples if profile is not None and profile.examples is not None else EXAMPLES
    return {
        adapter: Examples(spaced(pairs, most), len(pairs))
        for adapter, pairs in golden.examples(bundle).items()
        if adapter in reference.adapters and pairs
    }


def router_texts(package: Package, bundle: Bundle) -> list[str]:
    """What the router is asked: texts for it, then the sentences of an answer."""
    return [*_texts(bundle), *(sentence.text for sentence in _sentences(package, bundle))]


def _texts(bundle: Bundle) -> list[str]:
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
