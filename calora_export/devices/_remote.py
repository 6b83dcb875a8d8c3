"""A job on a device that has a shell: what `adb:` and `ssh:` do alike.

A transport is a command that runs a script over there with bytes in and out. On the device, one directory holds
`runner/`, `package/` and `job/`. While a job runs, a keeper sits there: a shell whose input is open as long as this
machine is in touch. It holds the lock; when its input ends it stops the runner and cleans up, whatever happened here.
"""

from __future__ import annotations

import getpass
import os
import shlex
import signal
import socket
import subprocess
import tarfile
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from gzip import GzipFile
from io import BytesIO
from pathlib import Path
from typing import IO

import msgspec

from calora_export import native
from calora_export import package as packages
from calora_export.errors import DeviceError, mismatch
from calora_export.jobs import JOB, LOGITS, TRACE, Answer, Job, Trace, read_trace, write_job
from calora_export.package import Package

LIMIT_S = 3600  # of a job
QUICK_S = 60  # of everything that moves little
SLOWEST = 250_000  # bytes per second of a push, below which it counts as stuck
LINGER_S = 60  # how long a device keeps what was pushed when this machine goes away, so that a re-run sends the rest
PLACE = "CALORA_DEVICE_DIR"  # where on the device our directory shall be, if its usual place is too small
TOOLS = ("tar", "sha256sum", "find", "readlink", "sleep")
REASONS = ("No space left on device", "Read-only file system", "Permission denied", "Exec format error")

Progress = Callable[[str], None]
Feed = Callable[[IO[bytes]], None]


@dataclass(frozen=True)
class Shell:
    """A way to run scripts on a device. name: as the user gave it; client: the command that takes a script;
    place: the directory over there, as its shell reads it; hint: what to do when there is no way to it."""

    name: str
    client: tuple[str, ...]
    place: str
    hint: Callable[[str], str]

    def call(self, step: str, script: str, limit: float = QUICK_S, feed: Feed | None = None) -> bytes:
        """Standard output of a script; DeviceError, with the device and the step, when it fails or takes too long."""
        with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
            process = subprocess.Popen(
                [*self.client, _closed(script)],
                stdin=subprocess.PIPE if feed else subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                start_new_session=True,  # Ctrl-C is for us: there is something to clean up
            )
            with _limited(process, limit) as overdue:
                if feed is not None and process.stdin is not None:
                    with suppress(OSError), process.stdin as pipe:  # the reason is on stderr
                        feed(pipe)
                process.wait()
            out.seek(0)
            err.seek(0)
            self._judge(step, err.read().decode(errors="replace"), limit if overdue() else None)
            return out.read()

    def _judge(self, step: str, said: str, limit: float | None) -> None:
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
        hint = self.hint(reason)
        reason = reason.removeprefix("error: ").removeprefix("adb: ").removeprefix("ssh: ")
        what = "no connection" if step == FIRST else "the connection ended"
        return DeviceError(f"{self.name}: {step}: {what}: {reason}" + (f" ({hint})" if hint else ""))


FIRST, END = "connect", "calora-export:"
UNFIT = 126  # a shell's own exit code for what it cannot execute


def _closed(script: str) -> str:
    """The script for any login shell; its exit code comes as the last line of stderr, or the connection was lost."""
    return "sh -c " + shlex.quote(f"( {script} ); code=$?; echo {END}$code >&2; exit $code")


def _reason(status: int, lines: list[str]) -> str:
    if status > 128 and status - 128 in set(signal.Signals):
        return f"killed by {signal.Signals(status - 128).name}"
    known = [line for line in lines if any(reason in line for reason in REASONS)]
    line = (known or lines)[-1]
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


# ── a job ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Facts:
    """What a device says of itself; model, release and emulator are Android's."""

    system: str
    arch: str
    model: str
    release: str
    emulator: bool


def run(shell: Shell, package: Package, job: Job, progress: Progress) -> Trace:
    """Push what the device does not have, run the job there, and bring back its trace."""
    facts = _look(shell)
    target = package.manifest.target
    if not native.has_runner(target):
        raise DeviceError(mismatch(shell.name, "target", "one with a native runner", target))
    if facts.system != "Linux" or facts.arch not in native.LOADERS:
        expected = f"Linux or Android on {' or '.join(native.LOADERS)}"
        raise DeviceError(mismatch(shell.name, "system", expected, f"{facts.system} on {facts.arch}"))
    program = native.runner(target, facts.arch)
    with _kept(shell) as place, tempfile.TemporaryDirectory(prefix="calora-job-") as name:
        scratch = Path(name)
        _sync(shell, "runner", _files(program.parent), progress)
        _sync(shell, "package", _package_files(package), progress)
        _send_job(shell, place, job, scratch)
        progress(f"running on {shell.name}")
        start = shlex.quote(f"echo $$ > ../job/pid; exec {native.command(program, facts.arch)} ../package ../job")
        check = f"{native.check(program, facts.arch)} || exit {UNFIT}"
        shell.call("run", f"cd {shell.place}/runner && {{ {check}; }} && sh -c {start}", LIMIT_S)
        _fetch(shell, scratch)
        try:
            trace = read_trace(scratch, job)
        except DeviceError as error:
            raise DeviceError(f"{shell.name}: {error}") from error
    return replace(trace, answer=_named(trace.answer, facts))


