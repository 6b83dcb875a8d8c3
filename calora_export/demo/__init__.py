"""The embedded demo bundle: a small base, its adapters and router, really trained by demo/train.py."""

from __future__ import annotations

import shutil
from pathlib import Path

from calora_export.errors import BundleError, mismatch
from calora_export.manifest import FILE
from calora_export.package import written

BUNDLE = Path(__file__).parent / "bundle"


def write(out: Path) -> None:
    """Copy the demo bundle to `out`, which appears whole or not at all; a bundle that is there stays."""
    if (out / FILE).exists():
        raise BundleError(mismatch(out, "output", "a new or empty directory", "a bundle"))
    with written(out, FILE) as directory:
        shutil.copytree(BUNDLE, directory, dirs_exist_ok=True)
