"""One driver per runtime: loads a model, and maybe an adapter, and decodes greedily with so many threads."""

from __future__ import annotations

import ctypes
import json
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol, TypeVar

from calora_export import native

from .process import BenchError

Handle = TypeVar("Handle")
CONTEXT = 512
OPERATORS = native.KERNELS["onnx"]


class Driver(Protocol):
    """What is measured. `reset` is never timed."""

    def reset(self) -> None:
        """Forget every token."""

    def prefill(self, tokens: Sequence[int]) -> None:
        """Read the prompt."""

    def step(self) -> None:
        """Choose the likeliest next token and compute the one after it."""


class GenaiDriver:
    """onnxruntime-genai. The builder's packages and ours go through this same code."""

    def __init__(self, package: Path, adapter: Path | None, threads: int) -> None:
        import onnxruntime_genai as og

        self.library = og
        config = og.Config(str(package))
        # The overlay leaves the package's own genai_config.json as it was written.
        options = {"intra_op_num_threads": threads, "log_severity_level": 3}
        if (package / OPERATORS).exists():
            options["custom_ops_library"] = OPERATORS
        config.overlay(json.dumps({"model": {"decoder": {"session_options": options}}}))
        self.model = og.Model(config)
        self.adapters = None
        if adapter is not None:
            self.adapters = og.Adapters(self.model)
            self.adapters.load(str(adapter), "adapter")
        self.reset()

    def reset(self) -> None:
        params = self.library.GeneratorParams(self.model)
        params.set_search_options(max_length=CONTEXT, min_length=CONTEXT, do_sample=False)
        self.generator = self.library.Generator(self.model, params)
        if self.adapters is not None:
            self.generator.set_active_adapter(self.adapters, "adapter")

    def prefill(self, tokens: Sequence[int]) -> None:
        self.generator.append_tokens(list(tokens))

    def step(self) -> None:
        self.generator.generate_next_token()


class LlamaDriver:
    """llama.cpp through llama-cpp-python's C API."""

    def __init__(self, model: Path, adapter: Path | None, threads: int) -> None:
        import llama_cpp
        import numpy as np

        self.library, self.numpy = llama_cpp, np
        # Held by self: llama.cpp keeps the pointer to it.
        self.silence = llama_cpp.llama_log_callback(lambda level, text, data: None)
        llama_cpp.llama_log_set(self.silence, ctypes.c_void_p(0))
        llama_cpp.llama_backend_init()
        defaults = llama_cpp.llama_model_default_params()
        self.model = _made(llama_cpp.llama_model_load_from_file(str(model).encode(), defaults))
        params = llama_cpp.llama_context_default_params()
        params.n_ctx = CONTEXT
        params.n_threads = params.n_threads_batch = threads
        self.context = _made(llama_cpp.llama_init_from_model(self.model, params))
        self.memory = llama_cpp.llama_get_memory(self.context)
        self.vocab = llama_cpp.llama_vocab_n_tokens(_made(llama_cpp.llama_model_get_vocab(self.model)))
        if adapter is not None:
            self.activate(self.load_adapter(adapter))

    def load_adapter(self, adapter: Path) -> object:
        return _made(self.library.llama_adapter_lora_init(self.model, str(adapter).encode()))

    def activate(self, adapter: object) -> None:
        handles = (self.library.llama_adapter_lora_p_ctypes * 1)(adapter)
        if self.library.llama_set_adapters_lora(self.context, handles, 1, (ctypes.c_float * 1)(1.0)) != 0:
            raise RuntimeError("llama.cpp refused the adapter")

    def reset(self) -> None:
        self.library.llama_memory_clear(self.memory, True)

    def prefill(self, tokens: Sequence[int]) -> None:
        self._decode(tokens)

    def step(self) -> None:
        logits = self.library.llama_get_logits_ith(self.context, -1)
        self._decode([int(self.numpy.ctypeslib.as_array(logits, shape=(self.vocab,)).argmax())])

    def _decode(self, tokens: Sequence[int]) -> None:
        array = (self.library.llama_token * len(tokens))(*tokens)
        batch = self.library.llama_batch_get_one(array, len(tokens))
        if self.library.llama_decode(self.context, batch) != 0:
            raise RuntimeError("llama.cpp could not decode")


class ExecutorchDriver:
    """A .pte of transformers' exporter in the Python runtime, whose thread pool is as large as the machine."""

    def __init__(self, model: Path, adapter: Path | None, threads: int) -> None:
        import executorch.kernels.quantized  # noqa: F401
        import torch
        from executorch.runtime import Runtime

        if adapter is not None:
            raise BenchError("transformers' exporter knows no adapters")
        self.torch = torch
        self.program = Runtime.get().load_program(model)
        self.method = self.program.load_method("forward")
        self.reset()

    def reset(self) -> None:
        self.length, self.token = 0, 0

    def prefill(self, tokens: Sequence[int]) -> None:
        positions = self.torch.arange(self.length, self.length + len(tokens))
        logits = self.method.execute([self.torch.tensor([list(tokens)]), positions])[0]
        self.length += len(tokens)
        self.token = int(logits[0, -1].argmax())

    def step(self) -> None:
        self.prefill([self.token])


def _made(handle: Handle | None) -> Handle:
    """llama.cpp returns no object where it failed."""
    if handle is None:
        raise RuntimeError("llama.cpp could not load the model or the adapter")
    return handle


def llama_swap_ms(model: Path, adapters: Sequence[Path], threads: int) -> float:
    """The median, in ms, of 200 switches between adapters that llama.cpp has loaded before."""
    driver = LlamaDriver(model, None, threads)
    loaded = [driver.load_adapter(path) for path in adapters]
    samples = []
    for index in range(200):
        begin = time.perf_counter()
        driver.activate(loaded[index % len(loaded)])
        samples.append((time.perf_counter() - begin) * 1e3)
    return statistics.median(samples)
