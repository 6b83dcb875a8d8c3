"""What `inspect` shows against the files themselves."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from safetensors import safe_open

from calora_export import inspection
from calora_export.errors import CaloraError
from tests.bundles import GROUP, LAYERS, LINEARS, VOCAB, tiny_bundle


def bundle_view(path: Path) -> inspection.BundleView:
    view = inspection.inspect(path)
    assert isinstance(view, inspection.BundleView)
    return view


def package_view(path: Path) -> inspection.PackageView:
    view = inspection.inspect(path)
    assert isinstance(view, inspection.PackageView)
    return view


def tensor_bytes(directory: Path) -> int:
    """Counted by the safetensors library."""
    with safe_open(directory / "model.safetensors", "np") as file:
        return sum(file.get_tensor(name).nbytes for name in file.keys())  # noqa: SIM118


def linear_count() -> int:
    return LAYERS * sum(rows * columns for rows, columns in LINEARS.values())


@pytest.mark.parametrize("compressed", [True, False])
def test_a_bundle_counts_parameters_not_stored_numbers(tmp_path: Path, compressed: bool) -> None:
    bundle = tiny_bundle(tmp_path / "bundle", compressed=compressed, adapters=(), router=False)
    base = bundle_view(bundle).base
    hidden, norms = 64, 2 * LAYERS + 1
    assert base.parameters == 2 * VOCAB * hidden + linear_count() + norms * hidden
    if compressed:
        assert base.stored == {"int4": LAYERS * len(LINEARS), "int8": 2}
        assert base.compression == ["prune 2:4", f"int4 group {GROUP}", f"int8 group {GROUP}"]
    else:
        assert base.stored == {"dense": LAYERS * len(LINEARS) + 2} and base.compression == []
        assert base.bytes == tensor_bytes(bundle / "base") == 2 * base.parameters


def test_a_bundle_shows_its_adapters_and_router(tiny: Path) -> None:
    view = bundle_view(tiny)
    assert view.base.architecture == "llama" and view.base.bytes == tensor_bytes(tiny / "base")
    assert view.base.fingerprint == json.loads((tiny / "bundle.json").read_text())["base"]["fingerprint"]
    alpha, beta = view.adapters
    assert (alpha.id, alpha.class_index, beta.id, beta.class_index) == ("alpha", 0, "beta", 1)
    assert alpha.branches == ["lora r4 identity", "recovery r4 gelu"]
    assert (alpha.rank, beta.rank, alpha.sites) == (8, 4, 3 * LAYERS)
    assert alpha.bytes == sum(file.stat().st_size for file in (tiny / "adapters" / "alpha").iterdir())
    assert view.router is not None
    assert (view.router.classes, view.router.selection) == (2, "top_p p=0.6, weights softmax_probs")
    assert view.tasks == 2


def test_a_package_shows_what_its_files_are(package: Path) -> None:
    view = package_view(package)
    for name, entry in view.files.items():
        assert entry.size == (package / name).stat().st_size
    assert (view.target, view.recipe, view.slots) == ("onnx", "onnx-int4", 3 * LAYERS)
    alpha = view.adapters[0]
    assert alpha.branches == ["4 identity rows", "4 gelu rows"]
    assert alpha.bytes == (package / "adapters" / "alpha.onnx_adapter").stat().st_size
    assert view.router is not None and view.router.bytes == (package / "router.onnx").stat().st_size


def test_a_package_without_router_has_none(tmp_path: Path, package: Path) -> None:
    copy = Path(shutil.copytree(package, tmp_path / "package"))
    document = json.loads((copy / "package.json").read_text()) | {"router": None}
    (copy / "package.json").write_text(json.dumps(document))
    assert package_view(copy).router is None


@pytest.mark.parametrize("make", ["nothing", "file", "directory"])
def test_what_is_neither_is_said(tmp_path: Path, make: str) -> None:
    path = tmp_path / "path"
    if make == "file":
        path.touch()
    elif make == "directory":
        path.mkdir()
    found = {"nothing": "nothing", "file": "a file", "directory": "a directory without them"}[make]
    with pytest.raises(CaloraError) as caught:
        inspection.inspect(path)
    assert str(caught.value) == f"{path}: content: expected a directory with bundle.json or package.json, found {found}"
