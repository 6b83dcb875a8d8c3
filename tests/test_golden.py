from __future__ import annotations

from pathlib import Path

import numpy as np
import peft
import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.numpy import load_file

from calora_export import bundle as bundles
from calora_export import golden, pipeline
from calora_export import package as packages
from calora_export.runtimes import onnx
from tests.bundles import copy_bundle, edit_json, tiny_bundle


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle that transformers and PEFT can run as it is: bf16 weights, no recovery, no router."""
    path = tmp_path_factory.mktemp("plain") / "bundle"
    return tiny_bundle(path, compressed=False, recovery=False, router=False)


@pytest.fixture(scope="module")
def plain_package(plain: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pipeline.export(plain, tmp_path_factory.mktemp("plain") / "package", "onnx-fp32").path


def prefill(file: Path) -> int:
    with safe_open(file, "np") as tensors:
        return int(tensors.metadata()["prefill"])


def bytes_of(texts: list[str], length: int) -> tuple[int, ...]:
    """The tiny tokenizer's token ids are bytes."""
    return tuple("".join(texts).encode())[:length]


def test_a_stream_takes_one_example_of_each_task_in_turn(tiny: Path) -> None:
    texts = ["alpha oneeno", "beta oneeno", "alpha twoowt", "beta twoowt", "alpha threeeerht"]
    assert golden.stream(bundles.load(tiny), 40) == bytes_of(texts, 40)


def test_a_stream_goes_on_with_noise_when_the_examples_end(tiny: Path, tmp_path: Path) -> None:
    bundle = bundles.load(tiny)
    short, long = golden.stream(bundle, 60), golden.stream(bundle, 300)
    assert long[:60] == short
    assert len(long) == 300
    silent = copy_bundle(tiny, tmp_path / "silent")
    edit_json(silent / "bundle.json", lambda document: document.update(tasks=[]))
    noise = golden.stream(bundles.load(silent), 64)
    assert noise == golden.stream(bundles.load(silent), 64)
    assert len(set(noise)) > 32
    assert all(0 <= token < 256 for token in noise)


def test_examples_are_those_of_an_adapters_tasks(tiny: Path) -> None:
    found = golden.examples(bundles.load(tiny))
    assert list(found) == ["alpha", "beta"]
    assert found["beta"] == [("beta one", "eno"), ("beta two", "owt"), ("beta three", "eerht")]


@pytest.mark.parametrize("case", ["base", "adapter:alpha", "adapter:beta"])
def test_golden_logits_are_those_of_transformers_and_peft(
    plain: Path, plain_package: Path, case: str
) -> None:
    file = plain_package / "golden" / golden.FILE
    tensors, first = load_file(file), prefill(file)
    hf = transformers.AutoModelForCausalLM.from_pretrained(str(plain / "base"), dtype=torch.float32)
    if case != "base":
        hf = peft.PeftModel.from_pretrained(hf, str(plain / "adapters" / case.split(":")[1]))
    with torch.no_grad():
        expected = hf(torch.from_numpy(tensors["ids"])[None]).logits[0, first - 1 :].numpy()
    assert tensors[case].shape == (golden.DECODE + 1, 256)
    np.testing.assert_allclose(tensors[case], expected, atol=1e-4)


def test_golden_logits_are_what_the_package_computes(plain_package: Path) -> None:
    """What a device does with the file: prefill, decode, compare."""
    file = plain_package / "golden" / golden.FILE
    tensors, first = load_file(file), prefill(file)
    session = onnx.open_session(packages.load(plain_package), 1)
    ids = tensors["ids"].tolist()
    rows = {}
    for case in ("base", "adapter:alpha", "adapter:beta"):
        session.select({case.split(":")[1]: 1.0} if ":" in case else {})
        steps = [session.extend(ids[:first]), *(session.extend([token]) for token in ids[first:])]
        rows[case] = np.concatenate(steps)
        np.testing.assert_allclose(rows[case], tensors[case], atol=1e-3)
    assert np.abs(rows["base"] - rows["adapter:alpha"]).max() > 0.1
    assert set(tensors) == {"ids", *rows}
