from __future__ import annotations

import itertools
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np
import onnxruntime as ort
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file
from torch import Tensor, nn

from calora_export import bundle as bundles
from calora_export import routers
from calora_export.manifest import Selection
from calora_export.routers import Mlp, MlpConfig, Router, Select
from calora_export.targets import onnx
from tests.bundles import tiny_bundle

CLASSES = 5
WEIGHTS = ("softmax_probs", "softmax_logits", "renorm", "uniform")
KINDS: tuple[dict[str, object], ...] = (
    {"select": "top_p", "p": 0.6},
    {"select": "top_k", "k": 3},
    {"select": "threshold", "threshold": 0.25},
    {"select": "all"},
)
SELECTS: tuple[dict[str, object], ...] = (
    *KINDS,
    {"select": "top_p", "p": 0.97},
    {"select": "top_p", "p": 1e-9},
    {"select": "top_k", "k": 1},
    {"select": "threshold", "threshold": 0.9},
)
TEMPERATURES = (1.0, 0.5, 3.0)


def selection(select: dict[str, object], weights: str, temperature: float = 1.0) -> Selection:
    return msgspec.convert({**select, "weights": weights, "temperature": temperature}, Selection)


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max())
    return e / e.sum()


@dataclass(frozen=True)
class Choice:
    """The gates, and how far the choice was from another one: 0 where rounding may tip it."""

    gates: np.ndarray
    margin: float


def published(logits: np.ndarray, selection: Selection) -> Choice:
    """What DLP-LoRA's code does, in float64: sort, accumulate, keep while the sum is at most p and the one after."""
    scores = logits.astype(np.float64) / selection.temperature
    probs = softmax(scores)
    order = np.argsort(-probs, kind="stable")
    sums = np.cumsum(probs[order])
    match selection.select:
        case "top_p":
            count = int((sums <= selection.p).sum()) + 1
            margin = float(np.abs(sums[:-1] - selection.p).min(initial=1.0))
        case "top_k":
            count, margin = int(selection.k or 0), 1.0
        case "threshold":
            count = max(1, int((probs >= selection.threshold).sum()))
            margin = float(np.abs(probs - selection.threshold).min())
        case "all":
            count, margin = len(probs), 1.0
    chosen, others = order[:count], order[count:]
    if len(others):
        for edge in (chosen[-1], others[0]):  # equal logits tie exactly in fp32 too, nearly equal ones may
            distinct = probs[scores != scores[edge]]
            margin = min(margin, float(np.abs(distinct - probs[edge]).min(initial=1.0)))
    weights = {
        "softmax_probs": softmax(probs[chosen]),
        "softmax_logits": softmax(scores[chosen]),
        "renorm": probs[chosen] / probs[chosen].sum(),
        "uniform": np.full(len(chosen), 1 / len(chosen)),
    }
    gates = np.zeros(len(probs))
    gates[chosen] = weights[selection.weights]
    return Choice(gates, margin)


def gates(logits: np.ndarray, selection: Selection) -> np.ndarray:
    with torch.no_grad():
        return Select(selection)(torch.from_numpy(logits)[None]).numpy()


def same(actual: np.ndarray, expected: np.ndarray) -> None:
    """Weights to rounding. A weight below what fp32 can hold is 0 there."""
    np.testing.assert_allclose(actual, expected, atol=2e-6, rtol=0)
    assert set(np.flatnonzero(expected > 1e-30)) == set(np.flatnonzero(actual))


# Few distinct values make exact ties; large ones make a softmax of one.
LOGIT = st.one_of(
    st.sampled_from([0.0, 1.0, -1.0, 2.5]),
    st.floats(-8, 8, width=32),
    st.sampled_from([1e4, -1e4, 1e30, -1e30]),
)


