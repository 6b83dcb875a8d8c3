"""A prompt as the router was trained to read it; apart from the router, so that `run` needs no torch."""

from __future__ import annotations

from pathlib import Path

from tokenizers import Tokenizer

from calora_export.manifest import RouterSpec


class RouterText:
    """Text to the router's token ids, as it was trained: template, no special tokens, truncation."""

    def __init__(self, spec: RouterSpec, tokenizer: Path) -> None:
        self._spec = spec
        self._tokenizer: Tokenizer = Tokenizer.from_file(str(tokenizer))

    def ids(self, text: str) -> list[int]:
        """At least one id, at most max_length; `left` truncation keeps the last ones."""
        spec = self._spec
        ids = self._tokenizer.encode(spec.template.replace("{text}", text), add_special_tokens=False).ids or [0]
        return ids[-spec.max_length :] if spec.truncation == "left" else ids[: spec.max_length]
