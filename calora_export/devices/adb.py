"""A phone: `adb:SERIAL`, by the system's own adb. SERIAL is what `adb devices` lists, or HOST:PORT to connect to."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

from calora_export.devices import Progress, _remote, silent
from calora_export.devices._shell import QUICK_S, Shell
from calora_export.errors import DeviceError, mismatch
from calora_export.jobs import Job, Trace
from calora_export.package import Package

PLACE = "/data/local/tmp/calora-export"  # where the shell user of every Android may write and execute
READY = "device"
HINTS = {
    "unauthorized": "unlock it and allow USB debugging for this machine",
    "authorizing": "unlock it and allow USB debugging for this machine",
    "offline": "plug it in again, or `adb disconnect` and `adb connect`",
    "no permissions": "add a udev rule for it, or your user to the group plugdev",
    "recovery": "start Android",
    "sideload": "start Android",
    "bootloader": "start Android",
}


def run(address: str, package: Package, job: Job, progress: Progress = silent) -> Trace:
    """Run the job over there."""
    return _remote.run(shell(address), package, job, progress)


def shell(address: str) -> Shell:
    """A device that is ready; DeviceError says what to do about one that is not."""
    adb = _client()
    known = listed(adb)
    if ":" in address and known.get(address) != READY:
        known = _connect(adb, address)
    if not address and len(known) == 1:
        (address,) = known
    if address not in known:
        expected = f"one of {', '.join(known)}" if known else "a connected device"
        raise DeviceError(mismatch("--device", f"adb:{address}", expected, "no such device", "see `adb devices`"))
    if (state := known[address]) != READY:
        raise DeviceError(mismatch(f"adb:{address}", "state", READY, state, advice(state)))
    return Shell(
        name=f"adb:{address}",
        client=(adb, "-s", address, "shell", "-T"),
        place=_remote.placed(PLACE),
        hints=HINTS,
    )


def connected() -> dict[str, str]:
    """Serial → state of every device, or nothing where there is no adb."""
    try:
        return listed(_client())
    except DeviceError:
        return {}


def advice(state: str) -> str:
    """What to do about a device in this state."""
    return next((hint for text, hint in HINTS.items() if state.startswith(text)), "see `adb devices`")


def listed(adb: str) -> dict[str, str]:
    """What `adb devices` says; `no permissions` is the only state of two words."""
    lines = [line.split() for line in _adb(adb, "devices").splitlines() if line.strip()]
    return {
        serial: " ".join(state[:2] if state[0] == "no" else state[:1])
        for serial, *state in lines
        if state and serial not in ("List", "*")
    }


def _connect(adb: str, address: str) -> dict[str, str]:
    """adb forgets a device on the network that went away only when it is told to."""
    _adb(adb, "disconnect", address)
    _adb(adb, "connect", address)
    return listed(adb)


def _client() -> str:
    home = os.environ.get("ANDROID_HOME") or os.environ.get("ANDROID_SDK_ROOT")
    inside = str(Path(home) / "platform-tools") if home else ""
    found = shutil.which("adb") or shutil.which("adb", path=inside)
    if found is None:
        raise DeviceError(mismatch("adb", "adb", "installed", "not", "install Android's platform-tools"))
    return found


def _adb(adb: str, *arguments: str) -> str:
    try:
        done = subprocess.run([adb, *arguments], capture_output=True, text=True, timeout=QUICK_S)
    except subprocess.TimeoutExpired as error:
        line = f"adb: {arguments[0]}: no answer after {QUICK_S} s (try `adb kill-server`)"
        raise DeviceError(line) from error
    return done.stdout
