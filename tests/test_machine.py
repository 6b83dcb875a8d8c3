"""What a machine tells of itself, to Python and to the native runner: where files of /sys are others, both say so."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

from calora_export import machine, native
from calora_export import package as packages
from calora_export.devices import host
from calora_export.errors import DeviceError
from calora_export.jobs import Answer, Conditions, InterruptedRun, Job, Timing, read_trace, write_job

IDS = tuple(range(40, 60))
TIMED = Job(threads=1, timing=Timing("alpha", "beta", IDS, decode=2, rounds=1, swaps=2, lengths=(8, 24), repeats=2))


@pytest.fixture
def sys_files(tmp_path: Path) -> Path:
    """A /sys of a phone with two thermal zones, one of them closed to us, and two clocks."""
    root = tmp_path / "sys"
    for name, text in {
        "class/thermal/thermal_zone0/type": "cpu-big\n",
        "class/thermal/thermal_zone0/temp": "41250\n",
        "class/thermal/thermal_zone1/type": "battery\n",
        "class/thermal/thermal_zone1/temp": "not for you\n",
        "devices/system/cpu/cpu0/cpufreq/scaling_cur_freq": "1704000\n",
        "devices/system/cpu/cpu4/cpufreq/scaling_cur_freq": "2367000\n",
        "devices/system/cpu/cpuidle/driver": "psci\n",
    }.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


HOT = Conditions(temperature_c={"0 cpu-big": 41.25}, clock_mhz={"cpu0": 1704.0, "cpu4": 2367.0})


def test_temperatures_and_clocks(sys_files: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(machine, "SYSTEM", sys_files)
    assert machine.conditions() == HOT
    monkeypatch.setattr(machine, "SYSTEM", tmp_path / "nowhere")
    assert machine.conditions() == Conditions(None, None)


def test_the_native_runner_reads_the_same(package: Path, sys_files: Path, tmp_path: Path) -> None:
    """In a mount namespace of its own, where /sys is another directory."""
    job = tmp_path / "job"
    job.mkdir()
    write_job(job, TIMED)
    inside = 'mount --bind "$1" /sys && exec "$2" "$3" "$4"'
    command = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", inside, "sh"]
    if subprocess.run([*command[:4], "true"], capture_output=True).returncode:
        pytest.skip("no user namespaces")
    subprocess.run([*command, sys_files, native.runner("onnx"), package, job], check=True)
    timing = read_trace(job, TIMED).answer.timing
    assert timing is not None and timing.before == timing.after == HOT


@pytest.mark.parametrize("address", ["", "native"])
def test_cores_files_and_curves_are_in_the_answer(package: Path, address: str) -> None:
    core = max(machine.cores() or (0,))
    job = msgspec.structs.replace(TIMED, cores=(core,), threads=4)
    answer = host.run(address, packages.load(package), job).answer
    assert answer.threads == 1, "more than there are processors wait for each other"
    assert answer.cores == (core,) and machine.cores() == tuple(sorted(os.sched_getaffinity(0)))
    assert answer.mapped and 1e6 < answer.mapped < answer.peak_rss
    assert answer.timing is not None
    found = [(point.length, len(point.prefill), len(point.decode)) for point in answer.timing.curve]
    assert found == [(8, 2, 4), (24, 2, 4)]
    assert all(sample > 0 for point in answer.timing.curve for sample in (*point.prefill, *point.decode))


@pytest.mark.parametrize("address", ["", "native"])
def test_processors_that_are_not_there(package: Path, address: str) -> None:
    with pytest.raises(InterruptedRun, match=r"^host: job.json: cores: expected processors of this device") as caught:
        host.run(address, packages.load(package), msgspec.structs.replace(TIMED, cores=(0, 999)))
    assert caught.value.begun is None


def test_without_a_proc_nothing_is_known(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert machine.peak_rss() > 1e7 and machine.mapped()
    monkeypatch.setattr(machine, "STATUS", tmp_path / "status")
    assert machine.mapped() is None and machine.peak_rss() > 0
    monkeypatch.setattr(sys, "platform", "darwin")
    assert machine.cores() is None
    with pytest.raises(DeviceError, match="cores"):
        machine.pin((0,))


def test_an_answer_without_the_new_keys_is_one_all_the_same() -> None:
    """A device that tells less is no worse."""
    text = '{"device": "d", "arch": "a", "os": "o", "runtime": "onnx", "vocab": 8, "gates": [], "completions": [],'
    text += '"safety": null, "peak_rss": 1, "timing": {"load": 1, "swap": [], "first_token": [], "prefill": [],'
    text += '"decode": {}, "router": []}}'
    answer = msgspec.json.decode(text, type=Answer)
    assert answer.timing is not None
    assert (answer.cores, answer.mapped, answer.timing.curve, answer.timing.before) == (None, None, (), None)
