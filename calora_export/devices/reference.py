"""The reference runtime, on any machine: what Core ML would run, executed from the saved file, operator by operator.

Its times are those of an interpreter, so a report marks them as emulated.
"""

from __future__ import annotations

import sys
from pathlib import Path

from msgspec.structs import replace

from calora_export.devices import Progress, host, silent
from calora_export.errors import DeviceError, mismatch
from calora_export.jobs import Job, Record, Trace
from calora_export.package import Package


def run(address: str, package: Package, job: Job, progress: Progress = silent) -> Trace:
    """Run the job in a child process; its one-line errors come back as DeviceError."""
    if address:
        raise DeviceError(mismatch("--device", f"reference:{address}", "reference", "more"))
    if package.manifest.target != "coreml":
        found = f"one for {package.manifest.target}"
        raise DeviceError(mismatch("--device", "reference", "a Core ML package", found, "use --device host"))
    return host.ask([sys.executable, "-m", __name__], "reference", package, job)


def answer(package: Package, job: Job, record: Record | None = None) -> Trace:
    """Run a job in this process; the answer has the peaks of the model's activations in the job's cases."""
    from calora_export.coreml_engines import Reference
    from calora_export.runtimes.coreml import CoremlSession

    watching, plain = Reference(watched=True), Reference()  # watching doubles the time
    timing = job.timing and replace(job.timing, lengths=())  # times that mean nothing
    alone, others = Job(threads=1, cases=job.cases), replace(job, threads=1, cases=(), timing=timing)
    cases = host.work(package, alone, lambda package, _: CoremlSession(package, watching), record)
    rest = host.work(package, others, lambda package, _: CoremlSession(package, plain))
    peaks = watching.peaks[package.manifest.model.file]
    return Trace(replace(rest.answer, runtime="reference", peaks=peaks, emulated=True, threads=1), cases.logits)


if __name__ == "__main__":
    raise SystemExit(host.serve(Path(sys.argv[1]), Path(sys.argv[2]), answer))
