"""`apple:` as far as it can be checked without a Mac: its command lines, what devicectl says, and what is refused.

Nothing here shows that it works: no Mac has run it, and what devicectl writes below was typed off published samples.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from calora_export import catalogue, devices, resources
from calora_export import package as packages
from calora_export.devices import apple
from calora_export.errors import DeviceError
from calora_export.jobs import Job, Safety
from tests.conftest import Export

UDID = "00008130-001A2B3C4D5E6F70"


def listed(udid: str = UDID, platform: str = "iOS", paired: str = "paired", mode: str = "enabled", tunnel: str = "x"):
    return {
        "capabilities": [],
        "connectionProperties": {"pairingState": paired, "transportType": "wired", "tunnelState": tunnel},
        "deviceProperties": {"developerModeStatus": mode, "name": "Ann's phone", "osVersionNumber": "18.1"},
        "hardwareProperties": {
            "cpuType": {"name": "arm64e"},
            "marketingName": "iPhone 15 Pro",
            "platform": platform,
            "productType": "iPhone16,1",
            "udid": udid,
        },
        "identifier": "7A1C6A0E-0000-4000-8000-000000000000",
    }


def parsed(*devices: object) -> tuple[apple.Phone, ...]:
    document = {"info": {"outcome": "success", "version": "397.21"}, "result": {"devices": devices}}
    return apple.parse_list(json.dumps(document).encode())


def test_phones_that_devicectl_lists() -> None:
    (phone,) = parsed(listed(tunnel="connected"), listed("W", "watchOS"), listed("M", "macOS"))
    assert phone == apple.Phone(UDID, "Ann's phone", "iPhone 15 Pro", "iOS 18.1", "connected")


@pytest.mark.parametrize(
    ("changes", "state"),
    [
        ({"paired": "unpaired"}, "not paired: unlock it and trust this Mac"),
        ({"mode": "disabled"}, "developer mode is off: Settings, Privacy & Security"),
        ({"tunnel": "unavailable"}, "away: plug it in or join its network"),
        ({"tunnel": "disconnected"}, "connected"),  # the tunnel is made when it is needed
    ],
)
def test_what_is_in_the_way(changes: dict[str, str], state: str) -> None:
    (phone,) = parsed(listed(**changes))
    assert phone.state == state


@pytest.mark.parametrize("document", [b"", b"[]", b'{"result": {"devices": 3}}'])
def test_another_document(document: bytes) -> None:
    with pytest.raises(DeviceError, match="^apple: list: devicectl says something else: ") as caught:
        apple.parse_list(document)
    assert "\n" not in str(caught.value)


def test_which_phone_is_meant() -> None:
    phones = parsed(listed(tunnel="connected"))
    for name in ("apple:", f"apple:{UDID}", "apple:Ann's phone"):
        assert apple._chosen(name, phones).udid == UDID
    for name, known, line in (
        ("apple:other", phones, f"--device: apple:other: expected one of {UDID}, found no such device"),
        ("apple:", (), "--device: apple:: expected a connected device, found no such device"),
        ("apple:", parsed(listed(mode="disabled")), "apple:: state: expected connected, found developer mode is off"),
    ):
        with pytest.raises(DeviceError) as caught:
            apple._chosen(name, known)
        assert str(caught.value).startswith(line)


def test_command_lines() -> None:
    app, there = "org.calora.export.runner.TEAM", Path("/there")
    device = f"xcrun devicectl device %s --device {UDID} "
    container = f"--domain-type appDataContainer --domain-identifier {app} "
    made = {
        apple.list_command(there): "xcrun devicectl list devices --json-output /there",
        apple.install_command(UDID, there): device % "install app" + "/there/Release-iphoneos/CaloraRunner.app",
        apple.copy_to_command(UDID, app, there, "job"): device % "copy to"
        + container
        + "--source /there --destination Documents/job",
        apple.copy_from_command(UDID, app, "job", there): device % "copy from"
        + container
        + "--source Documents/job --destination /there",
        apple.launch_command(UDID, app): device % "process launch" + f"--terminate-existing --console {app}",
        apple.uninstall_command(UDID, app): device % "uninstall app" + app,
    }
    for command, expected in made.items():
        assert " ".join(command) == expected
    build = apple.build_command(UDID, "TEAM", there)
    assert build[0] == "xcodebuild" and "-allowProvisioningUpdates" in build
    assert {f"PRODUCT_BUNDLE_IDENTIFIER={app}", "DEVELOPMENT_TEAM=TEAM", "SYMROOT=/there"} <= set(build)
    assert Path(build[build.index("-project") + 1], "project.pbxproj").is_file()


def test_what_a_device_gets(exported: Export, tmp_path: Path) -> None:
    package = packages.load(exported("coreml-fp16"))
    forged = tmp_path / "forged.safetensors"
    forged.write_bytes(b"forged")
    apple._lay_out(package, Job(threads=1, safety=Safety({}, {}, (1, 2), str(forged))), tmp_path / "there")
    found = {path.relative_to(tmp_path / "there").as_posix() for path in (tmp_path / "there").rglob("*")}
    assert {"job/job.json", "job/forged.safetensors", "package/package.json"} <= found
    assert {f"package/{name}" for name in package.manifest.files} <= found
    assert json.loads((tmp_path / "there/job/job.json").read_text())["safety"]["forged"] == "forged.safetensors"


def test_where_there_is_no_mac(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(apple.sys, "platform", "linux")
    with pytest.raises(DeviceError) as caught:
        devices.run(f"apple:{UDID}", packages.load(package), Job(threads=1))
    expected = f"apple:{UDID}: system: expected macOS with Xcode, found linux ({apple.UNVERIFIED})"
    assert str(caught.value) == expected
    assert apple.connected() == ()


def test_what_is_refused_on_a_mac(package: Path, exported: Export, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(apple.sys, "platform", "darwin")
    monkeypatch.delenv(apple.TEAM, raising=False)
    with pytest.raises(DeviceError, match="recipe: expected one for Core ML .*, found onnx-int4 for onnx$"):
        apple.require("apple:X", packages.load(package))
    with pytest.raises(DeviceError, match=f"{apple.TEAM}: expected the team that signs the app, found nothing"):
        apple.require("apple:X", packages.load(exported("coreml-fp16")))


def test_the_list_says_that_it_is_unverified(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(apple, "connected", lambda: parsed(listed()))
    (row,) = [row for row in catalogue.entries("devices") if row["device"].startswith("apple:")]
    assert row["device"] == f"apple:{UDID}" and "unverified" in row["state"]


def test_reasons() -> None:
    log = "note: x\nERROR: The device is locked. (com.apple.dt.CoreDeviceError error 4)\nmore"
    assert apple.reason(log) == "The device is locked. (com.apple.dt.CoreDeviceError error 4)"
    assert apple.reason("") == "it says nothing"


def test_the_runner_reads_what_a_job_holds() -> None:
    """Its names are those of jobs.py, as far as text tells."""
    source = (resources.target_dir("coreml") / "runner" / "CaloraRunner" / "Job.swift").read_text()
    for name in ("cases", "routes", "completions", "safety", "timing", "prefill", "first_token", "peak_rss"):
        assert re.search(rf"\b{name}\b", source), name
