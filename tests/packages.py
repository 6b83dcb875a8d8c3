"""Packages of any target, to be changed."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path

from tests.bundles import edit_json


def copy_package(source: Path, destination: Path) -> Path:
    """A copy to break, without the report of the original."""
    return Path(shutil.copytree(source, destination, ignore=shutil.ignore_patterns("report")))


def refresh(package: Path) -> None:
    """List every file's present hash and size in package.json."""

    def update(manifest: dict) -> None:
        for name, entry in manifest["files"].items():
            data = (package / name).read_bytes()
            entry.update(sha256=hashlib.sha256(data).hexdigest(), size=len(data))

    edit_json(package / "package.json", update)
