"""Trains the demo bundle from nothing on two CPU cores: `python -m calora_export.demo.train OUT`.

One straight line, each step with its own seed: tokenizer → base → compressed base → per task a LoRA on the
uncompressed base, the same one moved to the compressed base, a LoRA trained there and a CA-LoRA trained
there → router → bundle and results. Only the CA-LoRA adapters are bundled; the others are for comparison.
"""

import copy
import hashlib
import json
import math
import multiprocessing
import platform
import random
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path

import torch
import torch.nn.functional as F
from peft import LoraConfig, TaskType
from safetensors.torch import save_file
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.utils import logging

from calora_export.demo.table import table
from calora_export.demo.tasks import TASKS, Example, Task, draw, held_out_examples, natural, terse

BOS, EOS, PAD = "<|bos|>", "<|eos|>", "<|pad|>"
LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
IGNORED = -100
CORES = 2


@dataclass(frozen=True)
class Plan:
    """Every number that was chosen; the defaults are the committed bundle's."""

    seed: int = 2024
    vocab_size: int = 512
    base_steps: int = 2500
    base_batch: int = 64
    base_lr: float = 2e-3
    adapter_steps: int = 300
    adapter_batch: int = 32
    adapter_lr: float = 3e-3
    rank: int = 8
    alpha: int = 16
    group_size: int = 32
    linear_bits: int = 4
    embedding_bits: int = 8
    eval_items: int = 200
    router_embedding: int = 64
    router_hidden: tuple[int, ...] = (128, 128, 128)
    router_max_length: int = 64
    router_steps: int = 4000
    router_batch: int = 64
    router_lr: float = 2e-3
    router_p: float = 0.6
    router_eval_items: int = 300


# --- tokenizer and batches ------------------------------------------------------------------------


