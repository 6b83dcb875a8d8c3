"""A base straight from a quantiser becomes a bundle: what its layout says is what the manifest says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from calora_export import bundle
from calora_export.importers._draft import draft
from tests import zoo
from tests.bundles import tiny_bundle


@pytest.mark.parametrize("scheme", sorted(set(zoo.SCHEMES) - {zoo.FLOATS}))
def test_a_compressed_base_is_described_as_it_is_stored(scheme: str, tmp_path: Path) -> None:
    made = zoo.animal(scheme, tmp_path / "zoo")
    with draft(made.bundle / "base", tmp_path / "out", None, "tests"):
        pass
    imported, written = bundle.load(tmp_path / "out", deep=True), json.loads((made.bundle / "bundle.json").read_text())
    stated = written["base"]["compression"][0]
    for step in imported.manifest.base.compression:  # two where a group is as wide as some of the rows
        assert (step.scheme, step.symmetric) == (stated["scheme"], stated.get("symmetric"))
        assert step.group_size in (None, stated.get("group_size"))
    assert imported.manifest.base.fingerprint == written["base"]["fingerprint"]
    assert set(imported.adaptable) - set(made.expected) == {"lm_head"}


@pytest.mark.parametrize(
    ("key", "value", "line"),
    [
        ("symmetric", True, "base.compression[0].symmetric: expected false, as model.layers.0.mlp.down_proj is stored"),
        ("scheme", "int8", "base.compression[0].scheme: expected int4, as model.layers.0.mlp.down_proj is stored"),
        ("group_size", 64, "base.compression[0].group_size: expected 32, as model.layers.0.mlp.down_proj is stored"),
    ],
)
def test_a_manifest_that_says_otherwise_is_refused(key: str, value: object, line: str, tmp_path: Path) -> None:
    made = zoo.animal("int4, groups, zero points", tmp_path / "zoo")
    document = json.loads((made.bundle / "bundle.json").read_text())
    document["base"]["compression"][0][key] = value
    (made.bundle / "bundle.json").write_text(json.dumps(document))
    with pytest.raises(bundle.BundleError) as caught:
        bundle.load(made.bundle)
    assert line in str(caught.value)


def test_a_step_is_needed_for_what_is_packed(tmp_path: Path) -> None:
    made = zoo.animal("nf4, blocks of 64", tmp_path / "zoo")
    document = json.loads((made.bundle / "bundle.json").read_text())
    document["base"]["compression"] = []
    (made.bundle / "bundle.json").write_text(json.dumps(document))
    with pytest.raises(bundle.BundleError, match="base.compression: expected an nf4 step with .*, found none"):
        bundle.load(made.bundle)


def test_an_uncompressed_base_has_no_step(tmp_path: Path) -> None:
    tiny_bundle(tmp_path / "tiny", compressed=False, router=False, adapters=())
    with draft(tmp_path / "tiny" / "base", tmp_path / "out", None, "tests"):
        pass
    assert bundle.load(tmp_path / "out").manifest.base.compression == ()
