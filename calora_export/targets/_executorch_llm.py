"""Attention by the operators of ExecuTorch's LLM frameworks, slots by calora::slot: one instruction each."""

from __future__ import annotations

from collections.abc import Sequence

from calora_export.errors import UnsupportedError, mismatch
from calora_export.package import SlotTensor
from calora_export.targets._executorch_steps import RANK, Attention, Frame, Ref, Shape, Steps
from calora_export.targets._xnnpack import SEQUENCE


def adapter_inputs(tensors: Sequence[SlotTensor], dtype: str, rank: int) -> list[tuple[str, Shape]]:
    """rows [R · width] as the file has them, gate [R], recovery [R]."""
    width = sum(tensor.inputs + tensor.outputs for tensor in tensors)
    return [(dtype, (width * rank,)), ("fp32", (RANK,)), ("fp32", (RANK,))]


class Operators:
    def __init__(self, steps: Steps) -> None:
        self._steps = steps
        self._layer = 0
        self._offset = 0

    def require(self, attention: Attention) -> None:
        if 0 < attention.window < attention.context or attention.softcap:
            expected = "full attention without a cap, which is what llama::custom_sdpa computes"
            found = f"sliding_window {attention.window}, softcap {attention.softcap}"
            hint = 'a recipe with kernels = "stock" has any'
            raise UnsupportedError(mismatch("base/config.json", "attention", expected, found, hint))

    def attention(self, q: Ref, k: Ref, v: Ref, attention: Attention) -> Ref:
        layer, size = self._layer, (1, attention.context, attention.kv_heads, attention.head_dim)
        self._layer += 1
        self._steps.caches.update({f"key_{layer}": size, f"value_{layer}": size})

        def call(frame: Frame, inputs: Sequence[int], output: int) -> None:
            method, (q, k, v) = frame.method, inputs
            key, value = frame.named[f"key_{layer}"], frame.named[f"value_{layer}"]
            for new, cache in ((k, key), (v, value)):
                unused = method.tensor("fp32", [1], dynamic=False)
                method.call("llama::update_cache.out", [new, cache, frame.position, unused, unused])
            options = [method.number(option) for option in (None, 0.0, True, attention.scale)]
            method.call("llama::custom_sdpa.out", [q, key, value, frame.position, *options, output, output])

        out = self._steps.outside(call, [q, k, v], q.shape)
        return self._steps.reshape(out, (1, SEQUENCE, attention.heads * attention.head_dim))

    def slotted(self, x: Ref, y: Ref, widths: Sequence[int], members: Sequence[int], gates: Ref | None) -> list[Ref]:
        starts = [sum(widths[:i]) for i in range(len(widths))]
        offset, outs = self._offset, [widths[i] for i in members]
        self._offset += len(outs) * x.shape[-1] + sum(outs)

        def call(frame: Frame, inputs: Sequence[int], output: int) -> None:
            method = frame.method
            columns = method.numbers([starts[i] for i in members])
            layout = (method.number(offset), columns, method.numbers(outs))
            rows, gate, recovery = frame.adapter
            x, y, *own = inputs
            method.call("calora::slot.out", [x, y, rows, *(own or [gate]), recovery, *layout, output, output])

        added = self._steps.outside(call, [x, y, *([] if gates is None else [gates])], y.shape, in_place=y)
        return [self._steps.slice(added, start, width) for start, width in zip(starts, widths, strict=True)]
