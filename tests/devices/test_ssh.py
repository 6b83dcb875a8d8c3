"""`ssh:` before there is a connection: addresses, configuration, and what a real sshd refuses. Jobs: test_remote.py."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from calora_export import devices
from calora_export import package as packages
from calora_export.devices import _shell, ssh
from calora_export.errors import DeviceError
from calora_export.jobs import Job
from tests.devices import sshd
from tests.devices.beds import SshBed
from tests.devices.sshd import free_port


@pytest.mark.parametrize(
    ("address", "host", "port"),
    [
        ("board", "board", ""),
        ("pi@board.lan", "pi@board.lan", ""),
        ("pi@board:2222", "pi@board", "2222"),
        ("10.0.0.7:22", "10.0.0.7", "22"),
        ("fe80::1%eth0", "fe80::1%eth0", ""),
        ("me@[fe80::1]:2222", "me@fe80::1", "2222"),
        ("a@b@host", "a@b@host", ""),
    ],
)
def test_addresses(address: str, host: str, port: str) -> None:
    assert ssh.parse(address) == (host, port)


@pytest.mark.parametrize("address", ["", "host:", "host:abc", "me@", "-oProxyCommand=true", "me@:22"])
def test_what_is_no_address(address: str) -> None:
    with pytest.raises(DeviceError) as caught:
        ssh.parse(address)
    assert str(caught.value) == f"--device: ssh:{address}: expected ssh:[user@]host[:port], found another form"


def test_the_users_own_client_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """No password prompt, and nothing that would hide ~/.ssh/config or an agent."""
    monkeypatch.delenv(ssh.COMMAND, raising=False)
    monkeypatch.delenv("CALORA_DEVICE_DIR", raising=False)
    shell = ssh.shell("pi@board:2222")
    assert shell.client[0] == "ssh" and "BatchMode=yes" in shell.client
    assert shell.client[-4:] == ("-p", "2222", "--", "pi@board")
    assert not {"-F", "-i"} & set(shell.client)
    assert shell.place.endswith("/calora-export-device")


def test_a_directory_of_the_users_choice_is_one_below_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is removed after a fault, so it must be ours alone."""
    monkeypatch.setenv("CALORA_DEVICE_DIR", "/big disk")
    assert ssh.shell("board").place == "'/big disk'/calora-export-device"


def test_a_missing_client_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv(ssh.COMMAND, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(DeviceError, match="^ssh:board: ssh: expected installed, found not"):
        ssh.shell("board")


def refusal(device: str, package: Path) -> str:
    with pytest.raises(DeviceError) as caught:
        devices.run(device, packages.load(package), Job(threads=1))
    line = str(caught.value)
    assert "\n" not in line and line.startswith(f"{device}: connect: no connection: "), line
    return line.removeprefix(f"{device}: connect: no connection: ")


def test_nobody_listens(package: Path, ssh_bed: SshBed) -> None:
    line = refusal(f"ssh:127.0.0.1:{free_port()}", package)
    assert "Connection refused" in line and line.endswith("(is sshd running there, and on that port?)")


def test_there_is_no_such_host(package: Path, ssh_bed: SshBed) -> None:
    line = refusal("ssh:no-such-host.invalid", package)
    assert line.endswith("(expected ssh:[user@]host[:port], or a Host of ~/.ssh/config)")


def test_sshd_refuses_the_user(package: Path, host_keys: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with sshd.started(host_keys, more="AllowUsers nobody-here") as server:
        monkeypatch.setenv(ssh.COMMAND, server.command)
        line = refusal(f"ssh:{server.address}", package)
    assert "Permission denied" in line and "a key or an agent must log in" in line


def test_a_host_that_is_not_known(package: Path, host_keys: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with sshd.started(host_keys) as server:
        monkeypatch.setenv(ssh.COMMAND, f"{server.command} -o UserKnownHostsFile=/dev/null")
        line = refusal(f"ssh:{server.address}", package)
    assert line == "Host key verification failed. (connect once with ssh to accept its key)"


@pytest.mark.parametrize(
    ("forced", "expected"),
    [
        ("/bin/false", "connect: no connection: it says nothing"),
        ("/bin/echo hello", "connect: no connection: it says nothing"),
        ("sleep 60", "connect: no answer after 2 s"),
    ],
)
def test_a_login_that_gives_no_shell(
    package: Path, host_keys: Path, monkeypatch: pytest.MonkeyPatch, forced: str, expected: str
) -> None:
    with sshd.started(host_keys, more=f"ForceCommand {forced}") as server:
        monkeypatch.setenv(ssh.COMMAND, server.command)
        monkeypatch.setattr(_shell.Shell.call, "__defaults__", (2.0 if "sleep" in forced else 60.0, None))
        with pytest.raises(DeviceError) as caught:
            devices.run(f"ssh:{server.address}", packages.load(package), Job(threads=1))
    assert str(caught.value) == f"ssh:{server.address}: {expected}"


def test_a_device_without_tools(
    package: Path, host_keys: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for tool in ("sh", "uname", "tar", "find", "sleep"):
        (tmp_path / tool).symlink_to(shutil.which(tool) or tool)
    forced = f'ForceCommand PATH={tmp_path}; export PATH; eval "$SSH_ORIGINAL_COMMAND"'
    with sshd.started(host_keys, more=forced) as server:
        monkeypatch.setenv(ssh.COMMAND, server.command)
        with pytest.raises(DeviceError, match=r": connect: expected tar, .*, found no sha256sum readlink$"):
            devices.run(f"ssh:{server.address}", packages.load(package), Job(threads=1))


def test_hosts_of_the_configuration(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert ssh.configured() == ()
    (tmp_path / ".ssh").mkdir()
    (tmp_path / ".ssh" / "config").write_text("HOST a b\n\tPort 3\nhost = c a\nHost * d?\nMatch all\n# Host e\n")
    assert ssh.configured() == ("a", "b", "c")
