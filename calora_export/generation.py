"""Try a package: a chat whose KV cache is never read under adapters that did not fill it.

A router per sentence is asked again at the first token of every new sentence of the answer, as DLP-LoRA does (arXiv
2410.01497): it reads the prompt and the answer so far. When it chooses other adapters, the cache is dropped and the
whole history is prefilled under the new ones; when it chooses the same, nothing is computed twice.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from tokenizers import Tokenizer

from calora_export.errors import PackageError, mismatch
from calora_export.package import Package
from calora_export.router_text import RouterText
from calora_export.runtimes import Session

# Where a sentence is over: a mark and a space, so that 3.14 is one word, or a line's end.
_END = re.compile(r"[.!?…][\"'”’)\]]*\s|[。！？]|\n")


def sentence_ends(text: str) -> list[int]:
    """Where its sentences are over: behind the mark and what follows it."""
    return [found.end() for found in _END.finditer(text)]


@dataclass(frozen=True)
class Sentence:
    """From which token of the answer on which adapters write it; `prefill` tokens were fed before the next one."""

    token: int
    mix: Mapping[str, float]
    prefill: int


@dataclass(frozen=True)
class Turn:
    """How one prompt is about to be answered; `prefill` tokens are fed before the first new one."""

    mix: Mapping[str, float]
    routed: bool
    prefill: int
    cache: str


@dataclass
class Chat:
    """One conversation. Its history is prefilled again whenever the adapters change."""

    package: Package
    session: Session
    history: list[int] = field(default_factory=list)
    sentences: list[Sentence] = field(default_factory=list)  # of the last answer, where it was routed

    def __post_init__(self) -> None:
        path = self.package.path / self.package.manifest.tokenizer
        self._tokenizer: Tokenizer = Tokenizer.from_file(str(path))
        self._pending: list[int] = []
        self._prompt: str | None = None  # None: the answer's sentences are not routed

    def route(self, prompt: str) -> dict[str, float]:
        """The router's choice for a prompt, or for a task's name: adapter id → gate, without those at 0."""
        router = self.package.manifest.router
        if router is None:
            raise PackageError(mismatch("package.json", "router", "a router", "none", "name one with --adapter"))
        text = RouterText(router.spec, self.package.path / router.tokenizer)
        gates = self.session.route(text.ids(prompt))
        return {name: float(gate) for name, gate in zip(router.spec.classes, gates, strict=True) if gate > 0}

    def start(self, prompt: str, mix: Mapping[str, float] | None, task: str | None = None) -> Turn:
        """Choose the adapters (None: the router does) and say what happens to the cache.

        A router of the kind task_id needs the task's name.
        """
        chosen = self.route(self._asked(prompt, task)) if mix is None else dict(mix)
        new = self._tokenizer.encode(prompt).ids
        if not new:
            raise PackageError(mismatch("--prompt", "text", "at least one token", "none"))
        context, total = self.package.manifest.model.context, len(self.history) + len(new)
        if total >= context:
            raise PackageError(mismatch("--prompt", "tokens", f"less than the package's context of {context}", total))
        if not self.history:
            self.session.select(chosen)
            cache = "empty"
        elif chosen == dict(self.session.mix):
            cache = f"kept: the same adapters filled its {len(self.history) - len(self._pending)} positions"
        else:
            self.session.select(chosen)
            self._pending = list(self.history)
            cache = f"filled again: {len(self.history)} positions were computed under other adapters"
        self._pending += new
        self.history += new
        self._prompt = prompt if mix is None and self._per_sentence() else None
        self.sentences = [] if self._prompt is None else [Sentence(0, chosen, len(self._pending))]
        return Turn(chosen, mix is None, len(self._pending), cache)

    def stream(self, limit: int) -> Iterator[str]:
        """Greedy answer, piece by piece, until an end token, `limit` tokens or the end of the context."""
        ends = set(self.package.manifest.model.eos)
        made: list[int] = []
        shown = ""
        while len(made) < limit and len(self.history) < self.package.manifest.model.context:
            logits = self.session.extend(self._pending)[-1]
            self._pending = [int(logits.argmax())]
            self.history += self._pending
            if self._pending[0] in ends:
                return
            made += self._pending
            text = self._tokenizer.decode(made)
            if text.endswith("\N{REPLACEMENT CHARACTER}"):  # half of a character that takes two tokens
                continue
            began = len(sentence_ends(text)) > len(sentence_ends(shown))
            yield text[len(shown) :]
            shown = text
            if began and self._prompt is not None:
                self._route_again(self._prompt + text, len(made))

    def _route_again(self, text: str, token: int) -> None:
        chosen = self.route(text)
        if chosen != dict(self.session.mix):
            self.session.select(chosen)
            self._pending = list(self.history)
        self.sentences.append(Sentence(token, chosen, len(self._pending)))

    def _asked(self, prompt: str, task: str | None) -> str:
        """What the router reads: the task's name, if it goes by that."""
        router = self.package.manifest.router
        if router is None or router.spec.kind != "task_id":
            return prompt
        if task is None:
            raise PackageError(mismatch("--task", "name", "the task that the router goes by", "nothing"))
        return task

    def _per_sentence(self) -> bool:
        router = self.package.manifest.router
        return router is not None and router.spec.kind != "task_id" and router.spec.granularity == "sentence"


def parse_mix(text: str) -> dict[str, float] | None:
    """`auto` → None, `none` → {}, `ID` → {ID: 1}, `ID=0.7,ID=0.3` → their gates."""
    if text == "auto":
        return None
    if text == "none":
        return {}
    mix: dict[str, float] = {}
    for part in text.split(","):
        name, given, gate = part.strip().partition("=")
        try:
            value = float(gate) if given else 1.0
        except ValueError:
            value = math.nan
        if not math.isfinite(value):
            raise PackageError(mismatch("--adapter", name, "a finite number after =", repr(gate)))
        if name in mix:
            raise PackageError(mismatch("--adapter", name, "each adapter once", "it twice"))
        mix[name] = value
    return mix
