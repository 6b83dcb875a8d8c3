from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from calora_export import bundle
from calora_export.errors import BundleError, CaloraError, FingerprintError
from calora_export.sites import collapse_sites, expand_sites
from tests.bundles import HIDDEN, LINEARS, MLP, VOCAB, copy_bundle, edit_json, edit_tensors, tiny_bundle
from tests.malformed import MALFORMED, Malformed
from tests.memory import peak_megabytes


@pytest.fixture(scope="module")
def valid(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_bundle(tmp_path_factory.mktemp("bundles") / "tiny")


@pytest.fixture
def copy(valid: Path, tmp_path: Path) -> Path:
    return copy_bundle(valid, tmp_path / "copy")


@pytest.mark.parametrize("compressed", [True, False])
@pytest.mark.parametrize("recovery", [True, False])
@pytest.mark.parametrize("router", [True, False])
def test_a_valid_bundle_loads(tmp_path: Path, compressed: bool, recovery: bool, router: bool) -> None:
    path = tiny_bundle(tmp_path / "tiny", compressed=compressed, recovery=recovery, router=router)
    loaded = bundle.load(path, deep=True)
    assert [adapter.id for adapter in loaded.manifest.adapters] == ["alpha", "beta"]
    assert (loaded.manifest.router is not None) == router
    assert loaded.embeddings == ("model.embed_tokens",)
    assert set(loaded.linears) == set(loaded.adaptable) | {"model.embed_tokens"}
    assert len(loaded.adaptable) == 2 * len(LINEARS) + 1
    assert loaded.linears["model.layers.1.mlp.down_proj"] == (HIDDEN, MLP)
    assert loaded.linears["lm_head"] == (VOCAB, HIDDEN)
    assert loaded.adapter_dir("beta") == path / "adapters" / "beta"


def test_an_unknown_adapter_is_named_with_those_that_exist(valid: Path) -> None:
    with pytest.raises(
        BundleError, match="^bundle.json: adapters: expected one of alpha, beta, found gamma$"
    ):
        bundle.load(valid).adapter("gamma")


@pytest.mark.parametrize("case", MALFORMED, ids=lambda case: case.name)
def test_a_malformed_bundle_is_one_line_with_file_key_expected_found(copy: Path, case: Malformed) -> None:
    case.damage(copy)
    with pytest.raises(CaloraError) as caught:
        bundle.load(copy)
    line = str(caught.value)
    assert type(caught.value) is case.error, line
    assert "\n" not in line
    assert line.startswith(f"{case.file}: {case.key}: expected {case.expected}"), line
    assert re.search(rf", found {re.escape(case.found)}", line), line


def test_the_malformed_bundles_are_many_and_different() -> None:
    assert len({case.name for case in MALFORMED}) == len(MALFORMED) >= 40


@pytest.mark.parametrize("name", ["nowhere", "file"])
def test_a_path_that_is_no_directory_is_a_bundle_error(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(
        BundleError, match="bundle: expected a directory with bundle.json, found (nothing|a file)"
    ):
        bundle.load(tmp_path / name)


def test_a_changed_base_is_found_by_deep_load(copy: Path) -> None:
    def flip(tensors: dict[str, np.ndarray]) -> None:
        tensors["lm_head.weight_packed"][0, 0] ^= 1

    declared = bundle.load(copy).manifest.base.fingerprint
    edit_tensors(copy / "base/model.safetensors", flip)
    bundle.load(copy)
    with pytest.raises(FingerprintError) as caught:
        bundle.load(copy, deep=True)
    stored = bundle.load(copy).base.fingerprint()
    assert f"bundle.json: base.fingerprint: expected {stored}, found {declared}" in str(caught.value)


def test_a_base_with_nan_is_found_by_deep_load(tmp_path: Path) -> None:
    path = tiny_bundle(tmp_path / "tiny", compressed=False)

    def spoil(tensors: dict[str, np.ndarray]) -> None:
        tensors["model.norm.weight"][3] = ml_dtypes.bfloat16("nan")

    edit_tensors(path / "base/model.safetensors", spoil)
    fingerprint = bundle.load(path).base.fingerprint()

    def trust(manifest: dict) -> None:
        manifest["base"]["fingerprint"] = fingerprint
        for adapter in manifest["adapters"]:
            adapter["base_fingerprint"] = fingerprint

    edit_json(path / "bundle.json", trust)
    bundle.load(path)
    with pytest.raises(BundleError, match=r"model\.safetensors: model\.norm\.weight: expected finite values"):
        bundle.load(path, deep=True)


def test_rank_and_alpha_patterns_and_rslora_agree_with_the_branches(copy: Path) -> None:
    def patterns(config: dict) -> None:
        config |= {"use_rslora": True, "r": 16, "rank_pattern": {"q_proj": 4, "v_proj": 4}}
        config |= {"lora_alpha": 1, "alpha_pattern": {".*": 8}}

    edit_json(copy / "adapters/alpha/adapter_config.json", patterns)

    def scale(manifest: dict) -> None:
        for branch in manifest["adapters"][0]["branches"]:
            branch["scale"] = 4.0  # 8 / sqrt(4)

    edit_json(copy / "bundle.json", scale)
    bundle.load(copy)


def test_the_manifest_is_written_stably_and_reads_back(valid: Path, tmp_path: Path) -> None:
    manifest = bundle.read_manifest(valid)
    bundle.write_manifest(tmp_path, manifest)
    written = (tmp_path / "bundle.json").read_text()
    assert bundle.read_manifest(tmp_path) == manifest
    assert json.loads(written) == json.loads((valid / "bundle.json").read_text())
    assert written.startswith('{\n  "schema_version": 1,\n')
    assert written.endswith("}\n")


LAYERS = [f"model.layers.{layer}.{name}" for layer in range(12) for name in LINEARS]


def test_sites_expand_in_the_order_of_the_layers() -> None:
    sites = expand_sites(["model.layers.*.self_attn.q_proj", "lm_head"], [*reversed(LAYERS), "lm_head"])
    assert sites == ("lm_head", *(f"model.layers.{layer}.self_attn.q_proj" for layer in range(12)))


@given(st.sets(st.sampled_from(LAYERS)))
def test_collapsed_sites_expand_to_the_same(sites: set[str]) -> None:
    patterns = collapse_sites(sites, LAYERS)
    assert set(expand_sites(patterns, LAYERS)) == sites
    assert len(patterns) <= len(sites)


def test_sites_of_all_layers_collapse_to_one_pattern() -> None:
    sites = [site for site in LAYERS if site.endswith("q_proj")] + ["model.layers.3.mlp.up_proj"]
    assert collapse_sites(sites, LAYERS) == ("model.layers.*.self_attn.q_proj", "model.layers.3.mlp.up_proj")


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**400), 10**400) | st.floats() | st.text(max_size=300)
    | st.sampled_from(["*", "model.layers.*", "alpha", "a" * 5000, "a\nb", "eval/\0", "eval", "."]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)  # fmt: skip


