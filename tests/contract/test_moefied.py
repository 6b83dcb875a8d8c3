"""A base with MoEfied layers on every target, against the forward of MoEfication's own code in transformers' model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from calora_export import bundle as bundles
from calora_export import package as packages
from calora_export import runtimes
from calora_export.composing import compose
from calora_export.errors import BundleError
from calora_export.importers.peft import run as import_peft
from tests.bundles import copy_bundle, edit_json, edit_tensors, write_tokenizer
from tests.conftest import Variant
from tests.contract import logits
from tests.families import CONTEXT, CaLora, Family, base

EXPERTS, HIDDEN, TOP_K = 8, 12, 3
SITES = ("model.layers.0.mlp.gate_proj", "model.layers.1.mlp.gate_proj", "model.layers.1.mlp.up_proj")
LABELS, SCORES = f"{SITES[0]}.experts.labels", f"{SITES[0]}.experts.scores"
RECIPES = (
    ("torch-fp32", {}),
    ("onnx-fp32", {}),
    ("onnx-fp32", {"kernels": "calora"}),
    ("executorch-fp32", {}),
    ("executorch-fp32", {"kernels": "calora"}),
    ("coreml-fp16", {}),
)


def moefied(module: nn.Linear, seed: int) -> dict[str, Tensor]:
    """Random experts for a layer, whose mask a hook puts on its output, as MoEfication's code does it."""
    random = torch.Generator().manual_seed(seed)
    labels = torch.randint(EXPERTS, (module.out_features,), generator=random)
    first, second = nn.Linear(module.in_features, HIDDEN, bias=False), nn.Linear(HIDDEN, EXPERTS, bias=False)
    for layer in (first, second):
        layer.weight.data = torch.randn(layer.weight.shape, generator=random)
    mlp = nn.Sequential(first, nn.Tanh(), second)
    patterns = torch.stack([labels == expert for expert in range(EXPERTS)]).float()

    def mask(_module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> Tensor:
        x = inputs[0].float()
        score = mlp(x / torch.norm(x, dim=-1).unsqueeze(-1))
        chosen = torch.topk(score, k=TOP_K, dim=-1)[1]
        return output * torch.nn.functional.embedding(chosen, patterns).sum(-2)

    module.register_forward_hook(mask)
    return {"labels": labels, "hidden": first.weight.data, "scores": second.weight.data}


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Family:
    """An adapter's delta comes after the mask: its hook is the later one."""
    directory, hf = tmp_path_factory.mktemp("moefied"), base("llama")
    hf.config.save_pretrained(directory / "base")
    write_tokenizer(directory / "base")
    tensors = dict(hf.state_dict())
    for seed, site in enumerate(SITES):
        made = moefied(hf.get_submodule(site), seed)
        tensors |= {f"{site}.experts.{name}": tensor for name, tensor in made.items()}
    save_file(tensors, directory / "base" / "model.safetensors")
    adapter = adapted(hf).save(directory / "calora" / "one")
    import_peft(directory / "base", [adapter], directory / "bundle", top_k=TOP_K)
    return Family("moefied", hf, directory)


def adapted(hf: nn.Module) -> CaLora:
    return CaLora.draw(hf, (4, 3), 10, ("q_proj", "gate_proj"), ("gate_proj", "up_proj", "down_proj"))


@pytest.mark.parametrize("weight", [0.0, 1.0])
def test_the_reference_masks_as_the_published_code(family: Family, weight: float) -> None:
    bundle = bundles.load(family.bundle, deep=True)
    made = logits.of_model(compose(bundle, bundle.weight, context=CONTEXT), bundle, weight)
    assert np.abs(made - logits.of_transformers(family, adapted(family.hf), weight)).max() < 5e-5


@pytest.mark.parametrize(("name", "changes"), RECIPES, ids=str)
def test_every_target_lowers_it(family: Family, variant: Variant, name: str, changes: dict[str, str | int]) -> None:
    package = packages.load(variant(family.bundle, name, **changes))
    target = package.manifest.target
    session = runtimes.load(target).open_session(package, 1)
    for weight, mix in ((0.0, {}), (1.0, {"one": 1.0})):
        error = np.abs(logits.of_session(session, mix) - logits.of_transformers(family, adapted(family.hf), weight))
        assert error.max() < (0.5 if target == "coreml" else 2e-4)  # logits reach ±10


# ── what is refused ─────────────────────────────────────────────────────────────────────────────────────────



@pytest.mark.parametrize(
    ("edit", "line"),
    [
        (lambda t: t.pop(f"{SITES[0]}.experts.hidden"), f"base: {SITES[0]}.experts.hidden: expected a tensor"),
        (lambda t: t.update({LABELS: np.full(96, 8)}), "experts from 0 to 7, found 8 to 8"),
        (lambda t: t.update({SCORES: np.ones((2, 12), "f4"), LABELS: np.ones(96, "i8")}), "at least top_k 3 experts"),
        (lambda t: t.update({SCORES: np.ones((8, 9), "f4")}), "[rows, 12], found F32 [8, 9]"),
    ],
)
def test_experts_that_do_not_fit_are_refused(
    family: Family, tmp_path: Path, edit: Callable[[dict[str, np.ndarray]], object], line: str
) -> None:
    path = copy_bundle(family.bundle, tmp_path / "bundle")
    edit_tensors(path / "base/model.safetensors", edit)
    with pytest.raises(BundleError) as caught:
        bundles.load(path)
    assert line in str(caught.value)


def test_experts_that_the_bundle_does_not_declare_are_refused(family: Family, tmp_path: Path) -> None:
    path = copy_bundle(family.bundle, tmp_path / "bundle")
    edit_json(path / "bundle.json", lambda manifest: manifest["base"].update(compression=[]))
    with pytest.raises(BundleError, match=r"base\.compression: expected a moefy step with model\.layers\.0"):
        bundles.load(path)


def test_an_import_asks_how_many_experts_compute(family: Family, tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="--top-k"):
        import_peft(family.directory / "base", [family.directory / "calora" / "one"], tmp_path / "bundle")
