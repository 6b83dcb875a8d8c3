from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

pytest.importorskip("coremltools", reason="the coreml extra is not installed")

import coremltools as ct

from calora_export import coreml_engines, mil, profiles
from calora_export import package as packages
from calora_export.adapters import load_adapter
from calora_export.bundle import load
from calora_export.coreml_engines import Predictions
from calora_export.devices import host
from calora_export.errors import PackageError
from calora_export.jobs import Case, Job
from calora_export.package import Package
from calora_export.runtimes import coreml as runtime
from tests.bundles import VOCAB
from tests.conftest import Export, Variant

IDS = [int(token) for token in np.random.default_rng(3).integers(0, VOCAB, 20)]


@pytest.fixture(scope="module")
def package(exported: Export) -> Package:
    return packages.load(exported("coreml-int4"))


# ── adapter files ─────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_file_holds_rows_as_the_model_takes_them(tiny: Path, package: Package) -> None:
    """By group of sites that share an input: their downs [in, R], then their ups [out, R], one below the other."""
    slots, adapter = package.manifest.slots, load_adapter(load(tiny), "alpha")
    found = load_file(package.path / package.adapter("alpha").file)
    start = 0
    for group in slots.groups():
        for slot in group:
            rows = adapter.sites.get(slot.site)
            expected = np.zeros((slot.inputs, adapter.rank)) if rows is None else rows.down.T
            assert np.array_equal(found["rows"][start : start + slot.inputs], expected.astype(np.float16)), slot.site
            start += slot.inputs
        for slot in group:
            rows = adapter.sites.get(slot.site)
            expected = np.zeros((slot.outputs, adapter.rank)) if rows is None else rows.up
            assert np.array_equal(found["rows"][start : start + slot.outputs], expected.astype(np.float16)), slot.site
            start += slot.outputs
    assert start == len(found["rows"])
    assert np.array_equal(found["recovery"], adapter.recovery.astype(np.float16))


def test_a_mix_is_side_by_side_and_nothing_is_one_row_of_gate_0(package: Package) -> None:
    slots = package.manifest.slots
    alpha, beta = (
        runtime.read_adapter(package.path / package.adapter(name).file, slots)[0] for name in ("alpha", "beta")
    )
    mixed = runtime.blend([(alpha, 0.5), (beta, 0.25)], slots)
    assert np.array_equal(mixed.adapter, np.hstack([alpha.adapter, beta.adapter]))
    assert mixed.gate.tolist() == [0.5] * alpha.rank + [0.25] * beta.rank
    assert runtime.blend([(alpha, 1.0)], slots).adapter is alpha.adapter
    none = runtime.blend([], slots)
    assert none.gate.tolist() == [0.0] and none.adapter.shape == (len(alpha.adapter), 1)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda arrays: arrays.pop("recovery"), "recovery: expected float16 .0., found nothing"),
        (lambda arrays: arrays.update(more=np.zeros(1)), "more: expected no such tensor, found float64 .1."),
        (lambda arrays: arrays.update(rows=arrays["rows"][1:]), r"rows: expected float16 \[\d+, \d+\], found"),
        (
            lambda arrays: arrays.update(rows=arrays["rows"].astype(np.float32)),
            "rows: expected float16 .* found float32",
        ),
    ],
)
def test_a_file_that_is_not_of_these_slots_is_one_line(package: Package, tmp_path: Path, change, says: str) -> None:
    arrays = load_file(package.path / package.adapter("alpha").file)
    change(arrays)
    save_file(arrays, tmp_path / "broken.safetensors", metadata={"base_fingerprint": "sha256:0"})
    with pytest.raises(PackageError, match=says):
        runtime.read_adapter(tmp_path / "broken.safetensors", package.manifest.slots)
    (tmp_path / "noise.safetensors").write_bytes(b"noise")
    with pytest.raises(PackageError, match="noise.safetensors: not an adapter file"):
        runtime.read_adapter(tmp_path / "noise.safetensors", package.manifest.slots)


# ── calls ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_long_prompts_go_in_chunks(variant: Variant, tiny: Path, package: Package) -> None:
    chunked = runtime.open_session(packages.load(variant(tiny, "coreml-int4", chunk=7)), 1)
    whole = runtime.open_session(package, 1)
    np.testing.assert_allclose(chunked.extend(IDS), whole.extend(IDS), atol=0.03)


