"""A bundle's tokenizer files and special tokens."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

import msgspec

from calora_export import strict_json
from calora_export.bundle import Bundle
from calora_export.errors import BundleError, mismatch


def copy_tokenizer(source: Path, out: Path) -> None:
    """Tokenizer files only, in the form that the tokenizers library and the runtimes read."""
    out.mkdir(parents=True)
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja"):
        if (source / name).is_file():
            shutil.copyfile(source / name, out / name)


class _Generation(msgspec.Struct, frozen=True):
    bos_token_id: int | None = None
    eos_token_id: int | tuple[int, ...] | None = None


def special_tokens(bundle: Bundle) -> tuple[int | None, tuple[int, ...]]:
    """bos and eos ids: generation_config.json has the last word, as in transformers."""
    base = bundle.path / "base"
    found: Mapping[str, _Generation] = {
        name: strict_json.read(base / name, _Generation, f"base/{name}")
        for name in ("generation_config.json", "config.json")
        if (base / name).is_file()
    }
    eos = next((g.eos_token_id for g in found.values() if g.eos_token_id is not None), None)
    if eos is None:
        raise BundleError(mismatch("base/config.json", "eos_token_id", "the token that ends an answer", "nothing"))
    bos = next((g.bos_token_id for g in found.values() if g.bos_token_id is not None), None)
    return bos, (eos,) if isinstance(eos, int) else tuple(eos)
