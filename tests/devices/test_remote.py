"""Jobs on real devices, `ssh:` into a real sshd and `adb:` into a real adbd on emulated arm64; and what breaks there.
What every device does alike: test_contract.py.

Every fault is a real one. Each ends in one line that names the device and the step, leaves nothing on the device, and
a re-run works.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from subprocess import PIPE

import numpy as np
import pytest
from typer.testing import CliRunner

from calora_export import cli, devices, latency, native, pipeline, resources
from calora_export import package as packages
from calora_export import report as reports
from calora_export.bundle import read_manifest
from calora_export.devices import _remote, _shell, host
from calora_export.errors import DeviceError
from calora_export.jobs import Case, InterruptedRun, Job, Timing, Trace
from calora_export.package import Package
from calora_export.report import Report, Safety, Sample
from tests.conftest import Export
from tests.devices import phone as phones
from tests.devices import sshd
from tests.devices.beds import AdbBed, Bed, SshBed, interruptible, wait_for
from tests.devices.phone import Phone
from tests.packages import copy_package

IDS = tuple(range(40, 60))
SMALL = Job(threads=1, cases=(Case("base", {}, IDS, 16), Case("mix", {"alpha": 0.7, "beta": -0.4}, IDS, 16)))
ENDLESS = Job(threads=1, cases=SMALL.cases, timing=Timing("alpha", "beta", IDS, decode=100, rounds=10**6, swaps=1))


@pytest.fixture
def opened(package: Path) -> Package:
    return packages.load(package)


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_remote, "LINGER_S", 1)
    monkeypatch.setattr(latency, "threads", lambda profile: 1)  # several wait for ages under emulation


def fault(bed: Bed, package: Package, step: str, job: Job = SMALL) -> str:
    """What a run that fails says, without the device and the step."""
    with pytest.raises(DeviceError) as caught:
        devices.run(bed.device, package, job)
    return said(bed, str(caught.value), step)


def said(bed: Bed, line: str, step: str) -> str:
    assert "\n" not in line and line.startswith(f"{bed.device}: {step}: "), line
    return line.removeprefix(f"{bed.device}: {step}: ")


def works(bed: Bed, package: Package) -> None:
    """A re-run works, and its package stays for the next one."""
    made, expected = devices.run(bed.device, package, SMALL), host.answer(package, SMALL)
    distance = np.linalg.norm(made.logits["mix"] - expected.logits["mix"])
    assert distance < 0.05 * np.linalg.norm(expected.logits["mix"])
    assert {path.name for path in bed.place.iterdir()} == {"runner", "package"}


def reruns(bed: Bed, package: Package) -> None:
    """Nothing is left, so a re-run is a first run: shown on the phone, for ssh where something could differ."""
    if isinstance(bed, AdbBed):
        works(bed, package)


class Running:
    """A job that does not end by itself, in a thread."""

    def __init__(self, bed: Bed, package: Package) -> None:
        self.bed, self.line = bed, ""
        self.begun: Trace | None = None
        self._thread = threading.Thread(target=self._run, args=(bed.device, package))
        self._thread.start()
        self.pid = runner_there(bed, self._thread.is_alive)

    def _run(self, device: str, package: Package) -> None:
        try:
            devices.run(device, package, ENDLESS)
        except InterruptedRun as error:
            self.line, self.begun = str(error), error.begun
        except DeviceError as error:
            self.line = str(error)

    def work(self) -> None:
        """Let it come to the part that does not end."""
        at_work(self.bed, self.pid)

    def end(self) -> str:
        self._thread.join(120)
        assert not self._thread.is_alive()
        return self.line


def runner_there(bed: Bed, alive: Callable[[], bool]) -> int:
    """The process that does a job there, once it has started."""
    file = bed.place / "job" / "pid"
    wait_for(lambda: (file.is_file() and file.read_text().endswith("\n")) or not alive(), 300)
    assert alive()
    return int(file.read_text())


def at_work(bed: Bed, pid: int) -> None:
    """Until it has loaded and done two cases: so many seconds of its processor's time."""
    ticks = (8 if isinstance(bed, AdbBed) else 1) * os.sysconf("SC_CLK_TCK")
    wait_for(lambda: int(Path(f"/proc/{pid}/stat").read_text().split()[13]) > ticks, 300)


