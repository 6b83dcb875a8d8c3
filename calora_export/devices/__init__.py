"""Where a package is run: one module per transport. A device only sees a Package.

adb         a phone, by Android's debug bridge, with the native runner
apple       an iPhone or iPad, from a Mac; not run yet
browser     a browser of this machine or of a phone, with a web page
host        this machine, in a process of its own without torch
reference   this machine, for Core ML: the saved file, operator by operator
ssh         a board or another machine, with the native runner
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Sequence
from threading import Thread
from typing import Protocol

from calora_export.errors import CaloraError, DeviceError, mismatch
from calora_export.jobs import Job, Trace
from calora_export.package import Package

Progress = Callable[[str], None]
"""Told what is going on, for people."""


class Request(str):
    """Progress that asks a person to do something: shown in a pipe too."""


def silent(text: str) -> None:
    """Nobody is told."""


class Device(Protocol):
    """What every transport offers."""

    def run(self, address: str, package: Package, job: Job, progress: Progress = silent) -> Trace:
        """Run a job; address is what follows the colon in `--device kind:address`."""
        ...


def names() -> tuple[str, ...]:
    return tuple(sorted(module.name for module in pkgutil.iter_modules(__path__) if not module.name.startswith("_")))


def require(device: str) -> None:
    """DeviceError unless there is a transport for `kind` or `kind:address`."""
    if device.partition(":")[0] not in names():
        raise DeviceError(mismatch("--device", device, f"one of {', '.join(names())}", "none of them"))


def run(device: str, package: Package, job: Job, progress: Progress = silent) -> Trace:
    """Run a job on `kind` or `kind:address`."""
    require(device)
    kind, _, address = device.partition(":")
    transport: Device = importlib.import_module(f"{__name__}.{kind}")  # type: ignore[assignment]
    return transport.run(address, package, job, progress)


def run_each(
    devices: Sequence[str], package: Package, job: Job, progress: Progress = silent
) -> dict[str, Trace | CaloraError]:
    """Run a job on several devices at once. What goes wrong with one is its answer, and does not disturb the others."""

    answers: dict[str, Trace | Exception] = {}

    def attempt(device: str) -> None:
        try:
            answers[device] = run(device, package, job, progress)
        except Exception as error:
            answers[device] = error

    if len(devices) == 1:
        attempt(devices[0])  # in this thread, which Ctrl-C reaches: it can clean up
    else:
        # Nobody waits for a daemon when Ctrl-C ends the program; the devices see that it is gone.
        threads = [Thread(target=attempt, args=(device,), daemon=True) for device in devices]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    return {device: _expected(answers[device]) for device in devices}


def _expected(answer: Trace | Exception) -> Trace | CaloraError:
    """A bug is no answer."""
    if isinstance(answer, Exception) and not isinstance(answer, CaloraError):
        raise answer
    return answer
