"""A thousand adapters in one package: what grows with their number, and what does not."""

from __future__ import annotations

import shutil
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch

from calora_export import bundle as bundles
from calora_export import inspection, pipeline, routers, runtimes
from calora_export import package as packages
from calora_export.errors import CaloraError
from calora_export.package import Package
from calora_export.router_text import RouterText
from tests.bundles import tiny_bundle
from tests.packages import copy_package
from tests.test_routers import published, published_logits, same

COUNT, FEW = 1000, 8
MILLISECONDS = 50.0  # of processor time, so that a busy machine changes nothing


def names(count: int) -> tuple[str, ...]:
    return tuple(f"task{number:04d}" for number in range(count))


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], tuple[Path, Package, float]]:
    """Count → bundle, package, and the seconds of processor time that the export took."""
    known: dict[int, tuple[Path, Package, float]] = {}

    def export(count: int) -> tuple[Path, Package, float]:
        if count not in known:
            directory = tmp_path_factory.mktemp(f"many{count}")
            bundle = tiny_bundle(directory / "bundle", adapters=names(count))
            start = time.process_time()
            package = pipeline.export(bundle, directory / "package", "onnx-fp32")
            known[count] = bundle, package, time.process_time() - start
        return known[count]

    export(FEW)  # what is imported once is not counted
    known.clear()
    return export


Exported = Callable[[int], tuple[Path, Package, float]]


def test_each_adapter_costs_the_export_little(exported: Exported) -> None:
    few, many = exported(FEW), exported(COUNT)
    assert len(many[1].manifest.adapters) == COUNT
    assert 1000 * (many[2] - few[2]) / (COUNT - FEW) < MILLISECONDS


def test_one_more_costs_as_little_beside_a_thousand(exported: Exported, tmp_path: Path) -> None:
    bundle, package, _ = exported(COUNT)
    copy = copy_package(package.path, tmp_path / "package")
    spent = []
    for number in range(5):
        adapter = shutil.copytree(bundle / "adapters" / "task0000", tmp_path / f"new{number}")
        start = time.process_time()
        pipeline.add_adapter(copy, adapter)
        spent.append(1000 * (time.process_time() - start))
    assert len(packages.load(copy).manifest.adapters) == COUNT + 5
    assert statistics.median(spent) < MILLISECONDS


def test_inspect_and_load_read_no_adapter_but_those_selected(exported: Exported, tmp_path: Path) -> None:
    """All others are overwritten: whoever read one would see it."""
    whole = exported(COUNT)[1]
    broken = packages.load(copy_package(whole.path, tmp_path / "package"))
    for entry in broken.manifest.adapters:
        if entry.id != "task0500":
            (broken.path / entry.file).write_bytes(b"\0" * broken.manifest.files[entry.file].size)
    assert inspection.inspect(broken.path) == msgspec.structs.replace(
        inspection.inspect(whole.path), path=str(broken.path), name=broken.manifest.name
    )
    logits = []
    for package in (whole, packages.load(broken.path)):
        session = runtimes.load("onnx").open_session(package, 1)
        session.select({"task0500": 1.0})
        logits.append(session.extend([1, 2, 3]))
    np.testing.assert_array_equal(*logits)
    with pytest.raises(CaloraError):
        session.select({"task0501": 1.0})


def test_the_router_selects_from_a_thousand_classes(exported: Exported) -> None:
    path, package, _ = exported(COUNT)
    bundle = bundles.load(path)
    router, spec = routers.load(bundle), bundle.manifest.router
    assert router is not None and spec is not None and spec.selection is not None
    tensors = {name: bundles.TensorIndex.open(path / "router").float32(name) for name in router.scores.state_dict()}
    session = runtimes.load("onnx").open_session(package, 1)
    text = RouterText(spec, path / "router" / "tokenizer.json")
    for prompt in ("one", "Sort these words.", "zzz", "12 + 7"):
        ids = text.ids(prompt)
        expected = published(published_logits(tensors, ids), spec.selection)
        assert expected.margin > 1e-9 and 1 < np.count_nonzero(expected.gates) < COUNT
        found = session.route(ids)
        same(found, router(torch.tensor([ids])).numpy())
        assert np.array_equal(np.flatnonzero(found), np.flatnonzero(expected.gates)) or expected.margin < 1e-6


@pytest.mark.heavy  # it measures
def test_a_swap_is_as_fast_as_among_a_few(exported: Exported) -> None:
    """Processor time of one swap between adapters that were used before, the median of many."""

    def swap(package: Package) -> float:
        session = runtimes.load("onnx").open_session(package, 1)
        spent = []
        for number in range(200):
            start = time.process_time_ns()
            session.select({f"task{number % FEW:04d}": 1.0})
            spent.append(time.process_time_ns() - start)
        return statistics.median(spent[FEW:])

    few, many = exported(FEW)[1], exported(COUNT)[1]
    turns = [(swap(few), swap(many)) for _ in range(5)]
    assert min(slow for _, slow in turns) / min(fast for fast, _ in turns) < 1.2


def test_an_error_does_not_list_a_thousand(exported: Exported) -> None:
    with pytest.raises(CaloraError) as caught:
        exported(COUNT)[1].adapter("gamma")
    first = ", ".join(names(12))
    assert str(caught.value) == f"package.json: adapters: expected one of {first} … (1000 in all), found gamma"


@pytest.mark.heavy
def test_validation_compares_some_and_says_how_many(exported: Exported, tmp_path: Path) -> None:
    bundle, whole, _ = exported(COUNT)
    package = packages.load(copy_package(whole.path, tmp_path / "package"))
    report = pipeline.validate(package.path, bundle)
    assert report.passed and report.sample is not None and (report.sample.checked, report.sample.of) == (64, COUNT)
    compared = [row.case for row in report.parity if row.case.startswith("adapter:") and row.against == "source"]
    assert len(compared) == 64 and {compared[0], compared[-1]} == {"adapter:task0000", "adapter:task0999"}
    assert report.router is not None and report.router.decisions_equal
