from __future__ import annotations

import gc
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

pytest.importorskip("executorch", reason="the executorch extra is not installed")

from calora_export import bundle as bundles
from calora_export import native
from calora_export import package as packages
from calora_export.adapters import Adapter, SiteRows, load_adapter, mix
from calora_export.errors import FingerprintError, PackageError
from calora_export.package import Package, Slots
from calora_export.runtimes import executorch as runtime
from calora_export.runtimes.executorch import ExecutorchSession, Rows
from tests.bundles import ALPHA, HIDDEN, KV_HEADS, LAYERS, MLP, RANKS
from tests.conftest import Families, Lower, Variant
from tests.packages import copy_package, refresh

IDS = list(range(60, 80))
Q, V, DOWN = (f"model.layers.1.{name}" for name in ("self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj"))
OTHER_BASE = "sha256:" + "5" * 64

Arrays = dict[str, np.ndarray]


@pytest.fixture(scope="module")
def opened(package_executorch: Path) -> Package:
    return packages.load(package_executorch)


@pytest.fixture(scope="module")
def slots(opened: Package) -> Slots:
    return opened.manifest.slots


@pytest.fixture
def session(opened: Package) -> ExecutorchSession:
    return runtime.open_session(opened, 1)


@pytest.fixture
def copy(package_executorch: Path, tmp_path: Path) -> Path:
    return copy_package(package_executorch, tmp_path / "package")


def adapter_file(package: Path, identifier: str) -> Path:
    return package / "adapters" / f"{identifier}.safetensors"


def fresh(session: ExecutorchSession, gates: dict[str, float], ids: list[int] = IDS) -> np.ndarray:
    session.select(gates)
    return session.extend(ids)


def sliced(rows: np.ndarray, rank: int) -> dict[str, np.ndarray]:
    """`<site>.down` [R, in] and `<site>.up` [R, out], cut as the package's documentation says: group by group in model
    order, of each group first every down, then every up.
    """
    v, cut, start = HIDDEN // 4 * KV_HEADS, {}, 0
    for layer in range(LAYERS):
        name = f"model.layers.{layer}"
        q, v_site, down = (f"{name}.{site}" for site in ("self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj"))
        for group, inputs in ((((q, HIDDEN), (v_site, v)), HIDDEN), (((down, HIDDEN),), MLP)):
            sizes = [(f"{site}.down", inputs) for site, _ in group] + [(f"{site}.up", out) for site, out in group]
            for key, width in sizes:
                cut[key] = rows[start : start + rank * width].reshape(rank, width)
                start += rank * width
    assert start == len(rows)
    return cut


# ── adapter files ───────────────────────────────────────────────────────────────────────────────────────────


def test_a_file_holds_the_trainers_tensors_scaled(tiny: Path, package_executorch: Path) -> None:
    """In fp16, where the layout has them: LoRA first, then recovery."""
    trained = load_file(tiny / "adapters" / "alpha" / "adapter_model.safetensors")
    arrays, r = load_file(adapter_file(package_executorch, "alpha")), RANKS[0]
    assert arrays.keys() == {"rows", "recovery"}
    assert (arrays["rows"].dtype, arrays["recovery"].dtype) == (np.float16, np.float32)
    assert arrays["recovery"].tolist() == [0.0] * r + [1.0] * r
    found, scale = sliced(arrays["rows"], 2 * r), np.float32(ALPHA / r)
    for site in (Q, V):
        prefix = f"base_model.model.{site}"
        down = [trained[f"{prefix}.{name}.weight"] for name in ("lora_A", "lora_a1")]
        up = [trained[f"{prefix}.{name}.weight"].T * scale for name in ("lora_B", "lora_a2")]
        assert np.array_equal(found[f"{site}.down"], np.concatenate(down).astype(np.float16))
        assert np.array_equal(found[f"{site}.up"], np.concatenate(up).astype(np.float16))
    assert not found[f"{DOWN}.down"][:r].any(), "no LoRA there, only recovery"
    recovery = trained[f"base_model.model.{DOWN}.lora_a2.weight"].T * scale
    assert np.array_equal(found[f"{DOWN}.up"][r:], recovery.astype(np.float16))


def test_slots_are_listed_in_the_order_of_the_file(slots: Slots) -> None:
    keys = [tensor.site for tensor in slots.tensors]
    order = [f"model.layers.{i}.{site}" for i in range(LAYERS) for site in ("self_attn.q_proj", "self_attn.v_proj")]
    assert [key for key in keys if "self_attn" in key] == order
    assert [(tensor.part, tensor.parts) for tensor in slots.tensors] == [(0, 2), (1, 2), (0, 1)] * LAYERS


