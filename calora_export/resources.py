"""Where the files live that the package reads but does not import: recipes, device profiles, target folders; its cache.

In an installed wheel they are in `_data` beside this module; in a checkout (or an editable install of one)
there is no `_data`, and they are the folders of the same names at the repository's top.
"""

from __future__ import annotations

import os
from pathlib import Path

from calora_export.errors import RecipeError, mismatch


def root() -> Path:
    """The directory that holds `recipes/`, `devices/` and `targets/`."""
    package = Path(__file__).resolve().parent
    data = package / "_data"
    return data if data.is_dir() else package.parent


def cache() -> Path:
    """Where what was built or fetched once is kept for the next time."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "calora-export"


def recipes() -> dict[str, Path]:
    """Every recipe that ships, name → TOML file, in the order of the names."""
    return _by_stem(root() / "recipes")


def devices() -> dict[str, Path]:
    """Every device profile that ships, name → TOML file, in the order of the names."""
    return _by_stem(root() / "devices")


def targets() -> dict[str, Path]:
    """Every target's folder (`target.toml`, `runner/`, `kit/`) by its name, in the order of the names."""
    return {file.parent.name: file.parent for file in sorted((root() / "targets").glob("*/target.toml"))}


def target_dir(name: str) -> Path:
    """The folder of one target; RecipeError names the known ones when `name` is none of them."""
    known = targets()
    if name not in known:
        raise RecipeError(mismatch(root() / "targets", "target", f"one of {', '.join(known)}", repr(name)))
    return known[name]


def _by_stem(folder: Path) -> dict[str, Path]:
    return {file.stem: file for file in sorted(folder.glob("*.toml"))}
