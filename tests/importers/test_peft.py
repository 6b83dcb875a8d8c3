from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import peft
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from calora_export import bundle
from calora_export.adapters import load_adapter
from calora_export.composing import compose
from calora_export.errors import BundleError, CaloraError, UnsupportedError
from calora_export.importers.peft import run as import_peft
from calora_export.model import Rows, SlotModel
from tests.bundles import edit_json, tiny_bundle

Q_V = ["q_proj", "v_proj"]
IDS = torch.tensor([list(b"What is a low rank?")])
CONFIGS: dict[str, dict[str, object]] = {
    "plain": {"r": 4, "lora_alpha": 8, "target_modules": Q_V},
    "alpha-1": {"r": 4, "lora_alpha": 1, "target_modules": "all-linear"},
    "rslora": {"r": 4, "lora_alpha": 8, "target_modules": Q_V, "use_rslora": True},
    "rank-pattern": {
        "r": 4, "lora_alpha": 8, "target_modules": [*Q_V, "down_proj"],
        "rank_pattern": {"q_proj": 2, "layers.1.self_attn.v_proj": 6},
    },
    "both-patterns": {
        "r": 3, "lora_alpha": 5, "target_modules": [*Q_V, "up_proj"],
        "rank_pattern": {"model.layers.0.mlp.up_proj": 1, "^model.layers.1.*v_proj": 5},
        "alpha_pattern": {r".*\.0\..*": 7, "v_proj": 9},
    },
    "rslora-pattern": {
        "r": 4, "lora_alpha": 8, "target_modules": Q_V, "use_rslora": True,
        "rank_pattern": {"v_proj": 9}, "alpha_pattern": {"layers.0.self_attn.q_proj": 3},
    },
    "one-layer": {"r": 2, "lora_alpha": 4, "target_modules": Q_V, "layers_to_transform": [1]},
    "lm-head": {"r": 2, "lora_alpha": 4, "target_modules": ["lm_head", "o_proj"]},
}  # fmt: skip


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_bundle(tmp_path_factory.mktemp("peft") / "tiny", compressed=False) / "base"


@pytest.fixture(scope="module")
def trained(
    base: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, tuple[Path, dict[str, np.ndarray]]]:
    """Per config: the directory that PEFT saved, and PEFT's own merge delta (scale · B A) by site."""
    saved: dict[str, tuple[Path, dict[str, np.ndarray]]] = {}
    directory = tmp_path_factory.mktemp("adapters")
    torch.manual_seed(0)
    for name, options in CONFIGS.items():
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        model = peft.get_peft_model(model, peft.LoraConfig(**options))  # type: ignore[arg-type]
        for parameter_name, parameter in model.named_parameters():
            if "lora_" in parameter_name:
                torch.nn.init.normal_(parameter, std=0.15)
        model.save_pretrained(directory / name, save_embedding_layers=False)
        deltas = {
            module_name.removeprefix("base_model.model."): module.get_delta_weight("default").detach().numpy()
            for module_name, module in model.named_modules()
            if isinstance(module, peft.tuners.lora.Linear)
        }
        saved[name] = (directory / name, deltas)
    return saved


