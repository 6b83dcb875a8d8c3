"""Device profiles: how they are found, what they must say, and what is refused because of them before any work."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from calora_export import catalogue, devices, profiles, resources, targets
from calora_export.errors import RecipeError, UnsupportedError
from calora_export.profiles import Budget, Profile
from tests.bundles import HEADS, HIDDEN, KV_HEADS, LAYERS, LINEARS, LORA_SITES, RECOVERY_SITES

MB = 2**20
FACTS = ("soc", "ram_mb", "memory_mb", "os_floor", "compute_units", "threads", "cores", "examples", "budget")


def written(tmp_path: Path, text: str) -> str:
    file = tmp_path / "phone.toml"
    file.write_text(text)
    return str(file)


def test_a_profile_is_found_by_name_kind_and_file(tmp_path: Path) -> None:
    named = profiles.load("host")
    assert named == profiles.load("host:anything") and "onnx" in named.targets
    own = profiles.load(written(tmp_path, 'kind = "adb"\ndescription = "d"\ntargets = ["onnx"]\nmemory_mb = 3'))
    assert (own.kind, own.memory_mb, own.room) == ("adb", 3, 3 * MB)


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ('kind = "adb"', "missing required field `description`"),
        ('kind = "adb"\ndescription = "d"\ntargets = ["onnx"]\ncolour = 1', "colour"),
        ('kind = "adb"\ndescription = "d"\ntargets = "onnx"', "targets"),
        ('kind = "adb"\ndescription = "d"\ntargets = ["onnx"]\nos_floor = "new"', "os_floor"),
        ('kind = "adb"\ndescription = "d"\ntargets = ["onnx"]\nmemory_mb = 0', "memory_mb"),
        ('kind = "adb"\ndescription = "d"\ntargets = ["onnx"]\ncompute_units = "gpu"', "compute_units"),
        ('kind = "adb"\ndescription = "d"\ntargets = ["onnx"]\n[budget]\nswap_s = 1', "swap_s"),
        ('kind = "adb"\ndescription = "d"\ntargets = ["onnx"]\n[budget]\nswap_ms = 0', "swap_ms"),
        ('kind = "adb"\ndescription = "d"\ntargets = ["onnx"]\ncores = [-1]', "cores"),
        ('kind = "adb"\ndescription = "d"\ntargets = ["onnx"]\nexamples = 0', "examples"),
        ("kind =", "phone.toml: "),
    ],
)
def test_a_wrong_profile_is_one_line(tmp_path: Path, text: str, part: str) -> None:
    with pytest.raises(RecipeError) as caught:
        profiles.load(written(tmp_path, text))
    assert str(caught.value).startswith("phone.toml: ") and part in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_unknown_device_names_the_known_ones() -> None:
    with pytest.raises(RecipeError, match="--device: tamagotchi: expected a file or one of .*host"):
        profiles.load("tamagotchi")


def test_room_is_the_published_limit_or_all_there_is() -> None:
    assert Profile("apple", "d", (), ram_mb=8, memory_mb=3).room == 3 * MB
    assert Profile("apple", "d", (), ram_mb=8).room == 8 * MB
    assert Profile("apple", "d", ()).room is None


# ── the profiles that ship ──────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("name", sorted(resources.devices()))
def test_every_fact_says_where_it_was_published(name: str) -> None:
    profile = profiles.load(name)
    facts = {field for field in FACTS if getattr(profile, field) not in (None, (), Budget())}
    assert set(profile.sources) == facts
    assert all(len(source) > 10 for source in profile.sources.values())


@pytest.mark.parametrize("name", sorted(resources.devices()))
def test_a_profile_is_consistent(name: str) -> None:
    profile = profiles.load(name)
    assert set(profile.targets) <= set(targets.names()) and profile.targets
    assert profile.os_floor is None or profile.os is not None
    if profile.memory_mb and profile.ram_mb:
        assert profile.memory_mb <= profile.ram_mb
    if profile.kind == "host":
        assert profile.kind in devices.names()
    assert not profile.compute_units or "coreml" in profile.targets


def test_the_list_shows_what_is_known() -> None:
    rows = {row["device"]: row for row in catalogue.entries("devices")}
    assert rows["iphone-15-pro"] == {
        "device": "iphone-15-pro",
        "kind": "apple",
        "soc": "A17 Pro",
        "os": "iOS 18.0",
        "memory": "3376 of 8192 MB",
        "targets": "coreml, executorch, onnx",
        "state": "profile",
    }
    assert (rows["iphone-16"]["memory"], rows["host"]["memory"], rows["host"]["os"]) == ("? of 8192 MB", "–", "–")


# ── what is refused before the work ─────────────────────────────────────────────────────────────────


def loaded(monkeypatch: pytest.MonkeyPatch, **facts: Any) -> None:
    profile = Profile("apple", "d", **{"targets": ("coreml", "onnx"), **facts})
    monkeypatch.setattr(profiles, "load", lambda name: profile)


def refusal(bundle: Path, recipe_name: str) -> str:
    with pytest.raises(UnsupportedError) as caught:
        profiles.check("phone", bundle, recipe_name)
    return str(caught.value)


def test_a_target_that_does_not_run_there(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    profiles.check("host", tiny, "onnx-int4")
    loaded(monkeypatch, targets=("coreml",))
    assert refusal(tiny, "onnx-int4") == "onnx-int4: target: expected one that phone runs (coreml), found onnx"


def test_a_system_that_the_target_says_is_too_old(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded(monkeypatch, os="iOS", os_floor="17.6")
    assert refusal(tiny, "coreml-int4") == "phone: os_floor: expected iOS 18 or newer, found 17.6"
    profiles.check("phone", tiny, "onnx-int4")
    loaded(monkeypatch, os="iOS", os_floor="15.0.2")
    assert refusal(tiny, "onnx-int4") == "phone: os_floor: expected iOS 15.1 or newer, found 15.0.2"
    loaded(monkeypatch, os="Linux", os_floor="1")
    profiles.check("phone", tiny, "onnx-int4")


POSITIONS = 256  # of the tiny base; the recipes allow 2048
CACHE = POSITIONS * LAYERS * 2 * KV_HEADS * HIDDEN // HEADS  # numbers: keys and values
ADAPTER = LAYERS * 4 * sum(sum(LINEARS[site]) for site in LORA_SITES + RECOVERY_SITES)  # alpha's, of rank 4


@pytest.mark.parametrize(
    ("recipe_name", "weights", "width"),
    [
        ("onnx-fp32", 106_496 * 4, 4),
        ("onnx-int4", 73_728 / 2 + 32_768 + 106_496 / 32 * 4, 4),
        ("coreml-fp16", 106_496 * 2, 2),
        ("coreml-int4", 73_728 / 2 + 32_768 + 106_496 / 32 * 2, 2),
    ],
)
def test_memory_is_weights_cache_and_the_largest_adapter(
    tiny: Path, monkeypatch: pytest.MonkeyPatch, recipe_name: str, weights: float, width: int
) -> None:
    """106 496 weights, of which 32 768 in the two tables; a scale of 4 or 2 bytes for each 32."""
    total = weights + CACHE * width + ADAPTER * width
    loaded(monkeypatch, memory_mb=total / MB)
    profiles.check("phone", tiny, recipe_name)
    loaded(monkeypatch, memory_mb=(total - 1) / MB)
    shares = [("weights", weights), ("cache", CACHE * width), ("adapter", ADAPTER * width)]
    assert refusal(tiny, recipe_name) == (
        f"phone: memory_mb: expected at most {total / MB:.0f} MB, found {total / MB:.1f} MB "
        f"({', '.join(f'{name} {size / MB:.1f}' for name, size in shares)})"
    )


def test_without_adapters_there_is_none_to_hold(bare: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded(monkeypatch, ram_mb=1 / MB)
    line = refusal(bare, "onnx-fp32")
    assert line.startswith("phone: ram_mb: ") and line.endswith("adapter 0.0)")