@settings(max_examples=400, deadline=None)
@given(
    logits=st.lists(LOGIT, min_size=1, max_size=8),
    select=st.sampled_from(SELECTS),
    weights=st.sampled_from(WEIGHTS),
    temperature=st.sampled_from(TEMPERATURES),
)
def test_gates_equal_the_published_code(
    logits: list[float], select: dict[str, object], weights: str, temperature: float
) -> None:
    policy = selection(select, weights, temperature)
    assume(policy.k is None or policy.k <= len(logits))  # a bundle with more is refused
    x = np.array(logits, np.float32)
    expected = published(x, policy)
    assume(expected.margin > 1e-5)
    same(gates(x, policy), expected.gates)


@pytest.mark.parametrize(
    ("logits", "select", "chosen"),
    [
        ([0, 0, 0, 0], {"select": "top_p", "p": 0.5}, [0, 1, 2]),  # the sums are exact: 0.25, 0.5, 0.75
        ([0, 0, 0, 0], {"select": "top_p", "p": 0.49}, [0, 1]),
        ([0, 0, 0, 0], {"select": "top_k", "k": 2}, [0, 1]),  # ties go to the lower class
        ([1, 2, 2, 1], {"select": "top_k", "k": 3}, [0, 1, 2]),
        ([0, 0, 0, 0], {"select": "threshold", "threshold": 0.25}, [0, 1, 2, 3]),
        ([0, 0, 0, 0], {"select": "threshold", "threshold": 0.3}, [0]),  # at least one
        ([7], {"select": "top_p", "p": 0.1}, [0]),
        ([1e30, -1e30, 1e30], {"select": "top_p", "p": 0.6}, [0, 2]),
    ],
)
def test_ties_and_edges(logits: list[float], select: dict[str, object], chosen: list[int]) -> None:
    x, policy = np.array(logits, np.float32), selection(select, "uniform")
    expected = np.zeros(len(logits))
    expected[chosen] = 1 / len(chosen)
    np.testing.assert_allclose(gates(x, policy), expected, rtol=1e-6)
    np.testing.assert_allclose(published(x, policy).gates, expected, rtol=1e-6)


@pytest.mark.parametrize("logits", [[1e4, -1e4], [1e30, -1e30], [0.0, -200.0]])
@pytest.mark.parametrize("weights", WEIGHTS)
def test_a_class_without_probability_is_no_nan(logits: list[float], weights: str) -> None:
    made = gates(np.array(logits, np.float32), selection({"select": "all"}, weights))
    assert np.isfinite(made).all()
    np.testing.assert_allclose(made.sum(), 1, rtol=1e-6)


# ── the classifier ──────────────────────────────────────────────────────────────────────────────────────────


def published_logits(tensors: dict[str, np.ndarray], ids: list[int]) -> np.ndarray:
    """docs/bundle.md: embed, average over the tokens, linear layers with ReLU between them."""
    x = tensors["embedding.weight"][ids].astype(np.float64).mean(axis=0)
    for index in itertools.count():
        if f"layers.{index}.weight" not in tensors:
            return x
        x = np.maximum(x, 0) if index else x
        x = tensors[f"layers.{index}.weight"] @ x + tensors[f"layers.{index}.bias"]
    raise AssertionError


def prompts(count: int) -> list[list[int]]:
    rng = np.random.default_rng(1)
    return [rng.integers(0, 256, int(size)).tolist() for size in rng.integers(1, 40, count)]


def test_a_bundles_router_follows_its_manifest(tiny: Path) -> None:
    bundle = bundles.load(tiny)
    router, spec = routers.load(bundle), bundle.manifest.router
    assert router is not None and spec is not None
    tensors = load_file(tiny / "router" / "model.safetensors")
    decided = set()
    for ids in prompts(50):
        expected = published(published_logits(tensors, ids), spec.selection)
        assert expected.margin > 1e-5
        made = router(torch.tensor([ids])).numpy()
        same(made, expected.gates)
        decided.add(tuple(np.flatnonzero(made)))
    assert len(decided) > 1  # a router that always says the same would prove nothing


