"""A tiny bundle in every scheme, its linear layers packed by the real quantisers or as their formats say."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from calora_export.tensors import TensorIndex
from tests.bundles import edit_json, tiny_bundle
from tests.layouts import published
from tests.layouts.published import Published, metadata_text

Pack = Callable[[str, Tensor], Published]


@dataclass(frozen=True)
class Kept:
    """A scheme of `formats`: how a module's weight is packed, and what bundle.json says of it."""

    pack: Pack
    step: dict[str, object]


@dataclass(frozen=True)
class Animal:
    """A bundle and the float32 values of its linear layers, as the quantisers' own code has them."""

    bundle: Path
    expected: dict[str, np.ndarray]


def _tensors(bits: int, group: int, form: str = "pack-quantized") -> Kept:
    step: dict[str, object] = {"scheme": f"int{bits}", "symmetric": True} | ({"group_size": group} if group else {})
    return Kept(lambda module, weight: published.compressed_tensors(module, weight, bits, group, True, form), step)


def _gptq(bits: int, group: int, symmetric: bool, act_order: bool, form: str = "gptq") -> Kept:
    def pack(module: str, weight: Tensor) -> Published:
        return published.gptq(module, *weight.shape, bits, group, symmetric, act_order, form)

    return Kept(pack, {"scheme": f"int{bits}", "group_size": group, "symmetric": symmetric})


FLOATS = "fp32, fp16, bf16"


def _floats(module: str, weight: Tensor) -> Published:
    """Each of the three in some modules."""
    made = weight.to((torch.float32, torch.float16, torch.bfloat16)[len(module) % 3])
    return Published({}, {f"{module}.weight": made}, made.float().numpy())


SCHEMES: dict[str, Kept] = {
    FLOATS: Kept(_floats, {}),
    "int8, rows": _tensors(8, 0, "int-quantized"),
    "int8, rows, W8A8": Kept(
        _tensors(8, 0, "int-quantized").pack, {"scheme": "int8", "symmetric": True, "activations": "int8"}
    ),
    "int8, rows, zero points": Kept(
        lambda module, weight: published.compressed_tensors(module, weight + 0.05, 8, 0, False, "int-quantized"),
        {"scheme": "int8", "symmetric": False},
    ),
    "int8, groups": _tensors(8, 32),
    "int8, groups, zero points": _gptq(8, 64, False, False, "gptq_v2"),
    "int4, rows": _tensors(4, 0),
    "int4, groups": _tensors(4, 32),
    "int4, groups, fp16 scales": _gptq(4, 32, True, False),
    "int4, groups of 16": _tensors(4, 16),
    "int4, groups, zero points": Kept(
        lambda module, weight: published.awq(module, *weight.shape, 32),
        {"scheme": "int4", "group_size": 32, "symmetric": False},
    ),
    "int4, groups, act-order": _gptq(4, 32, False, True),
    "nf4, blocks of 64": Kept(
        lambda module, weight: published.nf4(module, weight, True), {"scheme": "nf4", "group_size": 64}
    ),
}


def animal(scheme: str, path: Path) -> Animal:
    """Write the bundle into the new directory `path`: neither adapters nor a router, tables in bf16."""
    kept = SCHEMES[scheme]
    tiny_bundle(path, compressed=False, router=False, adapters=())
    file = path / "base" / "model.safetensors"
    tensors, expected, metadata = dict(load_file(file)), {}, {"format": "pt"}
    modules = [name.removesuffix(".weight") for name in tensors if name.endswith("_proj.weight")]
    packed = {module: kept.pack(module, tensors.pop(f"{module}.weight").float()) for module in modules}
    for module, made in packed.items():
        tensors |= {name: tensor.contiguous() for name, tensor in made.tensors.items()}
        metadata |= {name: text for name, text in metadata_text(made).items() if name != "tensor_names"}
        expected[module] = made.expected
    save_file(tensors, file, metadata)
    if config := dict(packed[modules[0]].config):
        edit_json(path / "base" / "config.json", lambda document: document.update(quantization_config=config))

    def state(document: dict) -> None:
        sites = sorted({f"model.layers.*.{module.split('.', 3)[3]}" for module in modules})
        document["base"]["compression"] = [{**kept.step, "sites": sites}] if kept.step else []
        document["base"]["fingerprint"] = TensorIndex.open(path / "base").fingerprint()

    edit_json(path / "bundle.json", state)
    return Animal(path, expected)


def has(found: list[np.ndarray], wanted: np.ndarray) -> bool:
    """Whether one of the matrices has `wanted` as some of its rows, bit for bit."""
    rows, columns = wanted.shape
    for matrix in found:
        if matrix.shape[1:] == (columns,):
            for start in np.flatnonzero((matrix == wanted[0]).all(axis=1)):
                if matrix[start : start + rows].tobytes() == wanted.tobytes():
                    return True
    return False
