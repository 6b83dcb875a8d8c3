"""A way to run scripts on a device that has a shell, and what is said when one of them fails."""

from __future__ import annotations

import shlex
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import IO

from calora_export.errors import DeviceError

QUICK_S = 60  # of everything that moves little
FIRST, END = "connect", "calora-export:"
UNFIT = 126  # a shell's own exit code for what it cannot execute
REASONS = ("No space left on device", "Read-only file system", "Permission denied", "Exec format error")
EMPTY = ("tar: Exiting with failure status", "tar: Error is not recoverable")  # the reason is in a line before

Feed = Callable[[IO[bytes]], None]


@dataclass(frozen=True)
class Shell:
    """name: as the user gave it; client: the command that takes a script; place: the directory over there, as its shell
    reads it; hints: what to do when there is no way to it, by words of what the client says."""

    name: str
    client: tuple[str, ...]
    place: str
    hints: Mapping[str, str]

    def call(self, step: str, script: str, limit: float = QUICK_S, feed: Feed | None = None) -> bytes:
        """Standard output of a script; DeviceError, with the device and the step, when it fails or takes too long."""
        with tempfile.TemporaryFile() as out:
            self.record(step, script, out, limit, feed)
            out.seek(0)
            return out.read()

    def record(self, step: str, script: str, out: IO[bytes], limit: float, feed: Feed | None = None) -> None:
        """The same, into a file: what was said until something broke is there."""
        with tempfile.TemporaryFile() as err:
            process = self.start(script, subprocess.PIPE if feed else subprocess.DEVNULL, out, err)
            with _limited(process, limit) as overdue:
                if feed is not None and process.stdin is not None:
                    with suppress(OSError), process.stdin as pipe:  # the reason is on stderr
                        feed(pipe)
                process.wait()
            err.seek(0)
            self.judge(step, err.read().decode(errors="replace"), limit if overdue() else None)

    def start(self, script: str, stdin: int, stdout: int | IO[bytes], stderr: IO[bytes]) -> subprocess.Popen[bytes]:
        """In a session of its own: Ctrl-C is for us, there is something to clean up."""
        command = [*self.client, _closed(script)]
        return subprocess.Popen(command, stdin=stdin, stdout=stdout, stderr=stderr, start_new_session=True)

    def judge(self, step: str, said: str, limit: float | None = None) -> None:
        """DeviceError unless a script that said this on stderr came to a good end within its limit, if that counts."""
        lines = [line.strip() for line in said.splitlines() if line.strip()]
        ends = [line for line in lines if line.startswith(END)]
        if limit is not None:
            raise DeviceError(f"{self.name}: {step}: no answer after {limit:g} s")
        lines = [line for line in lines if not line.startswith(END)] or ["it says nothing"]
        if not ends:
            raise self.lost(step, lines[-1])
        if status := int(ends[-1].removeprefix(END)):
            raise DeviceError(f"{self.name}: {step}: {_reason(status, lines)}")

    def lost(self, step: str, reason: str) -> DeviceError:
        """What is said when a script did not reach its end."""
        hint = next((hint for words, hint in self.hints.items() if words in reason), "")
        reason = reason.removeprefix("error: ").removeprefix("adb: ").removeprefix("ssh: ")
        what = "no connection" if step == FIRST else "the connection ended"
        return DeviceError(f"{self.name}: {step}: {what}: {reason}" + (f" ({hint})" if hint else ""))


def _closed(script: str) -> str:
    """The script for any login shell; its exit code comes as the last line of stderr, or the connection was lost."""
    return "sh -c " + shlex.quote(f"( {script} ); code=$?; echo {END}$code >&2; exit $code")


def _reason(status: int, lines: list[str]) -> str:
    if status > 128 and status - 128 in set(signal.Signals):
        return f"killed by {signal.Signals(status - 128).name}"
    known = [line for line in lines if any(reason in line for reason in REASONS)]
    line = (known or [line for line in lines if not line.startswith(EMPTY)] or lines)[-1]
    return f"the runner does not start there: {line}" if status == UNFIT else line


@contextmanager
def _limited(process: subprocess.Popen[bytes], limit: float) -> Iterator[Callable[[], bool]]:
    """Kill the process when it takes longer, or when the block ends before it does; yields whether that was why."""
    end = time.monotonic() + limit
    timer = threading.Timer(limit, process.kill)
    timer.start()
    try:
        yield lambda: time.monotonic() >= end
    finally:
        timer.cancel()
        process.kill()
        process.wait()
