"""What `list` says must be what the code does: the same modules, the same recipes, the same outcomes."""

from __future__ import annotations

import tomllib
from dataclasses import replace
from pathlib import Path

import msgspec
import numpy as np
import pytest

import calora_export
from calora_export import catalogue, formats, recipe, resources
from calora_export.compression import DenseWeight, PackedWeight
from calora_export.errors import UnsupportedError

LISTS = ("targets", "recipes", "devices", "adapters", "routers", "formats")


@pytest.mark.parametrize("what", LISTS)
def test_a_list_is_a_table_of_texts(what: str) -> None:
    rows = catalogue.entries(what)
    assert rows
    for row in rows:
        assert list(row) == list(rows[0])
        assert all(isinstance(value, str) and value for value in row.values())


def test_targets_are_the_modules() -> None:
    folder = Path(calora_export.__file__).parent / "targets"
    modules = {file.stem for file in folder.glob("*.py") if not file.stem.startswith("_")}
    assert {row["target"] for row in catalogue.entries("targets")} == modules


def test_recipes_and_devices_are_the_files() -> None:
    for what, key in (("recipes", "recipe"), ("devices", "device")):
        files = {file.stem: file for file in (resources.root() / what).glob("*.toml")}
        rows = catalogue.entries(what)
        assert {row[key] for row in rows if row.get("state", "profile") == "profile"} == set(files)
    for row in catalogue.entries("recipes"):
        document = tomllib.loads((resources.root() / "recipes" / f"{row['recipe']}.toml").read_text())
        assert (row["target"], row["description"]) == (document["target"], document["description"])


