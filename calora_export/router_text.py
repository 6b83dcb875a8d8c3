"""A prompt as the router was trained to read it; apart from the router, so that `run` needs no torch."""

from __future__ import annotations

from pathlib import Path

from tokenizers import Tokenizer

from calora_export.errors import PackageError, mismatch, one_of
from calora_export.manifest import RouterSpec


class RouterText:
    """Text to the router's token ids, as it was trained: template, special tokens, truncation."""

    def __init__(self, spec: RouterSpec, tokenizer: Path) -> None:
        self._spec = spec
        self._tokenizer: Tokenizer = Tokenizer.from_file(str(tokenizer))
        self._tokenizer.no_padding()  # some tokenizer.json bring their own
        if spec.special_tokens:
            self._tokenizer.enable_truncation(spec.max_length, direction=spec.truncation)
        else:
            self._tokenizer.no_truncation()

    @property
    def tasks(self) -> tuple[str, ...]:
        """The texts that a task_id router knows, in their rows' order; none for other kinds."""
        if self._spec.kind != "task_id":
            return ()
        rows = self._tokenizer.get_vocab(with_added_tokens=False)
        return tuple(sorted(rows, key=rows.__getitem__))

    def ids(self, text: str) -> list[int]:
        """At least one id, at most max_length; `left` truncation keeps the last ones.

        A task_id router reads a task's name: PackageError for another text. A static one reads nothing.
        """
        spec = self._spec
        if spec.kind == "static":
            return [0]
        if spec.kind == "task_id":
            if text not in self.tasks:
                raise PackageError(mismatch("router", "task", one_of(self.tasks), repr(text)))
            return [self.tasks.index(text)]
        filled = spec.template.replace("{text}", text)
        ids = self._tokenizer.encode(filled, add_special_tokens=spec.special_tokens).ids or [0]
        return ids[-spec.max_length :] if spec.truncation == "left" else ids[: spec.max_length]
