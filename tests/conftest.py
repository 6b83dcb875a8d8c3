"""Exports that tests share: each costs seconds, so a session makes it once. Copy a package to change it."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.bundles import tiny_bundle

if TYPE_CHECKING:
    from tests.families import Family

Export = Callable[[str], Path]
Families = Callable[[str], "Family"]


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
def families(tmp_path_factory: pytest.TempPathFactory) -> Families:
    """Name of tests.families → that family, with its bundle on disk."""
    from tests.families import make

    return functools.cache(lambda name: make(name, tmp_path_factory.mktemp(name)))


@pytest.fixture(scope="session")
def lowered(families: Families) -> Export:
    """Name of tests.families → its package on ONNX Runtime in fp32."""
    from calora_export import pipeline

    def export(name: str) -> Path:
        family = families(name)
        return pipeline.export(family.bundle, family.directory / "package", "onnx-fp32").path

    return functools.cache(export)
