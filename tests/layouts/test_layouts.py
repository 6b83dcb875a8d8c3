from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from calora_export import layouts
from calora_export.compression import PackedWeight
from calora_export.errors import BundleError, CaloraError, UnsupportedError
from calora_export.tensors import TensorIndex
from tests.layouts import published
from tests.layouts.published import Published, weights

M = "model.layers.0.mlp.up_proj"
PACK, WHOLE = "pack-quantized", "int-quantized"

CASES: dict[str, Callable[[], Published]] = {
    **{
        f"compressed-tensors {form} int{bits} {group or 'rows'} {'sym' if symmetric else 'asym'}": (
            lambda bits=bits, group=group, symmetric=symmetric, form=form: published.compressed_tensors(
                M, weights(24, 96, 0.0 if symmetric else 0.05), bits, group, symmetric, form
            )
        )
        for form, bits, group in [(PACK, 4, 32), (PACK, 4, 0), (PACK, 8, 32), (PACK, 8, 0), (WHOLE, 8, 0)]
        for symmetric in (True, False)
    },
    "compressed-tensors, columns that do not fill a word": lambda: published.compressed_tensors(
        M, weights(12, 20), 4, 0, False, PACK
    ),
    "compressed-tensors, act-order": lambda: published.packed_act_order(M, 24, 256, 64),
    "nf4": lambda: published.nf4(M, weights(24, 128), double=False),
    "nf4, nested": lambda: published.nf4(M, weights(40, 1024), double=True),
    "nf4, blocks across rows": lambda: published.nf4(M, weights(24, 96), double=True),
    "llm.int8": lambda: published.llm_int8(M, weights(24, 96)),
    **{
        f"torchao int{bits} {group or 'rows'} {'sym' if symmetric else 'asym'}": (
            lambda bits=bits, group=group, symmetric=symmetric: published.torchao(
                M, weights(24, 96, 0.0 if symmetric else 0.05), bits, group, symmetric
            )
        )
        for bits, group, symmetric in [(4, 32, True), (4, 32, False), (8, 0, True), (8, 0, False), (0, 0, True)]
    },
    **{
        f"{form} int{bits} {group} {'sym' if symmetric else 'asym'} {'act-order' if act_order else ''}": (
            lambda bits=bits, group=group, symmetric=symmetric, act_order=act_order, form=form: published.gptq(
                M, 24, 256, bits, group, symmetric, act_order, form
            )
        )
        for form in ("gptq", "gptq_v2")
        for bits, group, symmetric, act_order in (
            (4, 32, True, False),
            (4, 64, False, False),
            (4, 128, False, True),
            (8, 32, True, True),
            (8, 64, False, False),
        )
    },
    "awq 32": lambda: published.awq(M, 24, 256, 32),
    "awq 128": lambda: published.awq(M, 24, 256, 128),
}


def stored(case: Published, directory: Path) -> TensorIndex:
    tensors = {name: tensor.contiguous() for name, tensor in case.tensors.items()}
    tensors["model.norm.weight"] = torch.ones(8)
    save_file(tensors, directory / "model.safetensors", published.metadata_text(case))
    return TensorIndex.open(directory, "base")


def opened(case: Published, directory: Path) -> layouts.Checkpoint:
    return layouts.checkpoint(stored(case, directory), json.dumps(dict(case.config)).encode(), "base/config.json")


@pytest.mark.parametrize("name", CASES)
def test_a_weight_is_the_numbers_that_its_library_reads(name: str, tmp_path: Path) -> None:
    case = CASES[name]()
    checkpoint = opened(case, tmp_path)
    assert list(checkpoint.formats) == [M]
    weight, stated = checkpoint.read(M), checkpoint.formats[M]
    assert isinstance(weight, PackedWeight)
    assert weight.q.dtype == np.int8 and weight.shape == case.expected.shape == stated.shape
    assert (weight.bits, weight.group_size) == (stated.bits, stated.group_size)
    assert (weight.zero is None, weight.codebook is not None) == (stated.symmetric, stated.codebook)
    made = weight.dequantize()
    assert made.dtype == np.float32
    if name == "llm.int8":  # the library multiplies by the scale and then by 1 / 127: two roundings, not one
        np.testing.assert_allclose(made, case.expected, rtol=3e-7, atol=0)
    else:
        np.testing.assert_array_equal(made, case.expected)