def test_a_file_carries_the_fingerprint_of_its_base(tiny: Path, package_executorch: Path, slots: Slots) -> None:
    file = adapter_file(package_executorch, "beta")
    fingerprint = bundles.load(tiny).manifest.base.fingerprint
    assert runtime.read_adapter(file, slots)[1] == fingerprint
    with safe_open(file, "np") as stored:
        assert stored.metadata() == {"base_fingerprint": fingerprint}


def test_the_same_adapter_gives_the_same_bytes(
    tiny: Path, package_executorch: Path, slots: Slots, tmp_path: Path
) -> None:
    bundle, file = bundles.load(tiny), tmp_path / "again.safetensors"
    runtime.encode_adapter(load_adapter(bundle, "beta"), slots, bundle.manifest.base.fingerprint, file)
    assert file.read_bytes() == adapter_file(package_executorch, "beta").read_bytes()


def test_a_mix_is_the_adapters_rows_side_by_side(tiny: Path, slots: Slots, tmp_path: Path) -> None:
    """The same as the file of the mixed adapter, but for gates, which stay beside the rows."""

    def stored(adapter: Adapter) -> Rows:
        path = tmp_path / f"{adapter.rank}.safetensors"
        runtime.encode_adapter(adapter, slots, OTHER_BASE, path)
        return runtime.read_adapter(path, slots)[0]

    bundle = bundles.load(tiny)
    parts = [(load_adapter(bundle, "alpha"), 0.75), (load_adapter(bundle, "beta"), -0.5)]
    blended = runtime.blend([(stored(adapter), gate) for adapter, gate in parts], slots)
    whole = stored(mix([(adapter, 1.0) for adapter, _ in parts]))
    assert torch.equal(blended.rows, whole.rows)
    assert torch.equal(blended.recovery, whole.recovery)
    assert blended.gate.tolist() == [0.75] * 2 * RANKS[0] + [-0.5] * 2 * RANKS[1]


def test_a_lone_adapter_stays_where_it_is_mapped(package_executorch: Path, slots: Slots) -> None:
    rows, _ = runtime.read_adapter(adapter_file(package_executorch, "alpha"), slots)
    assert runtime.blend([(rows, 0.5)], slots).rows.data_ptr() == rows.rows.data_ptr()


def test_no_adapter_is_rank_0(slots: Slots) -> None:
    none = runtime.blend([], slots)
    assert none.rows.shape == none.gate.shape == none.recovery.shape == (0,)
    assert none.rows.dtype == torch.float16


def test_a_site_that_an_adapter_lacks_adds_nothing(slots: Slots, tmp_path: Path) -> None:
    rows = SiteRows(np.ones((3, HIDDEN), np.float32), np.ones((HIDDEN, 3), np.float32))
    runtime.encode_adapter(Adapter("one", None, 3, np.zeros(3, bool), {Q: rows}), slots, OTHER_BASE, tmp_path / "one")
    found = sliced(load_file(tmp_path / "one")["rows"], 3)
    assert {key for key, array in found.items() if array.any()} == {f"{Q}.down", f"{Q}.up"}


# ── damaged and forged files ────────────────────────────────────────────────────────────────────────────────


def edited(edit: Callable[[Arrays], object], metadata: dict[str, str] | None = None) -> Callable[[Path], None]:
    def apply(file: Path) -> None:
        with safe_open(file, "np") as stored:
            kept = stored.metadata() if metadata is None else metadata
        arrays = load_file(file)
        edit(arrays)
        save_file(arrays, file, metadata=kept)

    return apply


def change(name: str, new: Callable[[np.ndarray], np.ndarray]) -> Callable[[Path], None]:
    return edited(lambda arrays: arrays.update({name: new(arrays[name])}))


