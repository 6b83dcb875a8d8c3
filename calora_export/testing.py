"""Fixtures of pytest, with which an app's repository checks its package on its devices.

In conftest.py: `pytest_plugins = ["calora_export.testing"]`. What to check is said once, in pytest's configuration
(`calora_package`, `calora_bundle`, `calora_device`, `calora_profile`) or on its command line (`--calora-device` …).

calora_report     the report of `validate`, made once for all tests of a session; a device that breaks fails the test
calora_adapter    each adapter of the package in turn, with what is wrong with it there
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest

from calora_export import package as packages
from calora_export import pipeline
from calora_export.errors import CaloraError
from calora_export.report import ParityRow, Report, TaskRow

OPTIONS = {
    "package": "The package to check.",
    "bundle": "The bundle that it was made from.",
    "device": "Where to run it: host, host:native, adb:SERIAL, ssh:HOST …",
    "profile": "A device profile: its threads, cores and examples, its budgets to judge by.",
}
DEFAULTS = {"device": "host", "profile": ""}


@dataclass(frozen=True)
class AdapterResult:
    """What a report says of one adapter. problems: a line each; none: it does on the device what it was trained to."""

    id: str
    parity: tuple[ParityRow, ...]
    task: TaskRow | None
    problems: tuple[str, ...]


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("calora", "calora-export")
    for name, text in OPTIONS.items():
        group.addoption(f"--calora-{name}", help=text)
        parser.addini(f"calora_{name}", text, default=DEFAULTS.get(name))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test that takes `calora_adapter` runs once for each adapter of the package, under its id."""
    if "calora_adapter" not in metafunc.fixturenames:
        return
    try:
        package = packages.load(_path(metafunc.config, "package"))
    except CaloraError as error:
        raise pytest.UsageError(str(error)) from error
    ids = [adapter.id for adapter in package.manifest.adapters]
    metafunc.parametrize("calora_adapter", ids, ids=ids, indirect=True, scope="session")


@pytest.fixture(scope="session")
def calora_report(pytestconfig: pytest.Config) -> Report:
    """The whole report; it is in PACKAGE/report, too."""
    package, bundle = _path(pytestconfig, "package"), _path(pytestconfig, "bundle")
    device, profile = (_option(pytestconfig, name) for name in ("device", "profile"))
    try:
        return pipeline.validate(package, bundle, device, profile=profile)
    except CaloraError as error:
        line = " ".join(str(error).split())
    pytest.fail(line, pytrace=False)


@pytest.fixture(scope="session")
def calora_adapter(request: pytest.FixtureRequest, calora_report: Report) -> AdapterResult:
    """One adapter by itself: its parity against each reference, and its task."""
    adapter: str = request.param
    rows = tuple(row for row in calora_report.parity if row.case == f"adapter:{adapter}")
    task = next((row for row in calora_report.tasks if row.adapter == adapter), None)
    heads = (f"adapter:{adapter} against", f"task {adapter}:")
    problems = tuple(line for line in calora_report.problems if line.startswith(heads))
    if not rows:
        problems = (*problems, f"adapter:{adapter}: the bundle does not have it, so nothing was compared")
    return AdapterResult(adapter, rows, task, problems)


def _option(config: pytest.Config, name: str) -> str:
    return str(config.getoption(f"--calora-{name}") or config.getini(f"calora_{name}") or "")


def _path(config: pytest.Config, name: str) -> Path:
    """What the configuration says is relative to the directory that it is in."""
    said, written = config.getoption(f"--calora-{name}"), config.getini(f"calora_{name}")
    if not said and not written:
        raise pytest.UsageError(f"say which: calora_{name} in pytest's configuration, or --calora-{name}")
    return Path(str(said)) if said else config.rootpath / str(written)
