from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from calora_export import package as packages
from calora_export.adapters import Adapter
from calora_export.errors import PackageError, UnsupportedError
from calora_export.package import Package
from calora_export.runtimes import torch as runtime
from calora_export.runtimes.torch import TorchSession
from tests.bundles import ALPHA, RANKS
from tests.conftest import Export
from tests.packages import copy_package, refresh

IDS = list(range(60, 80))
Q = "model.layers.1.self_attn.q_proj"
Arrays = dict[str, np.ndarray]


@pytest.fixture(scope="module")
def opened(exported: Export) -> Package:
    return packages.load(exported("torch-fp32"))


@pytest.fixture
def session(opened: Package) -> TorchSession:
    return runtime.open_session(opened, 1)


def adapter_file(package: Package, identifier: str) -> Path:
    return package.path / package.adapter(identifier).file


def test_a_file_holds_the_trainers_tensors_scaled(tiny: Path, opened: Package) -> None:
    """LoRA first, then recovery; the fingerprint is that of the bundle."""
    trained = load_file(tiny / "adapters" / "alpha" / "adapter_model.safetensors")
    arrays, r = load_file(adapter_file(opened, "alpha")), RANKS[0]
    prefix, scale = f"base_model.model.{Q}", np.float32(ALPHA / r)
    assert np.array_equal(arrays[f"{Q}.down"][:r], trained[f"{prefix}.lora_A.weight"])
    assert np.array_equal(arrays[f"{Q}.down"][r:], trained[f"{prefix}.lora_a1.weight"])
    assert np.array_equal(arrays[f"{Q}.up"][:r], trained[f"{prefix}.lora_B.weight"].T * scale)
    assert np.array_equal(arrays[f"{Q}.up"][r:], trained[f"{prefix}.lora_a2.weight"].T * scale)
    assert arrays["recovery"].tolist() == [False] * r + [True] * r
    with safe_open(adapter_file(opened, "alpha"), "np") as file:
        assert file.metadata() == {"base_fingerprint": opened.manifest.base_fingerprint}


def test_recovery_rows_need_a_graph_that_has_them(opened: Package) -> None:
    slots = msgspec.structs.replace(opened.manifest.slots, recovery=None)
    with pytest.raises(UnsupportedError, match="curved: branches: .*recovery"):
        runtime.arrange(Adapter("curved", None, 1, np.ones(1, bool), {}), slots)


# ── damaged files ───────────────────────────────────────────────────────────────────────────────────────────


def edited(edit: Callable[[Arrays], object], fingerprint: bool = True) -> Callable[[Path], None]:
    def apply(file: Path) -> None:
        with safe_open(file, "np") as opened_file:
            metadata = opened_file.metadata()
        arrays = {name: array.copy() for name, array in load_file(file).items()}
        edit(arrays)
        save_file(arrays, file, metadata if fingerprint else None)

    return apply


def reshape(name: str, change: Callable[[np.ndarray], np.ndarray]) -> Callable[[Path], None]:
    return edited(lambda arrays: arrays.update({name: np.ascontiguousarray(change(arrays[name]))}))


@pytest.mark.parametrize(
    ("damage", "line"),
    [
        (lambda file: file.write_bytes(b""), "not an adapter file"),
        (lambda file: file.write_bytes(b"\0" * 4096), "not an adapter file"),
        (lambda file: file.write_bytes(file.read_bytes()[:200]), "not an adapter file"),
        (lambda file: file.unlink(), "not an adapter file"),
        (edited(lambda arrays: None, fingerprint=False), "base_fingerprint: expected sha256"),
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
    opened: Package, session: TorchSession, tmp_path: Path, damage: Callable[[Path], object], line: str
) -> None:
    file = tmp_path / "bad.safetensors"
    file.write_bytes(adapter_file(opened, "alpha").read_bytes())
    session.admit(file)
    damage(file)
    with pytest.raises(PackageError, match=f"bad.safetensors: {re.escape(line)}") as caught:
        session.admit(file)
    assert "\n" not in str(caught.value)


def test_a_damaged_model_is_one_line(opened: Package, tmp_path: Path) -> None:
    copy = copy_package(opened.path, tmp_path / "package")
    (copy / "model.safetensors").write_bytes(b"\0" * 100)
    refresh(copy)
    with pytest.raises(PackageError, match=r"^model\.safetensors: not a program: "):
        runtime.open_session(packages.load(copy), 1)


# ── sessions ────────────────────────────────────────────────────────────────────────────────────────────────


def test_decoding_from_the_cache_equals_one_prefill(session: TorchSession) -> None:
    session.select({"alpha": 1.0})
    whole = session.extend(IDS)
    session.forget()
    session.extend(IDS[:5])
    session.extend(IDS[5:9])
    for token in IDS[9:]:
        last = session.extend([token])
    np.testing.assert_allclose(last, whole, atol=1e-4)


def test_an_unknown_adapter_is_named_and_changes_nothing(session: TorchSession) -> None:
    session.select({"alpha": 1.0})
    before = session.extend(IDS)
    with pytest.raises(PackageError, match="one of alpha, beta, found gamma"):
        session.select({"gamma": 1.0})
    assert session.mix == {"alpha": 1.0}
    session.forget()
    assert np.array_equal(session.extend(IDS), before)


def test_logits_outlive_the_next_step(session: TorchSession) -> None:
    logits = session.extend(IDS)
    kept = logits.copy()
    session.extend([65])
    assert np.array_equal(logits, kept)


def test_the_whole_context_can_be_used(session: TorchSession, opened: Package) -> None:
    context = opened.manifest.model.context
    session.extend([65] * (context - 1))
    with pytest.raises(PackageError, match=f"at most {context} tokens.*found {context + 1}"):
        session.extend([65, 66])
    assert session.extend([65]).shape == (1, opened.manifest.model.vocab)