def build_tokenizer(plan: Plan) -> PreTrainedTokenizerFast:
    """A byte-level BPE trained on both forms of all tasks.

    Capitals and digits stand alone: operands are read letter by letter while the words around them merge.
    """
    rng = random.Random(f"{plan.seed} tokenizer")
    texts = []
    for task in TASKS:
        for _ in range(300):
            operand, answer = draw(task, rng, held_out=False)
            for example in (terse(task, operand, answer), natural(task, operand, answer, rng)):
                texts.append(example.prompt + example.completion)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex("[A-Z0-9]"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=plan.vocab_size,
        special_tokens=[BOS, EOS, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        clean_up_tokenization_spaces=False,
    )


def encode(tokenizer: PreTrainedTokenizerFast, examples: list[Example]) -> tuple[Tensor, Tensor]:
    """Token ids [n, length], padded on the right, and labels [n, length], IGNORED outside the completion."""
    eos = [tokenizer.eos_token_id]
    prompts = tokenizer([e.prompt for e in examples])["input_ids"]
    completions = [ids + eos for ids in tokenizer([e.completion for e in examples])["input_ids"]]
    length = max(len(p) + len(c) for p, c in zip(prompts, completions, strict=True))
    ids = torch.full((len(examples), length), tokenizer.pad_token_id)
    labels = torch.full_like(ids, IGNORED)
    for row, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
        ids[row, : len(prompt) + len(completion)] = torch.tensor(prompt + completion)
        labels[row, len(prompt) : len(prompt) + len(completion)] = torch.tensor(completion)
    return ids, labels


def task_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross entropy of each labelled token, predicted from the one before it."""
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORED)


def percentage(right: list[bool]) -> float:
    return round(100 * sum(right) / len(right), 2)


@torch.no_grad()
def exact_match(model: nn.Module, tokenizer: PreTrainedTokenizerFast, examples: list[Example]) -> float:
    """Percentage of examples whose whole completion, end token included, is what greedy decoding would write.

    Feeding the true completion and comparing every argmax is the same test: until its first wrong
    token, greedy decoding has written just that.
    """
    model.eval()
    ids, labels = encode(tokenizer, examples)
    guesses, wanted = model(input_ids=ids).logits.argmax(-1)[:, :-1], labels[:, 1:]
    right = ((guesses == wanted) | (wanted == IGNORED)).all(1)
    return percentage(right.tolist())


def optimise(
    parameters: Iterable[nn.Parameter], loss_of_step: Callable[[], Tensor], steps: int, lr: float, label: str
) -> None:
    """AdamW with warm-up and cosine decay to 2 %; `loss_of_step` draws its own batch."""
    parameters = list(parameters)
    optimiser = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.01, betas=(0.9, 0.98), fused=True)
    start = time.perf_counter()
    for step in range(steps):
        warm = min(1.0, (step + 1) / 50)
        rate = lr * warm * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / steps)))
        for group in optimiser.param_groups:
            group["lr"] = rate
        loss = loss_of_step()
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()
        if step % 250 == 0 or step == steps - 1:
            seconds = time.perf_counter() - start
            message = f"{label}: step {step + 1} of {steps}, loss {loss.item():.4f}, {seconds:.0f} s"
            print(message, file=sys.stderr, flush=True)


# --- base -----------------------------------------------------------------------------------------


def base_config(plan: Plan, tokenizer: PreTrainedTokenizerFast) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=plan.vocab_size,
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=6,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def terse_batches(rng: random.Random, size: int) -> Iterator[list[Example]]:
    """Endless batches of mixed tasks; examples of about one length go together, which halves the padding."""
    while True:
        pool = []
        for _ in range(8 * size):
            task = rng.choice(TASKS)
            pool.append(terse(task, *draw(task, rng, held_out=False)))
        pool.sort(key=lambda example: len(example.prompt) + len(example.completion))
        batches = [pool[start : start + size] for start in range(0, len(pool), size)]
        rng.shuffle(batches)
        yield from batches


def train_base(plan: Plan, tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """The uncompressed base: all skills, asked for by terse tags only."""
    torch.manual_seed(plan.seed)
    rng = random.Random(f"{plan.seed} base")
    model = LlamaForCausalLM(base_config(plan, tokenizer))
    batches = terse_batches(rng, plan.base_batch)

    def loss() -> Tensor:
        ids, labels = encode(tokenizer, next(batches))
        return task_loss(model(input_ids=ids).logits, labels)

    optimise(model.parameters(), loss, plan.base_steps, plan.base_lr, "base")
    model.requires_grad_(False)
    return model


# --- compression ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Quantized:
    """A weight as integers [out, in] and scales [out, in / group]."""

    integers: Tensor
    scales: Tensor
    bits: int

    def dense(self) -> Tensor:
        out, groups = self.scales.shape
        return (self.integers.view(out, groups, -1) * self.scales[..., None]).flatten(1)


def prune_2_4(weight: Tensor) -> Tensor:
    """Zero the two smallest of every four weights in a row."""
    fours = weight.unflatten(1, (-1, 4))
    kept = fours.abs().topk(2, dim=-1).indices
    return torch.zeros_like(fours).scatter(-1, kept, fours.gather(-1, kept)).flatten(1)


def quantize(weight: Tensor, bits: int, group_size: int) -> Quantized:
    """Symmetric round-to-nearest per group.

    Scales are bf16 values inside fp16's normal range, so they are the same number in bf16, fp16 and fp32.
    """
    top = 2 ** (bits - 1) - 1
    groups = weight.unflatten(1, (-1, group_size))
    scales = (groups.abs().amax(-1) / top).clamp(min=6.2e-5).bfloat16().float()
    integers = (groups / scales[..., None]).round().clamp(-top - 1, top)
    return Quantized(integers.flatten(1), scales, bits)


def compress(plan: Plan, base: LlamaForCausalLM) -> tuple[LlamaForCausalLM, dict[str, Quantized]]:
    """The compressed base as a dense fp32 model of the very same values, and its weights by module name."""
    model = copy.deepcopy(base)
    stored = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding):
            stored[name] = quantize(module.weight, plan.embedding_bits, plan.group_size)
        elif name.rpartition(".")[2] in LINEARS:
            stored[name] = quantize(prune_2_4(module.weight), plan.linear_bits, plan.group_size)
        elif isinstance(module, LlamaRMSNorm):
            module.weight.data = module.weight.half().float()
        if name in stored:
            module.weight.data = stored[name].dense()
    model.tie_weights()
    return model, stored


# --- adapters -------------------------------------------------------------------------------------


class Adapted(nn.Module):
    """y = base(x) + s · B(A x) + s · a2(gelu(a1 x)), s = alpha / rank (CA-LoRA, arXiv 2307.07705).

    Without recovery the last term is absent: a plain LoRA.
    """

    def __init__(self, base: nn.Linear, plan: Plan, recovery: bool):
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
        if self.lora_a1 is not None:
            hidden = torch.cat((hidden, F.gelu(F.linear(x, self.lora_a1))), -1)
            up = torch.cat((up, self.lora_a2), 1)
        return self.base(x) + F.linear(self.scale * hidden, up)


def adapt(base: LlamaForCausalLM, plan: Plan, recovery: bool = False) -> LlamaForCausalLM:
    """A copy of the frozen model with a new adapter on all seven linears of every layer."""
    model = copy.deepcopy(base).requires_grad_(False)
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if name in LINEARS:
                setattr(module, name, Adapted(child, plan, recovery))
    return model


def adapted_sites(model: LlamaForCausalLM) -> dict[str, Adapted]:
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
            real = ids != tokenizer.pad_token_id
            total = total + F.mse_loss(hidden[real], wanted[real])
        return total

    parameters = [p for p in model.parameters() if p.requires_grad]
    optimise(parameters, loss, plan.adapter_steps, plan.adapter_lr, f"{task.id}, {label}")
    for parameter in parameters:
        parameter.data = parameter.data.half().float()


@dataclass(frozen=True)
class TaskScores:
    """Exact match in percent on one task's held-out prompts."""

    task: str
    no_adapter: float
    lora: float
    lora_moved: float
    lora_compressed: float
    calora: float


def train_task(plan: Plan, index: int, source: Path, adapter: Path) -> TaskScores:
    """Train and compare the adapters of one task for the uncompressed base in `source`; write its CA-LoRA."""
    torch.manual_seed(plan.seed + index)
    task = TASKS[index]
    tokenizer = PreTrainedTokenizerFast.from_pretrained(source)
    base = LlamaForCausalLM.from_pretrained(source, dtype=torch.float32).requires_grad_(False)
    compressed, _ = compress(plan, base)
    items = held_out_examples(task, plan.eval_items, plan.seed)

    lora = adapt(base, plan)
    train_adapter(plan, task, tokenizer, lora, "LoRA on the uncompressed base")
    moved = adapt(compressed, plan)
    inherit_lora(moved, lora)
    lora_compressed = adapt(compressed, plan)
    train_adapter(plan, task, tokenizer, lora_compressed, "LoRA on the compressed base")
    calora = adapt(compressed, plan, recovery=True)
    inherit_lora(calora, lora)
    train_adapter(plan, task, tokenizer, calora, "CA-LoRA on the compressed base", teacher=lora.eval())
    write_adapter(plan, calora, adapter)
    models = (base, lora, moved, lora_compressed, calora)
    return TaskScores(task.id, *(exact_match(model, tokenizer, items) for model in models))


# --- router ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Routed:
    """One or two sentences and, for each, the class that should answer it."""

    sentences: tuple[str, ...]
    classes: tuple[int, ...]

    @property
    def text(self) -> str:
        return " ".join(self.sentences)


class Router(nn.Module):
    """DLP-LoRA's mini-MLP (arXiv 2410.01497): embed the tokens, average, four linear layers."""

    def __init__(self, plan: Plan):
        super().__init__()
        self.embedding = nn.Embedding(plan.vocab_size, plan.router_embedding)
        sizes = (plan.router_embedding, *plan.router_hidden, len(TASKS))
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in zip(sizes, sizes[1:], strict=False))

    def forward(self, ids: Tensor, real: Tensor) -> Tensor:
        """Logits [n, classes] of token ids [n, length]; `real` [n, length] is False on padding."""
        x = (self.embedding(ids) * real[..., None]).sum(1) / real.sum(1, keepdim=True)
        for layer in self.layers[:-1]:
            x = F.relu(layer(x))
        return self.layers[-1](x)


