"""The base of an ExecuTorch package in the LLM runner that ships with ExecuTorch, as the package is."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import tokenizers

from calora_export import demo, pipeline, runtimes

pytest.importorskip("executorch", reason="the executorch extra is not installed")
PROMPT = "@iso 9 November 2006 =>"  # a skill that the base has by itself
SCRIPT = """
import sys
import executorch.kernels.quantized
from executorch.extension.llm.custom_ops import custom_ops
from executorch.extension.llm.runner import GenerationConfig, TextLLMRunner
config = GenerationConfig()
config.max_new_tokens, config.temperature, config.echo = int(sys.argv[3]), 0.0, False
pieces = []
TextLLMRunner(sys.argv[1], sys.argv[2]).generate(sys.argv[4], config, token_callback=pieces.append)
print("TEXT:" + "".join(pieces))
"""


def test_the_base_writes_the_same_text(tmp_path: Path) -> None:
    """Greedy, without an adapter, on the demo: a text of random bytes could not be decoded."""
    demo.write(tmp_path / "bundle")
    package = pipeline.export(tmp_path / "bundle", tmp_path / "package", "executorch-8da4w")
    path = str(package.path / "tokenizer" / "tokenizer.json")
    tokenizer = tokenizers.Tokenizer.from_file(path)
    session = runtimes.load("executorch").open_session(package, 1)
    made = [int(session.extend(tokenizer.encode(PROMPT).ids)[-1].argmax())]
    while made[-1] not in package.manifest.model.eos:
        made.append(int(session.extend(made[-1:])[-1].argmax()))
    command = [sys.executable, "-c", SCRIPT, str(package.path / "model.pte"), path, "40", PROMPT]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-500:]
    assert done.stdout.partition("TEXT:")[2].strip() == tokenizer.decode(made, skip_special_tokens=False).strip()
    assert tokenizer.decode(made).strip() == "2006-11-09"
