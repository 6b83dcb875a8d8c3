"""A board, a Linux phone or another machine: `ssh:[user@]host[:port]`, by the system's own ssh client.

What `ssh host` uses is used: ~/.ssh/config, keys, agents, jump hosts. Passwords are never asked for.
"""

from __future__ import annotations

import os
import shlex
import shutil
from pathlib import Path

from calora_export.devices import Progress, _remote, silent
from calora_export.devices._shell import Shell
from calora_export.errors import DeviceError, mismatch
from calora_export.jobs import Job, Trace
from calora_export.package import Package

PLACE = '"${XDG_CACHE_HOME:-$HOME/.cache}"/calora-export-device'
OPTIONS = ("BatchMode=yes", "ConnectTimeout=10", "ServerAliveInterval=10", "ServerAliveCountMax=3")
COMMAND = "CALORA_SSH_COMMAND"  # as GIT_SSH_COMMAND is for git
HINTS = {
    "Permission denied": "a key or an agent must log in: try `ssh -o BatchMode=yes` yourself",
    "Host key verification failed": "connect once with ssh to accept its key",
    "Could not resolve hostname": "expected ssh:[user@]host[:port], or a Host of ~/.ssh/config",
    "Connection refused": "is sshd running there, and on that port?",
}


def run(address: str, package: Package, job: Job, progress: Progress = silent) -> Trace:
    """Run the job over there."""
    return _remote.run(shell(address), package, job, progress)


def shell(address: str) -> Shell:
    host, port = parse(address)
    command = shlex.split(os.environ.get(COMMAND, "")) or ["ssh"]
    if shutil.which(command[0]) is None:
        raise DeviceError(mismatch(f"ssh:{address}", "ssh", "installed", "not", "install the OpenSSH client"))
    options = [part for option in OPTIONS for part in ("-o", option)]
    where = (*(("-p", port) if port else ()), "--", host)
    return Shell(
        name=f"ssh:{address}",
        client=(*command, "-T", *options, *where),
        place=_remote.placed(PLACE),
        hints=HINTS,
    )


def parse(address: str) -> tuple[str, str]:
    """[user@]host[:port] → (user@host, port); an IPv6 address with a port is in brackets."""
    user, at, rest = address.rpartition("@")
    if rest.startswith("["):
        host, _, port = rest[1:].partition("]")
    elif rest.count(":") == 1:
        host, _, port = rest.partition(":")
        port = f":{port}"
    else:
        host, port = rest, ""
    if not host or address.startswith("-") or (port and not port[1:].isdigit()):
        raise DeviceError(mismatch("--device", f"ssh:{address}", "ssh:[user@]host[:port]", "another form"))
    return f"{user}{at}{host}", port[1:]


def configured() -> tuple[str, ...]:
    """The hosts that ~/.ssh/config names, without patterns."""
    file = Path.home() / ".ssh" / "config"
    try:
        lines = file.read_text(errors="replace").splitlines()
    except OSError:
        return ()
    words = [line.replace("=", " ").split() for line in lines]
    hosts = [name for parts in words if parts and parts[0].lower() == "host" for name in parts[1:]]
    return tuple(dict.fromkeys(name for name in hosts if not set(name) & set("*?!")))
