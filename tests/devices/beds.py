"""Devices to break: one of each transport, and how to hurt it."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Protocol

import pytest

from calora_export import onnxruntime_web
from calora_export.devices import browser
from calora_export.errors import DeviceError
from tests.devices.phone import Phone
from tests.devices.sshd import Sshd


class Bed(Protocol):
    """device: what `--device` is given; place: the directory that it holds there, as this machine sees it."""

    device: str
    place: Path

    def cut(self) -> None:
        """End every connection, as a pulled cable does."""
        ...

    def back(self) -> None:
        """After `cut`: it can be reached again."""
        ...

    def small(self, patch: pytest.MonkeyPatch) -> Path:
        """From now on its directory is on a file system of 4 MB: where, as this machine sees it."""
        ...

    def readonly(self, patch: pytest.MonkeyPatch) -> None:
        """From now on its directory is on a file system that cannot be written."""
        ...


def wait_for(what: Callable[[], bool], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end, "it never came"
        time.sleep(0.02)


def interruptible() -> None:
    """In a new process: Ctrl-C reaches it even where the tests are a job in the background, which ignores it."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def children(pid: int) -> list[int]:
    listing = Path(f"/proc/{pid}/task/{pid}/children").read_text()
    return [int(child) for child in listing.split()]


class SshBed:
    def __init__(self, server: Sshd, place: Path) -> None:
        self.device = f"ssh:{server.address}"
        self.place = place / "calora-export-device"
        self._server, self._parent = server, place.parent

    def cut(self) -> None:
        for session in children(self._server.process.pid):
            for worker in [session, *children(session)]:
                if b"sshd" in Path(f"/proc/{worker}/cmdline").read_bytes():
                    os.kill(worker, signal.SIGKILL)

    def back(self) -> None:
        """Only the sessions were killed."""

    def small(self, patch: pytest.MonkeyPatch) -> Path:
        return self._mounted("size=4m", patch)

    def readonly(self, patch: pytest.MonkeyPatch) -> None:
        self._mounted("ro", patch)

    def _mounted(self, options: str, patch: pytest.MonkeyPatch) -> Path:
        point = self._parent / "mounted"
        point.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(point)]
        if subprocess.run(command, capture_output=True).returncode:
            pytest.skip("this user may not mount")
        patch.setenv("CALORA_DEVICE_DIR", str(point))
        return point

    def unmount(self) -> None:
        subprocess.run(["umount", "-l", str(self._parent / "mounted")], capture_output=True)


class AdbBed:
    def __init__(self, phone: Phone) -> None:
        self.device = f"adb:{phone.serial}"
        self.place = phone.root / "data" / "local" / "tmp" / "calora-export"
        self._phone = phone

    def cut(self) -> None:
        self._phone.kill()

    def back(self) -> None:
        self._phone.start()

    def small(self, patch: pytest.MonkeyPatch) -> Path:
        patch.setenv("CALORA_DEVICE_DIR", "/mnt/full")
        return self._phone.inside / "mnt" / "full"

    def readonly(self, patch: pytest.MonkeyPatch) -> None:
        patch.setenv("CALORA_DEVICE_DIR", "/mnt/readonly")


def require_browser() -> None:
    """Skip where nothing could run."""
    try:
        browser._program()
    except DeviceError as error:
        pytest.skip(str(error))
    if not onnxruntime_web.is_here():
        pytest.skip("ONNX Runtime Web is not in the cache: `make test` fetches it with npm")


class BrowserBed:
    """The browser that `--device browser` starts, and all that it could leave behind."""

    device = "browser"

    def __init__(self, scratch: Path) -> None:
        self.scratch, self._groups = scratch, set[int]()

    def processes(self, kind: str = "") -> list[int]:
        """Those that run, whose command line has this word."""
        running: dict[int, tuple[bytes, int]] = {}
        for process in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):
                status, _, group = (process / "stat").read_text().rpartition(")")[2].split()[:3]
                if status != "Z":
                    running[int(process.name)] = (process / "cmdline").read_bytes(), int(group)
        ours = {pid for pid, (words, _) in running.items() if f"{self.scratch}/".encode() in words}
        self._groups |= {running[pid][1] for pid in ours}
        ours |= {pid for pid, (_, group) in running.items() if group in self._groups}
        return sorted(pid for pid in ours if kind.encode() in running[pid][0])

    def main(self) -> int:
        return self.processes("--headless")[0]

    def nothing_is_left(self) -> None:
        wait_for(lambda: not self.processes())
        left = [path.name for path in self.scratch.iterdir() if "calora" in path.name or "hrom" in path.name]
        assert not left, left  # other libraries of the test leave directories, too
