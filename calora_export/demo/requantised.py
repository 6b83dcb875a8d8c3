"""What quantising the demo's base once more costs, as `python -m calora_export.demo.table requantised` prints it.

The adapters' recovery branches were trained against one error of the compressed base. The table has the tasks' exact
match with that base as it is, as recipes hold it, and as exporters make it that dequantise and quantise again.
"""

# ruff: noqa: TID253  # imported by the command that prints it, and by nothing else
from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import msgspec
import numpy as np
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from calora_export import bundle as bundles
from calora_export import demo, recipe
from calora_export.bundle import Bundle
from calora_export.compression import DenseWeight, PackedWeight, quantize_symmetric, sqnr
from calora_export.demo.adapting import adapt, adapted_sites
from calora_export.demo.plan import Plan
from calora_export.demo.tasks import TASKS, Example, held_out_examples
from calora_export.demo.tokenizing import IGNORED, encode
from calora_export.demo.training import answered, task_loss
from calora_export.weights import Weights

BATCH = 50
WeightOf = Callable[[str], DenseWeight | PackedWeight]


@dataclass(frozen=True)
class Row:
    """A base: how far its linear layers are from the trained one (dB, the mean), by task which prompts are answered
    exactly, and the loss on the answers in nats per token.
    """

    name: str
    kept: float
    right: dict[str, list[bool]]
    losses: dict[str, float]

    @property
    def scores(self) -> dict[str, float]:
        """Exact match in percent."""
        return {task: 100 * sum(right) / len(right) for task, right in self.right.items()}

    @property
    def mean(self) -> float:
        """Of the tasks' scores."""
        return float(np.mean(list(self.scores.values())))


def variants(bundle: Bundle) -> dict[str, WeightOf]:
    """Name → the weights of the base."""
    held = {
        "as trained: int4 in groups of 32, table int8 in groups of 32": bundle.weight,
        "`onnx-int4`: the same integers and scales": Weights(bundle, recipe.load("onnx-int4")),
        "`executorch-8da4w`: the same, table in int8 rows": Weights(bundle, recipe.load("executorch-8da4w")),
    }
    again: dict[str, WeightOf] = {
        "quantised again: int8 rows": lambda module: _again(bundle, module, 8, 0),
        "quantised again: int4, groups of 32 with zero points": lambda module: _asymmetric(bundle, module, 32),
        "quantised again: int4, groups of 16": lambda module: _again(bundle, module, 4, 16),
        "quantised again: int4, groups of 64": lambda module: _again(bundle, module, 4, 64),
        "quantised again: int4 rows": lambda module: _again(bundle, module, 4, 0),
        "quantised again: int4 rows, the table too": lambda module: _rows(bundle, module),
    }
    return held | again


@torch.no_grad()
def measure(bundle: Bundle, name: str, weight_of: WeightOf, prompts: int = 0) -> Row:
    """Every adapter on its own task's held-out prompts: the bundle's, or as many others as `prompts` says, drawn as
    those were with another seed.
    """
    linears = [module for module in bundle.adaptable if bundle.weights.formats[module].bits]
    model = _model(bundle, weight_of)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(bundle.path / "base")
    kept = [min(sqnr(bundle.weight(module).dequantize(), weight_of(module).dequantize()), 999) for module in linears]
    right: dict[str, list[bool]] = {}
    losses: dict[str, float] = {}
    for task in bundle.manifest.tasks:
        adapted = adapt(model, Plan(), recovery=True)
        stored = load_file(bundle.adapter_dir(task.adapter) / "adapter_model.safetensors")
        for site, module in adapted_sites(adapted).items():
            for branch, parameter in module.branches().items():
                parameter.copy_(stored[f"base_model.model.{site}.{branch}.weight"].float())
        lines = (bundle.path / task.eval).read_text().splitlines()
        examples = [Example(**msgspec.json.decode(line)) for line in lines]
        if prompts:
            drawn = next(known for known in TASKS if known.id == task.id)
            examples = held_out_examples(drawn, prompts, Plan().seed + 1)
        right[task.id], losses[task.id] = _scored(adapted, tokenizer, examples)
    return Row(name, float(np.mean(kept)), right, losses)