@pytest.mark.parametrize(
    ("damage", "line"),
    [
        (lambda file: file.write_bytes(b""), "not an adapter file"),
        (lambda file: file.write_bytes(b"\0" * 4096), "not an adapter file"),
        (lambda file: file.write_bytes(b"\xff" * 4096), "not an adapter file"),
        (lambda file: file.write_bytes(b"{}"), "not an adapter file"),
        (lambda file: file.write_bytes(file.read_bytes()[:-1]), "not an adapter file"),
        (lambda file: file.unlink(), "not an adapter file"),
        (edited(lambda arrays: None, metadata={}), "base_fingerprint: expected sha256"),
        (edited(lambda arrays: arrays.pop("recovery")), "recovery: expected"),
        (edited(lambda arrays: arrays.pop("rows")), "rows: expected"),
        (edited(lambda arrays: arrays.update(extra=np.zeros(1, np.float32))), "extra: expected no such tensor"),
        (change("rows", lambda rows: rows[:-1]), "rows: expected"),
        (change("rows", lambda rows: rows.reshape(2, -1)), "rows: expected"),
        (change("rows", lambda rows: rows.astype(np.float32)), "rows: expected"),
        (change("recovery", lambda rows: rows[1:]), "rows: expected"),
        (change("recovery", lambda rows: rows.astype(np.float16)), "recovery: expected"),
        (change("recovery", lambda rows: rows.reshape(2, -1)), "recovery: expected"),
        (change("recovery", lambda rows: np.ones((), np.float32)), "recovery: expected"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_damaged_file_is_one_line(
    package_executorch: Path,
    session: ExecutorchSession,
    tmp_path: Path,
    damage: Callable[[Path], object],
    line: str,
) -> None:
    file = tmp_path / "bad.safetensors"
    file.write_bytes(adapter_file(package_executorch, "alpha").read_bytes())
    session.admit(file)
    damage(file)
    with pytest.raises(PackageError, match=f"bad.safetensors: {re.escape(line)}") as caught:
        session.admit(file)
    assert "\n" not in str(caught.value)


def test_an_adapter_for_another_base_is_refused_with_both_fingerprints(
    session: ExecutorchSession, opened: Package, copy: Path
) -> None:
    file = adapter_file(copy, "beta")
    edited(lambda arrays: None, metadata={"base_fingerprint": OTHER_BASE})(file)
    with pytest.raises(FingerprintError) as caught:
        session.admit(file)
    assert OTHER_BASE in str(caught.value) and opened.manifest.base_fingerprint in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"\0" * 100, None], ids=["empty", "zeros", "cut"])
@pytest.mark.parametrize("name", ["model.pte", "router.pte"])
def test_a_damaged_program_is_one_line(copy: Path, name: str, content: bytes | None) -> None:
    whole = (copy / name).read_bytes()
    (copy / name).write_bytes(whole[: len(whole) // 2] if content is None else content)
    refresh(copy)
    with pytest.raises(PackageError, match=rf"^{name}: ") as caught:
        runtime.open_session(packages.load(copy), 1).route([1])
    assert "\n" not in str(caught.value)


def test_a_program_of_something_else_is_named(copy: Path) -> None:
    (copy / "model.pte").write_bytes((copy / "router.pte").read_bytes())
    refresh(copy)
    with pytest.raises(PackageError, match=r"model\.pte: method: expected adapted, found forward"):
        runtime.open_session(packages.load(copy), 1)


def test_kernels_that_were_built_again_are_not_loaded_over_the_old(
    opened: Package, session: ExecutorchSession, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever edits slot.cpp while a process runs: a second registration would end it."""
    again = tmp_path / native.kernels("executorch").name
    again.write_bytes(native.kernels("executorch").read_bytes())
    monkeypatch.setattr(native, "kernels", lambda: again)
    assert np.array_equal(fresh(runtime.open_session(opened, 1), {"alpha": 1.0}), fresh(session, {"alpha": 1.0}))


# ── sessions ────────────────────────────────────────────────────────────────────────────────────────────────


def test_decoding_from_the_cache_equals_one_prefill(package_executorch_fp32: Path) -> None:
    session = runtime.open_session(packages.load(package_executorch_fp32), 1)
    whole = fresh(session, {"alpha": 1.0})
    session.select({"alpha": 1.0})
    session.extend(IDS[:5])
    session.extend(IDS[5:9])
    for token in IDS[9:]:
        last = session.extend([token])
    np.testing.assert_allclose(last, whole, atol=1e-4)


def test_a_prompt_longer_than_a_chunk_is_fed_in_chunks(
    tiny: Path, package_executorch_fp32: Path, variant: Variant
) -> None:
    """20 tokens in chunks of 8, the last one short; adapters too."""
    small = packages.load(variant(tiny, "executorch-fp32", chunk=8))
    assert small.manifest.settings.chunk == 8
    session, whole = (runtime.open_session(package, 1) for package in (small, packages.load(package_executorch_fp32)))
    for gates in ({}, {"alpha": 0.5, "beta": 0.5}):
        for count in (8, 9, 16, 20):
            made, expected = fresh(session, gates, IDS[:count]), fresh(whole, gates, IDS[:count])
            assert made.shape == expected.shape == (1, 256)
            np.testing.assert_allclose(made, expected, atol=1e-4)


def test_a_mix_above_the_rank_budget_is_refused_and_changes_nothing(tiny: Path, variant: Variant) -> None:
    """alpha has 8 rows, beta 4."""
    session = runtime.open_session(packages.load(variant(tiny, "executorch-fp32", rank_budget=10)), 1)
    before = fresh(session, {"alpha": 1.0})
    with pytest.raises(PackageError, match=r"settings\.rank_budget: expected at least 12, found 10") as caught:
        session.select({"alpha": 0.5, "beta": 0.5})
    assert "\n" not in str(caught.value)
    assert session.mix == {"alpha": 1.0}
    session.forget()
    assert np.array_equal(session.extend(IDS), before)


def test_a_mix_may_use_the_whole_rank_budget(tiny: Path, variant: Variant, package_executorch_fp32: Path) -> None:
    package = packages.load(variant(tiny, "executorch-fp32", rank_budget=2 * sum(RANKS)))
    gates = {"alpha": 0.5, "beta": 0.5}
    reference = runtime.open_session(packages.load(package_executorch_fp32), 1)
    assert np.array_equal(fresh(runtime.open_session(package, 1), gates), fresh(reference, gates))


def test_select_empties_the_cache_unless_it_is_asked_not_to(session: ExecutorchSession) -> None:
    alone = fresh(session, {"beta": 1.0})
    session.select({"alpha": 1.0})
    session.extend(IDS[:10])
    assert np.array_equal(fresh(session, {"beta": 1.0}), alone)
    session.select({"alpha": 1.0})
    session.extend(IDS[:10])
    session.select({"beta": 1.0}, keep_cache=True)
    assert not np.allclose(session.extend(IDS[10:]), alone, atol=1e-3)
    session.forget()
    assert np.array_equal(session.extend(IDS), alone)


def test_sessions_of_one_package_have_caches_of_their_own(opened: Package) -> None:
    one, two = (runtime.open_session(opened, 1) for _ in range(2))
    alone = fresh(one, {})
    one.select({})
    one.extend(IDS[:10])
    fresh(two, {"alpha": 1.0}, IDS[5:])
    np.testing.assert_allclose(one.extend(IDS[10:]), alone, atol=0.2)


def test_a_session_says_what_is_active(session: ExecutorchSession) -> None:
    assert session.mix == {}
    session.select({"alpha": 0.25, "beta": 0.75})
    assert session.mix == {"alpha": 0.25, "beta": 0.75}


def test_a_gate_of_0_is_the_base_and_leaves_the_others_as_they_are(session: ExecutorchSession) -> None:
    assert np.array_equal(fresh(session, {"alpha": 0.0}), fresh(session, {}))
    assert np.array_equal(fresh(session, {"alpha": 1.0, "beta": 0.0}), fresh(session, {"alpha": 1.0}))


def test_an_unknown_adapter_is_named_and_changes_nothing(session: ExecutorchSession) -> None:
    before = fresh(session, {"alpha": 1.0})
    with pytest.raises(PackageError, match="one of alpha, beta, found gamma"):
        session.select({"gamma": 1.0})
    assert session.mix == {"alpha": 1.0}
    session.forget()
    assert np.array_equal(session.extend(IDS), before)


def test_the_context_ends_with_an_error_and_not_with_wrong_numbers(session: ExecutorchSession, opened: Package) -> None:
    context = opened.manifest.model.context
    session.extend([65] * (context - 1))
    with pytest.raises(PackageError, match=f"at most {context} tokens.*found {context + 1}"):
        session.extend([65, 66])
    last = session.extend([65])
    session.forget()
    np.testing.assert_allclose(session.extend([65] * context), last, atol=0.5)


def test_rows_outlive_the_call_that_made_them(session: ExecutorchSession) -> None:
    """What the runtime is given by its address must not be freed: it would be read as what comes after it."""
    gates, rank = {"alpha": 0.5, "beta": 0.5}, 2 * sum(RANKS)
    first = fresh(session, gates)
    session.select(gates)
    gc.collect()
    noise = [np.full(size, np.nan, np.float32) for _ in range(100) for size in (rank, rank * HIDDEN, rank * MLP)]
    assert np.array_equal(session.extend(IDS), first)
    del noise


def test_logits_outlive_the_next_step(session: ExecutorchSession) -> None:
    logits = session.extend(IDS)
    kept = logits.copy()
    session.extend([65])
    assert np.array_equal(logits, kept)


def test_a_package_without_a_router_says_so(families: Families, lowered: Lower) -> None:
    with pytest.raises(PackageError, match="router"):
        runtime.open_session(packages.load(lowered("qwen2", "executorch-fp32")), 1).route([1])