def is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"


# ── it works ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_only_what_changed_is_pushed(opened: Package, bed: Bed) -> None:
    def pushed() -> list[str]:
        lines: list[str] = []
        devices.run(bed.device, opened, SMALL, lines.append)
        return sorted({line.split(": ")[1].split(" (")[0] for line in lines if line.startswith("pushing")})

    everything = pushed()
    wanted = {"package/package.json", "package/model.onnx.data", "package/router.onnx", "runner/calora_runner"}
    assert wanted <= set(everything)
    assert pushed() == []
    with (bed.place / "package" / "model.onnx.data").open("r+b") as file:  # a push that was cut off
        file.truncate(1000)
    (bed.place / "package" / "router.onnx").unlink()
    (bed.place / "package" / "stranger").write_text("of another package")
    assert pushed() == ["job/job.json", "package/model.onnx.data", "package/router.onnx"]
    assert not (bed.place / "package" / "stranger").exists()


def proved(package: Path, bundle: Path, device: str, profile: str) -> Report:
    """What the command line says of a package on emulated arm64, which must be that it passed."""
    command = ["validate", str(package), "--bundle", str(bundle), "--device", device, "--profile", profile]
    done = CliRunner().invoke(cli.app, command)
    assert done.exit_code == 0, done.output
    made = reports.read(package / "report" / "report.json")
    assert made.passed and (made.device.arch, made.device.emulated) == ("aarch64", True)
    assert f"PASSED {made.package}" in done.stdout and "An emulated device" in done.stdout
    assert made.safety == Safety(aba_bit_identical=True, kv_isolated=True, wrong_base_refused=True)
    assert made.router is not None and made.router.cases >= 50
    cases = {row.case for row in made.parity}
    assert {f"adapter:{spec.id}" for spec in read_manifest(bundle).adapters} < cases
    assert {case.partition(":")[0] for case in cases} >= {"base", "mix", "route"}
    assert all(row.device == row.reference for row in made.tasks), "of so few examples each is many points"
    return made


@pytest.mark.phone
@pytest.mark.parametrize("cpu", ["cortex-a53", "cortex-a76", "max"])
@pytest.mark.parametrize("recipe", ["onnx-int4", "executorch-8da4w"])
def test_the_demo_is_right_on_every_processor(
    demo: Path,
    demo_package: Export,
    phone_on: Callable[[str], Phone],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    cpu: str,
    recipe: str,
) -> None:
    """What kernels see of a core decides which of them run: without dot products, with them, with SVE. One as a user
    has it, the others with less of what takes long."""
    profile, examples = "emulated-arm64", 20
    if cpu != "cortex-a76":
        few = resources.devices()[profile].read_text().replace("examples = 20", "examples = 2")
        (tmp_path / "few.toml").write_text(few)
        profile, examples = str(tmp_path / "few.toml"), 2
        for name, count in (("PROMPT", 16), ("ROUNDS", 1), ("SWAPS", 2)):  # times that mean nothing
            monkeypatch.setattr(latency, name, count)
    copy = copy_package(demo_package(recipe), tmp_path / "package")
    made = proved(copy, demo, AdbBed(phone_on(cpu)).device, profile)
    assert made.device.kind == "adb"
    assert [row.examples for row in made.tasks] == [Sample(checked=examples, of=200)] * 8


@pytest.mark.phone
@pytest.mark.skipif(os.getuid() != 0, reason="only root can map the users of a board's sshd")
@pytest.mark.parametrize("recipe", ["onnx-int4", "executorch-8da4w"])
def test_a_board_of_another_processor(
    tiny: Path,
    exported: Export,
    phone_files: Path,
    host_keys: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    recipe: str,
) -> None:
    """sshd in the arm64 root."""
    copy = copy_package(exported(recipe), tmp_path / "package")
    with phones.board(phone_files, host_keys, "cortex-a76") as board:
        monkeypatch.setenv("CALORA_SSH_COMMAND", board.command)
        made = proved(copy, tiny, f"ssh:{board.address}", "emulated-arm64")
    assert made.device.kind == "ssh"


