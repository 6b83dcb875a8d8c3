"""Exports that tests share: each costs seconds, so a session makes it once. Copy a package before you change it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.bundles import tiny_bundle

Export = Callable[[str], Path]


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny bundle: int4 linears, int8 tables, two adapters with recovery, a router."""
    return tiny_bundle(tmp_path_factory.mktemp("tiny") / "bundle")


@pytest.fixture(scope="session")
def exported(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Export:
    """Recipe name → the package that it makes of the tiny bundle."""
    from calora_export import pipeline

    made: dict[str, Path] = {}

    def export(recipe: str) -> Path:
        if recipe not in made:
            made[recipe] = pipeline.export(tiny, tmp_path_factory.mktemp(recipe) / "package", recipe).path
        return made[recipe]

    return export


@pytest.fixture(scope="session")
def package(exported: Export) -> Path:
    """The tiny bundle on ONNX Runtime, its packed weights as they are."""
    return exported("onnx-int4")


@pytest.fixture(scope="session")
def package_fp32(exported: Export) -> Path:
    """The tiny bundle on ONNX Runtime, every weight in fp32."""
    return exported("onnx-fp32")
