"""ONNX Runtime for browsers: fetched once from the npm registry and kept; only what a page loads of it."""

from __future__ import annotations

import base64
import hashlib
import shutil
import subprocess
import tarfile
import tempfile
from pathlib import Path
from threading import Lock

from calora_export import resources
from calora_export.errors import DeviceError, mismatch

# In WebAssembly, and with WebGPU, which needs WebAssembly that can wait for it.
BUILDS = {
    "wasm": ("ort.wasm.min.mjs", "ort-wasm-simd-threaded.mjs", "ort-wasm-simd-threaded.wasm"),
    "webgpu": ("ort.webgpu.min.mjs", "ort-wasm-simd-threaded.asyncify.mjs", "ort-wasm-simd-threaded.asyncify.wasm"),
}
FILES = tuple(name for build in BUILDS.values() for name in build)
LIMIT_S = 600
_FETCHING = Lock()  # several devices of one validation want it


def directory() -> Path:
    """Where its files are; fetched by npm at the first call."""
    with _FETCHING:
        if not is_here():
            package, integrity = _pinned()
            try:
                _fetch(package, integrity, _place())
            except OSError as error:
                raise DeviceError(f"{_place()}: cannot be written: {error.strerror or error}") from error
    return _place()


def is_here() -> bool:
    """Whether `directory` needs no network."""
    return all((_place() / name).is_file() for name in FILES)


def _place() -> Path:
    return resources.cache() / _pinned()[0].replace("@", "-")


def _pinned() -> tuple[str, str]:
    text = (resources.target_dir("onnx") / "web" / "npm.txt").read_text()
    package, integrity = next(line for line in text.splitlines() if not line.startswith("#")).split()
    return package, integrity


def _fetch(package: str, integrity: str, place: Path) -> None:
    place.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{place.name}-", dir=place.parent) as name:
        scratch = Path(name)
        archive = _pack(package, scratch)
        found = "sha512-" + base64.b64encode(hashlib.sha512(archive.read_bytes()).digest()).decode()
        if found != integrity:
            raise DeviceError(mismatch(package, "integrity", integrity, found, "the registry sent another archive"))
        (scratch / "unpacked").mkdir()
        with tarfile.open(archive) as tar:
            for file in FILES:
                member = tar.extractfile(f"package/dist/{file}")
                assert member is not None, "the archive is the pinned one"
                with (scratch / "unpacked" / file).open("wb") as target:
                    shutil.copyfileobj(member, target)
        shutil.rmtree(place, ignore_errors=True)
        (scratch / "unpacked").replace(place)


def _pack(package: str, scratch: Path) -> Path:
    """The archive of an npm package, from whatever registry npm is set up for; nothing of it is run."""
    npm = shutil.which("npm")
    if npm is None:
        raise DeviceError(mismatch(package, "npm", "installed, to fetch it once", "not", "install Node.js"))
    command = [npm, "pack", package, "--ignore-scripts", "--loglevel=error", "--pack-destination", str(scratch)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S, stdin=subprocess.DEVNULL)
    except subprocess.TimeoutExpired as error:
        raise DeviceError(f"{package}: cannot be fetched by npm: no answer after {LIMIT_S} s") from error
    archives = list(scratch.glob("*.tgz"))
    if done.returncode or not archives:
        raise DeviceError(f"{package}: cannot be fetched by npm: {_reason(done.stderr)}")
    return archives[0]


def _reason(log: str) -> str:
    """npm says the code of its error first, then in words what it is."""
    lines = [line.split(maxsplit=2)[-1] for line in log.splitlines() if line.startswith(("npm error ", "npm ERR! "))]
    told = [line for line in lines if not line.startswith(("code ", "errno ", "syscall "))]
    return (told or lines or ["it says nothing"])[0]