def draw_routed(rng: random.Random, count: int, held_out: bool) -> Routed:
    """`count` natural sentences of as many different tasks."""
    classes = tuple(rng.sample(range(len(TASKS)), count))
    sentences = (natural(TASKS[c], *draw(TASKS[c], rng, held_out), rng).prompt for c in classes)
    return Routed(tuple(sentences), classes)


def router_logits(plan: Plan, router: Router, tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> Tensor:
    rows = [torch.tensor(ids[-plan.router_max_length :]) for ids in tokenizer(texts)["input_ids"]]
    ids = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=tokenizer.pad_token_id)
    return router(ids, ids != tokenizer.pad_token_id)


def train_router(plan: Plan, tokenizer: PreTrainedTokenizerFast) -> Router:
    """Single sentences have one label; a pair of sentences has two, half each, so that top-p selects both."""
    torch.manual_seed(plan.seed)
    rng = random.Random(f"{plan.seed} router")
    router = Router(plan)

    def loss() -> Tensor:
        batch = [draw_routed(rng, rng.randint(1, 2), held_out=False) for _ in range(plan.router_batch)]
        labels = torch.zeros(len(batch), len(TASKS))
        for row, item in zip(labels, batch, strict=True):
            row[list(item.classes)] = 1 / len(item.classes)
        return F.cross_entropy(router_logits(plan, router, tokenizer, [item.text for item in batch]), labels)

    optimise(router.parameters(), loss, plan.router_steps, plan.router_lr, "router")
    return router.requires_grad_(False)