@pytest.fixture(scope="module")
def imported(
    base: Path, trained: dict[str, tuple[Path, dict]], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    out = tmp_path_factory.mktemp("out") / "bundle"
    import_peft(base, [path for path, _ in trained.values()], out, "mine")
    return out


@pytest.fixture(scope="module")
def slotted(imported: Path) -> SlotModel:
    loaded = bundle.load(imported)
    return compose(loaded, loaded.weight, context=64)


@pytest.mark.parametrize("name", CONFIGS)
def test_rows_are_pefts_own_merge_delta(
    imported: Path, trained: dict[str, tuple[Path, dict]], name: str
) -> None:
    adapter = load_adapter(bundle.load(imported), name)
    deltas = trained[name][1]
    assert set(adapter.sites) == set(deltas)
    assert not adapter.recovery.any()
    for site, delta in deltas.items():
        rows = adapter.sites[site]
        np.testing.assert_allclose(rows.up @ rows.down, delta, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_are_pefts_own(
    base: Path, imported: Path, slotted: SlotModel, trained: dict[str, tuple[Path, dict]], name: str
) -> None:
    """Its own model, unmerged, in fp32."""
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    with torch.no_grad():
        without = plain(IDS).logits
        expected = peft.PeftModel.from_pretrained(plain, trained[name][0]).eval()(IDS).logits
        found = slotted(IDS, slotted.empty_cache(), Rows.of(load_adapter(bundle.load(imported), name)))[0]
    assert float((expected - without).abs().max()) > 0.1
    assert float((found - expected).abs().max()) <= 1e-5


def test_the_bundle_is_complete(imported: Path, base: Path) -> None:
    loaded = bundle.load(imported, deep=True)
    manifest = loaded.manifest
    assert manifest.name == "mine"
    assert [(adapter.id, adapter.class_index) for adapter in manifest.adapters] == list(
        zip(CONFIGS, range(99), strict=False)
    )
    assert manifest.router is None
    assert manifest.tasks == ()
    assert manifest.base.compression == ()
    assert sorted(file.name for file in (imported / "base").iterdir()) == sorted(
        file.name for file in base.iterdir()
    )
    assert sorted(file.name for file in (imported / "adapters/plain").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    assert [file.name for file in imported.parent.iterdir()] == ["bundle"], "no temporary directory is left"
    AutoTokenizer.from_pretrained(imported / "base")


def test_sites_are_patterns_where_all_layers_agree(imported: Path) -> None:
    loaded = bundle.load(imported)
    plain = loaded.adapter("plain").branches
    assert [branch.sites for branch in plain] == [
        ("model.layers.*.self_attn.q_proj", "model.layers.*.self_attn.v_proj")
    ]
    assert (plain[0].r, plain[0].alpha, plain[0].scale) == (4, 8, 2)
    ranks = {branch.r: branch.sites for branch in loaded.adapter("rank-pattern").branches}
    assert ranks == {
        2: ("model.layers.*.self_attn.q_proj",),
        4: ("model.layers.*.mlp.down_proj", "model.layers.0.self_attn.v_proj"),
        6: ("model.layers.1.self_attn.v_proj",),
    }


def test_a_compressed_base_keeps_its_steps_and_recovery_its_branch(tmp_path: Path) -> None:
    source = tiny_bundle(tmp_path / "source")
    import_peft(source / "base", [source / "adapters/beta"], tmp_path / "out", None)
    original, loaded = bundle.load(source), bundle.load(tmp_path / "out", deep=True)
    assert loaded.manifest.name == "out"
    assert loaded.manifest.base.fingerprint == original.manifest.base.fingerprint
    steps = {step.scheme: (set(step.sites), step.group_size) for step in loaded.manifest.base.compression}
    wanted = {
        step.scheme: (set(step.sites), step.group_size) for step in original.manifest.base.compression[1:]
    }
    assert steps == wanted
    ours, theirs = load_adapter(loaded, "beta"), load_adapter(original, "beta")
    assert ours.recovery.tolist() == theirs.recovery.tolist()
    for site, rows in theirs.sites.items():
        np.testing.assert_array_equal(ours.sites[site].down, rows.down)
        np.testing.assert_array_equal(ours.sites[site].up, rows.up)


def test_only_the_shards_of_the_index_are_taken(
    base: Path, tmp_path: Path, trained: dict[str, tuple[Path, dict]]
) -> None:
    sharded = tmp_path / "sharded"
    AutoModelForCausalLM.from_pretrained(base).save_pretrained(sharded, max_shard_size="50KB")
    shutil.copy(base / "tokenizer.json", sharded)
    shutil.copy(base / "model.safetensors", sharded / "consolidated.safetensors")
    assert (sharded / "model.safetensors.index.json").is_file()
    import_peft(sharded, [trained["plain"][0]], tmp_path / "out", None)
    fingerprint = bundle.load(tmp_path / "out", deep=True).manifest.base.fingerprint
    assert not (tmp_path / "out/base/consolidated.safetensors").exists()
    assert fingerprint == bundle.load(base.parent).manifest.base.fingerprint, "sharding does not change it"


def test_a_pickle_as_older_peft_wrote_it_is_the_same_adapter(
    base: Path, trained: dict[str, tuple[Path, dict]], tmp_path: Path
) -> None:
    source = shutil.copytree(trained["plain"][0], tmp_path / "in" / "plain")
    tensors = load_file(source / "adapter_model.safetensors")
    (source / "adapter_model.safetensors").unlink()
    torch.save(tensors, source / "adapter_model.bin")
    import_peft(base, [source], tmp_path / "pickle", None)
    import_peft(base, [trained["plain"][0]], tmp_path / "safetensors", None)
    kept = [bundle.load(tmp_path / name, deep=True) for name in ("pickle", "safetensors")]
    assert kept[0].manifest.adapters == kept[1].manifest.adapters
    stored = [load_file(b.path / "adapters/plain/adapter_model.safetensors") for b in kept]
    assert stored[0].keys() == stored[1].keys() and all(torch.equal(stored[0][k], stored[1][k]) for k in stored[0])
    evil = type("E", (), {"__reduce__": lambda self: (Path.touch, (tmp_path / "mark",))})()
    torch.save({"x": evil}, source / "adapter_model.bin")
    with pytest.raises(BundleError, match="adapter_model.bin: file: expected a state dict of tensors"):
        import_peft(base, [source], tmp_path / "out", None)
    assert not (tmp_path / "mark").exists() and not (tmp_path / "out").exists()


Damage = Callable[[Path, Path], object]


def _pickle(base: Path, adapter: Path) -> None:
    (base / "model.safetensors").rename(base / "pytorch_model.bin")


def _wrong_rank(base: Path, adapter: Path) -> None:
    edit_json(adapter / "adapter_config.json", lambda config: config.update(r=5))


def _hqq(base: Path, adapter: Path) -> None:
    edit_json(
        base / "config.json",
        lambda config: config.update(quantization_config={"quant_method": "hqq", "bits": 4}),
    )


def _no_weights(base: Path, adapter: Path) -> None:
    (adapter / "adapter_model.safetensors").unlink()


@pytest.mark.parametrize(
    ("damage", "error", "parts"),
    [
        (
            _pickle,
            BundleError,
            ("*.safetensors: expected at least one file, found pytorch_model.bin", "pickles"),
        ),
        (
            _no_weights,
            BundleError,
            ("adapter_model.safetensors: file: expected a safetensors file, found nothing",),
        ),
        (_wrong_rank, BundleError, ("lora_A.weight: expected [5, 64], found [4, 64]",)),
        (
            _hqq,
            UnsupportedError,
            ("quant_method: expected one of awq, bitsandbytes, compressed-tensors", "found hqq", "uncompressed"),
        ),
        (
            lambda base, adapter: (base / "config.json").unlink(),
            BundleError,
            ("config.json: file: expected a file",),
        ),
        (lambda base, adapter: (base / "tokenizer.json").unlink(), BundleError, ("tokenizer.json: file",)),
        (
            lambda base, adapter: shutil.rmtree(base),
            BundleError,
            ("base: expected a model directory, found nothing (nothing is downloaded",),
        ),
        (
            lambda base, adapter: shutil.rmtree(adapter),
            BundleError,
            ("adapter: expected a directory, found nothing",),
        ),
    ],
)
def test_what_cannot_become_a_bundle_leaves_nothing_behind(
    base: Path,
    trained: dict[str, tuple[Path, dict]],
    tmp_path: Path,
    damage: Damage,
    error: type[CaloraError],
    parts: tuple[str, ...],
) -> None:
    model, adapter = tmp_path / "in/model", tmp_path / "in/plain"
    shutil.copytree(base, model)
    shutil.copytree(trained["plain"][0], adapter)
    damage(model, adapter)
    (tmp_path / "out").mkdir()
    with pytest.raises(error) as caught:
        import_peft(model, [adapter], tmp_path / "out" / "bundle", None)
    assert "\n" not in str(caught.value)
    for part in parts:
        assert part in str(caught.value)
    assert list((tmp_path / "out").iterdir()) == []


def test_an_output_with_content_is_refused_and_kept(
    base: Path, trained: dict[str, tuple[Path, dict]], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    import_peft(base, [trained["plain"][0]], out, None)  # an empty directory is fine
    before = json.loads((out / "bundle.json").read_text())
    with pytest.raises(
        BundleError, match="output: expected a new or empty directory, found one with content"
    ):
        import_peft(base, [trained["rslora"][0]], out, None)
    assert json.loads((out / "bundle.json").read_text()) == before


@pytest.mark.parametrize(
    ("target", "why"),
    [("lm_head", "save_embedding_layers=False"), ("embed_tokens", "LoRA on an embedding")],
)
def test_what_peft_saves_beyond_linear_layers_is_refused(
    base: Path, tmp_path: Path, target: str, why: str
) -> None:
    model = AutoModelForCausalLM.from_pretrained(base)
    peft.get_peft_model(model, peft.LoraConfig(target_modules=[target])).save_pretrained(tmp_path / "more")
    with pytest.raises(UnsupportedError, match=f"found another key .*{why}"):
        import_peft(base, [tmp_path / "more"], tmp_path / "out", None)


def test_a_full_disk_at_the_last_moment_leaves_nothing_behind(
    base: Path, trained: dict[str, tuple[Path, dict]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(source: Path, target: Path) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "rename", full)
    with pytest.raises(
        BundleError, match="output: expected a bundle that can be written, found No space left"
    ):
        import_peft(base, [trained["plain"][0]], tmp_path / "out", None)
    assert list(tmp_path.iterdir()) == []


def test_two_adapters_of_one_name_are_refused(
    base: Path, trained: dict[str, tuple[Path, dict]], tmp_path: Path
) -> None:
    adapter = trained["plain"][0]
    with pytest.raises(BundleError, match="directory name: expected an id of its own, found plain again"):
        import_peft(base, [adapter, adapter], tmp_path / "out", None)
