"""What a run of the benchmark found, and what it says about the goals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from .measure import Round, Speed, Spread, quiet, spread
from .process import Run

OURS, OURS_ADAPTER, OURS_MIX = (f"ours{use}" for use in ("", " + adapter", " + mix of two"))
STOCK, STOCK_ADAPTER, STOCK_MIX = (f"ours, stock operators{use}" for use in ("", " + adapter", " + mix of two"))
BUILDER, BUILDER_ADAPTER = "builder", "builder + adapter"
NATIVE, NATIVE_ADAPTER, NATIVE_MIX = (f"ours (ExecuTorch){use}" for use in ("", " + adapter", " + mix of two"))
UPSTREAM, UPSTREAM_FEW = "transformers (ExecuTorch)", "transformers (ExecuTorch), extrapolated"
COREML, PLAIN = "ours (Core ML)", "coremltools alone (Core ML)"
LLAMA, LLAMA_ADAPTER = "llama.cpp", "llama.cpp + adapter"
LLAMA_Q4, LLAMA_Q4_ADAPTER = "llama.cpp (Q4_0 embedding)", "llama.cpp (Q4_0 embedding) + adapter"

BASE_OF = {
    OURS_ADAPTER: OURS,
    OURS_MIX: OURS,
    STOCK_ADAPTER: STOCK,
    STOCK_MIX: STOCK,
    BUILDER_ADAPTER: BUILDER,
    NATIVE_ADAPTER: NATIVE,
    NATIVE_MIX: NATIVE,
    LLAMA_ADAPTER: LLAMA,
    LLAMA_Q4_ADAPTER: LLAMA_Q4,
}
SYSTEMS = (
    *(OURS, OURS_ADAPTER, OURS_MIX),
    *(STOCK, STOCK_ADAPTER, STOCK_MIX),
    *(BUILDER, BUILDER_ADAPTER),
    *(NATIVE, NATIVE_ADAPTER, NATIVE_MIX),
    *(UPSTREAM, UPSTREAM_FEW),
    *(COREML, PLAIN),
    *(LLAMA, LLAMA_ADAPTER, LLAMA_Q4, LLAMA_Q4_ADAPTER),
)


@dataclass(frozen=True)
class Memory:
    """Bytes: the peak of a process that has only opened a package, the model's files, the KV cache when it is full."""

    peak_at_load: int
    model: int
    kv_cache: int

    @property
    def of_allowance(self) -> float:
        """The peak over 1.3 times the model's files and a full KV cache."""
        return self.peak_at_load / (1.3 * self.model + self.kv_cache)


@dataclass(frozen=True)
class Results:
    """Everything that one run measured, by system; what was not measured is in no mapping.

    `exports` has one Run per round, `swap_ms` the p50 of a switch. `add_adapter` are runs of that command,
    `changed_files` what it changed besides package.json. `fp32_bytes`: the size of the uncompressed weights.
    `model_bytes`: the size of a model's files without adapters. `few_layers`: what transformers' exporter needed for
    so many layers, from which its export is extrapolated. `memory`: of our ExecuTorch package. `reference`: tokens per
    second of decoding in the Core ML reference runtime, of the shape and of the demo bundle.
    """

    environment: Mapping[str, str]
    fp32_bytes: int
    speeds: Mapping[str, Speed]
    exports: Mapping[str, Sequence[Run]]
    swap_ms: Mapping[str, float]
    add_adapter: Sequence[Run] = ()
    changed_files: Sequence[str] = ()
    model_bytes: Mapping[str, int] = field(default_factory=dict)
    few_layers: Mapping[int, Run] = field(default_factory=dict)
    memory: Memory | None = None
    reference: Mapping[str, float] = field(default_factory=dict)

    def tax(self, system: str) -> Spread | None:
        """Time of a token with the adapter over time of a token without."""
        return self.decode(BASE_OF[system], system) if system in BASE_OF else None

    def decode(self, system: str, peer: str) -> Spread | None:
        """Decoding speed of `system` over that of `peer`."""
        rounds = self._rounds(system, peer)
        return spread([b.step_s / a.step_s for a, b in rounds]) if rounds else None

    def prefill(self, system: str, peer: str) -> Spread | None:
        """Prefill speed of `system` over that of `peer`."""
        rounds = self._rounds(system, peer)
        ratios = [b.prefill_s / a.prefill_s for a, b in rounds if a.prefill_s and b.prefill_s]
        return spread(ratios) if ratios else None

    def export_time(self, system: str, peer: str) -> Spread | None:
        """Export time of `system` over that of `peer`, in the rounds that exported both."""
        pairs = zip(self.exports.get(system, ()), self.exports.get(peer, ()), strict=False)
        ratios = [a.seconds / b.seconds for a, b in pairs]
        return spread(ratios) if ratios else None

    def _rounds(self, system: str, peer: str) -> list[tuple[Round, ...]]:
        """The rounds of two systems side by side; none when one is not installed."""
        if system not in self.speeds or peer not in self.speeds:
            return []
        return quiet(self.speeds[system], self.speeds[peer])


