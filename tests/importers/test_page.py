"""docs/importing.md speaks of every system and every importer, and each of its claims names tests that exist."""

from __future__ import annotations

import ast
import re
from pathlib import Path

from calora_export import importers

TESTS = Path(__file__).parent.parent
PAGE = (TESTS.parent / "docs" / "importing.md").read_text()
SYSTEMS = (
    "CA-LoRA", "DLP-LoRA", "LoRA Land", "LoRAX", "S-LoRA", "LoraRetriever", "RAMoLE", "Compress-then-Serve",
    "LoRA-Flow", "NOLA", "LLM-Pruner", "MTL-LoRA", "ShareLoRA", "LLaVA-MoLE", "Chain of LoRA", "XGBLoRA",
    "FLoRA", "MultiLoRA", "LoRA-RITE", "DoRA",
)  # fmt: skip


def rows() -> list[list[str]]:
    """The cells of the table of systems."""
    table = PAGE.split("## Every system")[1].split("## What the files")[0]
    return [line.strip("| ").split(" | ") for line in table.splitlines() if line.startswith("| ")][1:]


def test_every_system_has_a_row() -> None:
    named = " ".join(row[0] for row in rows())
    assert [system for system in SYSTEMS if system not in named] == []


def test_every_row_is_backed_by_tests_that_exist() -> None:
    for row in rows():
        assert len(row) == 4
        exact, ran = (re.findall(r"`([\w/]+\.py)::(\w+)`", cell) for cell in row[2:])
        assert exact, row[0]
        assert bool(ran) == exact_claims(row) == (row[3] != "–"), row[0]
        for file, name in [*exact, *ran]:
            tree = ast.parse((TESTS / file).read_text())
            assert name in {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}, (file, name)


def exact_claims(row: list[str]) -> bool:
    """Whether a row says that something is imported, not refused."""
    assert row[2].startswith("yes: ") != row[1].startswith("refused"), row[0]
    return row[2].startswith("yes: ")


def test_every_importer_is_in_the_page_and_no_other() -> None:
    shown = set(re.findall(r"import ([a-z][a-z-]+)", PAGE.split("## What the files")[0]))
    refused = {"llm-pruner", "ramole"}
    assert shown == set(importers.names()) - refused
    assert refused < set(importers.names())
