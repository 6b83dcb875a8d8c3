"""`adb:` before there is a connection: which device, and what is wrong with it. Jobs: test_remote.py."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from calora_export import devices
from calora_export import package as packages
from calora_export.devices import adb
from calora_export.errors import DeviceError
from calora_export.jobs import Job

Said = Callable[..., Path]


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Said:
    """Let `adb devices` list these lines; `shell` is what its shell does; the calls are kept in a file."""

    def write(*lines: str, shell: str = "exit 1") -> Path:
        listing = "\n".join(("List of devices attached", *lines, ""))
        program, calls = tmp_path / "adb", tmp_path / "calls"
        choices = f"case $1 in\n-s) shift 4; {shell};;\ndevices) echo '{listing}';;\nesac"
        program.write_text(f'#!/bin/sh\necho "$*" >> {calls}\n{choices}\n')
        program.chmod(0o755)
        return calls

    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    return write


def refusal(address: str) -> str:
    with pytest.raises(DeviceError) as caught:
        adb.shell(address)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_device_is_always_named(said: Said) -> None:
    said("R5C device")
    assert adb.shell("R5C").client[1:] == ("-s", "R5C", "shell", "-T")
    assert adb.shell("").client[1:] == ("-s", "R5C", "shell", "-T"), "the only one there is"
    assert adb.shell("R5C").place == "/data/local/tmp/calora-export"


@pytest.mark.parametrize(
    ("lines", "address", "expected"),
    [
        ((), "", "--device: adb:: expected a connected device, found no such device (see `adb devices`)"),
        (("A device", "B device"), "", "--device: adb:: expected one of A, B, found no such device"),
        (("A device",), "B", "--device: adb:B: expected one of A, found no such device (see `adb devices`)"),
        (("A unauthorized",), "A", "adb:A: state: expected device, found unauthorized (unlock it and allow"),
        (("A offline",), "A", "adb:A: state: expected device, found offline (plug it in again"),
        (("A no permissions (rules); see http",), "A", "found no permissions (add a udev rule"),
        (("A sideload",), "A", "found sideload (start Android)"),
        (("A host",), "A", "found host (see `adb devices`)"),
    ],
)
def test_a_device_that_is_not_ready(said: Said, lines: tuple[str, ...], address: str, expected: str) -> None:
    said(*lines)
    assert expected in refusal(address)


def test_a_device_on_the_network_is_connected_to(said: Said) -> None:
    calls = said("10.0.0.7:5555 offline")
    assert "found offline" in refusal("10.0.0.7:5555")
    assert calls.read_text().split("\n") == [
        *("devices", "disconnect 10.0.0.7:5555", "connect 10.0.0.7:5555", "devices", "")
    ]


def test_a_missing_adb_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("ANDROID_HOME", raising=False)
    monkeypatch.delenv("ANDROID_SDK_ROOT", raising=False)
    assert refusal("A") == "adb: adb: expected installed, found not (install Android's platform-tools)"
    assert adb.connected() == {}
    tools = tmp_path / "sdk" / "platform-tools"
    tools.mkdir(parents=True)
    (tools / "adb").write_text("#!/bin/sh\necho List\necho A device\n")
    (tools / "adb").chmod(0o755)
    monkeypatch.setenv("ANDROID_HOME", str(tmp_path / "sdk"))
    monkeypatch.setenv("PATH", "/usr/bin:/bin" if not Path("/usr/bin/adb").exists() else str(tmp_path))
    assert adb._client() == str(tools / "adb")


@pytest.mark.parametrize(
    ("shell", "expected"),
    [
        ("echo 'error: device offline' >&2; exit 1", "device offline (plug it in again, or `adb disconnect`"),
        ("echo \"adb: device 'A' not found\" >&2; exit 1", "device 'A' not found"),
        ("exit 0", "it says nothing"),
    ],
)
def test_a_device_that_goes_away(said: Said, package: Path, shell: str, expected: str) -> None:
    said("A device", shell=shell)
    with pytest.raises(DeviceError) as caught:
        devices.run("adb:A", packages.load(package), Job(threads=1))
    assert str(caught.value).startswith("adb:A: connect: no connection: ") and expected in str(caught.value)


def test_an_android_device_says_its_model_and_version(said: Said, package: Path, tmp_path: Path) -> None:
    """On this machine, with a getprop: what Android calls itself, and that an emulator is one."""
    (tmp_path / "getprop").write_text(
        "#!/bin/sh\ncase $1 in *model) echo Pixel 8;; *release) echo 15;; ro.boot.qemu) echo 1;; esac\n"
    )
    (tmp_path / "getprop").chmod(0o755)
    said("A device", shell='eval "$*"')
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CALORA_DEVICE_DIR", str(tmp_path / "device"))
        answer = devices.run("adb:A", packages.load(package), Job(threads=1)).answer
    assert (answer.device, answer.os, answer.emulated) == ("Pixel 8", "Android 15", True)
