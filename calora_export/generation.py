"""Try a package: a chat whose KV cache is never read under adapters that did not fill it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from tokenizers import Tokenizer

from calora_export.errors import PackageError, mismatch
from calora_export.package import Package
from calora_export.router_text import RouterText
from calora_export.runtimes import Session


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

    def __post_init__(self) -> None:
        path = self.package.path / self.package.manifest.tokenizer
        self._tokenizer: Tokenizer = Tokenizer.from_file(str(path))
        self._pending: list[int] = []

    def route(self, prompt: str) -> dict[str, float]:
        """The router's choice for a prompt: adapter id → gate, without those at 0."""
        router = self.package.manifest.router
        if router is None:
            raise PackageError(mismatch("package.json", "router", "a router", "none", "name one with --adapter"))
        text = RouterText(router.spec, self.package.path / router.tokenizer)
        gates = self.session.route(text.ids(prompt))
        return {name: float(gate) for name, gate in zip(router.spec.classes, gates, strict=True) if gate > 0}

    def start(self, prompt: str, mix: Mapping[str, float] | None) -> Turn:
        """Choose the adapters (None: the router does) and say what happens to the cache."""
        chosen = self.route(prompt) if mix is None else dict(mix)
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
            if not text.endswith("\N{REPLACEMENT CHARACTER}"):  # half of a character that takes two tokens
                yield text[len(shown) :]
                shown = text


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