@dataclass(frozen=True)
class Goal:
    """A bound and where we are. The bound holds for the median; None when a side was not installed."""

    text: str
    bound: float
    at_least: bool
    found: Spread | None
    unit: str = "×"

    @property
    def verdict(self) -> str:
        if self.found is None:
            return "not measured"
        reached = self.found.median >= self.bound if self.at_least else self.found.median <= self.bound
        return "reached" if reached else "missed"


def goals(results: Results) -> dict[str, list[Goal]]:
    """The goals of the project over one run's own figures, by target."""
    return {
        "ONNX Runtime": onnx_goals(results),
        "ExecuTorch": executorch_goals(results),
        "Core ML": coreml_goals(results),
    }


def onnx_goals(results: Results) -> list[Goal]:
    """Against the builder and llama.cpp."""
    ours = results.exports.get(OURS)
    swap = results.swap_ms.get(OURS_ADAPTER)
    mix = results.decode(OURS_ADAPTER, OURS_MIX)  # the speed of one over the mix's is the mix's time over one's
    memory = spread([run.peak_rss / results.fp32_bytes for run in ours]) if ours else None
    late = spread([run.seconds for run in results.add_adapter]) if results.add_adapter else None
    changed = spread([float(len(results.changed_files))]) if results.add_adapter else None
    return [
        Goal("decode, base, of the builder's", 0.95, True, results.decode(OURS, BUILDER)),
        Goal("decode, adapter, of the builder's", 1.25, True, results.decode(OURS_ADAPTER, BUILDER_ADAPTER)),
        Goal("decode, adapter, of llama.cpp's", 0.95, True, results.decode(OURS_ADAPTER, LLAMA_ADAPTER)),
        Goal("time of a token, adapter, of ours without", 1.25, False, results.tax(OURS_ADAPTER)),
        Goal("time of a token, mix of two, of one", 1.1, False, mix),
        Goal("swap, p50", 1.0, False, None if swap is None else spread([swap]), " ms"),
        Goal("prefill, base, of the builder's", 1.0, True, results.prefill(OURS, BUILDER)),
        Goal("prefill, adapter, of the builder's", 1.0, True, results.prefill(OURS_ADAPTER, BUILDER_ADAPTER)),
        Goal("export time, of the builder's base", 2.0, False, results.export_time(OURS, BUILDER)),
        Goal("peak RSS of export, of the fp32 weights", 2.5, False, memory),
        Goal("add-adapter with Python's start", 3.0, False, late, " s"),
        Goal("files add-adapter changed besides package.json", 0.0, False, changed, ""),
    ]


def executorch_goals(results: Results) -> list[Goal]:
    """Against transformers' own exporter and llama.cpp with an embedding of 4 bits, as ours holds it."""
    swap = results.swap_ms.get(NATIVE_ADAPTER)
    mix = results.decode(NATIVE_ADAPTER, NATIVE_MIX)  # see onnx_goals
    full = UPSTREAM in results.exports
    lowering = results.export_time(NATIVE, UPSTREAM if full else UPSTREAM_FEW)
    upstream = "transformers'" if full else "transformers' (extrapolated)"
    memory = spread([results.memory.of_allowance]) if results.memory else None
    return [
        Goal(f"export time, of {upstream}", 1 / 3, False, lowering),
        Goal("decode, base, of llama.cpp's", 1.5, True, results.decode(NATIVE, LLAMA_Q4)),
        Goal("decode, adapter, of llama.cpp's", 1.3, True, results.decode(NATIVE_ADAPTER, LLAMA_Q4_ADAPTER)),
        Goal("time of a token, adapter, of ours without", 1.25, False, results.tax(NATIVE_ADAPTER)),
        Goal("time of a token, mix of two, of one", 1.15, False, mix),
        Goal("prefill, base, of llama.cpp's", 1.0, True, results.prefill(NATIVE, LLAMA_Q4)),
        Goal("prefill, adapter, of llama.cpp's", 1.0, True, results.prefill(NATIVE_ADAPTER, LLAMA_Q4_ADAPTER)),
        Goal("swap, p50", 2.0, False, None if swap is None else spread([swap]), " ms"),
        Goal("peak RSS at load, of 1.3 × the model's files + the KV cache", 1.0, False, memory),
    ]


def coreml_goals(results: Results) -> list[Goal]:
    """Against coremltools' own conversion of the same model. Its speed on a device can not be measured here."""
    ours = results.exports.get(COREML)
    memory = spread([2 * run.peak_rss / results.fp32_bytes for run in ours]) if ours else None
    rates = [[results.reference[name]] if name in results.reference else [] for name in ("shape", "demo")]
    shape, demo = (spread(rate) if rate else None for rate in rates)
    return [
        Goal("export time, of coremltools' without slots", 1.5, False, results.export_time(COREML, PLAIN)),
        Goal("peak RSS of export, of the fp16 weights", 3.0, False, memory),
        Goal("reference runtime, decode", 0.5, True, shape, " tok/s"),
        Goal("reference runtime, decode, demo bundle", 20.0, True, demo, " tok/s"),
    ]