def test_a_bundle_without_a_router_has_none(tmp_path: Path) -> None:
    assert routers.load(bundles.load(tiny_bundle(tmp_path / "bundle", router=False))) is None


# ── the exported one ────────────────────────────────────────────────────────────────────────────────────────


class Everything(nn.Module):
    """All policies after one classifier: ids [1, T] → gates [policies, classes]."""

    def __init__(self, classifier: Mlp, policies: list[Selection]) -> None:
        super().__init__()
        self.routers = nn.ModuleList(Router(classifier, policy) for policy in policies)

    def forward(self, ids: Tensor) -> Tensor:
        return torch.stack([router(ids) for router in self.routers])


def table() -> np.ndarray:
    """Logits [74, classes]: noise, exact ties, one class far above the others, and huge ones."""
    rng = np.random.default_rng(0)
    noise = rng.standard_normal((54, CLASSES)) * rng.choice([0.3, 2.0, 6.0], (54, 1))
    ties = rng.integers(-1, 2, (14, CLASSES)).astype(np.float64)
    far = np.eye(CLASSES)[:4] * 30
    huge = np.array([[1e4, -1e4, 1e4, 0, 0], [1e30, -1e30, 0, 1, 2]])
    return np.concatenate([noise, ties, far, huge]).astype(np.float32)


@pytest.fixture(scope="module")
def everything() -> tuple[Everything, list[Selection]]:
    """Token i is row i of the table: the one linear layer passes it on."""
    logits = table()
    config = MlpConfig("mlp", len(logits), CLASSES, (), CLASSES)
    classifier = Mlp(config)
    classifier.embedding.weight.data = torch.from_numpy(logits)
    layer = classifier.layers[0]
    assert isinstance(layer, nn.Linear)
    nn.init.eye_(layer.weight)
    nn.init.zeros_(layer.bias)
    pairs = itertools.product(KINDS, WEIGHTS)
    policies = [selection(select, weights, TEMPERATURES[i % 3]) for i, (select, weights) in enumerate(pairs)]
    return Everything(classifier, policies).eval().requires_grad_(False), policies


def test_the_exported_policies_decide_as_the_published_code(
    everything: tuple[Everything, list[Selection]], tmp_path: Path
) -> None:
    module, policies = everything
    session = ort.InferenceSession(str(tmp_path / onnx.lower_router(module, tmp_path)))  # type: ignore[arg-type]
    checked = dict.fromkeys(range(len(policies)), 0)
    for token, logits in enumerate(table()):
        ids = np.array([[token]], np.int64)
        made = session.run(["gates"], {"ids": ids})[0]
        np.testing.assert_allclose(made, module(torch.from_numpy(ids)).numpy(), atol=1e-6, rtol=0)
        for index, policy in enumerate(policies):
            expected = published(logits, policy)
            if expected.margin > 1e-5:
                same(made[index], expected.gates)
                checked[index] += 1
    assert min(checked.values()) >= 50


def test_the_exported_classifier_takes_any_number_of_tokens(tiny: Path, package: Path) -> None:
    router = routers.load(bundles.load(tiny))
    assert router is not None
    session = ort.InferenceSession(str(package / "router.onnx"))
    for ids in prompts(60):
        made = session.run(["gates"], {"ids": np.array([ids], np.int64)})[0]
        expected = router(torch.tensor([ids])).numpy()
        assert np.array_equal(made > 0, expected > 0)
        np.testing.assert_allclose(made, expected, atol=1e-6, rtol=0)


def test_the_exported_router_is_the_same_bytes_every_time(tiny: Path, package: Path, tmp_path: Path) -> None:
    router = routers.load(bundles.load(tiny))
    assert router is not None
    onnx.lower_router(router, tmp_path)
    assert (tmp_path / "router.onnx").read_bytes() == (package / "router.onnx").read_bytes()
