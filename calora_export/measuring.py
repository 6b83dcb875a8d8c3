"""Latency of a package without a bundle."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from calora_export import devices, latency, profiles
from calora_export import package as packages
from calora_export.jobs import Job
from calora_export.report import Bench


def bench(
    package_path: Path, device: str, progress: devices.Progress = devices.silent, profile_name: str = ""
) -> Bench:
    """Time a package on a device, with seeded noise for a prompt, and judge it by the profile that is named."""
    package = packages.load(package_path)
    profile = profiles.load(profile_name) if profile_name else None
    noise = np.random.default_rng(0).integers(0, package.manifest.model.vocab, latency.PROMPT)
    job = Job(
        threads=latency.threads(profile),
        cores=profile.cores if profile else (),
        timing=latency.timing(package, tuple(int(token) for token in noise)),
        routes=(tuple(range(8)),) if package.manifest.router else (),
    )
    answer = devices.run(device, package, job, progress).answer
    found = latency.summarise(job, answer)
    return Bench(
        package=str(package_path),
        device=answer.device,
        arch=answer.arch,
        emulated=answer.emulated,
        runtime=answer.runtime,
        latency=found,
        speed=latency.speed(answer),
        profile=profile_name,
        budget=latency.judge(profile, found, answer.emulated) if profile else (),
    )