def test_several_devices_at_once(tiny: Path, package: Path, ssh_bed: SshBed, tmp_path: Path) -> None:
    """Each has its own report; what goes wrong with one does not disturb the others."""
    copy = copy_package(package, tmp_path / "package")
    gone = f"ssh:127.0.0.1:{sshd.free_port()}"
    answers = pipeline.validate_each(copy, tiny, ("host", ssh_bed.device, gone))
    assert list(answers) == ["host", ssh_bed.device, gone]
    found = {}
    for device in ("host", ssh_bed.device):
        report = answers[device].report
        assert report is not None and report.passed
        found[device] = reports.read(pipeline.report_directory(copy, device, list(answers)) / "report.json")
        assert found[device] == report
    assert [made.device.kind for made in found.values()] == ["host", "ssh"]
    assert isinstance(answers[gone].fault, DeviceError) and gone in str(answers[gone].fault)
    assert answers[gone].report is None, "it measured nothing"


# ── it breaks ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_connection_ends_in_mid_run(opened: Package, bed: Bed) -> None:
    """adbd killed; sshd's sessions killed. The runner does not run on, and after a while nothing is left."""
    running = Running(bed, opened)
    running.work()
    bed.cut()
    assert said(bed, running.end(), "run").startswith("the connection ended")
    assert running.begun is not None and set(running.begun.logits) == {"base", "mix"}
    wait_for(lambda: not bed.place.exists())
    assert not is_running(running.pid)
    bed.back()
    works(bed, opened)


def test_a_rerun_sends_only_the_rest(opened: Package, bed: Bed, monkeypatch: pytest.MonkeyPatch) -> None:
    """A device keeps what it has while its host may come back."""
    monkeypatch.setattr(_remote, "LINGER_S", 300)
    running = Running(bed, opened)
    bed.cut()
    running.end()
    bed.back()
    lines: list[str] = []
    wait_for((bed.place / "orphan").exists)
    devices.run(bed.device, opened, SMALL, lines.append)
    assert [line for line in lines if line.startswith("pushing")] == []
    assert {path.name for path in bed.place.iterdir()} == {"runner", "package"}


def test_the_runner_crashes(opened: Package, bed: Bed) -> None:
    """What it had said until then is here."""
    running = Running(bed, opened)
    running.work()
    os.kill(running.pid, signal.SIGSEGV)
    assert said(bed, running.end(), "run") == "killed by SIGSEGV"
    assert not bed.place.exists()
    made, expected = running.begun, host.answer(opened, SMALL).logits["mix"]
    assert made is not None and made.answer.timing is None
    assert np.linalg.norm(made.logits["mix"] - expected) < 0.05 * np.linalg.norm(expected)
    reruns(bed, opened)


