"""A phone of phone.sh, and an adb server of its own that knows it."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.devices import sshd

SCRIPT = Path(__file__).with_name("phone.sh")


class Phone:
    """adbd on a port of this machine. root: its files, as this machine sees them."""

    def __init__(self, directory: Path, cpu: str) -> None:
        self.root, self.cpu, self.port = directory / "root", cpu, sshd.free_port()
        self._directory = directory
        self.start()

    @property
    def serial(self) -> str:
        return f"127.0.0.1:{self.port}"

    @property
    def inside(self) -> Path:
        """Its files with what is mounted there, which this machine does not see otherwise."""
        return Path(f"/proc/{self._process.pid}/root")

    def start(self) -> None:
        command = ["bash", str(SCRIPT), "run", str(self._directory), str(self.port)]
        with (self._directory / "log").open("ab") as log:
            environment = {**os.environ, "QEMU_CPU": self.cpu}
            self._process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
        for _ in range(50):
            subprocess.run(["adb", "disconnect", self.serial], capture_output=True)
            subprocess.run(["adb", "connect", self.serial], capture_output=True)
            done = subprocess.run(["adb", "-s", self.serial, "shell", "uname", "-m"], capture_output=True, text=True)
            if done.stdout.strip() == "aarch64":
                return
            time.sleep(0.2)
        raise AssertionError((self._directory / "log").read_text())

    def kill(self) -> None:
        """adbd alone: what it started lives on."""
        self._process.send_signal(signal.SIGKILL)
        self._process.wait()


@contextmanager
def board(directory: Path, keys: Path, cpu: str) -> Iterator[sshd.Sshd]:
    """The same root as a board: the real sshd in it. Only root can map the users that sshd changes to."""
    sshd.make_keys(keys)
    port, inside, log = sshd.free_port(), directory / "root" / "etc" / "keys", directory / "sshd.log"
    inside.mkdir(exist_ok=True)
    for name in ("host_key", "host_key.pub", "user_key.pub"):
        shutil.copy(keys / name, inside / name)
    (inside / "sshd_config").write_text(sshd.settings(port, Path("/etc/keys")))
    command = ["bash", str(SCRIPT), "sshd", str(directory), "/etc/keys/sshd_config"]
    with log.open("wb") as file:
        environment = {**os.environ, "QEMU_CPU": cpu}
        process = subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=file, stderr=file)
    try:
        own = os.readlink("/proc/self/ns/user")
        while os.readlink(f"/proc/{process.pid}/ns/user") == own:
            time.sleep(0.02)
        for name in ("uid_map", "gid_map"):
            Path(f"/proc/{process.pid}/{name}").write_text("0 0 65536\n")
        assert process.stdin is not None
        process.stdin.write(b"go\n")
        process.stdin.close()
        sshd.wait(port, log)
        yield sshd.Sshd(f"root@127.0.0.1:{port}", sshd.client(port, keys), log, process)
    finally:
        process.kill()
        process.wait()


def missing() -> str | None:
    """What this machine lacks to run a phone."""
    for program in ("adb", "apt-get", "unshare", "aarch64-linux-gnu-g++"):
        if shutil.which(program) is None:
            return program
    if not Path("/etc/apt/sources.list.d/debian.sources").is_file():
        return "sources of Debian packages"
    mount = ("mount", "-t", "binfmt_misc", "binfmt_misc", "/proc/sys/fs/binfmt_misc")
    if subprocess.run(["unshare", "--user", "--map-root-user", "--mount", *mount], capture_output=True).returncode:
        return "user namespaces with a binfmt_misc of their own"
    return None


def make(directory: Path) -> Path:
    """Unpack the phone's files, once."""
    if not (directory / "ready").is_file():
        subprocess.run(["bash", str(SCRIPT), "make", str(directory)], check=True)
    return directory


@contextmanager
def server() -> Iterator[str]:
    """An adb server; it goes away with what it knows."""
    port = str(sshd.free_port())
    environment = {**os.environ, "ANDROID_ADB_SERVER_PORT": port}
    try:
        yield port
    finally:
        subprocess.run(["adb", "kill-server"], env=environment, capture_output=True)
