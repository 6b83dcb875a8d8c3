from __future__ import annotations

import gc
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest
from safetensors.numpy import load_file

from calora_export import bundle as bundles
from calora_export import package as packages
from calora_export import resources
from calora_export.adapters import Adapter, SiteRows, load_adapter, mix
from calora_export.errors import FingerprintError, PackageError, UnsupportedError
from calora_export.generation import Chat
from calora_export.package import Package, Slots
from calora_export.runtimes import onnx as runtime
from calora_export.runtimes.onnx import OnnxSession
from tests.bundles import ALPHA, LAYERS, RANKS
from tests.conftest import Families, Lower
from tests.packages import copy_package, refresh
from tests.tampering import Arrays, adapter_file, edit_adapter, read_adapter, write_adapter

IDS = list(range(60, 80))
Q = "model.layers.1.self_attn.q_proj"


@pytest.fixture(scope="module")
def opened(package: Path) -> Package:
    return packages.load(package)


@pytest.fixture(scope="module")
def slots(opened: Package) -> Slots:
    return opened.manifest.slots


@pytest.fixture
def session(opened: Package) -> OnnxSession:
    return runtime.open_session(opened, 1)


@pytest.fixture
def copy(package: Path, tmp_path: Path) -> Path:
    return copy_package(package, tmp_path / "package")


def raw(package: Path, feeds: Arrays, options: ort.RunOptions | None = None) -> np.ndarray:
    """Logits of one prefill in stock ONNX Runtime."""
    quiet = ort.SessionOptions()
    quiet.log_severity_level = 3
    quiet.intra_op_num_threads = 1
    model = ort.InferenceSession(str(package / "model.onnx"), quiet, providers=["CPUExecutionProvider"])
    names = [f"past_key_values.{layer}.{kv}" for layer in range(LAYERS) for kv in ("key", "value")]
    past = dict.fromkeys(names, np.zeros((1, 2, 0, 16), np.float32))
    text = {"input_ids": np.array([IDS], np.int64), "attention_mask": np.ones((1, len(IDS)), np.int64)}
    return model.run(["logits"], {**text, **past, **feeds}, options)[0][0]


def fresh(session: OnnxSession, gates: dict[str, float]) -> np.ndarray:
    session.select(gates)
    return session.extend(IDS)


# ── adapter files ───────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("identifier", ["alpha", "beta"])
def test_stock_onnxruntime_reads_an_adapter_file_as_it_is(
    package: Path, session: OnnxSession, identifier: str
) -> None:
    """LoraAdapter, the same arrays fed by hand, and our session agree to the bit."""
    file = adapter_file(package, identifier)
    adapter, options = ort.LoraAdapter(), ort.RunOptions()
    adapter.Load(str(file))
    options.add_active_adapter(adapter)
    active = raw(package, {}, options)
    assert np.array_equal(raw(package, read_adapter(file)), active)
    assert np.array_equal(fresh(session, {identifier: 1.0}), active)
    assert np.array_equal(fresh(session, {}), raw(package, {}))
    assert np.abs(active - raw(package, {})).max() > 0.1


def test_a_file_holds_the_trainers_tensors_scaled(tiny: Path, package: Path, slots: Slots) -> None:
    """Each site's rows are found where package.json says: LoRA first, then recovery."""
    trained = load_file(tiny / "adapters" / "alpha" / "adapter_model.safetensors")
    arrays, r = read_adapter(adapter_file(package, "alpha")), RANKS[0]
    place = next(tensor for tensor in slots.tensors if tensor.site == Q)
    down = arrays[place.down].reshape(place.parts, 2 * r, place.inputs)[place.part]
    prefix = f"base_model.model.{Q}"
    assert np.array_equal(down[:r], trained[f"{prefix}.lora_A.weight"])
    assert np.array_equal(down[r:], trained[f"{prefix}.lora_a1.weight"])
    assert np.array_equal(arrays[place.up][:r], trained[f"{prefix}.lora_B.weight"].T * np.float32(ALPHA / r))
    assert np.array_equal(arrays[place.up][r:], trained[f"{prefix}.lora_a2.weight"].T * np.float32(ALPHA / r))
    assert arrays["recovery"].tolist() == [0.0] * r + [1.0] * r


def test_a_file_carries_the_fingerprint_of_its_base(tiny: Path, package: Path, slots: Slots) -> None:
    file = adapter_file(package, "beta")
    assert runtime.read_adapter(file, slots)[1] == bundles.load(tiny).manifest.base.fingerprint


