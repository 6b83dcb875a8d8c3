"""A base that reads its activations in int8, as CA-LoRA's W8A8 was trained, on every target.

The reference is transformers' model whose linear layers multiply integers, in int64, and scale the sums.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import save_file
from torch import Tensor, nn

from calora_export import bundle as bundles
from calora_export import package as packages
from calora_export import pipeline, runtimes
from calora_export.composing import compose
from calora_export.errors import BundleError, UnsupportedError
from calora_export.importers.peft import run as import_peft
from calora_export.model import Rows
from calora_export.weights import Weights
from tests.bundles import copy_bundle, edit_json, write_json, write_tokenizer
from tests.conftest import Variant
from tests.contract import logits
from tests.families import CONTEXT, PREFILL, CaLora, Family, base, tokens
from tests.layouts.published import compressed_tensors

RECIPES = (
    ("torch-fp32", {}, 1e-4),
    ("onnx-fp32", {}, 1e-4),
    ("executorch-fp32", {}, 1e-4),
    ("executorch-fp32", {"kernels": "calora"}, 1e-4),
    ("coreml-fp16", {}, 0.5),
)
STEP_OVER = 0.1
STEP = {"scheme": "int8", "sites": ["model.layers.*.self_attn.*", "model.layers.*.mlp.*"], "symmetric": True}
DYNAMIC = {"num_bits": 8, "type": "int", "symmetric": True, "dynamic": True, "strategy": "token"}


def integers(x: Tensor, dim: int = -1) -> tuple[Tensor, Tensor]:
    """x / scale, rounded, and scale = max |x| / 127."""
    scale = x.abs().amax(dim, keepdim=True) / 127
    return (x / scale).round().long(), scale


def multiply(q: Tensor, scale: Tensor, x: Tensor) -> Tensor:
    """W8A8: q int64 [out, in], scale [out, 1]."""
    steps, step = integers(x)
    return ((steps @ q.T).double() * step.double() * scale.double().T).float()


@pytest.fixture(scope="module", params=["floats", "compressed-tensors"])
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Family:
    """fp16 weights that inference rounds, as bmcook leaves them; or stored as int8, as llm-compressor saves them."""
    directory, hf = tmp_path_factory.mktemp("w8a8"), base("llama")
    for parameter in hf.parameters():
        parameter.data = parameter.data.half().float()
    hf.config.save_pretrained(directory / "base")
    write_tokenizer(directory / "base")
    tensors, config = {name: tensor.half() for name, tensor in hf.state_dict().items()}, hf.config.to_dict()
    for site, module in hf.named_modules():
        if not isinstance(module, nn.Linear) or site == "lm_head":
            continue
        if request.param == "floats":
            scale = (module.weight.abs().amax(-1, keepdim=True) / 127).half().float()
            q = (module.weight / scale).round().long()
        else:
            made = compressed_tensors(site, module.weight.detach(), 8, 0, True, "int-quantized")
            del tensors[f"{site}.weight"]
            tensors |= made.tensors
            q, scale = made.tensors[f"{site}.weight"].long(), made.tensors[f"{site}.weight_scale"].float()
        module.forward = partial(multiply, q, scale)
    if request.param != "floats":
        weights = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel"}
        group = {"targets": ["Linear"], "weights": weights, "input_activations": DYNAMIC}
        quantised = {"quant_method": "compressed-tensors", "format": "int-quantized", "config_groups": {"all": group}}
        write_json(directory / "base" / "config.json", config | {"quantization_config": quantised})
    save_file(tensors, directory / "base" / "model.safetensors")
    import_peft(directory / "base", [adapted(hf).save(directory / "calora" / "one")], directory / "bundle")
    if request.param == "floats":
        steps = [STEP | {"activations": "int8"}]
        edit_json(directory / "bundle" / "bundle.json", lambda manifest: manifest["base"].update(compression=steps))
    return Family(request.param, hf, directory)


def adapted(hf: nn.Module) -> CaLora:
    return CaLora.draw(hf, (4, 3), 10, ("q_proj", "gate_proj"), ("v_proj", "down_proj"))


def expected(family: Family, weight: float) -> np.ndarray:
    return logits.of_transformers(family, adapted(family.hf), weight)


def close(made: np.ndarray, reference: np.ndarray, limit: float) -> None:
    """Logits reach ±10. A last bit may take a value over the edge between two steps: not before the first position."""
    error = np.abs(made - reference).max(-1)
    assert error.min() < limit and error.max() < max(limit, STEP_OVER)


@pytest.mark.parametrize("weight", [0.0, 1.0])
def test_the_reference_multiplies_what_training_multiplied(family: Family, weight: float) -> None:
    """Adapters read x as it is."""
    bundle = bundles.load(family.bundle, deep=True)
    assert bundle.w8a8 == set(bundle.linears) - {"lm_head", "model.embed_tokens"}
    model = compose(bundle, bundle.weight, context=CONTEXT, activations="int8_block")
    close(logits.of_model(model, bundle, weight), expected(family, weight), 1e-4)


def test_its_rounding_is_seen(family: Family) -> None:
    bundle = bundles.load(family.bundle)
    plain = compose(bundle, lambda module: bundle.weights.read(module), context=CONTEXT)
    error = np.abs(logits.of_model(plain, bundle, 0.0) - expected(family, 0.0)).max(-1)
    assert error.min() > 1e-2 and error.max() > STEP_OVER


@pytest.mark.parametrize(("name", "changes", "limit"), RECIPES, ids=str)
def test_targets_that_hold_it_round_as_it_does(
    family: Family, variant: Variant, name: str, changes: dict[str, str | int], limit: float
) -> None:
    package = packages.load(variant(family.bundle, name, **changes))
    session = runtimes.load(package.manifest.target).open_session(package, 1)
    for weight, mix in ((0.0, {}), (1.0, {"one": 1.0})):
        close(logits.of_session(session, mix), expected(family, weight), limit)


@pytest.mark.parametrize(("name", "limit"), [("onnx-int4", 1e-3), ("coreml-int8", 0.2), ("executorch-8da8w", 0.2)])
def test_packed_recipes_compute_what_they_say(family: Family, tmp_path: Path, name: str, limit: float) -> None:
    """What else they round is in the reference of the target."""
    bundle, package = bundles.load(family.bundle), pipeline.export(family.bundle, tmp_path / "package", name)
    settings = package.manifest.settings
    model = compose(bundle, Weights(bundle, settings), context=CONTEXT, activations=settings.activations)
    ids = tokens(PREFILL)
    reference = model(ids, model.empty_cache(), Rows.none(), last_only=True)[0][0, -1].numpy()
    made = runtimes.load(settings.target).open_session(package, 1).extend(ids[0].tolist())[-1]
    assert np.abs(made - reference).max() < limit


# ── what is refused ─────────────────────────────────────────────────────────────────────────────────────────


def test_a_kernel_that_rounds_otherwise_is_refused_unless_allowed(family: Family, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match=r"int8_absmax activations .*\(use executorch-fp32, or lossy"):
        pipeline.export(family.bundle, tmp_path / "refused", "executorch-8da4w")
    package = pipeline.export(family.bundle, tmp_path / "package", "executorch-8da8w")
    changed = {entry.module: (entry.stored, entry.held) for entry in package.manifest.represented}
    assert changed["model.layers.0.mlp.up_proj"] == ("int8/0 a8", "int8/0")


def test_activations_in_int8_are_for_symmetric_int8_rows(family: Family, tmp_path: Path) -> None:
    path = copy_bundle(family.bundle, tmp_path / "bundle")
    steps = [STEP | {"activations": "int8", "group_size": 32}]
    edit_json(path / "bundle.json", lambda manifest: manifest["base"].update(compression=steps))
    with pytest.raises(BundleError, match=r"base\.compression\[0\]"):
        bundles.load(path)
