"""Real devices: sshd on loopback, and a phone in a root of its own."""

from __future__ import annotations

import functools
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.conftest import Export
from tests.devices import phone as phones
from tests.devices import sshd
from tests.devices.beds import AdbBed, Bed, BrowserBed, SshBed, require_browser


@pytest.fixture(scope="session")
def host_keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory for sshd, with its keys after the first start."""
    if sshd.program() is None or shutil.which("ssh") is None:
        pytest.skip("no OpenSSH server and client")
    return tmp_path_factory.mktemp("sshd")


@pytest.fixture
def ssh_bed(host_keys: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[SshBed]:
    with sshd.started(host_keys) as server:
        monkeypatch.setenv("CALORA_SSH_COMMAND", server.command)
        monkeypatch.setenv("CALORA_DEVICE_DIR", str(tmp_path / "device"))
        yield SshBed(server, tmp_path / "device")


@pytest.fixture(scope="session")
def phone_files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if lacking := phones.missing():
        pytest.skip(f"no {lacking}")
    try:
        return phones.make(tmp_path_factory.mktemp("phone"))
    except subprocess.CalledProcessError as error:
        pytest.skip(f"packages of Debian that could not be fetched: {error}")


@pytest.fixture(scope="session")
def phone_on(phone_files: Path) -> Iterator[Callable[[str], phones.Phone]]:
    """Processor → a running phone that has it."""
    running: dict[str, phones.Phone] = {}
    patch = pytest.MonkeyPatch()
    with phones.server() as port:
        patch.setenv("ANDROID_ADB_SERVER_PORT", port)

        def start(cpu: str) -> phones.Phone:
            if cpu not in running:
                running[cpu] = phones.Phone(phone_files, cpu)
            return running[cpu]

        yield start
        for phone in running.values():
            phone.kill()
    patch.undo()


@pytest.fixture
def adb_bed(phone_on: Callable[[str], phones.Phone]) -> AdbBed:
    bed = AdbBed(phone_on("cortex-a76"))
    shutil.rmtree(bed.place, ignore_errors=True)  # what the job before it left for the next one
    return bed


@pytest.fixture
def browser_bed(monkeypatch: pytest.MonkeyPatch) -> Iterator[BrowserBed]:
    require_browser()
    scratch = Path(tempfile.mkdtemp(prefix="c-", dir="/tmp"))  # a browser has sockets there, whose paths must be short
    monkeypatch.setenv("TMPDIR", str(scratch))
    monkeypatch.setattr(tempfile, "tempdir", None)
    made = BrowserBed(scratch)
    yield made
    made.nothing_is_left()
    shutil.rmtree(scratch)


@pytest.fixture(params=["ssh", pytest.param("adb", marks=pytest.mark.phone)])
def bed(request: pytest.FixtureRequest) -> Bed:
    """A real device of each transport."""
    return request.getfixturevalue(f"{request.param}_bed")


@pytest.fixture(scope="session")
def demo() -> Path:
    """The bundle that ships with the tool: eight adapters and a router, really trained."""
    from calora_export import demo

    return Path(demo.__file__).parent / "bundle"


@pytest.fixture(scope="session")
def demo_package(demo: Path, tmp_path_factory: pytest.TempPathFactory) -> Export:
    """Recipe name → the package that it makes of the demo bundle."""
    from calora_export import pipeline

    def export(recipe: str) -> Path:
        return pipeline.export(demo, tmp_path_factory.mktemp(recipe) / "package", recipe).path

    return functools.cache(export)