def test_the_same_adapter_gives_the_same_bytes(tiny: Path, package: Path, slots: Slots, tmp_path: Path) -> None:
    bundle = bundles.load(tiny)
    file = tmp_path / "again.onnx_adapter"
    runtime.encode_adapter(load_adapter(bundle, "beta"), slots, bundle.manifest.base.fingerprint, file)
    assert file.read_bytes() == adapter_file(package, "beta").read_bytes()


def test_a_mix_is_the_adapters_rows_side_by_side(tiny: Path, slots: Slots) -> None:
    bundle = bundles.load(tiny)
    parts = [(load_adapter(bundle, "alpha"), 0.7), (load_adapter(bundle, "beta"), -0.3)]
    blended = runtime.blend([(runtime.arrange(adapter, slots), gate) for adapter, gate in parts], slots)
    expected = runtime.arrange(mix(parts), slots)
    assert blended.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_array_equal(blended[name], array, err_msg=name)
        assert blended[name].dtype == array.dtype


def test_a_site_that_an_adapter_lacks_adds_nothing(slots: Slots) -> None:
    rows = SiteRows(np.ones((3, 64), np.float32), np.ones((64, 3), np.float32))
    arrays = runtime.arrange(Adapter("one", None, 3, np.zeros(3, bool), {Q: rows}), slots)
    for tensor in slots.tensors:
        assert arrays[tensor.up].any() == (tensor.site == Q)
        assert arrays[tensor.up].shape == (3, tensor.outputs)


def test_recovery_rows_need_a_graph_that_has_them(lowered: Lower, families: Families) -> None:
    slots = packages.load(lowered("qwen2")).manifest.slots
    assert slots.recovery is None
    adapter = Adapter("curved", None, 1, np.ones(1, bool), {})
    with pytest.raises(UnsupportedError, match="curved: branches: .*recovery"):
        runtime.arrange(adapter, slots)


# ── damaged and forged files ────────────────────────────────────────────────────────────────────────────────


def edited(edit: Callable[[Arrays], object]) -> Callable[[Path], None]:
    def apply(file: Path) -> None:
        arrays = read_adapter(file)
        edit(arrays)
        write_adapter(file, arrays)

    return apply


def reshape(name: str, change: Callable[[np.ndarray], np.ndarray]) -> Callable[[Path], None]:
    return edited(lambda arrays: arrays.update({name: np.ascontiguousarray(change(arrays[name]))}))


