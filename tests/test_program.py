"""A program that was written and read computes what torch's own does, and a file of anything else is refused."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram, export

from calora_export import bundle as bundles
from calora_export import composing, program
from calora_export.errors import PackageError, UnsupportedError
from calora_export.graph import Graph, Slot, trace
from tests.conftest import Families
from tests.families import NAMES

Edit = Callable[[dict], object]


def traced(path: Path) -> Graph:
    """A bundle's base with a slot on every linear layer that its first adapter could have."""
    bundle = bundles.load(path)
    composed = composing.compose(bundle, bundle.weight, context=64)
    sites = [site for group in composed.groups for site in group if site in bundle.linears]
    slots = tuple(Slot(site, bundle.linears[site][1], bundle.linears[site][0]) for site in sites)
    return trace(composed, slots, last_only=False, recovery=True)


def flat_inputs(graph: Graph, new: int, cached: int, rank: int) -> tuple[Tensor, list[list[Tensor]], list[Tensor]]:
    torch.manual_seed(0)
    shape = graph.shape
    past = [torch.randn(1, heads, cached, shape.head_dim) for heads in shape.kv_heads for _ in range(2)]
    downs = [torch.randn(rank, slot.inputs) for slot in graph.slots]
    ups = [torch.randn(slot.outputs, rank) for slot in graph.slots]
    rows = [torch.randn(rank), torch.arange(rank) % 2 == 0]
    return torch.randint(0, shape.vocab, (1, new)), [past, downs, ups], rows


@pytest.mark.parametrize("name", NAMES)
def test_every_family_computes_what_torchs_own_program_does(families: Families, tmp_path: Path, name: str) -> None:
    """To the bit, at the sizes of the example, which are the only ones that torch's own takes."""
    graph = traced(families(name).bundle)
    program.write(graph.program, tmp_path / "model")
    ids, lists, rows = flat_inputs(graph, new=4, cached=3, rank=5)
    with torch.no_grad():
        logits, present = graph.program.module()(ids, *lists, *rows)
    made = program.read(tmp_path / "model")(ids, *(tensor for each in lists for tensor in each), *rows)
    assert len(made) == 1 + len(present)
    assert all(torch.equal(a, b) for a, b in zip(made, [logits, *present], strict=True))


