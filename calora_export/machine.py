"""The machine that runs this process, as its system tells of it."""

from __future__ import annotations

import os
import resource
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from calora_export.errors import DeviceError, mismatch
from calora_export.jobs import Conditions

SYSTEM, STATUS = Path("/sys"), Path("/proc/self/status")


def cores() -> tuple[int, ...] | None:
    """The processors on which this process may run; None where the system does not say."""
    return tuple(sorted(os.sched_getaffinity(0))) if sys.platform == "linux" else None


def pin(wanted: Sequence[int]) -> None:
    """Run on these processors only, this thread and those that it starts from now on."""
    if sys.platform == "linux":
        with suppress(OSError):  # what counts is where it may run now
            os.sched_setaffinity(0, wanted)
    if cores() != tuple(sorted(wanted)):
        raise DeviceError(mismatch("job.json", "cores", "processors of this device", list(wanted)))


def conditions() -> Conditions:
    """Temperatures and clocks, from Linux."""
    temperatures = {
        f"{zone.name.removeprefix('thermal_zone')} {_text(zone / 'type')}".strip(): value / 1000
        for zone in sorted(SYSTEM.glob("class/thermal/thermal_zone*"))
        if (value := _number(zone / "temp")) is not None
    }
    clocks = {
        file.parents[1].name: value / 1000
        for file in sorted(SYSTEM.glob("devices/system/cpu/cpu[0-9]*/cpufreq/scaling_cur_freq"))
        if (value := _number(file)) is not None
    }
    return Conditions(temperature_c=temperatures or None, clock_mhz=clocks or None)


def peak_rss() -> int:
    """Bytes. On Linux from /proc, because getrusage still counts the parent that forked this process."""
    found = _status("VmHWM:")
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss if found is None else found


def mapped() -> int | None:
    """Bytes of files that are in this process's memory."""
    return _status("RssFile:")


def is_emulated() -> bool:
    """Whether another processor's program (qemu-user) runs this one: what runs is not what this Python is for."""
    running = Path("/proc/./self/exe")  # as /proc/self/exe, qemu-user shows its guest
    return running.exists() and _processor(running) != _processor(Path(sys.executable))


def _processor(program: Path) -> bytes:
    """The field e_machine of an ELF file."""
    with program.open("rb") as file:
        return file.read(20)[18:]


def _status(key: str) -> int | None:
    """A size of /proc/self/status, in bytes."""
    try:
        lines = STATUS.read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(key)), None)


def _text(file: Path) -> str:
    try:
        return file.read_text(errors="replace").strip()
    except OSError:
        return ""


def _number(file: Path) -> float | None:
    """A number in a file; Android lets a shell read some of them only."""
    try:
        return float(_text(file))
    except ValueError:
        return None