@pytest.mark.parametrize(
    ("damage", "line"),
    [
        (lambda file: file.write_bytes(b""), "not an adapter file"),
        (lambda file: file.write_bytes(b"\0" * 4096), "not an adapter file"),
        (lambda file: file.write_bytes(b"{}"), "not an adapter file"),
        (lambda file: file.write_bytes(file.read_bytes()[:200]), "not an adapter file"),
        (lambda file: file.unlink(), "not an adapter file"),
        (edited(lambda arrays: arrays.pop("base_fingerprint")), "base_fingerprint: expected uint8"),
        (edited(lambda arrays: arrays.pop("recovery")), "recovery: expected"),
        (edited(lambda arrays: arrays.pop(f"{Q}.up")), f"{Q}.up: expected"),
        (edited(lambda arrays: arrays.update(extra=np.zeros(1, np.float32))), "extra: expected no such tensor"),
        (reshape(f"{Q}.up", lambda up: up[:, :-1]), f"{Q}.up: expected"),
        (reshape(f"{Q}.up", lambda up: up[:-1]), f"{Q}.up: expected"),
        (reshape(f"{Q}.up", lambda up: up.astype(np.float16)), f"{Q}.up: expected"),
        (reshape("recovery", lambda rows: rows[1:]), "recovery: expected"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_damaged_file_is_one_line(
    package: Path, session: OnnxSession, tmp_path: Path, damage: Callable[[Path], object], line: str
) -> None:
    file = tmp_path / "bad.onnx_adapter"
    file.write_bytes(adapter_file(package, "alpha").read_bytes())
    session.admit(file)
    damage(file)
    with pytest.raises(PackageError, match=f"bad.onnx_adapter: {re.escape(line)}") as caught:
        session.admit(file)
    assert "\n" not in str(caught.value)


def test_an_adapter_for_another_base_is_refused_with_both_fingerprints(
    session: OnnxSession, opened: Package, copy: Path
) -> None:
    edit_adapter(copy, "beta", lambda arrays: arrays["base_fingerprint"].__setitem__(0, 1))
    with pytest.raises(FingerprintError) as caught:
        session.admit(adapter_file(copy, "beta"))
    own = opened.manifest.base_fingerprint
    assert own in str(caught.value) and f"sha256:01{own.removeprefix('sha256:')[2:]}" in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"\0" * 100], ids=["empty", "zeros"])
def test_a_damaged_model_is_one_line(copy: Path, content: bytes) -> None:
    (copy / "model.onnx").write_bytes(content)
    refresh(copy)
    with pytest.raises(PackageError, match=r"model\.onnx: ") as caught:
        runtime.open_session(packages.load(copy), 1)
    assert "\n" not in str(caught.value)


# ── sessions ────────────────────────────────────────────────────────────────────────────────────────────────


def test_decoding_from_the_cache_equals_one_prefill(package_fp32: Path) -> None:
    session = runtime.open_session(packages.load(package_fp32), 1)
    whole = fresh(session, {"alpha": 1.0})
    session.select({"alpha": 1.0})
    session.extend(IDS[:5])
    session.extend(IDS[5:9])
    for token in IDS[9:]:
        last = session.extend([token])
    np.testing.assert_allclose(last, whole, atol=1e-4)


def test_select_empties_the_cache_unless_it_is_asked_not_to(session: OnnxSession) -> None:
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


def test_a_session_says_what_is_active(session: OnnxSession) -> None:
    assert session.mix == {}
    session.select({"alpha": 0.25, "beta": 0.75})
    assert session.mix == {"alpha": 0.25, "beta": 0.75}


def test_a_gate_of_0_is_the_base_and_leaves_the_others_as_they_are(session: OnnxSession) -> None:
    assert np.array_equal(fresh(session, {"alpha": 0.0}), fresh(session, {}))
    assert np.array_equal(fresh(session, {"alpha": 1.0, "beta": 0.0}), fresh(session, {"alpha": 1.0}))


def test_an_unknown_adapter_is_named_and_changes_nothing(session: OnnxSession) -> None:
    before = fresh(session, {"alpha": 1.0})
    with pytest.raises(PackageError, match="one of alpha, beta, found gamma"):
        session.select({"gamma": 1.0})
    assert session.mix == {"alpha": 1.0}
    session.forget()
    assert np.array_equal(session.extend(IDS), before)


def test_the_context_ends_with_an_error_and_not_with_wrong_numbers(session: OnnxSession, opened: Package) -> None:
    context = opened.manifest.model.context
    session.extend([65] * (context - 1))
    with pytest.raises(PackageError, match=f"at most {context} tokens.*found {context + 1}"):
        session.extend([65, 66])
    last = session.extend([65])
    session.forget()
    np.testing.assert_allclose(session.extend([65] * context), last, atol=0.5)


def test_tensors_outlive_the_call_that_made_them(session: OnnxSession, slots: Slots) -> None:
    """Whatever an OrtValue keeps alive of an array: a freed one would be read as what comes after it."""
    gates = {"alpha": 0.5, "beta": 0.5}
    first, rank = fresh(session, gates), 2 * sum(RANKS)
    session.select(gates)
    gc.collect()
    sizes = {rank * size for tensor in slots.tensors for size in (tensor.parts * tensor.inputs, tensor.outputs)}
    noise = [np.full(size, np.nan, np.float32) for _ in range(100) for size in sizes]
    assert np.array_equal(session.extend(IDS), first)
    del noise


def test_logits_outlive_the_next_step(session: OnnxSession) -> None:
    logits = session.extend(IDS)
    kept = logits.copy()
    session.extend([65])
    assert np.array_equal(logits, kept)


def test_a_package_without_a_router_says_so(lowered: Lower) -> None:
    with pytest.raises(PackageError, match="router"):
        runtime.open_session(packages.load(lowered("qwen2")), 1).route([1])


def test_the_program_of_the_page_answers_as_run_does(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """docs/package.md, as printed: it knows only what the page and package.json say."""
    page = (resources.root() / "docs" / "package.md").read_text("utf-8")
    (program,) = (block for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "LoraAdapter()" in block)
    monkeypatch.chdir(package)
    names: dict[str, object] = {}
    exec(compile(program, "package.md", "exec"), names)
    opened = packages.load(package)
    chat = Chat(opened, runtime.open_session(opened, 1))
    read = chat.start("Write the word SAFARI backwards.", {opened.manifest.adapters[0].id: 1.0}).prefill
    assert list(chat.stream(32)) and names["answer"] == chat.history[read:]
