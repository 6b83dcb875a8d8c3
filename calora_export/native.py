"""The native programs of a target, built from the sources that ship with the tool and kept for the next time.

A runner's directory is whole: the program, the libraries that it loads, and in `system/` the C and C++ libraries of the
compiler with their loader, so that it runs on every Linux kernel of its processor, Android's too.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import threading
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from calora_export import resources
from calora_export.errors import DeviceError, mismatch

RUNNER, SYSTEM = "calora_runner", "system"
LOADERS = {"aarch64": "ld-linux-aarch64.so.1", "x86_64": "ld-linux-x86-64.so.2"}
SYSTEM_LIBRARIES = (
    *("libc.so.6", "libm.so.6", "libdl.so.2", "libpthread.so.0", "librt.so.1"),
    *("libstdc++.so.6", "libgcc_s.so.1"),
)
# The Python package of each target that carries the runtime's libraries, and what CMake is told about them.
RUNTIMES = {"executorch": "executorch", "onnx": "onnxruntime"}
KERNELS = {"executorch": "libcalora_kernels.so", "onnx": "libcalora_onnx.so"}
# A wheel for another processor than this machine's; any Python's has the same libraries.
FOREIGN = ("--python-version", "3.11", "--implementation", "cp")
_BUILDING = threading.Lock()


@dataclass(frozen=True)
class Machine:
    """A processor to build for, and the compiler and its CMake options that do it."""

    arch: str
    compiler: str
    options: tuple[str, ...]

    @property
    def is_host(self) -> bool:
        return not self.options


def kernels(target: str) -> Path:
    """The shared library of our operators for a target's runtime on this machine; built on first use."""
    return _built(f"kernels-{target}", target, _machine(host_arch()), ("-DCALORA_RUNNER=OFF",), KERNELS[target])


def runner(target: str, arch: str = "") -> Path:
    """The program that runs packages of a target without Python, for this machine or for another processor."""
    machine = _machine(arch or host_arch())
    return _built(f"runner-{target}-{machine.arch}", target, machine, (), RUNNER)


def has_runner(target: str) -> bool:
    return target in RUNTIMES


def command(program: Path, arch: str) -> str:
    """How a shell starts a runner in the directory of its files, with the loader and libraries that it brings."""
    loader = f"{SYSTEM}/{LOADERS[arch]}"
    return f"./{loader} --library-path {SYSTEM}:. ./{program.name}"


def check(program: Path, arch: str) -> str:
    """A command that fails where `command` would not start: some shells read a foreign program as a script."""
    return f"./{SYSTEM}/{LOADERS[arch]} --verify ./{program.name}"


def host_arch() -> str:
    machine = platform.machine()
    return {"arm64": "aarch64", "AMD64": "x86_64"}.get(machine, machine)


def _machine(arch: str) -> Machine:
    if arch == host_arch():
        return Machine(arch, "c++", ())
    if arch != "aarch64":
        expected = " or ".join(dict.fromkeys((host_arch(), "aarch64")))
        raise DeviceError(mismatch("host", "compiler", f"one for {expected}", arch, "there is no runner for it"))
    toolchain = resources.root() / "targets" / "runner" / "aarch64-linux.cmake"
    return Machine(arch, "aarch64-linux-gnu-g++", ("--toolchain", str(toolchain)))


def _built(kind: str, target: str, machine: Machine, options: tuple[str, ...], product: str) -> Path:
    with _BUILDING:  # several devices of one validation want the same runner
        return _build(kind, target, machine, options, product)


def _build(kind: str, target: str, machine: Machine, options: tuple[str, ...], product: str) -> Path:
    source = resources.target_dir(target) / "runner"
    directory = resources.cache() / f"{kind}-{_key(source, target, machine)}"
    if (directory / product).is_file():
        return directory / product
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{kind}-", dir=directory.parent) as name:
            scratch, build = Path(name), Path(name) / "build"
            with _packages(target, machine, scratch) as packages:
                runtime = _runtime_option(target, packages)
                _run("-S", str(source), "-B", str(build), runtime, *machine.options, *options)
                _run("--build", str(build), "--parallel", str(os.cpu_count() or 1))
            if product == RUNNER:
                _add_system(build, machine)
            _keep(build, directory, product)
    except OSError as error:
        raise DeviceError(f"host: {directory.parent} cannot be written: {error.strerror or error}") from error
    return directory / product


