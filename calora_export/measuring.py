"""Latency of a package without a bundle."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from calora_export import devices, latency
from calora_export import package as packages
from calora_export.jobs import Answer, Job


def bench(package_path: Path, device: str, progress: devices.Progress = devices.silent) -> tuple[Answer, Job]:
    """Time a package on a device, with seeded noise for a prompt."""
    package = packages.load(package_path)
    noise = np.random.default_rng(0).integers(0, package.manifest.model.vocab, latency.PROMPT)
    timing = latency.timing(package, tuple(int(token) for token in noise))
    routes = (tuple(range(8)),) if package.manifest.router else ()
    job = Job(threads=threads(), timing=timing, routes=routes)
    return devices.run(device, package, job, progress).answer, job


def threads() -> int:
    """The processors this process may use, at most four: more slows the decoding of small models."""
    if hasattr(os, "sched_getaffinity"):
        return min(4, len(os.sched_getaffinity(0)))
    return min(4, os.cpu_count() or 1)