def select_top_p(logits: Tensor, p: float) -> set[int]:
    """Classes by falling probability while the sum before them is at most p: the crossing one is included."""
    probabilities, order = logits.softmax(-1).sort(descending=True)
    before = probabilities.cumsum(-1) - probabilities
    return set(order[before <= p].tolist())


@dataclass(frozen=True)
class RouterScores:
    """Percentages on held-out operands: `…_sentences` each sentence alone, top 1; `…_set` the text, top p."""

    single_sentences: float
    single_set: float
    composite_sentences: float
    composite_set: float


def held_out_routed(plan: Plan) -> tuple[list[Routed], list[Routed]]:
    """Single and composite held-out texts."""
    rng = random.Random(f"{plan.seed} router held-out")
    singles = [draw_routed(rng, 1, held_out=True) for _ in range(plan.router_eval_items)]
    composites = [draw_routed(rng, 2, held_out=True) for _ in range(plan.router_eval_items)]
    return singles, composites


def score_router(plan: Plan, router: Router, tokenizer: PreTrainedTokenizerFast) -> RouterScores:
    scores = []
    for items in held_out_routed(plan):
        sentences = [sentence for item in items for sentence in item.sentences]
        wanted = torch.tensor([item.classes for item in items])
        right = router_logits(plan, router, tokenizer, sentences).argmax(-1).view_as(wanted) == wanted
        whole = router_logits(plan, router, tokenizer, [item.text for item in items])
        exact = [select_top_p(row, plan.router_p) == set(item.classes) for row, item in zip(whole, items, strict=True)]
        scores += [percentage(right.all(1).tolist()), percentage(exact)]
    return RouterScores(*scores)


# --- files ----------------------------------------------------------------------------------------


def write_json(path: Path, value: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def write_lines(path: Path, values: Iterable[object]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(value) + "\n" for value in values), encoding="utf-8")


def pack_ints(integers: Tensor, bits: int) -> Tensor:
    """int32 [out, in · bits / 32] of q [out, in]: q + 2^(bits-1), the first column in the lowest bits."""
    per_word = 32 // bits
    fields = (integers.long() + 2 ** (bits - 1)).unflatten(1, (-1, per_word))
    words = (fields << (bits * torch.arange(per_word))).sum(-1)
    return torch.where(words >= 2**31, words - 2**32, words).int()


