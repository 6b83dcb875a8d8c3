"""The flow: export and what becomes of a package when adapters are added to it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from msgspec import UNSET
from safetensors.numpy import load_file

from calora_export import inspection, pipeline
from calora_export.errors import BundleError, CaloraError, FingerprintError, PackageError, UnsupportedError
from calora_export.runtimes import onnx
from tests.bundles import copy_bundle, edit_json, edit_tensors, tiny_bundle
from tests.packages import copy_package
from tests.tampering import adapter_file, read_adapter


@pytest.fixture(scope="module")
def alpha_only(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A package of the tiny bundle as it was before beta was trained."""
    directory = tmp_path_factory.mktemp("alpha")
    bundle = tiny_bundle(directory / "bundle", adapters=("alpha",), router=False)
    return pipeline.export(bundle, directory / "package", "onnx-int4").path


@pytest.fixture(scope="module")
def linear_only(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A package whose adapters have no recovery branch: slots at q_proj and v_proj, linear rows."""
    directory = tmp_path_factory.mktemp("linear")
    bundle = tiny_bundle(directory / "bundle", adapters=("plain",), router=False, recovery=False)
    return pipeline.export(bundle, directory / "package", "onnx-int4").path


def content(directory: Path) -> dict[str, bytes]:
    return {
        file.relative_to(directory).as_posix(): file.read_bytes()
        for file in sorted(directory.rglob("*"))
        if file.is_file()
    }


def loose_adapter(tiny: Path, directory: Path, *without: str) -> Path:
    """beta outside of its bundle, as PEFT saves it, without the tensors whose names contain one of `without`."""
    path = Path(shutil.copytree(tiny / "adapters" / "beta", directory))

    def drop(tensors: dict) -> None:
        for name in [name for name in tensors if any(part in name for part in without)]:
            del tensors[name]

    edit_tensors(path / "adapter_model.safetensors", drop)
    return path


def refusal(package: Path, adapter: Path) -> CaloraError:
    """The error of adding an adapter, which must leave the package as it was."""
    before = content(package)
    with pytest.raises(CaloraError) as caught:
        pipeline.add_adapter(package, adapter)
    assert content(package) == before and "\n" not in str(caught.value)
    return caught.value


# ── export ──────────────────────────────────────────────────────────────────────────────────────────


def test_a_base_of_floats_is_quantised_and_the_package_says_so(tmp_path: Path) -> None:
    bundle = tiny_bundle(tmp_path / "bundle", compressed=False, adapters=(), router=False)
    made = pipeline.export(bundle, tmp_path / "package", "onnx-int4").manifest
    forms = {entry.module: (entry.stored, entry.held) for entry in made.represented}
    assert len(forms) == 2 * 7 + 2 and made.quantised and made.zeros is UNSET
    assert forms["model.embed_tokens"] == forms["lm_head"] == ("float", "int8/32")
    assert forms["model.layers.1.mlp.down_proj"] == ("float", "int4/32")
    assert all(10 < entry.sqnr_db < 60 for entry in made.represented)


def test_packed_weights_are_not_touched(package: Path) -> None:
    assert json.loads((package / "package.json").read_text())["represented"] == []


def test_stages_are_told_in_order(tiny: Path, tmp_path: Path) -> None:
    stages: list[str] = []

    def stop(stage: str) -> None:
        stages.append(stage)
        if stage == "lowering":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pipeline.export(tiny, tmp_path / "package", "onnx-int4", stop)
    assert stages == ["reading the bundle", "composing the model", "tracing the graph", "lowering"]
    assert list(tmp_path.iterdir()) == []


def no_eos(bundle: Path) -> None:
    edit_json(bundle / "base" / "config.json", lambda config: config.pop("eos_token_id"))


def odd_eos(bundle: Path) -> None:
    edit_json(bundle / "base" / "config.json", lambda config: config.update(eos_token_id="</s>"))


def odd_generation_config(bundle: Path) -> None:
    (bundle / "base" / "generation_config.json").write_text('{"eos_token_id": [1, "x"]}')


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (no_eos, "base/config.json: eos_token_id: expected "),
        (odd_eos, "base/config.json: eos_token_id: expected "),
        (odd_generation_config, "base/generation_config.json: eos_token_id"),
    ],
)
def test_a_wrong_end_token_is_found_before_the_slow_part(
    tiny: Path, tmp_path: Path, spoil: Callable[[Path], None], message: str
) -> None:
    bundle, stages = copy_bundle(tiny, tmp_path / "bundle"), []
    spoil(bundle)
    with pytest.raises(BundleError) as caught:
        pipeline.export(bundle, tmp_path / "package", "onnx-int4", stages.append)
    assert str(caught.value).startswith(message) and stages == ["reading the bundle"]


# ── add-adapter ─────────────────────────────────────────────────────────────────────────────────────


def test_an_added_adapter_is_the_one_that_an_export_makes(
    alpha_only: Path, package: Path, tiny: Path, tmp_path: Path
) -> None:
    copy = copy_package(alpha_only, tmp_path / "package")
    before, times = content(copy), {file: file.stat().st_mtime_ns for file in copy.rglob("*") if file.is_file()}
    entry = pipeline.add_adapter(copy, tiny / "adapters" / "beta")
    after = content(copy)
    assert after["adapters/beta.onnx_adapter"] == content(package)["adapters/beta.onnx_adapter"]
    assert set(after) - set(before) == {"adapters/beta.onnx_adapter"}
    assert [name for name in before if before[name] != after[name]] == ["package.json"]
    changed = [file.name for file, time in times.items() if file.stat().st_mtime_ns != time]
    assert changed == ["package.json"]
    assert (entry.id, entry.class_index, entry.rank, entry.recovery_rows, entry.stated) == ("beta", 1, 4, 2, True)
    validated = pipeline.validate(copy, tiny, "host")
    rows = {row.case: row for row in validated.parity if row.against == "target"}
    assert rows["adapter:beta"].passed and rows["adapter:beta"].effect_ratio == pytest.approx(1, abs=0.05)
    assert validated.safety.aba_bit_identical and validated.problems == ()


def test_a_plain_peft_adapter_is_taken_at_its_word(alpha_only: Path, tiny: Path, tmp_path: Path) -> None:
    copy = copy_package(alpha_only, tmp_path / "package")
    loose = loose_adapter(tiny, tmp_path / "gamma", "lora_a1", "lora_a2")
    entry = pipeline.add_adapter(copy, loose)
    assert (entry.id, entry.stated, entry.rank, entry.recovery_rows) == ("gamma", False, 2, 0)
    made, trained = read_adapter(adapter_file(copy, "gamma")), load_file(loose / "adapter_model.safetensors")
    site = "model.layers.1.self_attn.v_proj"
    up = trained[f"base_model.model.{site}.lora_B.weight"] * (8 / 2)  # alpha / r
    assert (made[f"{site}.up"] == up.T).all()
    view = inspection.inspect(copy)
    assert [adapter.id for adapter in view.adapters] == ["alpha", "gamma"]


def test_an_id_that_is_taken_is_refused(package: Path, tiny: Path) -> None:
    error = refusal(package, tiny / "adapters" / "alpha")
    assert str(error) == (
        "package.json: adapters: expected an id of its own, found alpha again "
        "(the adapter's id is its directory's name: rename it)"
    )


def test_an_adapter_of_another_base_is_refused_with_both_fingerprints(package: Path, tmp_path: Path) -> None:
    other = tiny_bundle(tmp_path / "other", compressed=False, adapters=("gamma",), router=False)
    error = refusal(package, other / "adapters" / "gamma")
    own = json.loads((package / "package.json").read_text())["base_fingerprint"]
    foreign = json.loads((other / "bundle.json").read_text())["base"]["fingerprint"]
    assert isinstance(error, FingerprintError) and own in str(error) and foreign in str(error)


def test_sites_without_slots_are_named(linear_only: Path, tiny: Path) -> None:
    """beta's recovery branch also sits at mlp.down_proj, where this package has no slot."""
    error = refusal(linear_only, tiny / "adapters" / "beta")
    assert isinstance(error, PackageError)
    assert "model.layers.0.mlp.down_proj: expected a site with a slot in this package, found none" in str(error)


def test_recovery_needs_a_package_with_recovery(linear_only: Path, tiny: Path, tmp_path: Path) -> None:
    loose = loose_adapter(tiny, tmp_path / "gamma", "down_proj")
    error = refusal(linear_only, loose)
    assert isinstance(error, UnsupportedError)
    assert str(error).startswith("gamma: branches: expected linear ones only, found recovery (export again")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nothing here", "nothing here: adapter: expected a directory, found nothing"),
        ("-gamma", "-gamma: id: expected a letter or digit, then"),
    ],
)
def test_a_wrong_directory_is_one_line(package: Path, tiny: Path, tmp_path: Path, name: str, message: str) -> None:
    if name.startswith("-"):
        loose_adapter(tiny, tmp_path / name)
    assert message in str(refusal(package, tmp_path / name))


def test_nan_in_an_adapter_is_refused(package: Path, tiny: Path, tmp_path: Path) -> None:
    loose = loose_adapter(tiny, tmp_path / "gamma")
    edit_tensors(
        loose / "adapter_model.safetensors", lambda tensors: [array.fill(float("nan")) for array in tensors.values()]
    )
    assert "expected finite values, found NaN or Inf" in str(refusal(package, loose))


def test_an_adapter_without_its_weights_is_refused(package: Path, tiny: Path, tmp_path: Path) -> None:
    loose = loose_adapter(tiny, tmp_path / "gamma")
    (loose / "adapter_model.safetensors").unlink()
    assert "adapter_model.safetensors: file: expected a safetensors file, found nothing" in str(
        refusal(package, loose)
    )


def test_a_failed_write_leaves_the_package(
    alpha_only: Path, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    copy = copy_package(alpha_only, tmp_path / "package")
    monkeypatch.setattr(onnx, "encode_adapter", full)
    error = refusal(copy, tiny / "adapters" / "beta")
    assert str(error) == f"{copy}: cannot be written: No space left on device"
