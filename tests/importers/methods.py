"""The published methods in plain torch: what they train, how they save it, what they add to a layer's output.

Written from the papers' formulas and the key names of the public code; nothing here knows the importers.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Collection
from contextlib import ExitStack
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

Sites = dict[str, tuple[int, int]]  # site → (out, in)
Delta = Callable[[str, Tensor], Tensor | None]  # what a method adds at a site, None where it is not


def normal(*shape: int) -> Tensor:
    """Random numbers that make a delta of some tenths of a layer's output, as training does."""
    return torch.randn(*shape) * 0.15


def some(sites: Sites, *endings: str) -> Sites:
    return {site: shape for site, shape in sites.items() if site.endswith(endings)}


def save_peft(directory: Path, pairs: dict[str, tuple[Tensor, Tensor]], r: int, alpha: float) -> Path:
    """The two files that PEFT writes, by hand."""
    from safetensors.torch import save_file

    directory.mkdir(parents=True)
    tensors = {}
    for site, (a, b) in pairs.items():
        tensors[f"base_model.model.{site}.lora_A.weight"] = a.clone()
        tensors[f"base_model.model.{site}.lora_B.weight"] = b.clone()
    save_file(tensors, directory / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": r, "lora_alpha": alpha, "bias": "none"}
    (directory / "adapter_config.json").write_text(json.dumps(config))
    return directory


def lora(pairs: dict[str, tuple[Tensor, Tensor]], scale: float) -> Delta:
    return lambda site, x: scale * (x @ pairs[site][0].T @ pairs[site][1].T) if site in pairs else None


def total(*deltas: Delta) -> Delta:
    def add(site: str, x: Tensor) -> Tensor | None:
        parts = [part for delta in deltas if (part := delta(site, x)) is not None]
        return torch.stack(parts).sum(0) if parts else None

    return add


def draw_pairs(sites: Sites, r: int) -> dict[str, tuple[Tensor, Tensor]]:
    return {site: (normal(r, columns), normal(rows, r)) for site, (rows, columns) in sites.items()}


def ca_lora(sites: Sites, file: Path, r: int, alpha: float, act: str) -> Delta:
    """LoRA on the attention, recovery on all: y += s · B(A x) + s · a2(act(a1 x))."""
    attention = some(sites, "q_proj", "k_proj", "v_proj", "o_proj")
    inherited, recovered = draw_pairs(attention, r), draw_pairs(sites, r)
    state = {}
    for site, (a, b) in inherited.items():
        state |= {f"{site}.lora.lora_A": a, f"{site}.lora.lora_B": b}
    for site, (a1, a2) in recovered.items():
        state |= {f"{site}.lora.lora_a1": a1, f"{site}.lora.lora_a2": a2}
    torch.save(state, file)

    def recovery(site: str, x: Tensor) -> Tensor | None:
        a1, a2 = recovered[site]
        h = x @ a1.T
        return alpha / r * ((F.gelu(h) if act == "gelu" else h) @ a2.T)

    return total(lora(inherited, alpha / r), recovery)


def ca_lora_peft(sites: Sites, directory: Path) -> Delta:
    """The two directories of the Llama-2 runs; ranks and scales of their own."""
    inherited, recovered = draw_pairs(some(sites, "q_proj", "v_proj"), 4), draw_pairs(sites, 3)
    save_peft(directory / "inherit", inherited, 4, 6)
    save_peft(directory / "recover", recovered, 3, 10)
    return total(lora(inherited, 6 / 4), lora(recovered, 10 / 3))


def mtl_lora(
    sites: Sites, file: Path, tasks: int, alpha: float, temperature: float, *, diagonal: bool, scaler: bool
) -> list[Delta]:
    """h = W x + s · B_t Λ_t A x with B_t = Σ_b softmax(w_t / τ)_b B_b; a delta per task."""
    r, count = 4, 3
    own = some(sites, "q_proj", "v_proj", "down_proj")
    state: dict[str, Tensor] = {}
    for site, (rows, columns) in own.items():
        state[f"module.{site}.lora_A"] = normal(1, r, columns)
        state[f"module.{site}.lora_lambdas"] = normal(tasks, r) if diagonal else normal(tasks, r, r)
        state[f"module.{site}.lora_B"] = normal(count, rows, r) * 3
        state[f"module.{site}.lora_B_w"] = torch.randn(tasks, count)
        if scaler:
            state[f"module.{site}.lora_scaler"] = torch.randn(())
    torch.save(state, file)

    def of(task: int) -> Delta:
        def delta(site: str, x: Tensor) -> Tensor | None:
            if site not in own:
                return None
            key = f"module.{site}.lora_"
            core = state[f"{key}lambdas"][task]
            h = x @ state[f"{key}A"][0].T @ (core.diag() if diagonal else core).T
            mixture = F.softmax(state[f"{key}B_w"][task] / temperature, dim=-1)
            outputs = torch.stack([h @ b.T for b in state[f"{key}B"]])
            factor = torch.sigmoid(state[f"{key}scaler"]) if scaler else 1.0
            return alpha / r * factor * torch.einsum("b,b...->...", mixture, outputs)

        return delta

    return [of(task) for task in range(tasks)]


def multilora(sites: Sites, file: Path, alpha: float) -> Delta:
    """y += (alpha / r) Σ_i γ_i ⊙ B_i A_i x."""
    r, n = 3, 4
    own = some(sites, "q_proj", "o_proj", "up_proj")
    state: dict[str, Tensor] = {}
    for site, (rows, columns) in own.items():
        state[f"{site}.lora_A"] = normal(n, r, columns)
        state[f"{site}.lora_B"] = normal(n, rows, r)
        state[f"{site}.lora_scaling"] = normal(n, rows)
    torch.save(state, file)

    def delta(site: str, x: Tensor) -> Tensor | None:
        if site not in own:
            return None
        parts = zip(*(state[f"{site}.lora_{part}"] for part in ("A", "B", "scaling")), strict=True)
        return alpha / r * torch.stack([x @ a.T @ b.T * gamma for a, b, gamma in parts]).sum(0)

    return delta


def sharelora(sites: Sites, directory: Path, shared: str) -> Delta:
    """One A per kind of layer for all layers, or one B, or both; PEFT saves a copy per layer."""
    first: dict[tuple[str, str], Tensor] = {}
    pairs: dict[str, tuple[Tensor, Tensor]] = {}
    for site, (a, b) in draw_pairs(some(sites, "q_proj", "v_proj"), 4).items():
        kind = site.rsplit(".", 1)[-1]
        a = first.setdefault(("A", kind), a) if "A" in shared else a
        b = first.setdefault(("B", kind), b) if "B" in shared else b
        pairs[site] = (a, b)
    save_peft(directory, pairs, 4, 8)
    return lora(pairs, 8 / 4)


def chain(sites: Sites, directory: Path) -> tuple[list[Path], Delta]:
    """Links of several ranks and scales, on layers of their own: y += Σ_i s_i B_i A_i x."""
    settings = [(1, 3.0, ("q_proj",)), (4, 6.0, ("q_proj", "v_proj")), (2, 8.0, ("v_proj", "down_proj"))]
    links, deltas = [], []
    for index, (r, alpha, endings) in enumerate(settings):
        pairs = draw_pairs(some(sites, *endings), r)
        links.append(save_peft(directory / f"link{index}", pairs, r, alpha))
        deltas.append(lora(pairs, alpha / r))
    return links, total(*deltas)


def nola(sites: Sites, directory: Path, kind: torch.dtype) -> Delta:
    """W = Σ_b c_b U_b / √n + W0, U uniform in [-1, 1) from the seed, for A and for B."""
    r, n, alpha = 4, 16, 8.0
    directory.mkdir()
    state: dict[str, Tensor] = {}
    made: dict[str, Tensor] = {}
    for site, (rows, columns) in some(sites, "q_proj", "up_proj").items():
        for matrix, shape in (("A", (r, columns)), ("B", (rows, r))):
            key = f"base_model.model.{site}.lora_{matrix}"
            seed = torch.randint(int(1e10), (1,))
            state[f"{key}.seed"], state[f"{key}.weight"] = seed, normal(*shape).to(kind)
            state[f"{key}.coefficients"] = torch.randn(n).to(kind)
            with torch.random.fork_rng():
                torch.manual_seed(int(seed))
                basis = torch.nn.init.uniform_(torch.zeros(n, *shape, dtype=kind), -1.0, 1.0) * (1 / math.sqrt(n))
            sum_ = torch.einsum("b,boi->oi", state[f"{key}.coefficients"].float(), basis.float())
            made[f"{site}.{matrix}"] = sum_ + state[f"{key}.weight"].float()
    torch.save(state, directory / "adapter_model.bin")
    config = {"peft_type": "LORA", "r": r, "lora_alpha": alpha, "use_nola": True, "nola_num_basis": n}
    (directory / "adapter_config.json").write_text(json.dumps(config))
    return lora({site[:-2]: (a, made[f"{site[:-2]}.B"]) for site, a in made.items() if site.endswith(".A")}, alpha / r)


def lots(sites: Sites, file: Path, *, diagonals: Collection[str] = (), scale: float) -> dict[str, Delta]:
    """y += scale · U Σ_i Vᵀ x; one delta per adapter. diagonals: those of which the file has Σ's diagonal alone."""
    c = 6
    own = some(sites, "q_proj", "v_proj")
    state: dict[str, Tensor] = {}
    for site, (rows, columns) in own.items():
        state |= {f"{site}.U": normal(rows, c), f"{site}.V": normal(columns, c)}
        for adapter in ("first", "second"):
            sigma = normal(c, c)
            state[f"{site}.sigma.{adapter}"] = 3 * sigma.diag() if adapter in diagonals else sigma
    torch.save(state, file)

    def of(adapter: str) -> Delta:
        def delta(site: str, x: Tensor) -> Tensor | None:
            if site not in own:
                return None
            sigma = state[f"{site}.sigma.{adapter}"]
            u, v = state[f"{site}.U"], state[f"{site}.V"]
            return scale * (u @ ((sigma.diag() if sigma.dim() == 1 else sigma) @ (v.T @ x.mT))).mT

        return delta

    return {adapter: of(adapter) for adapter in ("first", "second")}


# ── methods that do more than add to a layer's output ─────────────────────────────────────────────────────────────────

Install = Callable[[torch.nn.Module, ExitStack], None]  # changes a transformers model until the stack is closed


def flora(sites: Sites, file: Path) -> Install:
    """W ∘ (B A) in the place of W, rank 1."""
    own = some(sites, "q_proj", "v_proj", "down_proj")
    state: dict[str, Tensor] = {}
    for site, (rows, columns) in own.items():
        state |= {f"{site}.flora_A": 1 + normal(1, rows), f"{site}.flora_B": 1 + normal(columns, 1)}
    torch.save(state, file)

    def install(model: torch.nn.Module, stack: ExitStack) -> None:
        for site in own:
            module = model.get_submodule(site)
            whole = module.weight.data
            delta = (state[f"{site}.flora_B"] @ state[f"{site}.flora_A"]).T  # [out, in]
            module.weight.data = whole * delta
            stack.callback(setattr, module.weight, "data", whole)

    return install


def added(delta: Callable[[str, Tensor], Tensor | None]) -> Install:
    """A delta on every layer's output, as hooks."""

    def install(model: torch.nn.Module, stack: ExitStack) -> None:
        def hook(site: str):
            def add(module: object, inputs: tuple[Tensor], output: Tensor) -> Tensor:
                more = delta(site, inputs[0])
                return output if more is None else output + more

            return add

        for site, module in model.named_modules():
            if isinstance(module, torch.nn.Linear):
                stack.enter_context(module.register_forward_hook(hook(site)))

    return install


def _weighed(scope: str, gate: Callable[[str, Tensor], Tensor], parts: dict[str, list[Delta]]) -> Install:
    """scope: the ending of modules whose input `gate` turns into weights [..., E] for `parts[site]`, one delta each."""

    def install(model: torch.nn.Module, stack: ExitStack) -> None:
        weights: dict[str, Tensor] = {}
        for name, module in model.named_modules():
            if re.fullmatch(rf"model\.layers\.\d+{scope}", name):

                def read(module: object, args: tuple[Tensor, ...], kwargs: dict[str, Tensor], name: str = name) -> None:
                    weights[name] = gate(name, args[0] if args else kwargs["hidden_states"])

                stack.enter_context(module.register_forward_pre_hook(read, with_kwargs=True))

        def delta(site: str, x: Tensor) -> Tensor | None:
            if site not in parts:
                return None
            (w,) = (found for name, found in weights.items() if site.startswith(f"{name}."))
            outputs = [part(site, x) for part in parts[site]]
            return sum(w[..., k, None] * out for k, out in enumerate(outputs) if out is not None)  # type: ignore[return-value]

        added(delta)(model, stack)

    return install


def lora_flow(sites: Sites, directory: Path, hidden: int, temperature: float) -> tuple[list[Path], Path, Install]:
    """w = softmax(W x / T) + b per layer; y += Σ_k w_k s_k B_k A_k x. LoRAs of several ranks, on layers of their own.
    """
    settings = [("zh", 2, 6.0, ("q_proj", "v_proj")), ("math", 4, 4.0, ("q_proj", "v_proj", "up_proj", "down_proj"))]
    paths, deltas = [], []
    for name, r, alpha, endings in settings:
        pairs = draw_pairs(some(sites, *endings), r)
        paths.append(save_peft(directory / name, pairs, r, alpha))
        deltas.append(lora(pairs, alpha / r))
    layers = sorted({int(site.split(".")[2]) for site in sites})
    state = {}
    for layer in layers:
        state[f"encoder.layers.{layer}.lora_fusion_gate.weight"] = torch.randn(2, hidden)
        state[f"encoder.layers.{layer}.weight_bias"] = torch.randn(1, 2) * 0.3
    torch.save(state, directory / "gate.pt")

    def gate(name: str, x: Tensor) -> Tensor:
        key = f"encoder.layers.{name.rsplit('.', 1)[-1]}"
        scores = x @ state[f"{key}.lora_fusion_gate.weight"].T / temperature
        return scores.softmax(-1) + state[f"{key}.weight_bias"]

    return paths, directory / "gate.pt", _weighed("", gate, {site: deltas for site in sites})


def llava_mole(sites: Sites, file: Path, hidden: int, alpha: float, count: int) -> Install:
    """routing = softmax(router(x)), x the MLP's input; its projections add Σ_e routing_e · B_e A_e x · alpha / r."""
    r = 3
    state: dict[str, Tensor] = {}
    parts: dict[str, list[Delta]] = {}
    for site, (rows, columns) in some(sites, "gate_proj", "up_proj", "down_proj").items():
        scope, _, leaf = site.rpartition(".")
        state[f"{scope}.router.weight"], state[f"{scope}.router.bias"] = torch.randn(count, hidden), torch.randn(count)
        parts[site] = []
        for e in range(count):
            key = f"{scope}.moe_{leaf.removesuffix('_proj')}.{e}.lora_"
            state |= {f"{key}A": normal(r, columns), f"{key}B": normal(rows, r)}
            parts[site].append(lora({site: (state[f"{key}A"], state[f"{key}B"])}, alpha / r))
    torch.save(state, file)

    def gate(name: str, x: Tensor) -> Tensor:
        return torch.nn.functional.linear(x, state[f"{name}.router.weight"], state[f"{name}.router.bias"]).softmax(-1)

    return _weighed(r"\.mlp", gate, parts)


def run_with(model: torch.nn.Module, ids: Tensor, *installs: Install) -> Tensor:
    """Logits of a transformers model with methods installed."""
    with ExitStack() as stack, torch.no_grad():
        for install in installs:
            install(model, stack)
        return model(ids).logits
