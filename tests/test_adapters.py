from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from calora_export import bundle
from calora_export.adapters import Adapter, load_adapter, load_adapter_dir, mix
from calora_export.bundle import Bundle
from calora_export.errors import BundleError, FingerprintError, UnsupportedError
from tests.bundles import ALPHA, LORA_SITES, RANKS, RECOVERY_SITES, copy_bundle, edit_json, tiny_bundle

SITES = [f"model.layers.{layer}.{name}" for layer in (0, 1) for name in sorted({*LORA_SITES, *RECOVERY_SITES})]


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_bundle(tmp_path_factory.mktemp("bundles") / "tiny")


@pytest.fixture(scope="module")
def loaded(path: Path) -> Bundle:
    return bundle.load(path)


@pytest.fixture(scope="module")
def alpha(loaded: Bundle) -> Adapter:
    return load_adapter(loaded, "alpha")


@pytest.fixture(scope="module")
def beta(loaded: Bundle) -> Adapter:
    return load_adapter(loaded, "beta")


def _inputs(columns: int) -> torch.Tensor:
    return torch.randn(5, columns, generator=torch.manual_seed(1), dtype=torch.float64)


def _delta(adapter: Adapter, site: str, x: torch.Tensor) -> torch.Tensor:
    """The slot contract with gates of 1, in torch."""
    rows = adapter.sites[site]
    h = x @ torch.from_numpy(rows.down).to(x).T
    h = torch.where(torch.from_numpy(adapter.recovery), torch.nn.functional.gelu(h), h)
    return h @ torch.from_numpy(rows.up).to(x).T


def _reference(file: Path, site: str, x: torch.Tensor, scale: float) -> torch.Tensor:
    """docs/bundle.md: scale · lora_B(lora_A x) + scale · lora_a2(gelu(lora_a1 x)), from the file itself."""
    tensors = {name: value.to(x) for name, value in load_file(file / "adapter_model.safetensors").items()}
    prefix = f"base_model.model.{site}."
    y = 0
    if f"{prefix}lora_A.weight" in tensors:
        y = scale * (x @ tensors[f"{prefix}lora_A.weight"].T @ tensors[f"{prefix}lora_B.weight"].T)
    if f"{prefix}lora_a1.weight" in tensors:
        h = torch.nn.functional.gelu(x @ tensors[f"{prefix}lora_a1.weight"].T)
        y = y + scale * (h @ tensors[f"{prefix}lora_a2.weight"].T)
    assert isinstance(y, torch.Tensor)
    return y


@pytest.mark.parametrize("site", SITES)
@pytest.mark.parametrize("index", [0, 1])
def test_rows_do_what_the_two_branches_do(path: Path, loaded: Bundle, site: str, index: int) -> None:
    name = ("alpha", "beta")[index]
    adapter = load_adapter(loaded, name)
    x = _inputs(loaded.linears[site][1])
    expected = _reference(path / "adapters" / name, site, x, ALPHA / RANKS[index])
    torch.testing.assert_close(_delta(adapter, site, x), expected, rtol=1e-6, atol=1e-6)
    assert expected.abs().max() > 0.1


def test_identity_rows_come_first_and_are_the_same_at_every_site(alpha: Adapter, loaded: Bundle) -> None:
    assert alpha.rank == 2 * RANKS[0]
    assert alpha.recovery.tolist() == [False] * RANKS[0] + [True] * RANKS[0]
    assert set(alpha.sites) == set(SITES)
    for site, rows in alpha.sites.items():
        out, columns = loaded.linears[site]
        assert rows.down.shape == (alpha.rank, columns)
        assert rows.up.shape == (out, alpha.rank)
        assert rows.down.dtype == rows.up.dtype == np.float32
    assert alpha.fingerprint == loaded.manifest.base.fingerprint


