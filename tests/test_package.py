"""Packages as files: what they say, what they must hash to, and how they appear whole or not at all."""

from __future__ import annotations

import errno
import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from calora_export import package as packages
from calora_export.errors import FingerprintError, PackageError
from calora_export.package import written
from tests.bundles import edit_json
from tests.packages import copy_package


@pytest.fixture
def copy(package: Path, tmp_path: Path) -> Path:
    return copy_package(package, tmp_path / "package")


def one_line(caught: pytest.ExceptionInfo[BaseException]) -> str:
    text = str(caught.value)
    assert "\n" not in text
    return text


# ── what it says ────────────────────────────────────────────────────────────────────────────────────


def test_every_file_is_listed_with_its_hash_and_size(package: Path) -> None:
    listed = json.loads((package / "package.json").read_text())["files"]
    found = {
        file.relative_to(package).as_posix(): file.read_bytes() for file in package.rglob("*") if file.is_file()
    }
    del found["package.json"]
    assert listed == {
        name: {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data)} for name, data in found.items()
    }


def test_the_documented_files_are_there(package: Path) -> None:
    expected = {"model.onnx", "model.onnx.data", "router.onnx", "golden/golden.safetensors"}
    expected |= {"tokenizer/tokenizer.json", "tokenizer/router/tokenizer.json", "genai_config.json"}
    expected |= {f"adapters/{name}.onnx_adapter" for name in ("alpha", "beta")}
    assert expected <= set(packages.load(package).manifest.files)


def test_an_untouched_package_is_not_altered(package: Path) -> None:
    assert packages.load(package).altered() == []


def test_changed_and_missing_files_are_named(copy: Path) -> None:
    opened = packages.load(copy)
    data = bytearray((copy / "model.onnx").read_bytes())
    data[100] ^= 1
    (copy / "model.onnx").write_bytes(data)
    (copy / "router.onnx").unlink()
    changed, missing = sorted(opened.altered())
    entry = opened.manifest.files["model.onnx"]
    assert changed == f"model.onnx: sha256: expected {entry.sha256}, found {hashlib.sha256(data).hexdigest()}"
    assert missing == "router.onnx: file: expected a file, found nothing"


@pytest.mark.parametrize("extra", [b"", b"tail"])
def test_a_file_of_another_size_is_refused_on_opening(copy: Path, extra: bytes) -> None:
    file = copy / "adapters" / "alpha.onnx_adapter"
    size = file.stat().st_size
    file.write_bytes(file.read_bytes()[: -1 if not extra else None] + extra)
    with pytest.raises(PackageError) as caught:
        packages.load(copy)
    found = file.stat().st_size
    assert one_line(caught).startswith(f"adapters/alpha.onnx_adapter: size: expected {size}, found {found} (")


def test_a_missing_file_is_refused_on_opening(copy: Path) -> None:
    (copy / "model.onnx.data").unlink()
    with pytest.raises(PackageError, match=r"^model\.onnx\.data: size: expected \d+, found nothing"):
        packages.load(copy)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"colour": 1}, "package.json: colour: expected one of the keys schema_version, "),
        ({"schema_version": 2}, "package.json: schema_version: expected 1, found 2"),
        ({"adapters": {}}, "package.json: adapters: expected array, found {}"),
        ({"model": None}, "package.json: model: expected object, found null"),
    ],
)
def test_package_json_is_strict(copy: Path, change: dict[str, object], message: str) -> None:
    edit_json(copy / "package.json", lambda manifest: manifest.update(change))
    with pytest.raises(PackageError) as caught:
        packages.load(copy)
    assert one_line(caught).startswith(message)


def test_package_json_that_was_cut_off_is_one_line(copy: Path) -> None:
    file = copy / "package.json"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(PackageError) as caught:
        packages.load(copy)
    assert one_line(caught).startswith("package.json: JSON: expected a valid JSON document, found an error")