def test_fixed_lengths_take_the_longest_that_fits(variant: Variant, tiny: Path) -> None:
    session = runtime.open_session(packages.load(variant(tiny, "coreml-multifunction", context=128)), 1)
    assert [session._next_length(left) for left in (1, 63, 64, 65)] == [1, 1, 64, 64]


def test_more_rows_than_the_model_takes_are_refused(variant: Variant, tiny: Path, package: Package) -> None:
    alpha, beta = (package.adapter(name).rank for name in ("alpha", "beta"))
    session = runtime.open_session(packages.load(variant(tiny, "coreml-int4", rank_budget=alpha)), 1)
    session.select({"alpha": 1.0})
    with pytest.raises(PackageError, match=f"rank_budget: expected at least {alpha + beta}, found {alpha}"):
        session.select({"alpha": 0.6, "beta": 0.4})


class FakeModel:
    """Stands for coremltools' MLModel, whose predict() exists on macOS alone; computes by the reference runtime."""

    opened: list[tuple[str, object, object]] = []

    def __init__(self, path: str, compute_units: object, function_name: str | None = None) -> None:
        program = mil.load(Path(path))
        self.function = program.functions[function_name or program.default]
        self.opened.append((Path(path).name, compute_units, function_name))

    def make_state(self) -> dict[str, object]:
        if not self.function.states:
            raise AssertionError("a model without a state has none to make")
        return dict(self.function.state())

    def predict(self, data: dict[str, np.ndarray], state: dict | None = None) -> Mapping[str, np.ndarray]:
        assert all(type(value) is np.ndarray for value in data.values())
        return self.function.run(data, state or {})


def test_predictions_ask_core_ml_for_the_same(package: Package, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ct.models, "MLModel", FakeModel)
    FakeModel.opened.clear()
    session = runtime.CoremlSession(package, Predictions("CPU_AND_NE"))
    session.select({"alpha": 1.0})
    reference = runtime.open_session(package, 1)
    reference.select({"alpha": 1.0})
    assert np.array_equal(session.extend(IDS), reference.extend(IDS))
    assert np.array_equal(session.route(IDS[:5]), reference.route(IDS[:5]))
    units = ct.ComputeUnit.CPU_AND_NE
    assert FakeModel.opened == [("model.mlpackage", units, None), ("router.mlpackage", units, None)]


def test_each_function_is_opened_once(variant: Variant, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fused = packages.load(variant(tiny, "coreml-multifunction", context=64))
    monkeypatch.setattr(ct.models, "MLModel", FakeModel)
    FakeModel.opened.clear()
    session = runtime.CoremlSession(fused, Predictions())
    for mix in ({"alpha": 1.0}, {}, {"beta": 1.0}, {"alpha": 1.0}):
        session.select(mix)
    assert [name for _, _, name in FakeModel.opened] == ["base", "alpha", "beta"]


def test_on_macos_it_is_core_ml_and_elsewhere_the_reference(package: Package, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ct.models, "MLModel", FakeModel)
    monkeypatch.setattr(runtime.sys, "platform", "darwin")
    assert isinstance(runtime.open_session(package, 1)._engines, Predictions)
    runtime.prepare(package)
    monkeypatch.setattr(runtime.sys, "platform", "linux")
    assert isinstance(runtime.open_session(package, 1)._engines, coreml_engines.Reference)


def test_a_profile_says_on_which_units_it_predicts(package: Package, monkeypatch: pytest.MonkeyPatch) -> None:
    assert set(runtime.UNITS) == set(get_args(profiles.ComputeUnits))
    program = host._program("mac-m4", package)
    assert program[-1] == profiles.load("mac-m4").compute_units
    monkeypatch.setattr(ct.models, "MLModel", FakeModel)
    monkeypatch.setattr(runtime.sys, "platform", "darwin")
    FakeModel.opened.clear()
    job = Job(threads=1, cases=(Case(name="base", mix={}, ids=tuple(IDS), prefill=4),))
    trace = host.answer(package, job, units="cpuAndNeuralEngine")
    assert trace.logits["base"].shape == (len(IDS) - 4 + 1, package.manifest.model.vocab)
    assert FakeModel.opened == [("model.mlpackage", ct.ComputeUnit.CPU_AND_NE, None)]
