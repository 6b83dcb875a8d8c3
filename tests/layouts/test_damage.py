"""Whatever is wrong with a checkpoint's tensors, config or metadata is one line, never a traceback."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from calora_export.errors import CaloraError
from tests.layouts.published import Published
from tests.layouts.test_layouts import CASES, M, opened

NAMES = (
    "compressed-tensors pack-quantized int4 32 asym",
    "compressed-tensors int-quantized int8 rows asym",
    "compressed-tensors, act-order",
    "nf4, nested",
    "llm.int8",
    "torchao int4 32 asym",
    "gptq int4 128 asym act-order",
    "awq 32",
)
VALUES = (None, -5, 0, "x", [1], {"a": 1}, 3.5, True, 10**9)
TEXTS = ("{", "[]", "null", '{"_type": "IntxUnpackedToInt8Tensor", "_data": {}}', '{"_type": 3, "_data": []}')


def damaged(tensor: Tensor) -> Iterator[Tensor | None]:
    """Missing, of other sizes, of other types, of other values."""
    yield from (None, tensor.flatten()[:0], tensor.flatten(), tensor[None, None])
    yield from (tensor.to(kind) for kind in (torch.float64, torch.int64, torch.uint8, torch.int8))
    yield from (torch.zeros_like(tensor), torch.ones_like(tensor), tensor.flatten()[:1])
    yield from ([tensor.mT] if tensor.dim() == 2 else [])
    yield torch.full_like(tensor, 255 if tensor.dtype == torch.uint8 else -3)


def variants(case: Published) -> Iterator[Published]:
    for key, tensor in case.tensors.items():
        for other in damaged(tensor):
            tensors = {name: kept for name, kept in case.tensors.items() if name != key}
            tensors |= {} if other is None else {key: other}
            yield Published(case.config, tensors, case.expected, case.metadata)
    for key in case.config:
        for value in VALUES:
            yield Published({**case.config, key: value}, case.tensors, case.expected, case.metadata)
    for text in TEXTS if case.metadata else ():
        yield Published(case.config, case.tensors, case.expected, {**case.metadata, f"{M}.weight": text})


@pytest.mark.parametrize("name", NAMES)
def test_damage_is_one_line(name: str, tmp_path: Path) -> None:
    refused = 0
    for number, case in enumerate(variants(CASES[name]())):
        directory = tmp_path / str(number)
        directory.mkdir()
        try:
            checkpoint = opened(case, directory)
            if M in checkpoint.formats:
                checkpoint.read(M).dequantize()
        except CaloraError as error:
            refused += 1
            assert "\n" not in str(error)
    assert refused > 10
