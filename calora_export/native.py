"""The native programs of a target, built from the sources that ship with the tool and kept for the next time."""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from calora_export import resources
from calora_export.errors import DeviceError, mismatch

LIBRARY, RUNNER = "libcalora_kernels.so", "calora_runner"


def kernels() -> Path:
    """The shared library that registers calora::slot; built on first use."""
    return _built("kernels", ("-DCALORA_RUNNER=OFF",), LIBRARY)


def runner() -> Path:
    """The program that runs an ExecuTorch package without Python; built on first use."""
    return _built("runner", (), RUNNER)


def _built(kind: str, options: tuple[str, ...], product: str) -> Path:
    source = resources.target_dir("executorch") / "runner"
    directory = _cache() / f"{kind}-{_key(source)}"
    if (directory / product).is_file():
        return directory / product
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{kind}-", dir=directory.parent) as name:
            build = Path(name) / "build"
            _run("-S", str(source), "-B", str(build), f"-Dexecutorch_DIR={_sdk()}", *options)
            _run("--build", str(build), "--parallel", str(os.cpu_count() or 1))
            directory.mkdir(exist_ok=True)
            for file in sorted(build.glob("libcalora_*.so")) + [build / product]:
                shutil.copy2(file, directory / f".{file.name}")
                (directory / f".{file.name}").replace(directory / file.name)
    except OSError as error:
        raise DeviceError(f"host: {directory.parent} cannot be written: {error.strerror or error}") from error
    return directory / product


def _cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "calora-export"


def _key(source: Path) -> str:
    """Changes with the sources, with ExecuTorch and with the place of its libraries, which the runner finds by path."""
    digest = hashlib.sha256(f"{importlib.metadata.version('executorch')} {_sdk()}".encode())
    for file in sorted(source.iterdir()):
        if file.is_file():
            digest.update(file.name.encode() + file.read_bytes())
    return digest.hexdigest()[:16]


def _sdk() -> Path:
    """Where the wheel of executorch keeps its CMake configuration."""
    found = importlib.util.find_spec("executorch")
    if found is None or not found.submodule_search_locations:
        raise DeviceError(mismatch("host", "executorch", "installed", "not", "pip install 'calora-export[executorch]'"))
    return Path(next(iter(found.submodule_search_locations))) / "share" / "cmake"


def _run(*arguments: str) -> None:
    cmake = shutil.which("cmake", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}")
    if cmake is None:
        raise DeviceError(mismatch("host", "cmake", "3.28 or newer", "none", "pip install 'calora-export[executorch]'"))
    done = subprocess.run([cmake, *arguments], capture_output=True, text=True)
    if done.returncode:
        needs = "it needs a C++ compiler, and nlohmann-json for the runner"
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