def _look(shell: Shell) -> Facts:
    """The first contact."""
    missing = f"for tool in {' '.join(TOOLS)}; do command -v $tool >/dev/null || echo $tool; done"
    android = "command -v getprop >/dev/null && for key in product.model build.version.release boot.qemu kernel.qemu; "
    android += 'do echo "$(getprop ro.$key)"; done; true'
    said = shell.call(FIRST, f"uname -s; uname -m; echo tools: $({missing}); {android}").decode(errors="replace")
    lines = [line.strip() for line in said.splitlines()]
    tools = next((i for i, line in enumerate(lines) if line.startswith("tools:")), 0)
    if tools < 2:
        raise DeviceError(mismatch(shell.name, "connect", "a shell with uname", said.strip()[:60] or "nothing"))
    if lines[tools] != "tools:":
        raise DeviceError(mismatch(shell.name, "connect", f"{', '.join(TOOLS)}", f"no {lines[tools][7:]}"))
    model, release, *emulator = [*lines[tools + 1 :], "", ""]
    return Facts(lines[tools - 2], lines[tools - 1], model, release, "1" in emulator)


def placed(usual: str) -> str:
    """A transport's directory as the device's shell reads it; always one of our own, since it is removed."""
    chosen = os.environ.get(PLACE)
    return f"{shlex.quote(chosen)}/calora-export-device" if chosen else usual


def _named(answer: Answer, facts: Facts) -> Answer:
    """An Android device by its model and version; the kernel's names say little."""
    if not facts.release:
        return answer
    emulated = facts.emulator or answer.emulated
    return msgspec.structs.replace(answer, device=facts.model, os=f"Android {facts.release}", emulated=emulated)


def _send_job(shell: Shell, place: str, job: Job, scratch: Path) -> None:
    files = {JOB: scratch / JOB}
    if job.safety is not None:
        forged = Path(job.safety.forged)
        files[forged.name] = forged
        there = f"{place}/job/{forged.name}"
        job = msgspec.structs.replace(job, safety=msgspec.structs.replace(job.safety, forged=there))
    write_job(scratch, job)
    _push(shell, "job", files, lambda _: None)


def _fetch(shell: Shell, scratch: Path) -> None:
    """Bring back the trace; the tar stream says when it is cut off."""
    data = shell.call("pull", f"cd {shell.place}/job && tar -cf - {TRACE} {LOGITS}", LIMIT_S)
    try:
        with tarfile.open(fileobj=BytesIO(data), mode="r:") as archive:
            for name in (TRACE, LOGITS):
                member = archive.extractfile(name)
                (scratch / name).write_bytes(member.read() if member else b"")
    except (tarfile.TarError, KeyError) as error:
        raise DeviceError(f"{shell.name}: pull: what arrived is no archive of a trace: {error}") from error


# ── the keeper ────────────────────────────────────────────────────────────────────────────────────────────────────────

# The lock is a symbolic link, which is made whole or not at all; it says who holds it: pid, boot, token, owner.
KEEPER = """
umask 077; trap '' HUP PIPE
mkdir -p {place} && cd {place} || exit 3
boot=$(cat /proc/sys/kernel/random/boot_id 2>/dev/null)
mine="$$:$boot:{token}:{owner}"
if ! ln -s "$mine" lock 2>/dev/null; then
  other=$(readlink lock) || {{ ln -s "$mine" lock; exit 3; }}
  rest=${{other#*:}}
  if [ ! -e orphan ] && [ "${{rest%%:*}}" = "$boot" ] && kill -0 "${{other%%:*}}" 2>/dev/null; then
    echo "busy:${{other##*:}}"; exit 0
  fi
  rm -f lock orphan; ln -s "$mine" lock || exit 3
fi
rm -rf job && mkdir -p job package runner || exit 3
echo "held:$(pwd)"
word=gone
while read -r line; do word=$line; done
[ -f job/pid ] && kill -9 "$(cat job/pid)" 2>/dev/null
if [ $word = gone ]; then
  : > orphan; sleep {linger}
  [ "$(readlink lock)" = "$mine" ] || exit 0
fi
if [ $word = keep ]; then rm -rf job lock; else cd /; rm -rf {place}; fi
"""


