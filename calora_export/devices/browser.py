"""A browser: a small server of this machine serves the package to a page with ONNX Runtime Web, which posts the trace.

browser                         Chromium or Chrome of this machine, without a window, in WebAssembly
browser:webgpu                  the same, with WebGPU
browser[:webgpu]:listen[:PORT]  any browser, on a phone too: a person opens the URL that is shown
"""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from queue import Empty
from typing import IO

import msgspec

from calora_export import onnxruntime_web, resources
from calora_export import package as packages
from calora_export.devices import Progress, Request, silent
from calora_export.devices._page_server import Event, PageServer
from calora_export.errors import DeviceError, mismatch
from calora_export.jobs import JOB, InterruptedRun, Job, Trace, read_begun, read_trace, write_job
from calora_export.package import Package

LIMIT_S = 3600  # of a job
START_S = 60  # of a browser, until it has the page
VISIT_S = 900  # of a person, until they have opened the page
END_S = 10  # of a browser that was told to end
COMMAND = "CALORA_BROWSER"  # a program with options, instead of what is found
PROGRAMS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome", "microsoft-edge")
MAC = Path("/Applications/Google Chrome.app/Contents/MacOS/Google Chrome")
FLAGS = (
    "--headless=new",
    "--remote-debugging-pipe",  # nobody speaks there: a browser ends when this machine's end of the pipe is gone
    "--no-first-run",
    "--no-default-browser-check",
    "--no-proxy-server",
    "--disable-background-networking",
    "--disable-breakpad",
    "--disable-component-update",
    "--disable-default-apps",
    "--disable-dev-shm-usage",
    "--disable-extensions",
    "--disable-sync",
    "--password-store=basic",
    "--use-mock-keychain",
)
# The pipe is descriptors 3 and 4; ours is standard input.
START = 'exec "$@" 3<&0 4>/dev/null </dev/null'


@dataclass(frozen=True)
class Address:
    """name: as the user gave it; port: where a person's browser is awaited (0: any), None: a browser is started."""

    name: str
    provider: str
    port: int | None


def parse(address: str) -> Address:
    """[webgpu][:listen[:PORT]]"""
    name = f"browser:{address}" if address else "browser"
    parts = address.split(":") if address else []
    provider = parts.pop(0) if parts[:1] == ["webgpu"] else "wasm"
    match parts:
        case []:
            return Address(name, provider, None)
        case ["listen"]:
            return Address(name, provider, 0)
        case ["listen", port] if port.isdigit() and int(port) < 2**16:
            return Address(name, provider, int(port))
    raise DeviceError(mismatch("--device", name, "browser[:webgpu][:listen[:PORT]]", "another form"))


def run(address: str, package: Package, job: Job, progress: Progress = silent) -> Trace:
    """Serve the job, and read what the page posts."""
    where = parse(address)
    inputs = package.manifest.settings.adapter_inputs
    if package.manifest.target != "onnx" or inputs != "required":
        found = f"{package.manifest.recipe} for {package.manifest.target}"
        hint = "export again with --recipe onnx-web"
        raise DeviceError(mismatch(where.name, "recipe", "onnx-web, or one like it", found, hint))
    if job.cores:
        raise DeviceError(mismatch(where.name, "cores", "a profile without them", "some", "a page has no say in it"))
    program = None if where.port is not None else _program()
    with tempfile.TemporaryDirectory(prefix="calora-job-") as name:
        answers = Path(name)
        files = _served(where, package, job, answers)
        try:
            with _server(where, files, answers) as server:
                peak = _visited(where, server, program, progress)
        except DeviceError as error:
            raise InterruptedRun(str(error), read_begun(answers, job)) from error
        try:
            trace = read_trace(answers, job)
        except DeviceError as error:
            raise DeviceError(f"{where.name}: {error}") from error
    return replace(trace, answer=msgspec.structs.replace(trace.answer, peak_rss=peak))


def _visited(where: Address, server: PageServer, program: list[str] | None, progress: Progress) -> int | None:
    """Wait for the trace of the page that a person opens, or of the one in a browser that is started; bytes it took at
    the most, where that is known."""
    if program is None:
        progress(_invitation(where, server))
        _wait(where, server, None, progress)
        return None
    with _started(program, where, server) as browser:
        _wait(where, server, browser, progress)
        return browser.peak_rss() if where.provider == "wasm" else None


def state() -> str:
    """The browser that would be started, by its name and major version, or what to do to have one."""
    try:
        command = [*_program(), "--version"]
        said = subprocess.run(command, capture_output=True, text=True, timeout=START_S).stdout.strip()
    except (DeviceError, OSError, subprocess.TimeoutExpired) as error:
        return f"not found: {error}"
    return said.partition(".")[0] or f"not found: {command[0]} does not say its version"


def _program() -> list[str]:
    chosen = shlex.split(os.environ.get(COMMAND, ""))
    if chosen:
        names, missing = chosen[:1], f"{COMMAND} names it"
    else:
        names, missing = [*PROGRAMS, str(MAC)], f"install Chromium or Chrome, or name it in {COMMAND}"
    program = next((path for name in names if (path := shutil.which(name))), None)
    if program is None:
        raise DeviceError(mismatch("browser", chosen[0] if chosen else "Chromium", "installed", "not", missing))
    return [program, *chosen[1:]]


# ── what is served ────────────────────────────────────────────────────────────────────────────────────────────────────


