"""Where the figures come from: the processor and the versions."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from calora_export.version import VERSION

PACKAGES = (
    *("torch", "transformers", "torchao", "executorch"),
    *("onnxruntime", "onnxruntime-genai", "llama-cpp-python"),
)


def describe(shape: str, threads: int) -> dict[str, str]:
    """Name to value, in the order of the table's first line; packages that are not installed are left out."""
    facts = {"shape": shape, "CPU": _processor(), "cores": str(os.cpu_count()), "threads": str(threads)}
    facts |= {"Python": platform.python_version(), "calora-export": VERSION}
    for package in PACKAGES:
        try:
            facts[package] = version(package)
        except PackageNotFoundError:
            continue
    return facts


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