def test_two_identity_branches_at_one_site_lie_side_by_side(path: Path, tmp_path: Path) -> None:
    """The PEFT variant of CA-LoRA: a linear recovery branch (rank adds up, no GELU anywhere)."""
    copy = copy_bundle(path, tmp_path / "copy")
    edit_json(
        copy / "bundle.json", lambda manifest: manifest["adapters"][0]["branches"][1].update(act="identity")
    )
    adapter = load_adapter(bundle.load(copy), "alpha")
    assert adapter.rank == 2 * RANKS[0]
    assert not adapter.recovery.any()
    site = "model.layers.1.self_attn.q_proj"
    tensors = {
        name: value.double()
        for name, value in load_file(copy / "adapters/alpha/adapter_model.safetensors").items()
    }
    a, b, a1, a2 = (
        tensors[f"base_model.model.{site}.{key}.weight"] for key in ("lora_A", "lora_B", "lora_a1", "lora_a2")
    )
    expected = ALPHA / RANKS[0] * (b @ a + a2 @ a1)
    rows = adapter.sites[site]
    np.testing.assert_allclose(rows.up.astype(np.float64) @ rows.down, expected.numpy(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("weights", [(1.0, 1.0), (0.7, 0.3), (0.25, 0.0)])
def test_a_mix_is_the_weighted_sum_of_its_adapters(
    alpha: Adapter, beta: Adapter, weights: tuple[float, float]
) -> None:
    only_q = replace(beta, sites={site: rows for site, rows in beta.sites.items() if site.endswith("q_proj")})
    both = mix([(alpha, weights[0]), (only_q, weights[1])])
    assert both.rank == alpha.rank + beta.rank == both.recovery.size
    assert both.recovery.tolist() == [*alpha.recovery, *beta.recovery]
    assert both.fingerprint == alpha.fingerprint
    for site in SITES:
        x = _inputs(both.sites[site].down.shape[1])
        expected = weights[0] * _delta(alpha, site, x)
        if site in only_q.sites:
            expected = expected + weights[1] * _delta(only_q, site, x)
        torch.testing.assert_close(_delta(both, site, x), expected, rtol=1e-6, atol=1e-6)


def test_weight_zero_is_exactly_no_delta(alpha: Adapter, beta: Adapter) -> None:
    silent = mix([(alpha, 0.0), (beta, 0.0)])
    assert silent.rank == alpha.rank + beta.rank
    for site in SITES:
        assert not _delta(silent, site, _inputs(silent.sites[site].down.shape[1])).any()


def test_mixing_does_not_change_its_inputs(alpha: Adapter) -> None:
    before = {site: rows.up.copy() for site, rows in alpha.sites.items()}
    mix([(alpha, 0.5)])
    for site, up in before.items():
        np.testing.assert_array_equal(alpha.sites[site].up, up)


def test_a_mix_of_none_has_rank_zero() -> None:
    nothing = mix([])
    assert (nothing.rank, nothing.recovery.shape, nothing.sites) == (0, (0,), {})


def test_adapters_of_two_bases_do_not_mix(alpha: Adapter, beta: Adapter) -> None:
    other = replace(beta, fingerprint="sha256:" + "0" * 64)
    with pytest.raises(FingerprintError) as caught:
        mix([(alpha, 1.0), (other, 1.0)])
    assert str(alpha.fingerprint) in str(caught.value)
    assert str(other.fingerprint) in str(caught.value)
    assert mix([(alpha, 1.0), (replace(beta, fingerprint=None), 1.0)]).fingerprint == alpha.fingerprint


def _same(one: Adapter, two: Adapter) -> None:
    assert one.rank == two.rank
    assert one.recovery.tolist() == two.recovery.tolist()
    assert set(one.sites) == set(two.sites)
    for site, rows in one.sites.items():
        np.testing.assert_array_equal(rows.down, two.sites[site].down)
        np.testing.assert_array_equal(rows.up, two.sites[site].up)


def test_a_directory_inside_a_bundle_takes_the_bundles_word(
    path: Path, loaded: Bundle, alpha: Adapter
) -> None:
    adapter = load_adapter_dir(path / "adapters" / "alpha", loaded.adaptable)
    assert (adapter.id, adapter.fingerprint) == ("alpha", alpha.fingerprint)
    _same(adapter, alpha)


def test_a_directory_outside_is_read_as_peft(
    path: Path, loaded: Bundle, alpha: Adapter, tmp_path: Path
) -> None:
    outside = copy_bundle(path / "adapters" / "alpha", tmp_path / "x" / "y" / "mine")
    adapter = load_adapter_dir(outside, loaded.adaptable)
    assert (adapter.id, adapter.fingerprint) == ("mine", None)
    _same(adapter, alpha)


def test_a_directory_that_is_not_there_or_not_listed(path: Path, loaded: Bundle, tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="adapter: expected a directory, found nothing"):
        load_adapter_dir(tmp_path / "none", loaded.adaptable)
    copy = copy_bundle(path, tmp_path / "copy")
    (copy / "adapters/alpha").rename(copy / "adapters/late")
    late = load_adapter_dir(copy / "adapters/late", loaded.adaptable)
    assert late.fingerprint is None, "bundle.json does not list it"


@pytest.mark.parametrize(
    ("key", "value", "why"),
    [
        ("peft_type", "LOHA", "expected LORA, found LOHA"),
        ("use_dora", True, "DoRA rescales"),
        ("bias", "lora_only", "slots have no bias"),
        ("lora_bias", True, "slots have no bias"),
        ("fan_in_fan_out", True, "torch.nn.Linear"),
        ("modules_to_save", ["lm_head"], "would replace parts of the shared base"),
        ("layer_replication", [[0, 2], [1, 2]], "repeated layers"),
        ("trainable_token_indices", {"embed_tokens": [1]}, "trained embeddings"),
        ("target_parameters", ["mlp.experts.gate_up_proj"], "bare parameters"),
        ("init_lora_weights", "olora", "path_initial_model_for_weight_conversion"),
    ],
)
def test_what_slots_cannot_hold_is_refused_with_the_reason(
    path: Path, loaded: Bundle, tmp_path: Path, key: str, value: object, why: str
) -> None:
    outside = copy_bundle(path / "adapters" / "alpha", tmp_path / "mine")
    edit_json(outside / "adapter_config.json", lambda config: config.update({key: value}))
    with pytest.raises(UnsupportedError) as caught:
        load_adapter_dir(outside, loaded.adaptable)
    assert f"adapter_config.json: {key}: expected" in str(caught.value)
    assert why in str(caught.value)


def test_a_site_that_the_base_lacks_is_named(path: Path, loaded: Bundle, tmp_path: Path) -> None:
    outside = copy_bundle(path / "adapters" / "alpha", tmp_path / "mine")
    linears = {
        site: shape for site, shape in loaded.adaptable.items() if not site.endswith("1.mlp.down_proj")
    }
    with pytest.raises(
        BundleError, match=r"layers\.1\.mlp\.down_proj\.lora_a1\.weight: expected a linear layer of the base"
    ):
        load_adapter_dir(outside, linears)