def _places(document: object, at: tuple[str | int, ...] = ()) -> list[tuple[str | int, ...]]:
    if isinstance(document, dict):
        items = list(document.items())
    else:
        items = list(enumerate(document)) if isinstance(document, list) else []
    return [place for key, value in items for place in [(*at, key), *_places(value, (*at, key))]]


def _mutate(document: dict, place: tuple[str | int, ...], action: str, value: object) -> None:
    target: dict | list = document
    for key in place[:-1]:
        target = target[key]  # type: ignore[index,call-overload]
    if action == "delete":
        del target[place[-1]]  # type: ignore[arg-type]
    elif action == "insert" and isinstance(target, list):
        target.insert(int(place[-1]), value)
    elif action == "insert" and isinstance(target, dict):
        target[f"{place[-1]}_"] = value
    else:
        target[place[-1]] = value  # type: ignore[index,call-overload]


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_any_mutation_of_the_manifest_loads_or_is_a_calora_error(valid: Path, data: st.DataObject) -> None:
    original = (valid / "bundle.json").read_bytes()
    document = json.loads(original)
    place = data.draw(st.sampled_from(_places(document)))
    _mutate(document, place, data.draw(st.sampled_from(["delete", "replace", "insert"])), data.draw(VALUES))
    try:
        (valid / "bundle.json").write_text(json.dumps(document))
        bundle.load(valid)
    except CaloraError as error:
        assert "\n" not in str(error)
        assert ": expected " in str(error)
        assert ", found " in str(error)
    finally:
        (valid / "bundle.json").write_bytes(original)


FILES = (
    "bundle.json",
    "base/config.json",
    "adapters/alpha/adapter_config.json",
    "adapters/alpha/adapter_model.safetensors",
    "router/config.json",
    "router/model.safetensors",
    "eval/alpha.jsonl",
)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_any_cut_or_flipped_byte_loads_or_is_a_calora_error(valid: Path, data: st.DataObject) -> None:
    file = valid / data.draw(st.sampled_from(FILES))
    original = file.read_bytes()
    spot = data.draw(st.integers(0, min(len(original), 2000) - 1))
    byte = data.draw(st.integers(0, 255))
    cut = original[:spot] + (b"" if data.draw(st.booleans()) else bytes([byte]) + original[spot + 1 :])
    try:
        file.write_bytes(cut)
        bundle.load(valid)
    except CaloraError as error:
        assert "\n" not in str(error)
    finally:
        file.write_bytes(original)


def test_loading_needs_no_torch(valid: Path) -> None:
    script = (
        "import sys; from pathlib import Path; from calora_export import adapters, bundle\n"
        "import calora_export.importers.peft\n"
        "adapters.load_adapter(bundle.load(Path(sys.argv[1]), deep=True), 'alpha')\n"
        "assert not {'torch', 'transformers', 'tokenizers', 'safetensors'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", script, str(valid)], check=True)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_loading_a_large_base_is_quick_and_small(copy: Path) -> None:
    size = 500 << 20
    header = json.dumps({"big": {"dtype": "I8", "shape": [size], "data_offsets": [0, size]}}).encode()
    with (copy / "base/big.safetensors").open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + size)  # sparse: no disk is written
    script = (
        "import sys, time; from pathlib import Path; from calora_export import bundle\n"
        "start = time.process_time(); bundle.load(Path(sys.argv[1])); print(time.process_time() - start)"
    )
    megabytes, (seconds,) = peak_megabytes(script, copy)
    assert float(seconds) < 0.5
    assert megabytes < 150
