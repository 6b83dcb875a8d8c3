"""An iPhone or iPad on a Mac: `apple:UDID`, by Xcode's devicectl and xcodebuild. UDID is what `devicectl list` shows.

UNVERIFIED: the command lines and the app (targets/coreml/runner) are written from the documentation and have not been
run on a Mac yet.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import msgspec
from msgspec import Struct

from calora_export import package as packages
from calora_export import resources
from calora_export.devices import Progress, silent
from calora_export.errors import DeviceError, mismatch
from calora_export.jobs import Job, Trace, read_trace, write_job
from calora_export.package import Package

LIMIT_S, QUICK_S = 3600, 300
TEAM = "CALORA_APPLE_TEAM"  # who signs the app: the team's ten letters
APP = "org.calora.export.runner"  # bundle identifiers are the team's own: the team is appended
UNVERIFIED = "this transport was written without a Mac and has not been run yet"
READY = "connected"
Command = tuple[str, ...]


class Phone(Struct, frozen=True):
    """A device as devicectl lists it. state: READY, or what is in the way."""

    udid: str
    name: str
    model: str
    os: str
    state: str


def run(address: str, package: Package, job: Job, progress: Progress = silent) -> Trace:
    """Build and install the runner, move package and job there, start it, and bring the trace back."""
    name = f"apple:{address}"
    team = require(name, package)
    phone = _chosen(name, connected())
    app = f"{APP}.{team}"
    with tempfile.TemporaryDirectory(prefix="calora-apple-") as scratch:
        there, build = Path(scratch) / "there", Path(scratch) / "build"
        progress(f"building the runner for {name}")
        _run(name, "build", build_command(phone.udid, team, build))
        try:
            _run(name, "install", install_command(phone.udid, build))
            progress(f"pushing to {name}")
            _lay_out(package, job, there)
            for part in ("package", "job"):
                _run(name, "push", copy_to_command(phone.udid, app, there / part, part), LIMIT_S)
            progress(f"running on {name}")
            _run(name, "run", launch_command(phone.udid, app), LIMIT_S, may_fail=True)
            back = Path(scratch) / "back"
            _run(name, "pull", copy_from_command(phone.udid, app, "job", back), LIMIT_S)
        finally:
            _run(name, "clean", uninstall_command(phone.udid, app), may_fail=True)
        if (back / "error.txt").is_file():
            raise DeviceError(f"{name}: run: {(back / 'error.txt').read_text().strip()}")
        trace = read_trace(back, job)
    named = msgspec.structs.replace(trace.answer, device=f"{phone.name} ({phone.model})", os=phone.os)
    return replace(trace, answer=named)


def require(name: str, package: Package) -> str:
    """The team that signs; DeviceError where this cannot work."""
    if sys.platform != "darwin":
        raise DeviceError(mismatch(name, "system", "macOS with Xcode", sys.platform, UNVERIFIED))
    settings = package.manifest.settings
    if package.manifest.target != "coreml" or settings.adapter_inputs == "functions":
        found = f"{package.manifest.recipe} for {package.manifest.target}"
        raise DeviceError(mismatch(name, "recipe", "one for Core ML with adapters as inputs", found))
    team = os.environ.get(TEAM, "")
    if not team:
        raise DeviceError(mismatch(name, TEAM, "the team that signs the app", "nothing", "Xcode, Settings, Accounts"))
    return team


def connected() -> tuple[Phone, ...]:
    """What devicectl lists; nothing where there is none."""
    if sys.platform != "darwin":
        return ()
    with tempfile.TemporaryDirectory(prefix="calora-apple-") as scratch:
        file = Path(scratch) / "devices.json"
        try:
            _run("apple", "list", list_command(file))
        except DeviceError:
            return ()
        return parse_list(file.read_bytes())


def _chosen(name: str, phones: tuple[Phone, ...]) -> Phone:
    """The one that is named, or the only one."""
    address = name.partition(":")[2]
    found = [phone for phone in phones if address in ("", phone.udid, phone.name)]
    if len(found) != 1:
        known = ", ".join(phone.udid for phone in phones)
        expected = f"one of {known}" if known else "a connected device"
        raise DeviceError(mismatch("--device", name, expected, "no such device", "see `xcrun devicectl list devices`"))
    if found[0].state != READY:
        raise DeviceError(mismatch(name, "state", READY, found[0].state))
    return found[0]


def _lay_out(package: Package, job: Job, there: Path) -> None:
    """What the app finds in its Documents: `package/` and `job/`."""
    (there / "job").mkdir(parents=True)
    for name in (packages.FILE, *package.manifest.files):
        file = there / "package" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.symlink_to((package.path / name).resolve())
    if job.safety is not None:
        forged = Path(job.safety.forged)
        (there / "job" / forged.name).write_bytes(forged.read_bytes())
        job = msgspec.structs.replace(job, safety=msgspec.structs.replace(job.safety, forged=forged.name))
    write_job(there / "job", job)


# ── command lines ─────────────────────────────────────────────────────────────────────────────────────────────────────

_DEVICE = ("xcrun", "devicectl", "device")
_CONTAINER = ("--domain-type", "appDataContainer", "--domain-identifier")


def list_command(out: Path) -> Command:
    return ("xcrun", "devicectl", "list", "devices", "--json-output", str(out))


def build_command(udid: str, team: str, build: Path) -> Command:
    project = resources.target_dir("coreml") / "runner" / "CaloraRunner.xcodeproj"
    where = ("-project", str(project), "-target", "CaloraRunner", "-configuration", "Release")
    what = (f"DEVELOPMENT_TEAM={team}", f"PRODUCT_BUNDLE_IDENTIFIER={APP}.{team}", f"SYMROOT={build}")
    return ("xcodebuild", *where, "-destination", f"id={udid}", "-allowProvisioningUpdates", "build", *what)


def install_command(udid: str, build: Path) -> Command:
    return (*_DEVICE, "install", "app", "--device", udid, str(build / "Release-iphoneos" / "CaloraRunner.app"))


def copy_to_command(udid: str, app: str, source: Path, part: str) -> Command:
    to = ("--source", str(source), "--destination", f"Documents/{part}")
    return (*_DEVICE, "copy", "to", "--device", udid, *_CONTAINER, app, *to)


def launch_command(udid: str, app: str) -> Command:
    """Waits until the app ends."""
    return (*_DEVICE, "process", "launch", "--device", udid, "--terminate-existing", "--console", app)


def copy_from_command(udid: str, app: str, part: str, target: Path) -> Command:
    to = ("--source", f"Documents/{part}", "--destination", str(target))
    return (*_DEVICE, "copy", "from", "--device", udid, *_CONTAINER, app, *to)


def uninstall_command(udid: str, app: str) -> Command:
    return (*_DEVICE, "uninstall", "app", "--device", udid, app)


def _run(name: str, step: str, command: Command, limit: float = QUICK_S, *, may_fail: bool = False) -> None:
    """may_fail: what it was to bring about is checked afterwards, or does not matter."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit, stdin=subprocess.DEVNULL)
    except FileNotFoundError as error:
        raise DeviceError(mismatch(name, command[0], "installed", "not", "install Xcode")) from error
    except subprocess.TimeoutExpired as error:
        raise DeviceError(f"{name}: {step}: no answer after {limit:g} s") from error
    if done.returncode and not may_fail:
        raise DeviceError(f"{name}: {step}: {reason(done.stderr + done.stdout)}")


