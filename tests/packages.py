"""Packages of any target, to be changed."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path

from calora_export import bundle as bundles
from calora_export import package as packages
from calora_export import pipeline, validation
from calora_export.report import Report
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


def validated(package: Path, bundle: Path, device: str = "host") -> Report:
    """As pipeline.validate does it, without writing the report's page each time."""
    made = validation.validate(packages.load(package), bundles.load(bundle), (device,), pipeline.silent)[device]
    if made.fault is not None:
        raise made.fault
    assert made.report is not None
    return made.report[0]
