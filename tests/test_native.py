"""Building and keeping native programs; what they compute is tested with the runner."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from calora_export import native, resources
from calora_export.errors import DeviceError

pytest.importorskip("executorch", reason="the executorch extra is not installed")

CMAKE = """
cmake_minimum_required(VERSION 3.28)
project(small CXX)
set(CMAKE_BUILD_RPATH_USE_ORIGIN ON)
option(CALORA_RUNNER "" ON)
add_library(calora_kernels SHARED slot.cpp)
if(CALORA_RUNNER)
  add_executable(calora_runner main.cpp)
  target_link_libraries(calora_runner PRIVATE calora_kernels)
endif()
"""
SLOT, MAIN = "int answer() { return 42; }\n", "int answer(); int main() { return answer(); }\n"


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project with the same products that compiles at once, and a cache of its own."""
    directory = tmp_path / "executorch" / "runner"
    directory.mkdir(parents=True)
    for name, text in (("CMakeLists.txt", CMAKE), ("slot.cpp", SLOT), ("main.cpp", MAIN)):
        (directory / name).write_text(text)
    monkeypatch.setattr(resources, "target_dir", lambda name: tmp_path / name)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return directory


@pytest.fixture
def cmake() -> None:
    if not (shutil.which("c++") or shutil.which("g++")):
        pytest.skip("no C++ compiler")


def cached(source: Path) -> list[str]:
    """What the cache holds, hidden files too."""
    cache = source.parents[1] / "cache" / "calora-export"
    return sorted(path.name.split("-")[0] for path in cache.iterdir()) if cache.is_dir() else []


# ── what is kept ────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.usefixtures("cmake")
def test_a_program_is_built_once_and_runs_from_the_cache(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = native.runner("executorch")
    assert subprocess.run([program]).returncode == 42, "with the library that lies beside it"
    files = {path.name for path in program.parent.iterdir()}
    assert files == {native.RUNNER, native.KERNELS["executorch"], native.SYSTEM}
    assert cached(source) == ["runner"]
    monkeypatch.setattr(native, "_run", lambda *_: pytest.fail("built again"))
    assert native.runner("executorch") == program


@pytest.mark.usefixtures("cmake")
def test_the_kernels_need_less_than_the_runner_does(source: Path) -> None:
    (source / "main.cpp").write_text("#error needs a library that is not installed\n")
    library = native.kernels("executorch")
    assert library.name == native.KERNELS["executorch"] and cached(source) == ["kernels"]


@pytest.mark.usefixtures("cmake")
def test_changed_sources_are_built_again_beside_the_old(source: Path) -> None:
    before = native.runner("executorch")
    (source / "slot.cpp").write_text(SLOT.replace("42", "43"))
    after = native.runner("executorch")
    assert after != before
    assert [subprocess.run([program]).returncode for program in (before, after)] == [42, 43]


def test_the_key_is_of_names_contents_version_place_and_processor(
    source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine = native._machine(native.host_arch())

    def key(machine: native.Machine = machine) -> str:
        return native._key(source, "executorch", machine)

    keys = [key(), key()]
    assert keys[0] == keys[1]
    (source / "slot.cpp").write_text(SLOT + "// changed\n")
    keys.append(key())
    (source / "slot.cpp").rename(source / "other.cpp")
    keys.append(key())
    shared = source.parents[1] / "runner"
    shared.mkdir()
    (shared / "fields.cpp").write_text("// what all runners share\n")
    keys.append(key())
    keys.append(key(native.Machine("aarch64", "aarch64-linux-gnu-g++", ("--toolchain", "x"))))
    monkeypatch.setattr(native.metadata, "version", lambda _: "1.0")
    keys.append(key())
    monkeypatch.setattr(native, "_installed", lambda _: Path("/elsewhere"))
    keys.append(key())
    assert len(set(keys[1:])) == len(keys) - 1


def test_the_cache_is_where_the_system_keeps_caches(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert resources.cache() == tmp_path / "calora-export"
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    assert resources.cache() == Path.home() / ".cache" / "calora-export"


# ── what cannot be built ────────────────────────────────────────────────────────────────────────────────────


def refused(source: Path) -> str:
    """The line that a user gets; nothing is left behind."""
    with pytest.raises(DeviceError) as caught:
        native.runner("executorch")
    assert "\n" not in str(caught.value) and str(caught.value).startswith("host: ")
    assert cached(source) == []
    return str(caught.value)


@pytest.mark.usefixtures("cmake")
def test_a_compile_error_is_one_line(source: Path) -> None:
    (source / "main.cpp").write_text("int main() { return missing; }\n")
    assert "missing" in refused(source)


@pytest.mark.usefixtures("cmake")
def test_what_cmake_does_not_find_is_said(source: Path) -> None:
    (source / "CMakeLists.txt").write_text(f"{CMAKE}find_path(PLACE no/such.hpp REQUIRED)\n")
    line = refused(source)
    assert "Could not find PLACE" in line and "nlohmann-json" in line


def test_a_missing_compiler_is_said(source: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    tools = tmp_path / "bin"
    tools.mkdir()
    make = shutil.which("make") or shutil.which("ninja")
    if make is None:
        pytest.skip("neither make nor ninja")
    (tools / Path(make).name).symlink_to(make)
    monkeypatch.setenv("PATH", str(tools))
    monkeypatch.delenv("CXX", raising=False)
    line = refused(source)
    assert "needs a C++ compiler" in line and "CMAKE_CXX_COMPILER" in line


def test_a_missing_cmake_is_said(source: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    monkeypatch.setenv("PATH", str(tmp_path))
    line = refused(source)
    assert "cmake: expected 3.28 or newer, found none" in line and "pip install" in line


def test_a_missing_executorch_is_said(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native.importlib.util, "find_spec", lambda _: None)
    line = refused(source)
    assert "executorch: expected installed, found not" in line and "calora-export[executorch]" in line


def test_a_cache_that_cannot_be_written_is_said(source: Path) -> None:
    (source.parents[1] / "cache").write_text("a file where a directory should be")
    assert "cache/calora-export cannot be written" in refused(source)
