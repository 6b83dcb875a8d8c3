"""Sites: full module names, and the patterns for several of them (`*` is exactly one dotted component)."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Sequence

from calora_export.errors import BundleError, mismatch
from calora_export.strict_json import plain


def natural_key(name: str) -> tuple[tuple[int, int, str], ...]:
    """A sort key that puts layer 10 after layer 9."""
    return tuple((0, int(part), "") if _is_number(part) else (1, 0, part) for part in name.split("."))


def expand_sites(
    patterns: Sequence[str], linears: Collection[str], file: str = "bundle.json", key: str = "sites"
) -> tuple[str, ...]:
    """The modules of `linears` that `patterns` name, in natural order; BundleError when one names none."""
    found: set[str] = set()
    for index, pattern in enumerate(patterns):
        if pattern in linears:
            found.add(pattern)
            continue
        parts = pattern.split(".")
        if any("*" in part and part != "*" for part in parts):
            raise BundleError(mismatch(file, f"{key}[{index}]", "`*` alone between dots", plain(pattern)))
        regex = re.compile(r"\.".join("[^.]+" if part == "*" else re.escape(part) for part in parts))
        matches = {name for name in linears if regex.fullmatch(name)}
        if not matches:
            example = next(iter(linears), "model.layers.*.mlp.up_proj")
            expected = f"a pattern that names a linear layer, such as {example}"
            raise BundleError(mismatch(file, f"{key}[{index}]", expected, plain(pattern)))
        found |= matches
    return tuple(sorted(found, key=natural_key))


def collapse_sites(sites: Iterable[str], linears: Collection[str]) -> tuple[str, ...]:
    """Patterns whose expansion over `linears` is exactly `sites`: `*` for numbers where all layers agree."""
    groups: dict[str, set[str]] = {}
    for site in sorted(sites, key=natural_key):
        groups.setdefault(starred(site), set()).add(site)
    every: dict[str, set[str]] = {}
    for name in linears:
        every.setdefault(starred(name), set()).add(name)
    patterns: list[str] = []
    for pattern, members in groups.items():
        whole = len(members) > 1 and members == every.get(pattern)
        patterns += [pattern] if whole else sorted(members, key=natural_key)
    return tuple(patterns)


def owners(sites: Iterable[str]) -> set[str]:
    """Every module that a site is below of."""
    return {name.rsplit(".", depth)[0] for name in sites for depth in range(1, name.count(".") + 1)}


def starred(name: str) -> str:
    """A site with `*` for every number: what it is called in all layers."""
    return ".".join("*" if _is_number(part) else part for part in name.split("."))


def _is_number(part: str) -> bool:
    return part.isascii() and part.isdecimal()