def test_what_was_measured_before_a_crash_is_reported(
    tiny: Path, opened: Package, bed: Bed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a user sees it: the command's exit code, its two lines, and the report that it leaves."""
    monkeypatch.setattr(latency, "ROUNDS", 10**6)
    copy = copy_package(opened.path, tmp_path / "package")

    def crash() -> None:
        pid = runner_there(bed, lambda: True)
        at_work(bed, pid)
        os.kill(pid, signal.SIGSEGV)

    thread = threading.Thread(target=crash, daemon=True)
    thread.start()
    done = CliRunner().invoke(cli.app, ["validate", str(copy), "--bundle", str(tiny), "--device", bed.device])
    thread.join()
    line = f"{bed.device}: run: killed by SIGSEGV"
    kept = copy / "report" / "report.html"
    note = f"note: {bed.device}: what was measured before is in {kept}, marked as incomplete"
    assert (done.exit_code, done.stdout, done.stderr.splitlines()) == (1, "", [note, f"error: {line}"])
    made = reports.read(kept.with_name("report.json"))
    assert (made.passed, made.complete, made.problems) == (False, False, (line,))
    assert made.parity and made.parity[0].case == "base" and all(row.passed for row in made.parity)
    assert not bed.place.exists()


def test_the_runner_hangs(opened: Package, bed: Bed, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(_remote, "LIMIT_S", 15 if isinstance(bed, AdbBed) else 6)
        running = Running(bed, opened)
        os.kill(running.pid, signal.SIGSTOP)
        assert said(bed, running.end(), "run") == f"no answer after {_remote.LIMIT_S} s"
    assert not bed.place.exists()
    wait_for(lambda: not is_running(running.pid))
    reruns(bed, opened)


def test_the_runner_refuses(opened: Package, bed: Bed) -> None:
    job = Job(threads=1, cases=(Case("base", {"gamma": 1.0}, IDS, 16),))
    assert fault(bed, opened, "run", job) == "package.json: adapters: expected one of alpha, beta, found gamma"
    assert not bed.place.exists()


def test_ctrl_c(package: Path, bed: Bed, tmp_path: Path) -> None:
    """As from a terminal, which interrupts the whole group of processes: what was begun over there is taken back."""
    command = [sys.executable, "-m", "calora_export", "bench", str(package), "--device", bed.device]
    process = subprocess.Popen(command, stderr=PIPE, text=True, start_new_session=True, preexec_fn=interruptible)
    wait_for((bed.place / "lock").is_symlink)
    os.killpg(process.pid, signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert (process.returncode, said) == (1, "error: interrupted; nothing was changed\n")
    assert not bed.place.exists()


def test_two_hosts_on_one_device(opened: Package, bed: Bed) -> None:
    running = Running(bed, opened)
    reason = fault(bed, opened, "lock")
    assert reason.startswith("expected a free device, found ") and "at work" in reason
    assert is_running(running.pid), "the first one is not disturbed"
    os.kill(running.pid, signal.SIGKILL)
    assert said(bed, running.end(), "run") == "killed by SIGKILL"
    works(bed, opened)


def test_the_device_is_full(opened: Package, bed: Bed, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        place = bed.small(patch)
        assert "No space left on device" in fault(bed, opened, "push")
        assert place.is_mount() and list(place.iterdir()) == []
    if isinstance(bed, SshBed):
        bed.unmount()
    reruns(bed, opened)


def test_the_directory_cannot_be_written(opened: Package, bed: Bed, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        bed.readonly(patch)
        assert "Read-only file system" in fault(bed, opened, "prepare")
    if isinstance(bed, SshBed):
        bed.unmount()
    reruns(bed, opened)


def test_a_push_is_cut_off(opened: Package, ssh_bed: SshBed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The stream ends early although the connection stands."""
    command = os.environ["CALORA_SSH_COMMAND"]
    short = tmp_path / "ssh"
    cut = f'head -c 200000 | {command} "$@"'
    short.write_text(f'#!/bin/sh\ncase "$*" in *"tar -xzf"*) {cut};; *) {command} "$@";; esac\n')
    short.chmod(0o755)
    with monkeypatch.context() as patch:
        patch.setenv("CALORA_SSH_COMMAND", str(short))
        assert "unexpected" in fault(ssh_bed, opened, "push").lower()
    assert not ssh_bed.place.exists()
    reruns(ssh_bed, opened)


def test_the_connection_ends_in_a_push(opened: Package, bed: Bed) -> None:
    """adbd killed, sshd's sessions killed, when some of the push has arrived."""

    def progress(line: str) -> None:
        sent = re.search(r"\((\d+) of \d+ MB\)", line)
        if sent and int(sent[1]) >= 8 and not cut:
            cut.append(line)
            bed.cut()

    cut: list[str] = []
    with pytest.raises(DeviceError) as caught:
        devices.run(bed.device, opened, SMALL, progress)
    assert cut and said(bed, str(caught.value), "push").startswith("the connection ended")
    wait_for(lambda: not bed.place.exists())
    bed.back()
    works(bed, opened)


def test_a_file_that_arrives_changed(opened: Package, ssh_bed: SshBed, monkeypatch: pytest.MonkeyPatch) -> None:
    """A device whose storage lies: every file is there, one has other bytes."""
    push = _remote._push

    def damage(shell: _shell.Shell, files: dict[str, Path], progress: devices.Progress) -> None:
        push(shell, files, progress)
        (ssh_bed.place / "package" / "model.onnx.data").write_bytes(b"short")

    with monkeypatch.context() as patch:
        patch.setattr(_remote, "_push", damage)
        assert fault(ssh_bed, opened, "push").startswith("package/model.onnx.data: sha256: expected ")
    assert not ssh_bed.place.exists()
    reruns(ssh_bed, opened)


def test_a_runner_for_another_processor(
    opened: Package, bed: Bed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel refuses to start it."""
    arch = "aarch64" if isinstance(bed, AdbBed) else native.host_arch()
    whole = native.runner("onnx", arch)
    fake = tmp_path / "runner" / native.SYSTEM
    fake.mkdir(parents=True)
    loader = bytearray((whole.parent / native.SYSTEM / native.LOADERS[arch]).read_bytes())
    loader[18:20] = (0x5A5A).to_bytes(2, "little")  # e_machine: of no processor
    (fake / native.LOADERS[arch]).write_bytes(loader)
    program = fake.parent / native.RUNNER
    program.write_bytes(whole.read_bytes())
    with monkeypatch.context() as patch:
        patch.setattr(native, "runner", lambda *_: program)
        assert fault(bed, opened, "run").startswith("the runner does not start there: ")
    assert not bed.place.exists()
    reruns(bed, opened)


@pytest.mark.parametrize(
    ("system", "arch"), [("Linux", "armv7l"), ("Darwin", "arm64"), ("Linux", "riscv64"), ("FreeBSD", "amd64")]
)
def test_a_device_without_a_runner(
    opened: Package, ssh_bed: SshBed, monkeypatch: pytest.MonkeyPatch, system: str, arch: str
) -> None:
    monkeypatch.setattr(_remote, "_look", lambda _: _remote.Facts(system, arch, "", "", False))
    expected = f"expected Linux or Android on aarch64 or x86_64, found {system} on {arch}"
    assert fault(ssh_bed, opened, "system") == expected
    assert not ssh_bed.place.exists()


def test_a_target_without_a_runner(exported: Export, ssh_bed: SshBed) -> None:
    package = packages.load(exported("torch-fp32"))
    assert fault(ssh_bed, package, "target") == "expected one with a native runner, found torch"


@pytest.mark.phone
def test_adbd_is_not_there(opened: Package, adb_bed: AdbBed) -> None:
    adb_bed.cut()
    with pytest.raises(DeviceError) as caught:
        devices.run(adb_bed.device, opened, SMALL)
    assert "\n" not in str(caught.value) and adb_bed.device in str(caught.value)
    adb_bed.back()
    works(adb_bed, opened)


@pytest.mark.phone
def test_the_runtimes_functions_are_where_its_header_has_them(phone_files: Path, tmp_path: Path) -> None:
    """The ONNX Runtime runner declares what it calls; a wrong place in the table would call another function."""
    include = phone_files / "headers" / "usr" / "include" / "onnxruntime"
    declared = Path(native.resources.target_dir("onnx")) / "runner" / "ort.h"
    checks = []
    for ours, theirs in (("Api", "OrtApi"), ("CustomOp", "OrtCustomOp")):
        body = declared.read_text().split(f"struct {ours} {{")[1].split("\n};")[0]
        names = re.findall(r"(?m)^  \w[\w *]*\(\*(\w+)\)\(", body)  # and no parameter that is a function, too
        assert len(names) > 20
        checks += [f"offsetof({theirs}, {name}) == offsetof(calora::ort::{ours}, {name})" for name in names]
    source = tmp_path / "places.cpp"
    asserted = "\n".join(f"static_assert({check});" for check in checks)
    source.write_text(f"#include <onnxruntime_c_api.h>\n#include <cstddef>\n#include <ort.h>\n{asserted}\n")
    command = ["c++", "-std=c++17", "-fsyntax-only", f"-I{include}", f"-I{declared.parent}", str(source)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
