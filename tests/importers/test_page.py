"""docs/importing.md speaks of every system and every importer, and the tests that it names show what it claims."""

from __future__ import annotations

import re
import typing
from collections import defaultdict
from fnmatch import fnmatchcase
from pathlib import Path

import pytest

from calora_export import importers, recipe, targets
from calora_export.manifest import RouterSpec

TESTS = Path(__file__).parent.parent
PAGE = (TESTS.parent / "docs" / "importing.md").read_text()
SYSTEMS = (
    "CA-LoRA", "DLP-LoRA", "LoRA Land", "LoRAX", "S-LoRA", "LoraRetriever", "RAMoLE", "Compress-then-Serve",
    "LoRA-Flow", "NOLA", "LLM-Pruner", "MTL-LoRA", "ShareLoRA", "LLaVA-MoLE", "Chain of LoRA", "XGBLoRA",
    "FLoRA", "MultiLoRA", "LoRA-RITE", "DoRA",
)  # fmt: skip
TARGETS = {"ONNX": "onnx", "ExecuTorch": "executorch", "Core ML": "coreml", "torch": "torch"}
NAMED = re.compile(r"`([\w/]+\.py)::(\w+)(?:\[(.*?)\])?`")

Cases = dict[tuple[str, str], dict[str, set[str]]]  # file and test → id of a case → the targets that it runs on


def rows(title: str = "## Every system") -> list[list[str]]:
    """The cells of a section's first table."""
    section = PAGE.split(title)[1].split("\n## ")[0]
    return [line.strip("| ").split(" | ") for line in section.splitlines() if line.startswith("| ")][1:]


class Collector:
    """A plug-in of pytest that takes what it collects."""

    def __init__(self) -> None:
        self.cases: Cases = defaultdict(dict)
        self.targets = {name: entry.target for name, entry in recipe.catalogue().items()}
        self.targets |= {name: name for name in targets.names()}

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        for item in session.items:
            assert isinstance(item, pytest.Function)
            spec = getattr(item, "callspec", None)  # of parametrised tests alone
            file = item.path.relative_to(TESTS).as_posix()
            found = self.ran_on(*spec.params.values()) if spec else set()
            self.cases[file, item.originalname][spec.id if spec else ""] = found

    def ran_on(self, *parameters: object) -> set[str]:
        """The targets among a case's parameters: by their names, or by those of their recipes."""
        flat = [part for value in parameters for part in (value if isinstance(value, tuple) else (value,))]
        return {self.targets[part] for part in flat if isinstance(part, str) and part in self.targets}


@pytest.fixture(scope="module")
def cases() -> Cases:
    """Of every file that the table names; nothing is run."""
    files = sorted({file for file, _, _ in NAMED.findall(PAGE)})
    collector = Collector()
    options = ["--collect-only", "-m", "", "-p", "no:terminal", "-p", "no:cacheprovider"]
    status = pytest.main([*options, *(str(TESTS / file) for file in files)], [collector])
    assert status == pytest.ExitCode.OK
    return collector.cases


def test_every_system_has_a_row() -> None:
    named = " ".join(row[0] for row in rows())
    assert [system for system in SYSTEMS if system not in named] == []


@pytest.mark.parametrize("row", rows(), ids=lambda row: row[0])
def test_a_row_is_shown_by_tests(row: list[str], cases: Cases) -> None:
    """Every test of the last cell runs on every target that the cell names."""
    _, arrives, exact, ran = row
    assert exact.startswith("yes: ") != arrives.startswith("refused")
    assert matching(exact, cases)
    if arrives.startswith("refused"):
        assert ran == "–"
        return
    ran_where_it_says(ran, cases)


@pytest.mark.parametrize("row", rows("## Every kind of router"), ids=lambda row: row[0])
def test_a_kind_of_router_is_shown_by_tests(row: list[str], cases: Cases) -> None:
    kind, _, decides, ran = row
    assert kind and matching(decides, cases)
    ran_where_it_says(ran, cases)


def test_every_kind_of_router_has_a_row() -> None:
    kinds = typing.get_args(typing.get_type_hints(RouterSpec)["kind"])
    named = {row[0].split("`")[1] for row in rows("## Every kind of router")}
    assert named == {*kinds, "token_gate", "token_moe"}


def test_the_policy_of_the_cache_is_shown_by_tests(cases: Cases) -> None:
    section = PAGE.split("## Every kind of router")[1].split("\n## ")[0]
    assert matching(section.rpartition("|\n")[2], cases)


def ran_where_it_says(cell: str, cases: Cases) -> None:
    """Every test that a cell names behind its targets runs on all of them."""
    claimed = {TARGETS[name] for name in cell.partition(": ")[0].split(", ")}
    shown = matching(cell, cases)
    assert claimed and shown
    for name, found in shown.items():
        assert claimed <= set.union(*found.values()), f"{name}: {sorted(found)}"


def matching(cell: str, cases: Cases) -> dict[str, dict[str, set[str]]]:
    """The cases of each test that a cell names, of those that match what is in its brackets; there are some."""
    shown = {}
    for file, name, pattern in NAMED.findall(cell):
        found = {key: ran for key, ran in cases.get((file, name), {}).items() if fnmatchcase(key, pattern or "*")}
        assert found, f"{file}::{name}[{pattern}]: no such test"
        shown[f"{file}::{name}"] = found
    return shown


def test_a_claim_that_no_test_shows_is_found(cases: Cases) -> None:
    test = "importers/test_targets.py::test_an_imported_adapter_runs"
    assert {frozenset(ran) for ran in matching(f"`{test}[onnx-*]`", cases)[test].values()} == {frozenset({"onnx"})}
    for wrong in (f"{test}[*-dora]", f"{test}s", "importers/no_such.py::test_an_imported_adapter_runs"):
        with pytest.raises(AssertionError, match="no such test"):
            matching(f"`{wrong}`", cases)


def test_every_importer_is_in_the_page_and_no_other() -> None:
    shown = set(re.findall(r"import ([a-z][a-z-]+)", PAGE.split("## Every kind")[0]))
    refused = {"llm-pruner", "ramole"}
    assert shown == set(importers.names()) - refused
    assert refused < set(importers.names())
