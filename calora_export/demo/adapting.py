"""LoRA and CA-LoRA (arXiv 2307.07705) on a frozen Llama: the branches, how they inherit and how they learn."""

from __future__ import annotations

import copy
import math
import random

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from calora_export.demo.compressing import LINEARS
from calora_export.demo.plan import Plan
from calora_export.demo.tasks import Task, draw, natural
from calora_export.demo.tokenizing import PAD_ID, encode
from calora_export.demo.training import optimise, task_loss


class Adapted(nn.Module):
    """y = base(x) + s · B(A x) + s · a2(gelu(a1 x)), s = alpha / rank (CA-LoRA, arXiv 2307.07705).

    Without recovery the last term is absent: a plain LoRA.
    """

    lora_a1: nn.Parameter | None
    lora_a2: nn.Parameter | None

    def __init__(self, base: nn.Linear, plan: Plan, recovery: bool) -> None:
        super().__init__()
        self.base, self.scale = base, plan.alpha / plan.rank
        self.lora_A, self.lora_B = self._branch(plan.rank)
        self.lora_a1, self.lora_a2 = self._branch(plan.rank) if recovery else (None, None)

    def _branch(self, rank: int) -> tuple[nn.Parameter, nn.Parameter]:
        """Random [rank, in] and zero [out, rank]: a new branch changes nothing."""
        down = torch.randn(rank, self.base.in_features) / math.sqrt(self.base.in_features)
        return nn.Parameter(down), nn.Parameter(torch.zeros(self.base.out_features, rank))

    def forward(self, x: Tensor) -> Tensor:
        hidden, up = F.linear(x, self.lora_A), self.lora_B
        if self.lora_a1 is not None and self.lora_a2 is not None:
            hidden = torch.cat((hidden, F.gelu(F.linear(x, self.lora_a1))), -1)
            up = torch.cat((up, self.lora_a2), 1)
        return self.base(x) + F.linear(self.scale * hidden, up)

    def branches(self) -> dict[str, Tensor]:
        """The trained matrices by name, without the base's."""
        return {name: parameter.data for name, parameter in self.named_parameters(recurse=False)}


def adapt(base: LlamaForCausalLM, plan: Plan, recovery: bool = False) -> LlamaForCausalLM:
    """A copy of the frozen model with a new adapter on all seven linears of every layer."""
    model = copy.deepcopy(base).requires_grad_(False)
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if name in LINEARS and isinstance(child, nn.Linear):
                setattr(module, name, Adapted(child, plan, recovery))
    return model


def adapted_sites(model: LlamaForCausalLM) -> dict[str, Adapted]:
    """Every adapted linear by its module name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, Adapted)}


def inherit_lora(target: LlamaForCausalLM, source: LlamaForCausalLM) -> None:
    """Copy A and B of every site."""
    sites = adapted_sites(source)
    for name, site in adapted_sites(target).items():
        site.lora_A.data.copy_(sites[name].lora_A.data)
        site.lora_B.data.copy_(sites[name].lora_B.data)


def train_adapter(
    plan: Plan,
    task: Task,
    tokenizer: PreTrainedTokenizerFast,
    model: LlamaForCausalLM,
    label: str,
    teacher: LlamaForCausalLM | None = None,
) -> None:
    """Train all branches on the task's natural prompts, then round them to the fp16 they are stored in.

    Every call for a task sees the same batches. With a teacher its last hidden states are imitated too:
    CA-LoRA's distillation.
    """
    rng = random.Random(f"{plan.seed} adapter {task.id}")

    def loss() -> Tensor:
        examples = [natural(task, *draw(task, rng, held_out=False), rng) for _ in range(plan.adapter_batch)]
        ids, labels = encode(tokenizer, examples)
        hidden = model.model(input_ids=ids).last_hidden_state
        total = task_loss(model.lm_head(hidden), labels)
        if teacher is not None:
            with torch.no_grad():
                wanted = teacher.model(input_ids=ids).last_hidden_state
            real = ids != PAD_ID
            total = total + F.mse_loss(hidden[real], wanted[real])
        return total

    parameters = [p for p in model.parameters() if p.requires_grad]
    optimise(parameters, loss, plan.adapter_steps, plan.adapter_lr, f"{task.id}, {label}")
    for parameter in parameters:
        parameter.data = parameter.data.half().float()
