"""The bundle of the benchmark: the same weights, compressed as docs/bundle.md says."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from calora_export.compression import pack_int32, quantize_symmetric
from calora_export.manifest import AdapterSpec, BaseSpec, Branch, CompressionStep, Manifest, write_manifest
from calora_export.tensors import TensorIndex

from .shapes import ADAPTERS, ALPHA, BITS, GROUP, RANK, Shape

EMBEDDING = "model.embed_tokens"


def write_bundle(shape: Shape, model: Path, adapters: Path, bundle: Path) -> None:
    """int4 in groups of 32 for every linear and the tied embedding, fp32 norms; no router.

    `adapters` holds one PEFT directory per id; the late one is copied too, but bundle.json does not name it.
    """
    base = bundle / "base"
    base.mkdir(parents=True)
    _write_base(model, base)
    shutil.copytree(adapters, bundle / "adapters")
    sites = tuple(sorted({f"model.layers.*.{site.split('.', 3)[3]}" for site, _, _ in shape.linears()}))
    fingerprint = TensorIndex.open(base).fingerprint()
    branch = Branch(role="lora", sites=sites, r=RANK, alpha=ALPHA, scale=ALPHA / RANK, act="identity")
    specs = tuple(
        AdapterSpec(id=name, task=name, class_index=index, base_fingerprint=fingerprint, branches=(branch,))
        for index, name in enumerate(ADAPTERS)
    )
    step = CompressionStep(scheme="int4", sites=(*sites, EMBEDDING), group_size=GROUP, symmetric=True)
    manifest = Manifest(
        schema_version=1,
        name="benchmark",
        base=BaseSpec(fingerprint=fingerprint, compression=(step,)),
        adapters=specs,
        router=None,
        tasks=(),
        provenance={"weights": "random"},
    )
    write_manifest(bundle, manifest)


def _write_base(model: Path, base: Path) -> None:
    from safetensors.numpy import save_file

    for path in model.iterdir():
        if path.suffix == ".json":
            shutil.copy(path, base)
    weights = {"num_bits": BITS, "type": "int", "symmetric": True, "strategy": "group", "group_size": GROUP}
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    config["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": {"targets": ["Linear", "Embedding"], "weights": weights}},
        "ignore": ["lm_head"],
    }
    (base / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    tensors = TensorIndex.open(model)
    save_file(dict(_compressed(tensors)), base / "model.safetensors")


def _compressed(tensors: TensorIndex) -> Iterator[tuple[str, np.ndarray]]:
    for name in tensors.names():
        array = tensors.array(name)
        if array.ndim == 1:
            yield name, np.ascontiguousarray(array)
            continue
        packed = quantize_symmetric(array, BITS, GROUP)
        yield f"{name}_packed", pack_int32(packed.q, BITS)
        yield f"{name}_scale", packed.scale
        yield f"{name}_shape", np.array(packed.shape, np.int64)
