"""What our command line makes of the inputs."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from calora_export import adapters as rows
from calora_export import bundle as bundles
from calora_export import package as packages
from calora_export import runtimes

from .process import Run, run

CLI = (sys.executable, "-m", "calora_export")


def export(bundle: Path, recipe: str, package: Path, log: Path) -> Run:
    """`calora-export export`: the base and all adapters of the bundle."""
    return run([*CLI, "export", bundle, "-o", package, "--recipe", recipe], log)


def add_adapter(package: Path, adapter: Path, log: Path) -> Run:
    """`calora-export add-adapter`, with Python's start."""
    return run([*CLI, "add-adapter", package, adapter], log)


def swap_ms(package: Path, device: str, log: Path) -> float:
    """The p50 of a switch in ms, from `calora-export bench` on a device."""
    run([*CLI, "bench", package, "--device", device, "--json"], log)
    return json.loads(log.read_text(encoding="utf-8"))["latency"]["swap_ms"]["p50"]


def decode_tok_s(package: Path, device: str, log: Path) -> float:
    """Tokens per second of decoding the base, from `calora-export bench` on a device."""
    run([*CLI, "bench", package, "--device", device, "--json"], log)
    return json.loads(log.read_text(encoding="utf-8"))["latency"]["decode_tok_s"]


def adapter_file(package: Path, identifier: str) -> Path:
    """The adapter's file in a package."""
    return next((package / "adapters").glob(f"{identifier}.*"))


def model_bytes(path: Path) -> int:
    """The size of a model: of its file, or of the files model.* of a package or of the builder."""
    files = path.glob("model.*") if path.is_dir() else [path]
    every = (part for file in files for part in (file.rglob("*") if file.is_dir() else [file]))
    return sum(part.stat().st_size for part in every if part.is_file())


def kv_bytes(package: Path) -> int:
    """The size of a package's KV cache in fp32, as long as its context."""
    model = packages.load(package).manifest.model
    return 2 * model.layers * model.kv_heads * model.head_dim * model.context * 4


def write_mix(bundle: Path, package: Path, identifiers: Sequence[str], path: Path) -> Path:
    """An adapter file that mixes some of the bundle's in equal parts, as the router does on the device."""
    manifest = packages.load(package).manifest
    source = bundles.load(bundle)
    parts = [(rows.load_adapter(source, identifier), 1 / len(identifiers)) for identifier in identifiers]
    runtimes.load(manifest.target).encode_adapter(rows.mix(parts), manifest.slots, manifest.base_fingerprint, path)
    return path


def state(package: Path) -> dict[str, tuple[str, int]]:
    """SHA-256 and modification time in ns of every file but package.json, by its path in the package."""
    files = (path for path in sorted(package.rglob("*")) if path.is_file() and path.name != "package.json")
    return {str(path.relative_to(package)): (_sha256(path), path.stat().st_mtime_ns) for path in files}


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