def _keep(build: Path, directory: Path, product: str) -> None:
    """Copy what was made; the product comes last, so that a directory that has it has all."""
    (directory / SYSTEM).mkdir(parents=True, exist_ok=True)
    made = sorted([*build.glob("lib*.so*"), *(build / SYSTEM).glob("*")])
    for file in [*made, build / product]:
        place = directory / file.relative_to(build)
        shutil.copy2(file, place.with_name(f".{place.name}"))
        place.with_name(f".{place.name}").replace(place)


def _add_system(build: Path, machine: Machine) -> None:
    """The compiler's own C and C++ libraries, where it has them as files: not on macOS."""
    compiler = shutil.which(machine.compiler) or shutil.which("g++")
    if compiler is None or machine.arch not in LOADERS:
        return
    (build / SYSTEM).mkdir()
    for name in (LOADERS[machine.arch], *SYSTEM_LIBRARIES):
        found = subprocess.run([compiler, f"-print-file-name={name}"], capture_output=True, text=True).stdout.strip()
        if Path(found).is_absolute():
            shutil.copyfile(found, build / SYSTEM / name)
            (build / SYSTEM / name).chmod(0o755)


def _key(source: Path, target: str, machine: Machine) -> str:
    """Changes with the sources and with the runtime: its version and place here, its pinned wheel elsewhere."""
    place = f"{metadata.version(RUNTIMES[target])} {_installed(target)}" if machine.is_host else "wheels.txt"
    digest = hashlib.sha256(f"{place} {machine}".encode())
    for folder in (source, source.parents[1] / "runner"):
        for file in sorted(folder.glob("*")):
            if file.is_file():
                digest.update(file.name.encode() + file.read_bytes())
    return digest.hexdigest()[:16]


# ── the runtime's libraries ───────────────────────────────────────────────────────────────────────────────────────────


@contextmanager
def _packages(target: str, machine: Machine, scratch: Path) -> Iterator[Path]:
    """Where the runtime's Python package lies: the installed one, or an unpacked wheel for another processor."""
    if machine.is_host:
        yield _installed(target)
        return
    wheels = resources.target_dir(target) / "runner" / "wheels.txt"
    _pip(wheels, machine.arch, scratch / "wheels")
    (wheel,) = (scratch / "wheels").glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(scratch / "unpacked")
    yield scratch / "unpacked" / RUNTIMES[target]


def _installed(target: str) -> Path:
    name = RUNTIMES[target]
    found = importlib.util.find_spec(name)
    if found is None or not found.submodule_search_locations:
        raise DeviceError(mismatch("host", name, "installed", "not", f"pip install 'calora-export[{target}]'"))
    return Path(next(iter(found.submodule_search_locations)))


def _runtime_option(target: str, package: Path) -> str:
    if target == "executorch":
        return f"-Dexecutorch_DIR={package / 'share' / 'cmake'}"
    libraries = sorted((package / "capi").glob("libonnxruntime.*"))
    if not libraries:
        raise DeviceError(mismatch("host", "onnxruntime", "a package with its shared library", package))
    return f"-DORT_LIBRARY={libraries[0]}"


def _pip(requirements: Path, arch: str, directory: Path) -> None:
    """Download the wheel that is pinned by its hash, from whatever index pip is set up for."""
    where = ("--only-binary", ":all:", "--platform", f"manylinux_2_28_{arch}", *FOREIGN)
    command = (sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-input")
    chosen = ("--no-deps", "--require-hashes", "-r", str(requirements), "-d", str(directory))
    done = subprocess.run([*command, *where, *chosen], capture_output=True, text=True)
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or ["no output"]
        raise DeviceError(f"host: the {arch} wheel of {requirements.parents[1].name} cannot be downloaded: {lines[0]}")


# ── cmake ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def _run(*arguments: str) -> None:
    cmake = shutil.which("cmake", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}")
    if cmake is None:
        raise DeviceError(mismatch("host", "cmake", "3.28 or newer", "none", "pip install 'cmake>=3.28,<4'"))
    done = subprocess.run([cmake, *arguments], capture_output=True, text=True)
    if done.returncode:
        needs = "it needs a C++ compiler, and nlohmann-json for the runner"
        if "--toolchain" in arguments:
            needs = "it needs g++-aarch64-linux-gnu and nlohmann-json"
        reason = _reason(done.stderr + done.stdout)
        raise DeviceError(f"host: the native program cannot be built: {reason} ({needs})")


def _reason(log: str) -> str:
    """A compiler's first error; CMake says its own below where it found it."""
    lines = [line.strip() for line in log.splitlines() if line.strip()] or ["no output"]
    for line, below in zip(lines, [*lines[1:], ""], strict=True):
        if line.startswith("CMake Error"):
            return f"{line} {below}".strip()
        if "error:" in line:
            return line
    return lines[-1]
