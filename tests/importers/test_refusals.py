"""What cannot be imported: exit code 1, one line that says why and what would work, and nothing left behind."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

from calora_export import importers
from calora_export.cli import app
from tests.bundles import HIDDEN, LAYERS, LINEARS, MLP, tiny_base
from tests.importers import methods

SITES = {f"model.layers.{layer}.{name}": shape for layer in range(LAYERS) for name, shape in LINEARS.items()}
Q = "model.layers.0.self_attn.q_proj"
UP = "model.layers.0.mlp.up_proj"
State = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("refusals") / "base"
    tiny_base(directory, np.random.default_rng(0), compressed=False)
    return directory


def refused(out: Path, *arguments: object) -> str:
    done = CliRunner().invoke(app, ["import", *map(str, arguments), "-o", str(out)])
    assert done.exit_code == 1, done.output
    (line,) = done.stderr.splitlines()
    assert not out.exists()
    return line.removeprefix("error: ")


def save(path: Path, state: object) -> Path:
    torch.save(state, path)
    return path


def peft_dir(directory: Path, **config: object) -> Path:
    methods.save_peft(directory, methods.draw_pairs({Q: SITES[Q]}, 2), 2, 4)
    written = json.loads((directory / "adapter_config.json").read_text())
    (directory / "adapter_config.json").write_text(json.dumps(written | config))
    return directory


def test_lora_flow(base: Path, tmp_path: Path) -> None:
    loras = [peft_dir(tmp_path / name) for name in ("zh", "math")]

    def line(state: dict[str, torch.Tensor]) -> str:
        gate = save(tmp_path / "gate.pt", state)
        return refused(tmp_path / "out", "lora-flow", base, gate, *loras, "--id", "both")

    gates = {f"encoder.layers.{i}.lora_fusion_gate.weight": torch.zeros(2, HIDDEN) for i in range(LAYERS)}
    gates |= {f"encoder.layers.{i}.weight_bias": torch.zeros(2) for i in range(LAYERS)}
    first = "encoder.layers.0.lora_fusion_gate.weight"
    assert "weight: expected encoder.layers.<i>.lora_fusion_gate.weight or weight_bias, found" in line(
        {"weight": torch.zeros(2)}
    )
    assert f"{first}: expected a row for each of 2 LoRAs, found 3 (name the" in line(
        gates | {first: torch.zeros(3, HIDDEN)}
    )
    bias = "encoder.layers.1.weight_bias"
    assert f"{bias}: expected [1, 2], found [1, 3]" in line(gates | {bias: torch.zeros(1, 3)})
    assert "expected gates of 2 layers, found of 1" in line({k: v for k, v in gates.items() if ".1." not in k})
    assert f"{first}: expected a tensor, found nothing" in line({k: v for k, v in gates.items() if k != first})
    assert "token_router: expected 64 features, found [32]" in line(
        {k: v[..., :32] if v.dim() > 1 else v for k, v in gates.items()}
    )


def test_llava_mole(base: Path, tmp_path: Path) -> None:
    scope = "model.layers.0.mlp"
    state = {f"{scope}.router.weight": torch.zeros(2, HIDDEN), f"{scope}.router.bias": torch.zeros(2)}
    for e in range(2):
        state |= {f"{scope}.moe_up.{e}.lora_A": torch.ones(4, HIDDEN), f"{scope}.moe_up.{e}.lora_B": torch.ones(MLP, 4)}

    def line(state: dict[str, torch.Tensor]) -> str:
        file = save(tmp_path / "mole.pt", state)
        return refused(tmp_path / "out", "llava-mole", base, file, "--alpha", 8)

    vision = {"vision_tower.weight": torch.zeros(1)}
    assert "vision_tower.weight: expected <layer>.mlp.moe_gate" in line(state | vision)
    assert f"{scope}.router.bias: expected a tensor, found nothing" in line(
        {k: v for k, v in state.items() if not k.endswith("bias")}
    )
    assert f"{scope}.router.weight: expected [2, 64], found [3, 64]" in line(
        state | {f"{scope}.router.weight": torch.zeros(3, HIDDEN)}
    )
    missing = f"{scope}.moe_up.0.lora_B"
    assert f"{missing}: expected a tensor, found nothing" in line({k: v for k, v in state.items() if k != missing})


def test_ramole(base: Path, tmp_path: Path) -> None:
    line = refused(tmp_path / "out", "ramole", base, tmp_path)
    assert "attention per layer" in line and "import lora-retriever takes the same LoRAs" in line


def test_flora_of_a_higher_rank(base: Path, tmp_path: Path) -> None:
    site = "model.layers.0.self_attn.q_proj"
    state = {f"{site}.flora_A": torch.ones(4, HIDDEN), f"{site}.flora_B": torch.ones(HIDDEN, 4)}
    line = refused(tmp_path / "out", "flora", base, save(tmp_path / "german.pt", state))
    assert f"{site}.flora_A: expected rank 1, found rank 4 (a higher rank is that many passes through the base" in line


def test_llm_pruner(base: Path, tmp_path: Path) -> None:
    line = refused(tmp_path / "out", "llm-pruner", base)
    assert "expected a file, found a directory (import peft takes a base that was saved as safetensors)" in line
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    line = refused(tmp_path / "out", "llm-pruner", tmp_path / "pytorch_model.bin")
    assert "a pickled module" in line and "model.state_dict()" in line


@pytest.mark.parametrize("command", ["peft", "chain-of-lora", "sharelora"])
def test_a_merged_model_has_no_adapter(base: Path, tmp_path: Path, command: str) -> None:
    more = ["--id", "x"] if command == "chain-of-lora" else []
    line = refused(tmp_path / "out", command, base, base, *more)
    assert "a whole model, its LoRAs merged into it" in line and "before merge_and_unload" in line


@pytest.mark.parametrize("command", ["peft", "chain-of-lora", "sharelora"])
def test_dora(base: Path, tmp_path: Path, command: str) -> None:
    more = ["--id", "x"] if command == "chain-of-lora" else []
    line = refused(tmp_path / "out", command, base, peft_dir(tmp_path / "a", use_dora=True), *more)
    assert "use_dora" in line and "train plain LoRA" in line


def test_nola_of_a_gpu(base: Path, tmp_path: Path) -> None:
    methods.nola(SITES, tmp_path / "a", torch.float32)
    line = refused(tmp_path / "out", "nola", base, tmp_path / "a", "--trained-on", "cuda")
    assert "expected cpu" in line and "import peft" in line


def test_nola_as_plain_peft(base: Path, tmp_path: Path) -> None:
    methods.nola(SITES, tmp_path / "a", torch.float32)
    state = torch.load(tmp_path / "a/adapter_model.bin", weights_only=True)
    save_file(state, tmp_path / "a/adapter_model.safetensors")
    line = refused(tmp_path / "out", "peft", base, tmp_path / "a")
    assert "found another key (NOLA: import nola makes A and B of it)" in line


def test_sharelora_that_shares_nothing(base: Path, tmp_path: Path) -> None:
    line = refused(tmp_path / "out", "sharelora", base, peft_dir(tmp_path / "a"))
    assert "a matrix that several layers share, found none (import peft takes plain LoRA)" in line


def test_ca_lora_needs_both_directories(base: Path, tmp_path: Path) -> None:
    line = refused(tmp_path / "out", "ca-lora", base, peft_dir(tmp_path / "a"))
    assert "inherit: expected a PEFT directory, found nothing (import peft takes a single PEFT directory)" in line


def test_an_adapter_of_another_method(base: Path, tmp_path: Path) -> None:
    directory = peft_dir(tmp_path / "a")
    line = refused(tmp_path / "out", "nola", base, directory, "--trained-on", "cpu")
    assert "expected lora_A.coefficients and lora_A.seed, found none (import peft takes plain LoRA)" in line
    (directory / "adapter_config.json").write_text(json.dumps({"peft_type": "IA3"}))
    line = refused(tmp_path / "out", "peft", base, directory)
    assert "peft_type: expected LORA, found IA3 (train LoRA, or convert it to LoRA)" in line


@pytest.mark.parametrize(
    ("command", "option"),
    [
        (("ca-lora",), "--alpha"),
        (("mtl-lora", "--alpha", 8, "--tasks", "one"), "--temperature"),
        (("mtl-lora", "--temperature", 1, "--tasks", "one"), "--alpha"),
        (("multilora",), "--alpha"),
        (("llava-mole",), "--alpha"),
        (("lots",), "--scale"),
        (("lora-flow", "a", "--id", "x"), "--temperature"),
    ],
)
@pytest.mark.parametrize("value", ["0", "-3", "nan", "inf"])
def test_numbers_that_no_training_had(
    base: Path, tmp_path: Path, command: tuple[object, ...], option: str, value: str
) -> None:
    line = refused(tmp_path / "out", command[0], base, tmp_path / "a.pt", *command[1:], option, value)
    assert line == f"{option}: value: expected a number above 0, found {value}"


def test_ca_lora_needs_alpha_for_a_file(base: Path, tmp_path: Path) -> None:
    methods.ca_lora(SITES, tmp_path / "a.pt", 2, 4, "gelu")
    assert "--alpha: expected lora_alpha" in refused(tmp_path / "out", "ca-lora", base, tmp_path / "a.pt")


def test_mtl_lora_with_other_tasks(base: Path, tmp_path: Path) -> None:
    methods.mtl_lora(SITES, tmp_path / "a.pt", 3, 8, 1.0, diagonal=True, scaler=False)
    numbers = ["--alpha", 8, "--temperature", 1]
    line = refused(tmp_path / "out", "mtl-lora", base, tmp_path / "a.pt", *numbers, "--tasks", "one,two")
    assert "lora_lambdas: expected one for each of 2 tasks, found 3 (--tasks names them all)" in line
    line = refused(tmp_path / "out", "mtl-lora", base, tmp_path / "a.pt", *numbers, "--tasks", "a,b,a")
    assert "--tasks: [2]: expected a name of its own, found a again" in line


# ── a damaged checkpoint ────────────────────────────────────────────────────────────────────────────


def _move(key: str, to: str) -> Callable[[State], object]:
    return lambda state: state.update({to: state.pop(key)})


DAMAGES: dict[str, tuple[Callable[[State], object], str]] = {
    "shape": (
        lambda state: state.update({f"{Q}.lora.lora_A": torch.zeros(2, HIDDEN + 1)}),
        f"lora_A: expected [2, {HIDDEN}], found [2, {HIDDEN + 1}]",
    ),
    "rank": (
        lambda state: state.update({f"{UP}.lora.lora_a2": torch.zeros(MLP, 3)}),
        f"lora_a2: expected [{MLP}, 2], found [{MLP}, 3]",
    ),
    "nan": (lambda state: state[f"{Q}.lora.lora_A"].fill_(torch.nan), "expected finite values, found NaN or Inf"),
    "integers": (
        lambda state: state.update({f"{Q}.lora.lora_A": torch.zeros(2, HIDDEN, dtype=torch.int8)}),
        "lora_A: expected floats, found int8",
    ),
    "site": (
        lambda state: [_move(key, key.replace("mlp.up_proj", "mlp.up"))(state) for key in tuple(state) if UP in key],
        "expected a linear layer of the base, such as",
    ),
    "missing": (
        lambda state: state.pop(f"{UP}.lora.lora_a2"),
        "up_proj.lora.lora_a2: expected a tensor, found nothing",
    ),
    "unknown": (_move(f"{UP}.lora.lora_a2", f"{UP}.lora.lora_a3"), "lora_a3: expected only"),
    "other": (
        lambda state: state.update({"model.norm.weight": torch.ones(HIDDEN)}),
        "model.norm.weight: expected <site>.lora.lora_…, found another key (keep only the adapter's",
    ),
    "empty": (lambda state: state.clear(), "tensors: expected <site>.lora.lora_…, found none"),
    "number": (lambda state: state.update({"step": 3}), "step: expected a tensor, found int"),  # type: ignore[dict-item]
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint(base: Path, tmp_path: Path, damage: str) -> None:
    methods.ca_lora(SITES, tmp_path / "a.pt", 2, 4, "gelu")
    state = torch.load(tmp_path / "a.pt", weights_only=True)
    edit, expected = DAMAGES[damage]
    edit(state)
    line = refused(tmp_path / "out", "ca-lora", base, save(tmp_path / "a.pt", state), "--alpha", 4)
    assert expected in line


def test_a_pickle_of_more_than_tensors_is_not_loaded(base: Path, tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    evil = type("E", (), {"__reduce__": lambda self: (Path.touch, (mark,))})()
    torch.save({"x": evil}, tmp_path / "a.pt")
    line = refused(tmp_path / "out", "ca-lora", base, tmp_path / "a.pt", "--alpha", 4)
    assert "expected a state dict of tensors, found a pickle of more than tensors" in line
    assert not mark.exists()


@pytest.mark.parametrize("content", [b"", b"not a pickle", pickle.dumps([1])])
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_no_checkpoint_at_all(base: Path, tmp_path: Path, content: bytes, suffix: str) -> None:
    file = tmp_path / f"a{suffix}"
    file.write_bytes(content)
    assert "expected" in refused(tmp_path / "out", "multilora", base, file, "--alpha", 4)
    assert "found nothing" in refused(tmp_path / "out", "multilora", base, tmp_path / "no.pt", "--alpha", 4)


# ── the command line ────────────────────────────────────────────────────────────────────────────────


def test_every_importer_is_a_command_with_help() -> None:
    listed = CliRunner().invoke(app, ["import", "--help"]).output
    for name in importers.names():
        assert f" {name} " in listed
        done = CliRunner().invoke(app, ["import", name, "--help"])
        assert done.exit_code == 0 and "--out" in done.output and "--json" in done.output


def test_no_such_importer() -> None:
    assert CliRunner().invoke(app, ["import", "no-such-format"]).exit_code == 2


def test_an_importers_own_options_reach_it(base: Path, tmp_path: Path) -> None:
    methods.mtl_lora(SITES, tmp_path / "a.pt", 2, 8, 0.1, diagonal=False, scaler=False)
    out = tmp_path / "out"
    options = ["--alpha", "8", "--temperature", "0.1", "--tasks", "x,y", "--name", "mine", "-o", str(out), "--json"]
    done = CliRunner().invoke(app, ["import", "mtl-lora", str(base), str(tmp_path / "a.pt"), *options])
    assert json.loads(done.stdout) == {"bundle": str(out), "adapters": ["x", "y"]}
    assert json.loads((out / "bundle.json").read_text())["name"] == "mine"