def _served(where: Address, package: Package, job: Job, scratch: Path) -> dict[str, Path]:
    """URL's path → file: the page, its runtime, the package and the job."""
    try:
        runtime = onnxruntime_web.directory()
    except DeviceError as error:
        raise DeviceError(f"{where.name}: start: {error}") from error
    files = {f"package/{name}": package.path / name for name in (packages.FILE, *package.manifest.files)}
    for name, folder in (("runner", resources.target_dir("onnx") / "web"), ("ort", runtime)):
        files |= {f"{name}/{file.name}": file for file in folder.iterdir() if file.is_file()}
    files["index.html"] = files["runner/index.html"]
    if job.safety is not None:
        forged = Path(job.safety.forged)
        files[f"job/{forged.name}"] = forged
        job = msgspec.structs.replace(job, safety=msgspec.structs.replace(job.safety, forged=f"job/{forged.name}"))
    write_job(scratch, job)
    return files | {f"job/{JOB}": scratch / JOB}


def _server(where: Address, files: dict[str, Path], answers: Path) -> PageServer:
    try:
        return PageServer("127.0.0.1" if where.port is None else "", where.port or 0, files, answers)
    except OSError as error:
        raise DeviceError(f"{where.name}: listen: {error.strerror}") from error


def _url(where: Address, server: PageServer, host: str) -> str:
    return f"http://{host}:{server.server_port}{server.path}" + ("?on=webgpu" if where.provider == "webgpu" else "")


def _invitation(where: Address, server: PageServer) -> Request:
    """By its own address, and as one that browsers trust: only there they give threads and WebGPU without https."""
    port = server.server_port
    return Request(
        f"{where.name}: open {_url(where, server, _own_address())} in a browser. For threads and WebGPU on an Android "
        f"phone: adb reverse tcp:{port} tcp:{port}, and there {_url(where, server, 'localhost')}"
    )


def _own_address() -> str:
    """This machine's on its network, found without sending anything: which one would be used to reach another."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe, suppress(OSError):
        probe.connect(("192.0.2.1", 9))
        return probe.getsockname()[0]
    return "localhost"


# ── a browser ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Browser:
    """One that was started, in a group of processes of its own."""

    process: subprocess.Popen[bytes]
    log: IO[bytes]

    def fate(self) -> str | None:
        """How it ended, if it did."""
        code = self.process.poll()
        if code is None:
            return None
        self.log.seek(0)
        lines = [line.strip() for line in self.log.read().decode(errors="replace").splitlines() if line.strip()]
        fatal = [line.partition("] ")[2] for line in lines if ":FATAL:" in line]
        if code < 0:
            return f"the browser was killed by {signal.Signals(-code).name}{': ' if fatal else ''}{''.join(fatal[:1])}"
        return f"the browser ended with code {code}: {(fatal or lines[-1:] or ['it says nothing'])[0]}"

    def peak_rss(self) -> int | None:
        """Bytes, of its largest process that draws and runs pages; None where /proc does not tell."""
        peaks = [peak for process in Path("/proc").glob("[0-9]*") if (peak := self._peak_of(process))]
        return max(peaks, default=None)

    def _peak_of(self, process: Path) -> int | None:
        with suppress(OSError):
            ours = os.getpgid(int(process.name)) == self.process.pid
            if ours and b"--type=renderer" in (process / "cmdline").read_bytes():
                lines = (process / "status").read_text().splitlines()
                return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:")), None)
        return None


@contextmanager
def _started(program: list[str], where: Address, server: PageServer) -> Iterator[Browser]:
    """Open the page without a window, as a user who has no data yet; afterwards nothing of it is left."""
    options = [*FLAGS, *(("--no-sandbox",) if os.geteuid() == 0 else ())]
    if where.provider == "webgpu":
        options.append("--enable-unsafe-webgpu")  # also where Chrome does not trust a driver
    with tempfile.TemporaryDirectory(prefix="calora-", ignore_cleanup_errors=True) as home:
        command = [*program, *options, f"--user-data-dir={home}/profile", _url(where, server, "127.0.0.1")]
        with tempfile.TemporaryFile() as log:
            try:
                process = subprocess.Popen(
                    ["sh", "-c", START, "sh", *command],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.DEVNULL,
                    stderr=log,
                    env=os.environ | {"TMPDIR": home},
                    start_new_session=True,  # Ctrl-C is for us: there is something to clean up
                )
            except OSError as error:
                raise DeviceError(f"{where.name}: start: {program[0]}: {error.strerror}") from error
            try:
                yield Browser(process, log)
            finally:
                _end(process)


def _end(process: subprocess.Popen[bytes]) -> None:
    """All of its processes: it asks its children to go, and what does not is killed."""
    process.terminate()
    with suppress(subprocess.TimeoutExpired):
        process.wait(END_S)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


def _wait(where: Address, server: PageServer, browser: Browser | None, progress: Progress) -> None:
    """Until the page has posted its trace; DeviceError when it fails, goes away or takes too long."""
    step, limit = "connect", START_S if browser else VISIT_S
    end = time.monotonic() + limit
    while (event := _next(server)) is None or event[0] != "done":
        kind, text = event or ("", "")
        if kind == "here":
            step, limit = "run", LIMIT_S
            end = time.monotonic() + limit
            progress(f"running on {where.name}")
        elif kind == "error":
            raise DeviceError(f"{where.name}: {step}: {text}")
        elif kind == "gone" and browser:
            with suppress(subprocess.TimeoutExpired):
                browser.process.wait(1)  # its connections end before it does
        fate = browser.fate() if browser else None
        if fate or kind == "gone":
            raise DeviceError(f"{where.name}: {step}: {fate or 'the page was closed, or crashed'}")
        if time.monotonic() > end:
            raise DeviceError(f"{where.name}: {step}: no answer after {limit:g} s")


def _next(server: PageServer) -> Event | None:
    with suppress(Empty):
        return server.events.get(timeout=0.1)
    return None