def fingerprint(base: Path) -> str:
    """The base's identity as docs/bundle.md defines it."""
    tensors = {}
    for path in base.glob("*.safetensors"):
        content = path.read_bytes()
        header_size = int.from_bytes(content[:8], "little")
        header = json.loads(content[8 : 8 + header_size])
        header.pop("__metadata__", None)
        for name, entry in header.items():
            start, end = (8 + header_size + offset for offset in entry["data_offsets"])
            shape = ",".join(map(str, entry["shape"]))
            tensors[name] = (f"{name} {entry['dtype']} [{shape}]\n".encode(), content[start:end])
    digest = hashlib.sha256()
    for name in sorted(tensors):
        for part in tensors[name]:
            digest.update(part)
    return f"sha256:{digest.hexdigest()}"


def quantization_config(plan: Plan) -> dict[str, object]:
    """What compressed-tensors needs to read the base; lm_head is the embedding's own tensor."""

    def group(target: str, bits: int) -> dict[str, object]:
        weights = {
            "num_bits": bits,
            "type": "int",
            "symmetric": True,
            "strategy": "group",
            "group_size": plan.group_size,
            "dynamic": False,
        }
        return {
            "targets": [target],
            "weights": weights,
            "input_activations": None,
            "output_activations": None,
        }

    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {
            "group_0": group("Linear", plan.linear_bits),
            "group_1": group("Embedding", plan.embedding_bits),
        },
        "ignore": ["lm_head"],
    }


def write_base(plan: Plan, model: LlamaForCausalLM, stored: dict[str, Quantized], directory: Path) -> None:
    """The compressed base: packed integers and fp16 scales, everything else (the norms) in fp16."""
    tensors = {}
    for name, parameter in model.named_parameters():
        module = name.removesuffix(".weight")
        if module not in stored:
            tensors[name] = parameter.data.half()
            continue
        weight = stored[module]
        tensors[f"{name}_packed"] = pack_ints(weight.integers, weight.bits)
        tensors[f"{name}_scale"] = weight.scales.half()
        tensors[f"{name}_shape"] = torch.tensor(weight.integers.shape)
    directory.mkdir(parents=True, exist_ok=True)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    config = model.config.to_dict() | {
        "architectures": ["LlamaForCausalLM"],
        "dtype": "float16",
        "quantization_config": quantization_config(plan),
    }
    del config["_name_or_path"]  # a path of this machine
    write_json(directory / "config.json", config)


def write_adapter(plan: Plan, model: LlamaForCausalLM, directory: Path) -> None:
    """One task's CA-LoRA branches in fp16 under PEFT's names."""
    tensors = {}
    for name, site in adapted_sites(model).items():
        for branch in ("lora_A", "lora_B", "lora_a1", "lora_a2"):
            tensors[f"base_model.model.{name}.{branch}.weight"] = getattr(site, branch).data.half()
    directory.mkdir(parents=True, exist_ok=True)
    save_file(tensors, directory / "adapter_model.safetensors", metadata={"format": "pt"})
    config = LoraConfig(
        r=plan.rank,
        lora_alpha=plan.alpha,
        target_modules=list(LINEARS),
        task_type=TaskType.CAUSAL_LM,
        inference_mode=True,
    )
    # PEFT keeps the names in a set, whose order changes from run to run.
    write_json(directory / "adapter_config.json", config.to_dict() | {"target_modules": sorted(LINEARS)})


def write_router(plan: Plan, router: Router, tokenizer: PreTrainedTokenizerFast, directory: Path) -> None:
    write_json(
        directory / "config.json",
        {
            "form": "mlp",
            "vocab_size": plan.vocab_size,
            "embedding_size": plan.router_embedding,
            "hidden_sizes": list(plan.router_hidden),
            "num_classes": len(TASKS),
        },
    )
    save_file(dict(router.state_dict()), directory / "model.safetensors", metadata={"format": "pt"})
    tokenizer.save_pretrained(directory)
    lines = (
        {"text": item.text, "adapters": [TASKS[c].id for c in item.classes]}
        for items in held_out_routed(plan)
        for item in items
    )
    write_lines(directory / "eval.jsonl", lines)


