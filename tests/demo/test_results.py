"""What the demo claims, in the numbers that were measured, and what the documentation prints of them."""

from __future__ import annotations

from pathlib import Path
from statistics import mean

import msgspec
import pytest

from calora_export import demo
from calora_export.demo import table
from calora_export.demo.results import Provenance, Results
from calora_export.demo.tasks import TASKS
from calora_export.manifest import read_manifest

DOCUMENT = Path(__file__).parents[2] / "docs/demo.md"


@pytest.fixture(scope="module")
def results() -> Results:
    return msgspec.json.decode(table.RESULTS.read_bytes(), type=Results)


def test_they_are_of_the_committed_bundle(results: Results) -> None:
    assert results.provenance == msgspec.convert(read_manifest(demo.BUNDLE).provenance, Provenance)
    assert [task.task for task in results.tasks] == [task.id for task in TASKS]


def test_moving_a_lora_to_the_compressed_base_costs_at_least_ten_points(results: Results) -> None:
    assert mean(task.lora - task.lora_moved for task in results.tasks) >= 10


def test_calora_is_at_least_the_lora_trained_on_the_compressed_base(results: Results) -> None:
    assert mean(task.calora for task in results.tasks) >= mean(task.lora_compressed for task in results.tasks)


def test_calora_is_within_two_points_of_the_uncompressed_base(results: Results) -> None:
    assert mean(task.calora for task in results.tasks) >= mean(task.lora for task in results.tasks) - 2


def test_the_adapters_are_what_answers(results: Results) -> None:
    assert max(task.no_adapter for task in results.tasks) == 0


def test_the_router_is_as_good_as_published(results: Results) -> None:
    assert all(rate >= 92.3 for rate in msgspec.structs.astuple(results.router))


def test_the_documentation_has_the_table_that_is_printed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["table"])
    table.main()
    printed = capsys.readouterr().out
    assert printed.count("\n| ") > 12
    assert printed in DOCUMENT.read_text(encoding="utf-8")
