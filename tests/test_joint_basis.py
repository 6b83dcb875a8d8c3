"""Plain LoRAs in one basis: the least error there is, and what it saves."""

from __future__ import annotations

from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch

from calora_export import bundle as bundles
from calora_export import joint_basis, pipeline, recipe
from calora_export.adapters import load_adapter
from calora_export.errors import RecipeError
from calora_export.importers import peft
from tests.bundles import tiny_base
from tests.importers import methods
from tests.importers.test_reductions import SITES


def made(directory: Path, count: int, r: int = 4) -> bundles.Bundle:
    tiny_base(directory / "base", np.random.default_rng(0), compressed=False)
    torch.manual_seed(1)
    names = [directory / f"a{i}" for i in range(count)]
    for name in names:
        methods.save_peft(name, methods.draw_pairs(SITES, r), r, 2 * r)
    peft.run(directory / "base", names, directory / "bundle")
    return bundles.load(directory / "bundle")


def deltas(adapter) -> dict[str, np.ndarray]:
    return {site: rows.up @ rows.down for site, rows in adapter.sites.items()}


def test_a_basis_for_all_ranks_changes_nothing(tmp_path: Path) -> None:
    bundle = made(tmp_path, 3)
    joint = joint_basis.compress(bundle, 12)
    assert max(joint.errors.values()) < 1e-5 and joint.kept == ()
    for identifier in joint.adapters:
        whole = deltas(load_adapter(bundle, identifier))
        held = deltas(joint.adapters[identifier].rows(joint.basis))
        for site in SITES:
            np.testing.assert_allclose(held[site], whole[site], atol=1e-5)


def test_alone_an_adapter_loses_what_its_smallest_singular_values_hold(tmp_path: Path) -> None:
    """Eckart and Young, 1936: no matrix of rank c is nearer."""
    bundle = made(tmp_path, 1)
    joint = joint_basis.compress(bundle, 2)
    whole, held = deltas(load_adapter(bundle, "a0")), deltas(joint.adapters["a0"].rows(joint.basis))
    values = {site: np.linalg.svd(delta, compute_uv=False) for site, delta in whole.items()}
    for site, delta in whole.items():
        assert np.linalg.norm(delta - held[site]) == pytest.approx(np.linalg.norm(values[site][2:]), rel=1e-4)
    lost, total = (np.sqrt(sum((found[i:] ** 2).sum() for found in values.values())) for i in (2, 0))
    assert joint.errors["a0"] == pytest.approx(lost / total, rel=1e-4)


def test_the_error_of_each_adapter_is_that_of_its_rows_and_none_finds_a_better_basis(tmp_path: Path) -> None:
    bundle = made(tmp_path, 4)
    joint = joint_basis.compress(bundle, 6)
    lost = 0.0
    for identifier, error in joint.errors.items():
        whole, held = deltas(load_adapter(bundle, identifier)), deltas(joint.adapters[identifier].rows(joint.basis))
        gone = sum(np.linalg.norm(whole[site] - held[site]) ** 2 for site in whole)
        assert error == pytest.approx(np.sqrt(gone / sum(np.linalg.norm(d) ** 2 for d in whole.values())), rel=1e-4)
        lost += gone
    rng = np.random.default_rng(0)
    whole = {identifier: deltas(load_adapter(bundle, identifier)) for identifier in joint.errors}
    for _ in range(20):  # orthonormal bases of the same spaces' spans, at random
        other = 0.0
        for site in SITES:
            sides = [np.concatenate([d[site] for d in whole.values()], axis=1), None]
            sides[1] = np.concatenate([d[site].T for d in whole.values()], axis=1)
            u, v = (np.linalg.qr(s @ rng.normal(size=(s.shape[1], 6)))[0] for s in sides)  # type: ignore[union-attr]
            other += sum(np.linalg.norm(d[site] - u @ (u.T @ d[site] @ v) @ v.T) ** 2 for d in whole.values())
        assert lost < other


def test_adapters_with_recovery_are_left_as_they_are(tiny: Path) -> None:
    with pytest.raises(RecipeError, match="joint_basis: expected plain LoRAs in the bundle, found 2 adapters"):
        joint_basis.compress(bundles.load(tiny), 8)


def test_a_hundred_adapters_take_a_third(tmp_path: Path) -> None:
    """Rank 8; a core of 8 × 8 in the place of A and B."""
    bundle = made(tmp_path, 100, 8)
    text = (Path(recipe.resources.recipes()["torch-fp32"])).read_text()
    (tmp_path / "joint.toml").write_text(f"joint_basis = 8\n{text}")
    package = pipeline.export(bundle.path, tmp_path / "package", str(tmp_path / "joint.toml"))
    joint = package.manifest.joint_basis
    assert joint is not msgspec.UNSET and len(joint.adapters) == 100
    sizes = {entry.id: (package.path / package.adapter(entry.id).file).stat().st_size for entry in joint.adapters}
    rows = sum(4 * 8 * (a + b) for a, b in SITES.values())
    assert all(entry.bytes == sizes[entry.id] and entry.plain_bytes == rows for entry in joint.adapters)
    assert joint.bytes == (package.path / joint.file).stat().st_size
    assert joint.bytes + sum(sizes.values()) < 100 * rows / 3
