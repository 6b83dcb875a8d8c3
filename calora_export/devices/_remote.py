"""A job on a device that has a shell: what `adb:` and `ssh:` do alike.

A transport is a command that runs a script over there with bytes in and out. On the device, one directory holds
`runner/`, `package/` and `job/`. While a job runs, a keeper sits there: a shell whose input is open as long as this
machine is in touch. It holds the lock; when its input ends it stops the runner and cleans up, whatever happened here.
"""

from __future__ import annotations

import getpass
import os
import re
import shlex
import socket
import subprocess
import tarfile
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from gzip import GzipFile
from pathlib import Path
from typing import IO

import msgspec

from calora_export import native
from calora_export import package as packages
from calora_export.devices._shell import FIRST, QUICK_S, UNFIT, Shell
from calora_export.errors import DeviceError, mismatch
from calora_export.jobs import (
    JOB,
    LOGITS,
    TRACE,
    InterruptedRun,
    Job,
    Trace,
    read_begun,
    read_trace,
    write_job,
)
from calora_export.package import Package

LIMIT_S = 3600  # of a job
STEP = 4_000_000  # bytes of a push between two words of progress
SLOWEST = 250_000  # bytes per second of a push, below which it counts as stuck
LINGER_S = 60  # how long a device keeps what was pushed when this machine goes away, so that a re-run sends the rest
PLACE = "CALORA_DEVICE_DIR"  # where on the device our directory shall be, if its usual place is too small
TOOLS = ("tar", "sha256sum", "find", "readlink", "sleep")

Progress = Callable[[str], None]


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
        files = {**_runner_files(program), **_package_files(package)}
        _sync(shell, files, _job_files(place, job, scratch), progress)
        progress(f"running on {shell.name}")
        command = f"{native.command(program, facts.arch)} ../package ../job --stream"
        start = shlex.quote(f"echo $$ > ../job/pid; exec {command}")
        check = f"{native.check(program, facts.arch)} || exit {UNFIT}"
        script = f"cd {shell.place}/runner && {{ {check}; }} && sh -c {start}"
        try:
            with tempfile.TemporaryFile() as stream:
                try:
                    shell.record("run", script, stream, LIMIT_S)
                finally:
                    _unpack(stream, scratch)
        except DeviceError as error:
            begun = read_begun(scratch, job)
            raise InterruptedRun(str(error), begun and _named(begun, facts)) from error
        try:
            return _named(read_trace(scratch, job), facts)
        except DeviceError as error:
            raise DeviceError(f"{shell.name}: {error}") from error


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


def _named(trace: Trace, facts: Facts) -> Trace:
    """An Android device by its model and version; the kernel's names say little."""
    if not facts.release:
        return trace
    system, emulated = f"Android {facts.release}", facts.emulator or trace.answer.emulated
    answer = msgspec.structs.replace(trace.answer, device=facts.model, os=system, emulated=emulated)
    return replace(trace, answer=answer)


def _job_files(place: str, job: Job, scratch: Path) -> dict[str, Path]:
    files = {f"job/{JOB}": scratch / JOB}
    if job.safety is not None:
        forged = Path(job.safety.forged)
        files[f"job/{forged.name}"] = forged
        there = f"{place}/job/{forged.name}"
        job = msgspec.structs.replace(job, safety=msgspec.structs.replace(job.safety, forged=there))
    write_job(scratch, job)
    return files


FRAME = re.compile(rf"({re.escape(LOGITS)}|{re.escape(TRACE)}) (\d+)\n".encode())


def _unpack(stream: IO[bytes], scratch: Path) -> None:
    """The runner's frames as files, as far as they are whole. What a login shell says before them is passed over."""
    stream.seek(0)
    (scratch / LOGITS).write_bytes(b"")
    while line := stream.readline():
        frame = FRAME.fullmatch(line)
        if frame is None:
            continue
        name, size = frame[1].decode(), int(frame[2])
        if len(data := stream.read(size)) == size:
            with (scratch / name).open("ab" if name == LOGITS else "wb") as file:
                file.write(data)


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
        keeper = shell.start(script, subprocess.PIPE, subprocess.PIPE, err)
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
    try:
        line = keeper.stdout.readline().decode(errors="replace").strip()
    finally:
        timer.cancel()
    word, _, rest = line.partition(":")
    if word == "held":
        return rest
    if word == "busy":
        raise DeviceError(mismatch(shell.name, "lock", "a free device", f"{rest} at work", "try again when it is done"))
    keeper.wait()
    err.seek(0)
    shell.judge("prepare", err.read().decode(errors="replace"))
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


def _runner_files(program: Path) -> dict[str, Path]:
    paths = sorted(path for path in program.parent.rglob("*") if path.is_file())
    return {f"runner/{path.relative_to(program.parent).as_posix()}": path for path in paths}


def _package_files(package: Package) -> dict[str, Path]:
    names = (packages.FILE, *package.manifest.files)
    return {f"package/{name}": package.path / name for name in names}


def _sync(shell: Shell, files: Mapping[str, Path], more: Mapping[str, Path], progress: Progress) -> None:
    """Make the device hold these files and no others but `more`, by their hashes; check what was pushed."""
    wanted = {name: packages.hash_file(path).sha256 for name, path in files.items()}
    there = _hashes(shell)
    if other := sorted(there.keys() - wanted.keys()):
        names = " ".join(shlex.quote(f"./{name}") for name in other)
        shell.call("push", f"cd {shell.place} && rm -f {names}")
    missing = {name: path for name, path in files.items() if there.get(name) != wanted[name]}
    _push(shell, {**missing, **more}, progress if missing else lambda _: None)
    there = _hashes(shell) if missing else {}
    for name in missing:
        if there.get(name) != wanted[name]:
            found = there.get(name, "nothing")
            raise DeviceError(f"{shell.name}: push: {mismatch(name, 'sha256', wanted[name], found, 'it was cut off')}")


def _hashes(shell: Shell) -> dict[str, str]:
    said = shell.call("push", f"cd {shell.place} && find runner package -type f -exec sha256sum {{}} +", LIMIT_S)
    lines = [line.split(maxsplit=1) for line in said.decode(errors="replace").splitlines()]
    return {name.strip().removeprefix("*"): digest for digest, name in lines}


def _push(shell: Shell, files: Mapping[str, Path], progress: Progress) -> None:
    """One compressed stream."""
    total = sum(path.stat().st_size for path in files.values())
    sent = 0

    def feed(pipe: IO[bytes]) -> None:
        with (
            GzipFile(fileobj=pipe, mode="wb", compresslevel=1) as zipped,
            tarfile.open(fileobj=zipped, mode="w|") as archive,
        ):
            archive.copybufsize = STEP  # type: ignore[attr-defined]  # the attribute that its constructor sets
            for name, path in files.items():
                entry = tarfile.TarInfo(name)
                entry.size, entry.mode = path.stat().st_size, 0o755
                with path.open("rb") as file:
                    archive.addfile(entry, _Told(file, partial(tell, name)))

    def tell(name: str, size: int) -> None:
        nonlocal sent
        progress(f"pushing to {shell.name}: {name} ({sent / 1e6:.0f} of {total / 1e6:.0f} MB)")
        sent += size

    shell.call("push", f"cd {shell.place} && tar -xzf -", QUICK_S + total / SLOWEST, feed)


@dataclass(frozen=True)
class _Told:
    """A file that tells what is being read of it."""

    file: IO[bytes]
    tell: Callable[[int], None]

    def read(self, size: int = -1) -> bytes:
        self.tell(size)
        return self.file.read(size)