class Everything(nn.Module):
    """Each kind of argument once: lengths, arithmetic on them, infinities, dtypes, texts, lists, no tensor at all."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(-1, 1, 12).view(3, 4), requires_grad=False)
        self.register_buffer("mask", torch.tensor([True, False, True]))
        self.register_buffer("passing", torch.tensor(2.5), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        y = nn.functional.gelu(x @ self.weight.T, approximate="tanh").to(torch.float64)
        y = y.masked_fill(self.get_buffer("mask"), float("-inf")).clamp_min(-1e30)
        places = torch.arange(x.shape[0] * 2 + 1, dtype=torch.float64)[: x.shape[0]]
        first, second = torch.split(y + places[:, None] * self.get_buffer("passing"), [1, 2], dim=1)
        return torch.cat([first, second, torch.full((x.shape[0], 1), float("nan"))], dim=1).float()


@pytest.fixture(scope="module")
def everything() -> ExportedProgram:
    return traced_everything()


def traced_everything() -> ExportedProgram:
    return export(Everything(), (torch.zeros(4, 4),), dynamic_shapes={"x": {0: Dim("rows", min=1)}})


@pytest.mark.parametrize("rows", [1, 4, 9])
def test_every_kind_of_argument_survives(everything: ExportedProgram, tmp_path: Path, rows: int) -> None:
    program.write(everything, tmp_path / "file")
    x = torch.arange(4.0 * rows).view(rows, 4) / 7
    (made,) = program.read(tmp_path / "file")(x)
    np.testing.assert_array_equal(made.numpy(), Everything()(x).numpy())


def test_the_same_program_gives_the_same_bytes(everything: ExportedProgram, tmp_path: Path) -> None:
    program.write(everything, tmp_path / "a")
    program.write(traced_everything(), tmp_path / "b")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_a_tied_table_is_stored_once_and_what_is_not_needed_not_at_all(families: Families, tmp_path: Path) -> None:
    graph = traced(families("llama-tied").bundle)
    program.write(graph.program, tmp_path / "model")
    tables = [name for name, array in load_file(tmp_path / "model").items() if array.shape == (300, 64)]
    assert len(tables) == 1
    called = {call["operator"] for call in listing(tmp_path / "model")["calls"]}
    traced_calls = {str(node.target) for node in graph.program.graph.nodes}
    assert "aten.cumsum.default" in traced_calls - called


def test_a_call_that_writes_is_not_written(tmp_path: Path) -> None:
    class Writing(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.clone().add_(1)

    with pytest.raises(UnsupportedError, match=r"torch: operator: expected .*, found aten\.add_\.Tensor"):
        program.write(export(Writing(), (torch.zeros(2),)), tmp_path / "file")
    assert list(tmp_path.iterdir()) == []


# ── files that are something else ───────────────────────────────────────────────────────────────────────────


def listing(file: Path) -> dict:
    return json.loads(_header(file)[0]["__metadata__"]["program"])


def _header(file: Path) -> tuple[dict, bytes]:
    data = file.read_bytes()
    size = struct.unpack("<Q", data[:8])[0]
    return json.loads(data[8 : 8 + size]), data[8 + size :]


def edit(file: Path, change: Edit) -> None:
    """Let `change` edit the listing in place."""
    header, data = _header(file)
    document = json.loads(header["__metadata__"]["program"])
    change(document)
    header["__metadata__"]["program"] = json.dumps(document)
    text = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + data)


@pytest.fixture
def file(everything: ExportedProgram, tmp_path: Path) -> Path:
    program.write(everything, tmp_path / "file")
    edit(tmp_path / "file", lambda document: None)
    program.read(tmp_path / "file")
    return tmp_path / "file"


@pytest.mark.parametrize(
    "name",
    [
        "aten.from_file.default",  # opens a file
        "aten.save.default",
        "aten.add_.Tensor",  # writes to its argument
        "aten.add.out",
        "aten.no_such_operator.default",
        "aten.add",
        "aten.add.__class__",
        "aten.__class__.mro",
        "prim.Print.default",
        "operator.methodcaller",
        "operator.setitem",
        "os.system",
        "builtins.eval",
        "",
    ],
)
def test_only_operators_that_compute_are_called(file: Path, name: str) -> None:
    assert torch.ops.aten.from_file.default and torch.ops.aten.add.out  # they exist, and are refused
    edit(file, lambda document: document["calls"][0].update(operator=name))
    with pytest.raises(PackageError, match="expected an operator of aten or calora without side effects"):
        program.read(file)


@pytest.mark.parametrize(
    "argument",
    [
        {"value": "nobody"},
        {"value": ["x"]},
        {"torch": "load"},
        {"torch": "no_such_constant"},
        {"device": "cuda"},
        {"float": "1"},
        {"value": "x", "torch": "float32"},
        {},
        [[{"value": "nobody"}]],
    ],
    ids=str,
)
def test_an_argument_is_an_earlier_value_or_plain(file: Path, argument: object) -> None:
    edit(file, lambda document: document["calls"][0]["args"].__setitem__(0, argument))
    with pytest.raises(PackageError, match="file: argument: expected an earlier value or a constant of torch"):
        program.read(file)


def nothing(document: dict) -> None:
    document.clear()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (nothing, "not a program: Object missing required field `inputs`"),
        (lambda document: document.update(more=1), "not a program: Object contains unknown field `more`"),
        (lambda document: document["tensors"].update(y="nobody"), "nobody: expected a tensor, found nothing"),
        (lambda document: document["results"].append("nobody"), "argument: expected an earlier value"),
        (lambda document: document["calls"].reverse(), "argument: expected an earlier value"),
    ],
)
def test_a_wrong_listing_is_one_line(file: Path, change: Edit, message: str) -> None:
    edit(file, change)
    with pytest.raises(PackageError) as caught:
        program.read(file)
    assert str(caught.value).startswith(f"file: {message}") and "\n" not in str(caught.value)


def pickled(file: Path) -> None:
    torch.save({"weight": torch.zeros(2)}, file)


@pytest.mark.parametrize(
    "damage",
    [
        lambda file: file.write_bytes(b""),
        lambda file: file.write_bytes(b"\0" * 100),
        lambda file: file.write_bytes(file.read_bytes()[:-1]),
        lambda file: file.unlink(),
        pickled,
    ],
    ids=["empty", "zeros", "truncated", "missing", "pickled"],
)
def test_a_damaged_file_is_one_line(file: Path, damage: Callable[[Path], object]) -> None:
    damage(file)
    with pytest.raises(PackageError, match="^file: not a program: ") as caught:
        program.read(file)
    assert "\n" not in str(caught.value)


def test_an_operator_that_does_not_take_its_arguments_is_one_line(file: Path) -> None:
    edit(file, lambda document: document["calls"][0].update(args=[]))
    with pytest.raises(PackageError, match="^file: [a-z_0-9]+: aten::.* missing value for argument") as caught:
        program.read(file)(torch.zeros(4, 4))
    assert "\n" not in str(caught.value)


def test_a_deep_argument_is_refused_and_not_followed(file: Path) -> None:
    edit(file, lambda document: document["calls"][0].update(args="DEEP"))
    header, data = _header(file)
    listed = header["__metadata__"]["program"].replace('"DEEP"', "[" * 100_000 + "]" * 100_000)
    header["__metadata__"]["program"] = listed
    text = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + data)
    with pytest.raises(PackageError, match="^file: not a program: "):
        program.read(file)