def test_devices_that_are_there_follow_the_profiles(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What adb says of each, and what to do about it; the hosts of ~/.ssh/config, but no patterns."""
    adb = tmp_path / "adb"
    states = ("R5C device", "X9 unauthorized", "emulator-5554 offline", "Y1 no permissions (rules); see http")
    said = "\n".join(("List of devices attached", *states))
    adb.write_text(f"#!/bin/sh\necho '{said}'\n")
    adb.chmod(0o755)
    (tmp_path / ".ssh").mkdir()
    (tmp_path / ".ssh" / "config").write_text("Host board *.lan\n  HostName 10.0.0.7\nhost=pi !x\nMatch host y\n")
    browser = tmp_path / "browser"
    browser.write_text("#!/bin/sh\n[ $1 = --version ] && echo 'Chromium 156.0.1 built on Debian'\n")
    browser.chmod(0o755)
    monkeypatch.setenv("CALORA_BROWSER", str(browser))
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setenv("HOME", str(tmp_path))
    rows = catalogue.entries("devices")
    assert {row["device"]: row["state"] for row in rows if row["state"] != "profile"} == {
        "adb:R5C": "connected",
        "adb:X9": "unauthorized: unlock it and allow USB debugging for this machine",
        "adb:emulator-5554": "offline: plug it in again, or `adb disconnect` and `adb connect`",
        "adb:Y1": "no permissions: add a udev rule for it, or your user to the group plugdev",
        "ssh:board": "in ~/.ssh/config",
        "ssh:pi": "in ~/.ssh/config",
        "browser": "Chromium 156",
    }


def test_every_scheme_meets_every_recipe() -> None:
    cells = formats.matrix()
    schemes = {cell.scheme for cell in cells}
    assert schemes == set(formats.samples()) and len(schemes) == 13
    assert {(cell.scheme, cell.recipe) for cell in cells} == {(s, r) for s in schemes for r in recipe.catalogue()}
    assert len(cells) == 13 * len(recipe.catalogue())


def test_what_each_target_holds_exactly() -> None:
    outcomes = {(cell.scheme, cell.recipe): cell.outcome for cell in formats.matrix()}
    packed = {scheme for scheme, _ in outcomes if scheme.startswith(("int", "nf"))}
    assert {outcomes[scheme, "onnx-int4"] for scheme in packed} == {"exact"}
    assert outcomes["fp32, fp16, bf16", "onnx-fp32"] == "exact"
    assert outcomes["fp32, fp16, bf16", "onnx-int4"] == "re-represented"
    exact = {scheme for scheme in packed if outcomes[scheme, "executorch-8da4w"] == "exact"}
    assert exact == {"int8, rows", "int4, rows", "int4, groups"}  # XNNPACK: bf16 scales, int8 only by rows
    assert {outcomes[scheme, "executorch-8da4w"] for scheme in packed - exact} == {"refused"}
    allowed = {scheme for scheme in packed - exact if outcomes[scheme, "executorch-8da8w"] == "re-represented"}
    assert packed - exact - allowed == {"int4, groups of 16"}
    assert {scheme for scheme in packed if outcomes[scheme, "coreml-int4"] != "exact"} == {"nf4, blocks of 64"}


@pytest.mark.parametrize("name", sorted(recipe.catalogue()))
@pytest.mark.parametrize("scheme", formats.samples())
def test_exact_means_the_same_numbers(name: str, scheme: str) -> None:
    """Dequantised by hand, not by the code under test."""
    stored = formats.samples()[scheme]
    expected = by_hand(stored)
    cell = next(cell for cell in formats.matrix() if (cell.scheme, cell.recipe) == (scheme, name))
    if cell.outcome == "refused":
        with pytest.raises(UnsupportedError):
            recipe.represent(recipe.load(name), formats.SITE, stored)
        return
    made = recipe.represent(recipe.load(name), formats.SITE, stored)
    same = bool((by_hand(made.weight) == expected).all()) and made.weight.activations == stored.activations
    assert made.exact == (cell.outcome == "exact") == same


@pytest.mark.parametrize("name", sorted(recipe.catalogue()))
@pytest.mark.parametrize("scheme", formats.samples())
def test_whatever_a_target_makes_of_a_weight_its_zeros_stay_zeros(name: str, scheme: str) -> None:
    """Two of four are pruned, in the scheme's own terms: 0, the zero point, or what means 0 in its codebook."""
    stored, off = formats.samples()[scheme], np.arange(formats.COLUMNS) % 4 < 2
    if isinstance(stored, DenseWeight):
        pruned = replace(stored, values=np.where(off, np.float32(0), stored.values))
    else:
        zero = np.zeros_like(stored.scale, dtype=np.int8) if stored.zero is None else stored.zero
        if stored.codebook is not None:
            zero = np.full_like(zero, np.flatnonzero(stored.codebook == 0)[0])
        pruned = replace(stored, q=np.where(off, zero.repeat(stored.group_size, axis=1), stored.q))
    was = by_hand(pruned) == 0
    assert was.mean() >= 0.5
    try:
        made = recipe.represent(recipe.load(name), formats.SITE, pruned)
    except UnsupportedError:
        return
    assert (by_hand(made.weight)[was] == 0).all()


def by_hand(weight: DenseWeight | PackedWeight) -> np.ndarray:
    if isinstance(weight, DenseWeight):
        return weight.values.astype(np.float32)
    dense = np.empty(weight.shape, np.float32)
    for column in range(weight.shape[1]):
        group = column // weight.group_size
        q = weight.q[:, column]
        numbers = q.astype(np.float32) if weight.codebook is None else weight.codebook[q]
        if weight.zero is not None:
            numbers = numbers - weight.zero[:, group]
        place = column if weight.order is None else weight.order[column]
        dense[:, place] = numbers * weight.scale[:, group].astype(np.float32)
    return dense


@pytest.mark.parametrize("name", sorted(recipe.catalogue()))
@pytest.mark.parametrize("scheme", formats.samples())
def test_zeros_stay_zero_however_a_target_holds_them(name: str, scheme: str) -> None:
    """Pruning survives what a recipe does to weights, zero points included."""
    stored = formats.samples()[scheme]
    if isinstance(stored, PackedWeight):
        q, per_group = stored.q.copy(), stored.group_size
        nothing = np.zeros_like(stored.scale, np.int8) if stored.zero is None else stored.zero
        if stored.codebook is not None:
            nothing = np.full_like(nothing, int(np.flatnonzero(stored.codebook == 0)[0]))
        q[:, 2::4] = nothing.repeat(per_group, axis=1)[:, 2::4]
        stored = replace(stored, q=q)
    else:
        stored = DenseWeight(stored.values * (np.arange(stored.shape[1]) % 4 != 2))
    allowing = recipe.load(name)
    rules = tuple(msgspec.structs.replace(rule, lossy="allow") for rule in allowing.precision)
    zeros = by_hand(stored) == 0
    assert zeros.sum() >= zeros.size // 4
    try:
        made = recipe.represent(msgspec.structs.replace(allowing, precision=rules), formats.SITE, stored)
    except UnsupportedError:
        return
    assert (by_hand(made.weight)[zeros] == 0).all()