@pytest.mark.parametrize("name", [name for name in CASES if "asym" in name or name.startswith(("awq", "nf4"))])
def test_the_cases_test_something(name: str, tmp_path: Path) -> None:
    weight = opened(CASES[name](), tmp_path).read(M)
    assert isinstance(weight, PackedWeight)
    assert weight.codebook is not None or (weight.zero is not None and weight.zero.any())


def test_the_converter_of_compressed_tensors_reads_awq_as_we_do(tmp_path: Path) -> None:
    from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32
    from compressed_tensors.entrypoints.convert.converters.autoawq import AutoAWQConverter

    case = published.awq(M, 24, 256, 32)
    weight = opened(case, tmp_path).read(M)
    assert isinstance(weight, PackedWeight) and weight.zero is not None
    theirs = AutoAWQConverter(group_size=32).process(dict(case.tensors))
    assert np.array_equal(weight.q, unpack_from_int32(theirs[f"{M}.weight_packed"], 4, torch.Size((24, 256))))
    zero = unpack_from_int32(theirs[f"{M}.weight_zero_point"], 4, torch.Size((24, 8)), packed_dim=0)
    assert np.array_equal(weight.zero, zero)


def _gptq(**changes: object) -> Published:
    case = published.gptq(M, 24, 256, 4, 64, True, False, "gptq")
    return Published({**case.config, **changes}, case.tensors, case.expected)


def _awq(**changes: object) -> Published:
    case = published.awq(M, 24, 256, 32)
    return Published({**case.config, **changes}, case.tensors, case.expected)


def _with(case: Published, tensor: str, values: torch.Tensor) -> Published:
    return Published(case.config, {**case.tensors, f"{M}.{tensor}": values}, case.expected, case.metadata)


TOP = torch.full((4, 3), -1, dtype=torch.int32)


@pytest.mark.parametrize(
    ("case", "error", "line"),
    [
        (lambda: _gptq(bits=3), UnsupportedError, "quantization_config.bits: expected 4 or 8, found 3"),
        (lambda: _gptq(checkpoint_format="marlin"), UnsupportedError, "expected gptq or gptq_v2, found marlin"),
        (lambda: _gptq(group_size=0), BundleError, "group_size: expected -1 or at least 1, found 0"),
        (lambda: _gptq(group_size=48), BundleError, "qweight: expected a multiple of group_size 48, found 256 columns"),
        (lambda: _gptq(group_size=32), BundleError, "scales: expected F32 or F16 or BF16 [8, 24], found F16 [4, 24]"),
        (lambda: _with(_gptq(), "qzeros", TOP), UnsupportedError, "less than 15, found 15 (libraries read 15 as 0 or"),
        (lambda: _with(_gptq(), "qzeros", TOP * 0), BundleError, "8 everywhere, as quantization_config.sym says"),
        (lambda: _with(_gptq(), "g_idx", torch.zeros(256).int()), UnsupportedError, "4 groups of 64 columns, found"),
        (lambda: _awq(bits=8), UnsupportedError, "quantization_config.bits: expected 4, found 8"),
        (lambda: _awq(version="gemv"), UnsupportedError, "quantization_config.version: expected gemm, found gemv"),
        (lambda: _awq(group_size=64), BundleError, "scales: expected F32 or F16 or BF16 [4, 24], found F16 [8, 24]"),
        (
            lambda: Published({"quant_method": "torchao"}, CASES["torchao int4 32 sym"]().tensors, np.zeros(0)),
            BundleError,
            "__metadata__.model.layers.0.mlp.up_proj.weight: expected torchao's description of the tensor",
        ),
        (
            lambda: _with(CASES["nf4"](), "weight.absmax", torch.ones(7)),
            BundleError,
            "weight.absmax: expected F32 [48], found F32 [7]",
        ),
    ],
)  # fmt: skip
def test_what_cannot_be_read_is_one_line(
    case: Callable[[], Published], error: type[CaloraError], line: str, tmp_path: Path
) -> None:
    with pytest.raises(error) as caught:
        opened(case(), tmp_path).read(M)
    assert "\n" not in str(caught.value)
    assert line in str(caught.value)


@pytest.mark.parametrize("name", ["nf4", "llm.int8", "torchao int4 32 sym", "awq 32"])
def test_packed_weights_without_a_config_are_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="quantization_config: expected one for the packed weights, found nothing"):
        layouts.checkpoint(stored(CASES[name](), tmp_path), None, "base/config.json")