def reason(log: str) -> str:
    """The first error that Xcode's tools report, without the path before it."""
    lines = [line.strip() for line in log.splitlines() if line.strip()] or ["it says nothing"]
    errors = [line for line in lines if "error:" in line.lower()]
    return (errors or lines[-1:])[0].removeprefix("ERROR: ").removeprefix("error: ")


# ── what devicectl says ───────────────────────────────────────────────────────────────────────────────────────────────


class _Connection(Struct, frozen=True):
    pairingState: str = "unpaired"
    tunnelState: str = "unavailable"


class _Properties(Struct, frozen=True):
    name: str = ""
    osVersionNumber: str = ""
    developerModeStatus: str = "enabled"


class _Hardware(Struct, frozen=True):
    udid: str = ""
    marketingName: str = ""
    productType: str = ""
    platform: str = ""


class _Device(Struct, frozen=True):
    connectionProperties: _Connection = _Connection()
    deviceProperties: _Properties = _Properties()
    hardwareProperties: _Hardware = _Hardware()


class _Result(Struct, frozen=True):
    devices: tuple[_Device, ...] = ()


class _Listing(Struct, frozen=True):
    result: _Result = _Result()


def parse_list(document: bytes) -> tuple[Phone, ...]:
    """The phones and tablets of `devicectl list devices --json-output`."""
    try:
        listing = msgspec.json.decode(document, type=_Listing)
    except msgspec.MsgspecError as error:
        raise DeviceError(f"apple: list: devicectl says something else: {error}") from error
    return tuple(
        Phone(
            udid=device.hardwareProperties.udid,
            name=device.deviceProperties.name,
            model=device.hardwareProperties.marketingName or device.hardwareProperties.productType,
            os=f"{device.hardwareProperties.platform} {device.deviceProperties.osVersionNumber}",
            state=_state(device),
        )
        for device in listing.result.devices
        if device.hardwareProperties.udid and device.hardwareProperties.platform in ("iOS", "iPadOS")
    )


def _state(device: _Device) -> str:
    if device.connectionProperties.pairingState != "paired":
        return "not paired: unlock it and trust this Mac"
    if device.deviceProperties.developerModeStatus != "enabled":
        return "developer mode is off: Settings, Privacy & Security"
    if device.connectionProperties.tunnelState == "unavailable":
        return "away: plug it in or join its network"
    return READY
