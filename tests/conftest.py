"""Exports that tests share: each costs seconds, so a session makes it once. Copy a package to change it."""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import pytest

from tests.bundles import tiny_bundle

if TYPE_CHECKING:
    from tests.families import Family

Export = Callable[[str], Path]
Families = Callable[[str], "Family"]
Variant = Callable[..., Path]


class Lower(Protocol):
    def __call__(self, name: str, recipe: str = "onnx-fp32") -> Path: ...


def pytest_configure(config: pytest.Config) -> None:
    # Tiny matrices on several threads wait for each other, most of all on a busy machine. Read when torch is imported.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    # PEFT 0.21 asks transformers 5.23 for a property by its old name.
    config.addinivalue_line("filterwarnings", "ignore:`is_gradient_checkpointing`:FutureWarning")


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny bundle: int4 linears, int8 tables, two adapters with recovery, a router."""
    return tiny_bundle(tmp_path_factory.mktemp("tiny") / "bundle")


@pytest.fixture(scope="session")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The base of `tiny` with neither adapters nor a router."""
    return tiny_bundle(tmp_path_factory.mktemp("bare") / "bundle", router=False, adapters=())


@pytest.fixture(scope="session")
def exported(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Export:
    """Recipe name → the package that it makes of the tiny bundle."""
    from calora_export import pipeline

    def export(recipe: str) -> Path:
        return pipeline.export(tiny, tmp_path_factory.mktemp(recipe) / "package", recipe).path

    return functools.cache(export)


@pytest.fixture(scope="session")
def package(exported: Export) -> Path:
    """The tiny bundle on ONNX Runtime, its packed weights as they are."""
    return exported("onnx-int4")


@pytest.fixture(scope="session")
def package_fp32(exported: Export) -> Path:
    """The tiny bundle on ONNX Runtime, every weight in fp32."""
    return exported("onnx-fp32")


@pytest.fixture(scope="session")
def package_executorch(exported: Export) -> Path:
    """The tiny bundle on ExecuTorch, int4 linears and int8 activations."""
    return exported("executorch-8da4w")


@pytest.fixture(scope="session")
def package_executorch_fp32(exported: Export) -> Path:
    """The tiny bundle on ExecuTorch, every weight in fp32."""
    return exported("executorch-fp32")


@pytest.fixture(scope="session")
def variant(tmp_path_factory: pytest.TempPathFactory) -> Variant:
    """Export a bundle with a recipe that ships and some of its values changed."""
    from calora_export import pipeline, resources

    def export(bundle: Path, recipe: str, **changes: str | int) -> Path:
        text = resources.recipes()[recipe].read_text()
        for key, value in changes.items():
            text = f"{key} = {value!r}\n" + re.sub(rf"(?m)^{key} = .*\n", "", text)
        directory = tmp_path_factory.mktemp("variant")
        (directory / "recipe.toml").write_text(text)
        return pipeline.export(bundle, directory / "package", str(directory / "recipe.toml")).path

    return functools.cache(export)


@pytest.fixture(scope="session")
def families(tmp_path_factory: pytest.TempPathFactory) -> Families:
    """Name of tests.families → that family, with its bundle on disk."""
    from tests.families import make

    return functools.cache(lambda name: make(name, tmp_path_factory.mktemp(name)))


@pytest.fixture(scope="session")
def lowered(families: Families) -> Lower:
    """Name of tests.families → its package, in fp32 unless another recipe is named."""
    from calora_export import pipeline

    def export(name: str, recipe: str = "onnx-fp32") -> Path:
        family = families(name)
        return pipeline.export(family.bundle, family.directory / recipe, recipe).path

    return functools.cache(export)