def test_what_is_no_package_is_said(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    for path, found in ((tmp_path, "a directory without one"), (file, "a file"), (tmp_path / "no", "nothing")):
        with pytest.raises(PackageError) as caught:
            packages.load(path)
        assert one_line(caught) == f"{path}: package: expected a directory with package.json, found {found}"


def test_an_unknown_adapter_names_the_known_ones(package: Path) -> None:
    opened = packages.load(package)
    assert opened.adapter("beta").id == "beta"
    with pytest.raises(PackageError, match="adapters: expected one of alpha, beta, found gamma"):
        opened.adapter("gamma")


def test_a_fingerprint_of_another_base_is_refused_with_both(package: Path) -> None:
    opened = packages.load(package)
    own = opened.manifest.base_fingerprint
    opened.require_fingerprint("mine", own)
    with pytest.raises(FingerprintError, match=f"mine: base_fingerprint: expected {own}, found sha256:0") as caught:
        opened.require_fingerprint("mine", "sha256:" + "0" * 64)
    assert one_line(caught)


def test_package_json_survives_its_own_reading(copy: Path) -> None:
    before = (copy / "package.json").read_bytes()
    packages.write_manifest(copy, packages.load(copy).manifest)
    assert (copy / "package.json").read_bytes() == before
    assert msgspec.json.decode(before)["schema_version"] == 1


def test_package_json_is_replaced_whole_or_not_at_all(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest, before = packages.load(copy).manifest, (copy / "package.json").read_bytes()

    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(packages.os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        packages.write_manifest(copy, msgspec.structs.replace(manifest, name="other"))
    assert (copy / "package.json").read_bytes() == before
    assert [file.name for file in copy.iterdir() if file.name.startswith(".")] == []


# ── how it appears ──────────────────────────────────────────────────────────────────────────────────


def fill(directory: Path, text: str) -> Path:
    directory.mkdir(exist_ok=True)
    (directory / "package.json").write_text(json.dumps({"schema_version": 1, "name": text}))
    return directory


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def name_in(directory: Path) -> str:
    return json.loads((directory / "package.json").read_text())["name"]


@pytest.mark.parametrize("before", ["nothing", "empty", "old package"])
def test_a_directory_appears_when_the_block_ends(tmp_path: Path, before: str) -> None:
    out = tmp_path / "deep" / "out"
    if before != "nothing":
        out.mkdir(parents=True)
    if before == "old package":
        (fill(out, "old") / "left over").touch()
    with written(out, "package.json") as directory:
        assert directory.parent == out.parent and directory != out
        fill(directory, "new")
        assert before != "old package" or name_in(out) == "old"
    assert names(out.parent) == ["out"] and names(out) == ["package.json"] and name_in(out) == "new"
    assert out.stat().st_mode & 0o777 == 0o755


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError, PackageError])
def test_an_error_in_the_block_leaves_the_old_package(tmp_path: Path, error: type[BaseException]) -> None:
    out = fill(tmp_path / "out", "old")
    with pytest.raises(error), written(out, "package.json") as directory:
        fill(directory, "new")
        raise error
    assert names(tmp_path) == ["out"] and name_in(out) == "old"


def test_a_full_disk_in_the_block_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(PackageError) as caught, written(tmp_path / "out", "package.json"):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert one_line(caught) == f"{tmp_path / 'out'}: cannot be written: No space left on device"
    assert names(tmp_path) == []


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(errno.EACCES, "Permission denied")])
def test_a_failure_in_the_moment_of_replacement_puts_the_old_package_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    out = fill(tmp_path / "out", "old")
    genuine, calls = Path.replace, []

    def second_fails(self: Path, target: Path) -> Path:
        calls.append(target)
        if len(calls) == 2:
            raise error
        return genuine(self, target)

    monkeypatch.setattr(Path, "replace", second_fails)
    expected = PackageError if isinstance(error, OSError) else KeyboardInterrupt
    with pytest.raises(expected), written(out, "package.json") as directory:
        fill(directory, "new")
    assert len(calls) == 3 and names(tmp_path) == ["out"] and name_in(out) == "old"


def foreign_files(tmp_path: Path) -> Path:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").touch()
    return tmp_path / "out"


def npm_project(tmp_path: Path) -> Path:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "package.json").write_text('{"name": "app", "version": "1.0.0"}')
    return tmp_path / "out"


def broken_marker(tmp_path: Path) -> Path:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "package.json").write_text("{")
    return tmp_path / "out"


def plain_file(tmp_path: Path) -> Path:
    (tmp_path / "out").touch()
    return tmp_path / "out"


@pytest.mark.parametrize("make", [foreign_files, npm_project, broken_marker, plain_file])
def test_what_is_not_ours_is_never_replaced(tmp_path: Path, make: Callable[[Path], Path]) -> None:
    out = make(tmp_path)
    before = names(out) if out.is_dir() else None
    with pytest.raises(PackageError) as caught, written(out, "package.json"):
        raise AssertionError("the block must not begin")
    assert one_line(caught).startswith(f"{out}: output: expected a new or empty directory, or one with a package.json")
    assert names(tmp_path) == ["out"] and before == (names(out) if out.is_dir() else None)


@pytest.mark.parametrize("path", [".", "..", "/"])
def test_the_current_directory_cannot_be_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(PackageError, match="output: expected a directory by its own name"), written(
        Path(path), "package.json"
    ):
        raise AssertionError("the block must not begin")


def test_a_parent_that_is_a_file_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(PackageError) as caught, written(tmp_path / "file" / "out", "package.json"):
        raise AssertionError("the block must not begin")
    assert one_line(caught).startswith(f"{tmp_path / 'file' / 'out'}: cannot be written: ")
