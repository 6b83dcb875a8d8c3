"""A real sshd on loopback, with keys and a configuration of its own; the user's ~/.ssh is neither read nor written."""

from __future__ import annotations

import getpass
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Sshd:
    """address: for `--device ssh:…`; command: for CALORA_SSH_COMMAND; log: what sshd says."""

    address: str
    command: str
    log: Path
    process: subprocess.Popen[bytes]


def program() -> str | None:
    """sshd, where the system has it; it must be started by its whole path."""
    return shutil.which("sshd", path=f"/usr/sbin:/usr/local/sbin:{os.environ.get('PATH', '')}")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def make_keys(directory: Path) -> None:
    """Of the host and of its one user, once."""
    for name in ("host_key", "user_key"):
        if not (directory / name).exists():
            subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", directory / name], check=True)


def settings(port: int, keys: Path) -> str:
    """sshd_config, for keys that are in this directory of the machine that sshd is on."""
    return f"""
ListenAddress 127.0.0.1:{port}
HostKey {keys}/host_key
AuthorizedKeysFile {keys}/user_key.pub
PidFile none
StrictModes no
UsePAM no
PasswordAuthentication no
KbdInteractiveAuthentication no
"""


def client(port: int, directory: Path) -> str:
    """The command that logs in with these keys, for CALORA_SSH_COMMAND."""
    host_key = (directory / "host_key.pub").read_text()
    (directory / "known_hosts").write_text(f"[127.0.0.1]:{port} {host_key}")
    (directory / "ssh_config").write_text(f"""Host *
IdentityFile {directory}/user_key
IdentitiesOnly yes
UserKnownHostsFile {directory}/known_hosts
StrictHostKeyChecking yes
""")
    return f"ssh -F {directory}/ssh_config"


@contextmanager
def started(directory: Path, more: str = "") -> Iterator[Sshd]:
    """sshd with its files in `directory`; `more`: lines of sshd_config, which count before the others."""
    sshd = program()
    assert sshd is not None
    make_keys(directory)
    port, user = free_port(), getpass.getuser()
    (directory / "sshd_config").write_text(more + settings(port, directory))
    if os.getuid() == 0:
        Path("/run/sshd").mkdir(exist_ok=True)  # it refuses to start without; the service makes it otherwise
    log = directory / "log"
    with log.open("wb") as file:
        process = subprocess.Popen([sshd, "-D", "-e", "-f", directory / "sshd_config"], stdout=file, stderr=file)
    try:
        wait(port, log)
        yield Sshd(f"{user}@127.0.0.1:{port}", client(port, directory), log, process)
    finally:
        process.kill()
        process.wait()


def wait(port: int, log: Path) -> None:
    """Until somebody listens."""
    for _ in range(400):
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.05)
    raise AssertionError(log.read_text())