def bundle_manifest(plan: Plan, base_fingerprint: str, provenance: dict[str, object]) -> dict[str, object]:
    """bundle.json, see docs/bundle.md."""
    sites = [
        f"model.layers.*.{block}.{name}"
        for block, names in (("self_attn", LINEARS[:4]), ("mlp", LINEARS[4:]))
        for name in names
    ]
    branch = {"sites": sites, "r": plan.rank, "alpha": plan.alpha, "scale": plan.alpha / plan.rank}
    grouped = {"group_size": plan.group_size, "symmetric": True}
    return {
        "schema_version": 1,
        "name": "calora-demo",
        "base": {
            "fingerprint": base_fingerprint,
            "compression": [
                {"scheme": "prune", "sites": sites, "pattern": "2:4"},
                {"scheme": f"int{plan.linear_bits}", "sites": sites, **grouped},
                {"scheme": f"int{plan.embedding_bits}", "sites": ["model.embed_tokens"], **grouped},
            ],
        },
        "adapters": [
            {
                "id": task.id,
                "task": task.id,
                "class_index": index,
                "base_fingerprint": base_fingerprint,
                "branches": [
                    {"role": "lora", **branch, "act": "identity"},
                    {"role": "recovery", **branch, "act": "gelu"},
                ],
            }
            for index, task in enumerate(TASKS)
        ],
        "router": {
            "kind": "classifier",
            "granularity": "sentence",
            "template": "{text}",
            "max_length": plan.router_max_length,
            "truncation": "left",
            "classes": [task.id for task in TASKS],
            "selection": {
                "select": "top_p",
                "p": plan.router_p,
                "weights": "softmax_probs",
                "temperature": 1.0,
            },
        },
        "tasks": [
            {"id": task.id, "adapter": task.id, "metric": "exact_match", "eval": f"eval/{task.id}.jsonl"}
            for task in TASKS
        ],
        "provenance": provenance,
    }


# --- the whole run --------------------------------------------------------------------------------


def prepare_process() -> None:
    """One thread each: two small trainings side by side beat one on two threads, and repeat exactly."""
    torch.set_num_threads(1)
    logging.disable_progress_bar()


def train_demo(plan: Plan, out: Path) -> dict[str, object]:
    """Train everything, write `out`/bundle and `out`/results.json, and return the latter."""
    prepare_process()
    start = time.perf_counter()
    source, bundle = out / "uncompressed", out / "bundle"

    tokenizer = build_tokenizer(plan)
    base = train_base(plan, tokenizer)
    base.save_pretrained(source)
    tokenizer.save_pretrained(source)
    compressed, stored = compress(plan, base)
    write_base(plan, compressed, stored, bundle / "base")
    tokenizer.save_pretrained(bundle / "base")
    base_seconds = time.perf_counter() - start

    with ProcessPoolExecutor(CORES, multiprocessing.get_context("spawn"), prepare_process) as pool:
        task_runs = [
            pool.submit(train_task, plan, index, source, bundle / "adapters" / task.id)
            for index, task in enumerate(TASKS)
        ]
        router_run = pool.submit(train_router, plan, tokenizer)
        task_scores, router = [run.result() for run in task_runs], router_run.result()

    write_router(plan, router, tokenizer, bundle / "router")
    for task in TASKS:
        items = held_out_examples(task, plan.eval_items, plan.seed)
        write_lines(bundle / "eval" / f"{task.id}.jsonl", map(asdict, items))
    provenance = {
        "plan": asdict(plan),
        "cores": CORES,
        "seconds": {"base": round(base_seconds), "all": round(time.perf_counter() - start)},
        "versions": {"python": platform.python_version()}
        | {name: metadata.version(name) for name in ("torch", "transformers", "peft", "tokenizers", "safetensors")},
    }
    write_json(bundle / "bundle.json", bundle_manifest(plan, fingerprint(bundle / "base"), provenance))
    results = {
        "parameters": sum(parameter.numel() for parameter in base.parameters()),
        "tasks": list(map(asdict, task_scores)),
        "router": asdict(score_router(plan, router, tokenizer)),
        "provenance": provenance,
    }
    write_json(out / "results.json", results)
    return results


def main() -> None:
    if len(sys.argv) != 2:
        sys.exit("usage: python -m calora_export.demo.train OUT")
    print(table(train_demo(Plan(), Path(sys.argv[1]))))


if __name__ == "__main__":
    main()
