"""Where a package is run: one module per transport. A device only sees a Package.

host        this machine, in a process of its own without torch
reference   this machine, for Core ML: the saved file, operator by operator
"""

from __future__ import annotations

import importlib
import pkgutil
from typing import Protocol

from calora_export.errors import DeviceError, mismatch
from calora_export.jobs import Job, Trace
from calora_export.package import Package


class Device(Protocol):
    """What every transport offers."""

    def run(self, address: str, package: Package, job: Job) -> Trace:
        """Run a job; address is what follows the colon in `--device kind:address`."""
        ...


def names() -> tuple[str, ...]:
    return tuple(sorted(module.name for module in pkgutil.iter_modules(__path__)))


def require(device: str) -> None:
    """DeviceError unless there is a transport for `kind` or `kind:address`."""
    if device.partition(":")[0] not in names():
        raise DeviceError(mismatch("--device", device, f"one of {', '.join(names())}", "none of them"))


def run(device: str, package: Package, job: Job) -> Trace:
    """Run a job on `kind` or `kind:address`."""
    require(device)
    kind, _, address = device.partition(":")
    transport: Device = importlib.import_module(f"{__name__}.{kind}")  # type: ignore[assignment]
    return transport.run(address, package, job)