@contextmanager
def _kept(shell: Shell) -> Iterator[str]:
    """Hold the device: yields the directory there. Afterwards the package and the runner stay for the next job if this
    one ended well, and nothing stays if it did not."""
    owner = "".join(c if c.isalnum() or c in "@.-" else "_" for c in f"{_user()}@{socket.gethostname()}")
    token = os.urandom(8).hex()
    script = KEEPER.format(place=shell.place, token=token, owner=owner, linger=LINGER_S)
    with tempfile.TemporaryFile() as err:
        keeper = subprocess.Popen(
            [*shell.client, _closed(script)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=err,
            start_new_session=True,
        )
        try:
            place = _wait_for_keeper(shell, keeper, err)
            yield place
            _dismiss(keeper, b"keep\n")
        except BaseException:  # Ctrl-C too
            _dismiss(keeper, b"drop\n")
            raise


def _wait_for_keeper(shell: Shell, keeper: subprocess.Popen[bytes], err: IO[bytes]) -> str:
    assert keeper.stdout is not None
    timer = threading.Timer(QUICK_S, keeper.kill)
    timer.start()
    line = keeper.stdout.readline().decode(errors="replace").strip()
    timer.cancel()
    word, _, rest = line.partition(":")
    if word == "held":
        return rest
    if word == "busy":
        raise DeviceError(mismatch(shell.name, "lock", "a free device", f"{rest} at work", "try again when it is done"))
    keeper.wait()
    err.seek(0)
    shell._judge("prepare", err.read().decode(errors="replace"), None)
    raise shell.lost("prepare", "it says nothing")


def _dismiss(keeper: subprocess.Popen[bytes], word: bytes) -> None:
    """Say how it ended, and wait until the device is cleaned up, if it is still there."""
    with suppress(OSError, subprocess.TimeoutExpired):
        keeper.communicate(word, timeout=QUICK_S)
    keeper.kill()
    keeper.wait()


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return str(os.getuid())


# ── files ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def _files(directory: Path) -> dict[str, Path]:
    return {path.relative_to(directory).as_posix(): path for path in sorted(directory.rglob("*")) if path.is_file()}


def _package_files(package: Package) -> dict[str, Path]:
    names = (packages.FILE, *package.manifest.files)
    return {name: package.path / name for name in names}


def _sync(shell: Shell, directory: str, files: Mapping[str, Path], progress: Progress) -> None:
    """Make a directory of the device hold these files and no others, by their hashes; check what was pushed."""
    wanted = {name: packages.hash_file(path).sha256 for name, path in files.items()}
    there = _hashes(shell, directory)
    if other := sorted(there.keys() - wanted.keys()):
        names = " ".join(shlex.quote(f"./{name}") for name in other)
        shell.call("push", f"cd {shell.place}/{directory} && rm -f {names}")
    missing = {name: path for name, path in files.items() if there.get(name) != wanted[name]}
    if not missing:
        return
    _push(shell, directory, missing, progress)
    there = _hashes(shell, directory)
    for name in missing:
        if there.get(name) != wanted[name]:
            found = there.get(name, "nothing")
            raise DeviceError(f"{shell.name}: push: {mismatch(name, 'sha256', wanted[name], found, 'it was cut off')}")


def _hashes(shell: Shell, directory: str) -> dict[str, str]:
    said = shell.call("push", f"cd {shell.place}/{directory} && find . -type f -exec sha256sum {{}} +", LIMIT_S)
    lines = [line.split(maxsplit=1) for line in said.decode(errors="replace").splitlines()]
    return {name.strip().removeprefix("*").removeprefix("./"): digest for digest, name in lines}


def _push(shell: Shell, directory: str, files: Mapping[str, Path], progress: Progress) -> None:
    """One compressed stream."""
    total = sum(path.stat().st_size for path in files.values())

    def feed(pipe: IO[bytes]) -> None:
        sent = 0
        with (
            GzipFile(fileobj=pipe, mode="wb", compresslevel=1) as zipped,
            tarfile.open(fileobj=zipped, mode="w|") as archive,
        ):
            for name, path in files.items():
                progress(f"pushing to {shell.name}: {name} ({sent / 1e6:.0f} of {total / 1e6:.0f} MB)")
                entry = tarfile.TarInfo(name)
                entry.size, entry.mode = path.stat().st_size, 0o755
                with path.open("rb") as file:
                    archive.addfile(entry, file)
                sent += entry.size

    shell.call("push", f"cd {shell.place}/{directory} && tar -xzf -", QUICK_S + total / SLOWEST, feed)
