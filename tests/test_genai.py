"""A package opens as it is in stock onnxruntime-genai, and says there what it says here."""

from __future__ import annotations

from pathlib import Path

import onnxruntime_genai as og
import pytest
from tokenizers import Tokenizer

from calora_export import package as packages
from calora_export import pipeline
from calora_export.generation import Chat
from calora_export.runtimes import onnx as runtime
from tests.bundles import copy_bundle, edit_json
from tests.conftest import Export, Lower

PROMPT = "Write the word alpha backwards."
STEPS = 24


def generated(package: Path, prompt: list[int], adapter: str | None) -> list[int]:
    """Greedy tokens of onnxruntime-genai, with its own tokenizer, search and cache."""
    model = og.Model(str(package))
    search = og.GeneratorParams(model)
    search.set_search_options(max_length=len(prompt) + STEPS)
    generator = og.Generator(model, search)
    if adapter is not None:
        adapters = og.Adapters(model)
        adapters.load(str(package / "adapters" / f"{adapter}.onnx_adapter"), adapter)
        generator.set_active_adapter(adapters, adapter)
    generator.append_tokens(prompt)
    while not generator.is_done():
        generator.generate_next_token()
    return [int(token) for token in generator.get_sequence(0)][len(prompt) :]


def greedy(package: Path, prompt: list[int], adapter: str | None) -> list[int]:
    """The same of a session of ours; the end token is no part of what genai returns."""
    session = runtime.open_session(packages.load(package), 1)
    session.select({adapter: 1.0} if adapter else {})
    ends, made, fed = packages.load(package).manifest.model.eos, [], prompt
    while len(made) < STEPS and (token := int(session.extend(fed)[-1].argmax())) not in ends:
        made.append(token)
        fed = [token]
    return made


@pytest.mark.parametrize("adapter", [None, "alpha", "beta"])
@pytest.mark.parametrize("recipe", ["onnx-int4", "onnx-fp32"])
def test_genai_generates_the_same_tokens(exported: Export, recipe: str, adapter: str | None) -> None:
    package = exported(recipe)
    prompt = list(PROMPT.encode())
    made = generated(package, prompt, adapter)
    assert made == greedy(package, prompt, adapter)
    assert len(set(made)) > 1


def test_adapters_change_what_genai_says(package: Path) -> None:
    prompt = list(PROMPT.encode())
    assert len({tuple(generated(package, prompt, adapter)) for adapter in (None, "alpha", "beta")}) == 3


@pytest.mark.parametrize("adapter", [None, "alpha"])
def test_genai_answers_as_the_chat_does(package: Path, adapter: str | None) -> None:
    """Text in, text out: both tokenizers, too."""
    opened = packages.load(package)
    tokenizer = og.Tokenizer(og.Model(str(package)))
    prompt = [int(token) for token in tokenizer.encode(PROMPT)]
    assert prompt == Tokenizer.from_file(str(package / opened.manifest.tokenizer)).encode(PROMPT).ids
    chat = Chat(opened, runtime.open_session(opened, 1))
    chat.start(PROMPT, {adapter: 1.0} if adapter else {})
    list(chat.stream(STEPS))
    assert chat.history[len(prompt) :] == generated(package, prompt, adapter)


def test_genai_stops_at_the_end_token(bare: Path, package: Path, tmp_path: Path) -> None:
    """A base with two end tokens, of which it soon says the second."""
    prompt = list(PROMPT.encode())
    said = greedy(package, prompt, None)
    end = next(token for i, token in enumerate(said) if i > 2 and token not in said[:i])
    bundle = copy_bundle(bare, tmp_path / "bundle")
    edit_json(bundle / "base" / "config.json", lambda config: config.update(eos_token_id=[255, end]))
    made = generated(pipeline.export(bundle, tmp_path / "package", "onnx-int4").path, prompt, None)
    assert made == said[: said.index(end)]


@pytest.mark.parametrize("name", ["gemma3", "mistral", "phi3"])
def test_other_families_run_in_genai(lowered: Lower, name: str) -> None:
    """Sliding windows and packed projections, past the length of a window."""
    prompt = list(range(3, 20))
    for adapter in (None, "all"):
        assert generated(lowered(name), prompt, adapter) == greedy(lowered(name), prompt, adapter)
