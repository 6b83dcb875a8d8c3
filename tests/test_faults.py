"""Real faults: full disks, read-only ones, Ctrl-C and kill -9 while a package is written.

The old package stays or none is there; no temporary directory is left by anything that could still clean up; the
user reads one line.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from typer.testing import CliRunner

from calora_export import cli, pipeline
from calora_export.errors import PackageError
from tests.bundles import copy_bundle
from tests.packages import copy_package

PAGE = 4096
WRITTEN_IN_ORDER = (
    "model.onnx.data",
    "model.onnx",
    "adapters/alpha.onnx_adapter",
    "adapters/beta.onnx_adapter",
    "tokenizer/tokenizer.json",
    "tokenizer/tokenizer_config.json",
    "router.onnx",
    "tokenizer/router/tokenizer.json",
    "tokenizer/router/tokenizer_config.json",
    "golden/golden.safetensors",
)


def content(directory: Path) -> dict[str, bytes]:
    return {
        file.relative_to(directory).as_posix(): file.read_bytes() for file in directory.rglob("*") if file.is_file()
    }


def hidden(directory: Path) -> list[str]:
    """What temporary directories there are."""
    return [path.name for path in directory.iterdir() if path.name.startswith(".")]


def one_line(stderr: str) -> str:
    (line,) = stderr.splitlines()
    assert line.startswith("error: ")
    return line


# ── a process that is stopped while it exports ──────────────────────────────────────────────────────


SERVER = """
import json, os, signal, sys, time
import torch
from calora_export import cli, golden, graph, model, routers
from calora_export.targets import onnx
signal.signal(signal.SIGINT, signal.default_int_handler)  # what a shell starts in the background ignores it
for line in sys.stdin:
    order = json.loads(line)
    child = os.fork()
    if child == 0:
        for handle in ("stdout", "stderr"):
            os.dup2(os.open(order[handle], os.O_WRONLY | os.O_CREAT), getattr(sys, handle).fileno())
        if order["hold"]:
            onnx.lower_router = lambda *arguments: time.sleep(300)
        sys.argv = order["argv"]
        cli.main()
    print(child, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


class Exporter:
    """Processes that export, forked from one that has imported what takes longest (ONNX Runtime starts a thread)."""

    def __init__(self, directory: Path) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONHASHSEED": "7"}
        pipe = subprocess.PIPE
        self.server = subprocess.Popen(
            [sys.executable, "-c", SERVER], stdin=pipe, stdout=pipe, text=True, env=environment
        )
        self.files = {"stdout": str(directory / "stdout"), "stderr": str(directory / "stderr")}

    def start(self, *arguments: object, hold: bool = False) -> int:
        """The process id of `calora-export export` with these arguments; `hold` it when the model is written."""
        assert self.server.stdin is not None and self.server.stdout is not None
        for file in self.files.values():
            Path(file).unlink(missing_ok=True)
        argv = ["calora-export", "export", *map(str, arguments), "--recipe", "onnx-int4"]
        print(json.dumps({"argv": argv, "hold": hold, **self.files}), file=self.server.stdin, flush=True)
        return int(self.server.stdout.readline())

    def finish(self) -> tuple[int, str, str]:
        """Its exit code, what it said, and its errors."""
        assert self.server.stdout is not None
        code = int(self.server.stdout.readline())
        return code, Path(self.files["stdout"]).read_text(), Path(self.files["stderr"]).read_text()


@pytest.fixture(scope="module")
def exporter(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Exporter]:
    made = Exporter(tmp_path_factory.mktemp("exporter"))
    yield made
    made.server.communicate()


def start_and_signal(exporter: Exporter, tiny: Path, out: Path, number: signal.Signals) -> tuple[int, str, str]:
    """Signal an export that has written the model and the adapters; its exit code, what it said, and its errors."""
    process = exporter.start(tiny, "-o", out, hold=True)
    deadline = time.monotonic() + 120
    while not any((out.parent / name / "adapters" / "beta.onnx_adapter").exists() for name in hidden(out.parent)):
        assert time.monotonic() < deadline, "the export never wrote its adapters"
        time.sleep(0.01)
    os.kill(process, number)
    return exporter.finish()


def test_ctrl_c_leaves_the_old_package_and_nothing_else(
    exporter: Exporter, package: Path, tiny: Path, tmp_path: Path
) -> None:
    old = copy_package(package, tmp_path / "package")
    before = content(old)
    code, stdout, stderr = start_and_signal(exporter, tiny, old, signal.SIGINT)
    # -2: Python itself ends so when the signal came while a library ran Python code from C.
    assert code in (1, 130, -signal.SIGINT) and stdout == ""
    assert one_line(stderr) == "error: interrupted; nothing was changed"
    assert content(old) == before and os.listdir(tmp_path) == ["package"]


def test_kill_9_leaves_the_old_package_and_a_later_export_works(
    exporter: Exporter, package: Path, tiny: Path, tmp_path: Path
) -> None:
    """The later one has another hash seed and place of the bundle: its bytes are the same."""
    old = copy_package(package, tmp_path / "package")
    (old / "package.json").write_bytes((old / "package.json").read_bytes() + b"\n")
    before = content(old)
    code, _, _ = start_and_signal(exporter, tiny, old, signal.SIGKILL)
    assert code == -signal.SIGKILL and content(old) == before
    stale = hidden(tmp_path)
    assert len(stale) == 1
    exporter.start(copy_bundle(tiny, tmp_path / "moved"), "-o", old, "--json")
    code, stdout, stderr = exporter.finish()
    assert (code, stderr) == (0, "")
    sizes = sum(len(data) for name, data in content(old).items() if name != "package.json")
    said, made = json.loads(stdout), json.loads((old / "package.json").read_text())
    expected = {"package": str(old), "target": "onnx", "bytes": sizes, "represented": [], "zeros": made["zeros"]}
    assert said == expected
    assert content(old) == content(package) and hidden(tmp_path) == stale


# ── full and read-only disks ────────────────────────────────────────────────────────────────────────


@contextmanager
def file_size_limit(limit: int) -> Iterator[None]:
    """What a quota does, and a full disk on a machine where tests may not mount one."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_file_that_may_not_grow_is_one_line(package: Path, tiny: Path, tmp_path: Path) -> None:
    old = copy_package(package, tmp_path / "package")
    before = content(old)
    with file_size_limit(len(before["model.onnx.data"]) // 2):
        done = CliRunner().invoke(cli.app, ["export", str(tiny), "-o", str(old), "--recipe", "onnx-int4"])
    assert done.exit_code == 1 and done.stdout == ""
    assert one_line(done.stderr) == f"error: {old}: cannot be written: File too large"
    assert content(old) == before and os.listdir(tmp_path) == ["package"]


Mount = Callable[..., Path]


@pytest.fixture
def mount(tmp_path: Path) -> Iterator[Mount]:
    """Mounts a small disk: mount(size in bytes), and mount(remount="ro") afterwards."""
    point = tmp_path / "disk"
    point.mkdir()

    def tmpfs(size: int = 0, remount: str = "") -> Path:
        options = ["-o", f"remount,{remount}"] if remount else ["-t", "tmpfs", "-o", f"size={size}", "tmpfs"]
        try:
            done = subprocess.run(["mount", *options, str(point)], capture_output=True, text=True)
        except FileNotFoundError:
            pytest.skip("no mount command")
        if done.returncode:
            pytest.skip(f"mounting needs root: {done.stderr.strip()}")
        return point

    yield tmpfs
    subprocess.run(["umount", str(point)], capture_output=True)


@pytest.mark.parametrize(
    "last", ["model.onnx.data", "adapters/alpha.onnx_adapter", "router.onnx", "golden/golden.safetensors"]
)
def test_a_disk_that_is_full_at_any_file_is_one_line(package: Path, tiny: Path, mount: Mount, last: str) -> None:
    """The disk has room for all that is written before one file, and for a page of that file."""
    before = WRITTEN_IN_ORDER[: WRITTEN_IN_ORDER.index(last)]
    pages = sum(-(-(package / name).stat().st_size // PAGE) for name in before)
    disk = mount(PAGE * (pages + 1))
    with pytest.raises(PackageError) as caught:
        pipeline.export(tiny, disk / "package", "onnx-int4")
    assert "cannot be written" in str(caught.value) and "\n" not in str(caught.value)
    assert os.listdir(disk) == []


def test_the_order_above_is_that_of_an_export(package: Path) -> None:
    assert set(WRITTEN_IN_ORDER) <= set(content(package))


def test_adding_an_adapter_to_a_full_disk_leaves_the_package(
    package: Path, tiny: Path, mount: Mount, tmp_path: Path
) -> None:
    size = sum(-(-len(data) // PAGE) for data in content(package).values())
    copy = copy_package(package, mount(PAGE * (size + 2)) / "package")
    loose = shutil.copytree(tiny / "adapters" / "alpha", tmp_path / "delta")
    before = content(copy)
    with pytest.raises(PackageError, match="cannot be written") as caught:
        pipeline.add_adapter(copy, loose)
    assert "\n" not in str(caught.value) and content(copy) == before


def test_a_read_only_disk_refuses_before_the_work(package: Path, tiny: Path, mount: Mount, tmp_path: Path) -> None:
    disk = mount(1_000_000)
    copy = copy_package(package, disk / "package")
    loose = shutil.copytree(tiny / "adapters" / "alpha", tmp_path / "delta")
    mount(remount="ro")
    stages: list[str] = []
    with pytest.raises(PackageError, match="cannot be written: Read-only file system"):
        pipeline.export(tiny, disk / "new", "onnx-int4", stages.append)
    assert stages == ["reading the bundle"]
    with pytest.raises(PackageError, match="cannot be written"):
        pipeline.add_adapter(copy, loose)
    done = CliRunner().invoke(cli.app, ["validate", str(copy), "--bundle", str(tiny)])
    assert done.exit_code == 1 and "can not be written: Read-only file system" in one_line(done.stderr)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_directory_without_permission_is_one_line(tiny: Path, tmp_path: Path) -> None:
    tmp_path.chmod(0o555)
    try:
        done = CliRunner().invoke(
            cli.app, ["export", str(tiny), "-o", str(tmp_path / "package"), "--recipe", "onnx-int4"]
        )
    finally:
        tmp_path.chmod(0o755)
    assert done.exit_code == 1
    assert one_line(done.stderr) == f"error: {tmp_path / 'package'}: cannot be written: Permission denied"
