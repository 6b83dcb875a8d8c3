"""How ONNX Runtime for browsers arrives: by npm, from a registry on this machine that is right, wrong or not there."""

from __future__ import annotations

import base64
import hashlib
import io
import os
import tarfile
from pathlib import Path

import pytest

from calora_export import onnxruntime_web, resources
from calora_export.errors import DeviceError


def archive() -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for name in (*onnxruntime_web.FILES, "ort.webgl.js"):
            entry = tarfile.TarInfo(f"package/dist/{name}")
            entry.size = len(name)
            tar.addfile(entry, io.BytesIO(name.encode()))
    return buffer.getvalue()


@pytest.fixture
def npm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A program named npm; the first argument that follows its `--pack-destination` is where it puts the archive."""
    (tmp_path / "archive.tgz").write_bytes(archive())
    digest = base64.b64encode(hashlib.sha512(archive()).digest()).decode()
    monkeypatch.setattr(onnxruntime_web, "_pinned", lambda: ("onnxruntime-web@0.0.1", f"sha512-{digest}"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    says(tmp_path / "npm", f'cp "{tmp_path}/archive.tgz" "$destination/onnxruntime-web-0.0.1.tgz"')
    return tmp_path / "npm"


def says(npm: Path, script: str) -> None:
    find = 'while [ $# -gt 0 ]; do [ "$1" = --pack-destination ] && destination=$2; shift; done'
    npm.write_text(f"#!/bin/sh\n{find}\n{script}\n")
    npm.chmod(0o755)


def refusal() -> str:
    with pytest.raises(DeviceError) as caught:
        onnxruntime_web.directory()
    assert "\n" not in str(caught.value) and not onnxruntime_web.is_here()
    cache = resources.cache()
    assert not cache.exists() or list(cache.iterdir()) == [], "nothing is left"
    return str(caught.value)


def test_it_is_fetched_once_and_only_what_a_page_loads(npm: Path) -> None:
    assert not onnxruntime_web.is_here()
    place = onnxruntime_web.directory()
    assert place == resources.cache() / "onnxruntime-web-0.0.1" and onnxruntime_web.is_here()
    assert {file.name for file in place.iterdir()} == set(onnxruntime_web.FILES)
    npm.unlink()
    assert onnxruntime_web.directory() == place


def test_what_was_cut_off_is_fetched_again(npm: Path) -> None:
    place = onnxruntime_web.directory()
    (place / onnxruntime_web.FILES[0]).unlink()
    onnxruntime_web.directory()
    assert (place / onnxruntime_web.FILES[0]).read_text() == onnxruntime_web.FILES[0]


def test_another_archive_is_refused(npm: Path) -> None:
    (npm.parent / "archive.tgz").write_bytes(archive() + b"more")
    line = refusal()
    assert line.startswith("onnxruntime-web@0.0.1: integrity: expected sha512-")
    assert line.endswith("(the registry sent another archive)")


def test_no_npm(npm: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(npm.parent / "cache"))
    expected = "onnxruntime-web@0.0.1: npm: expected installed, to fetch it once, found not (install Node.js)"
    assert refusal() == expected


def test_no_network(npm: Path) -> None:
    """What npm says when nobody answers."""
    said = ("code ECONNREFUSED", "syscall connect", "errno ECONNREFUSED", "FetchError: request to registry failed")
    lines = "; ".join(f"echo 'npm error {line}' >&2" for line in said)
    says(npm, f"{lines}; exit 1")
    line = "onnxruntime-web@0.0.1: cannot be fetched by npm: FetchError: request to registry failed"
    assert refusal() == line


def test_an_npm_that_hangs(npm: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnxruntime_web, "LIMIT_S", 0.2)
    says(npm, "exec sleep 10")
    assert refusal() == "onnxruntime-web@0.0.1: cannot be fetched by npm: no answer after 0.2 s"


def test_what_is_pinned() -> None:
    package, integrity = onnxruntime_web._pinned()
    assert package.startswith("onnxruntime-web@1.") and len(base64.b64decode(integrity.removeprefix("sha512-"))) == 64