def _scored(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, examples: list[Example]
) -> tuple[list[bool], float]:
    """Which examples are answered, and the loss per token of all answers; BATCH at a time, for the caches."""
    ids, labels = encode(tokenizer, examples)
    right: list[bool] = []
    losses = []
    for some, wanted in zip(ids.split(BATCH), labels.split(BATCH), strict=True):
        logits = model(input_ids=some).logits
        right += answered(logits, wanted)
        losses.append(task_loss(logits, wanted) * (wanted != IGNORED).sum())
    return right, float(torch.stack(losses).sum() / (labels != IGNORED).sum())


def table(rows: Iterable[Row]) -> Iterator[str]:
    """The lines of a Markdown table, each as soon as its row is there: the mean of all tasks, what it costs against the
    first row in points, how many answers were lost and won against that row with the sign test's p, and the loss."""
    first: Row | None = None
    for row in rows:
        if first is None:
            first = row
            yield _line(["base", "kept of the linear layers", *row.scores, "mean", "points", "lost, won", "loss"])
            yield _line(["---", *["---:"] * (len(row.scores) + 5)])
        kept = "all" if row.kept > 200 else f"{row.kept:.1f} dB"
        scores = [f"{row.scores[task]:.1f}" for task in first.scores]
        points = f"{row.mean - first.mean:+.2f}"
        loss = float(np.mean(list(row.losses.values())))
        yield _line([row.name, kept, *scores, f"**{row.mean:.2f}**", points, _changed(first, row), f"{loss:.4f}"])


def _line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _changed(before: Row, after: Row) -> str:
    pairs = [pair for task in before.right for pair in zip(before.right[task], after.right[task], strict=True)]
    lost, won = pairs.count((True, False)), pairs.count((False, True))
    tail = sum(math.comb(lost + won, count) for count in range(min(lost, won) + 1)) / 2 ** (lost + won)
    return f"{lost}, {won} (p {min(1.0, 2 * tail):.2g})" if lost + won else "none"


def _model(bundle: Bundle, weight_of: WeightOf) -> LlamaForCausalLM:
    """transformers' own Llama in fp32, filled with these weights."""
    config = LlamaConfig.from_pretrained(bundle.path / "base")
    del config.quantization_config  # type: ignore[attr-defined]
    model = LlamaForCausalLM(config).eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        module = name.removesuffix(".weight")
        packed = module in bundle.weights.formats
        values = weight_of(module).dequantize() if packed else bundle.base.float32(name)
        parameter.copy_(torch.from_numpy(np.ascontiguousarray(values)))
    return model


def _again(bundle: Bundle, module: str, bits: int, group: int) -> DenseWeight | PackedWeight:
    """A linear layer dequantised, then rounded to the nearest; the table stays."""
    weight = bundle.weight(module)
    if module in bundle.embeddings:
        return weight
    return quantize_symmetric(weight.dequantize(), bits, group or weight.shape[1], scales=np.float32)


def _rows(bundle: Bundle, module: str) -> PackedWeight:
    weight = bundle.weight(module)
    return quantize_symmetric(weight.dequantize(), 4, weight.shape[1], scales=np.float32)


def _asymmetric(bundle: Bundle, module: str, group: int) -> DenseWeight | PackedWeight:
    """Lowest and highest value of a group at the ends of 15 steps; zero, which 2:4 has a lot of, is one of them."""
    weight = bundle.weight(module)
    if module in bundle.embeddings:
        return weight
    rows, columns = weight.shape
    groups = weight.dequantize().reshape(rows, -1, group)
    low, high = np.minimum(groups.min(2), 0), np.maximum(groups.max(2), 0)
    scale = np.where(high > low, (high - low) / 15, 1).astype(np.float32)
    zero = np.clip(np.rint(-low / scale) - 8, -8, 7)
    q = np.clip(np.rint(groups / scale[..., None]) + zero[..., None], -8, 7)
    return PackedWeight(q.astype(np.int8).reshape(rows, columns), scale, 4, group, zero.astype(np.int8))


def measured(prompts: int = 0) -> Iterator[str]:
    """The table of every variant of the committed bundle; half a minute of one core, and longer with more prompts."""
    bundle = bundles.load(demo.BUNDLE)
    return table(measure(bundle, name, weight_of, prompts) for name, weight_of in variants(bundle).items())
