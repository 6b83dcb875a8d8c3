"""bitsandbytes, as transformers saves it: NF4 in blocks, with or without double quantisation, and int8 rows.

NF4: `weight` uint8 [out · in / 2, 1] are positions in `weight.quant_map` [16], the first in the high half of a byte;
`weight.absmax` are the scales of blocks of the flattened matrix; nested ones are themselves 8-bit positions in
`weight.nested_quant_map` times `weight.nested_absmax`, plus an offset. Sizes are in JSON in `weight.quant_state.…`.
int8: `weight` int8 [out, in], `SCB` fp32 [out]: weight = q · SCB / 127.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import msgspec
import numpy as np

from calora_export import strict_json
from calora_export.compression import PackedWeight, WeightFormat
from calora_export.errors import BundleError, UnsupportedError, mismatch
from calora_export.layouts._words import require
from calora_export.tensors import TensorIndex

STATE, SCALES = ".weight.quant_state.bitsandbytes__nf4", ".SCB"
MARKS = (STATE, SCALES)
FOREIGN = ".weight.quant_state.bitsandbytes__fp4"


class State(msgspec.Struct, frozen=True):
    """The quantiser's state of one weight."""

    blocksize: int
    shape: tuple[int, int]
    nested_blocksize: int | None = None
    nested_offset: float = 0.0


def reader(config: bytes, tensors: TensorIndex, file: str) -> Reader:
    """UnsupportedError for weights in FP4."""
    if foreign := [name for name in tensors.names() if name.endswith(FOREIGN)]:
        raise UnsupportedError(mismatch(tensors.file_of(foreign[0]), foreign[0], "nf4", "fp4"))
    return Reader(tensors)


@dataclass(frozen=True)
class Reader:
    tensors: TensorIndex

    def modules(self) -> Sequence[str]:
        return [name.removesuffix(m) for m in MARKS for name in self.tensors.names() if name.endswith(m)]

    def format(self, module: str) -> WeightFormat:
        if f"{module}{SCALES}" in self.tensors.tensors:
            rows, columns = require(self.tensors, f"{module}.weight", (None, None), "I8")
            require(self.tensors, f"{module}{SCALES}", (rows,), "F32")
            return WeightFormat((rows, columns), 8, columns)
        state = self._state(module)
        (rows, columns), weight = state.shape, f"{module}.weight"
        blocks = -(-rows * columns // state.blocksize)
        require(self.tensors, weight, (rows * columns // 2, 1), "U8")
        require(self.tensors, f"{weight}.quant_map", (16,), "F32")
        if state.nested_blocksize is None:
            require(self.tensors, f"{weight}.absmax", (blocks,), "F32")
        else:
            require(self.tensors, f"{weight}.absmax", (blocks,), "U8")
            require(self.tensors, f"{weight}.nested_quant_map", (256,), "F32")
            require(self.tensors, f"{weight}.nested_absmax", (-(-blocks // state.nested_blocksize),), "F32")
        return WeightFormat((rows, columns), 4, math.gcd(columns, state.blocksize), codebook=True)

    def read(self, module: str) -> PackedWeight:
        stored, weight = self.format(module), self.tensors.array(f"{module}.weight")
        rows, columns = stored.shape
        if stored.bits == 8:
            scale = self.tensors.array(f"{module}{SCALES}") / np.float32(127)
            return PackedWeight(weight, scale[:, None], 8, columns)
        state, group = self._state(module), stored.group_size
        assert group is not None
        codes = np.stack([weight[:, 0] >> 4, weight[:, 0] & 15], axis=-1).reshape(rows, columns)
        first = np.arange(0, rows * columns, group).reshape(rows, -1)  # a block may begin inside a row
        scale = self._absmax(f"{module}.weight", state)[first // state.blocksize]
        codebook = np.array(self.tensors.array(f"{module}.weight.quant_map"))
        return PackedWeight(codes.astype(np.int8), scale, 4, group, codebook=codebook)

    def _absmax(self, weight: str, state: State) -> np.ndarray:
        """float32 [blocks]"""
        absmax = self.tensors.array(f"{weight}.absmax")
        if state.nested_blocksize is None:
            return absmax
        values = self.tensors.array(f"{weight}.nested_quant_map")[absmax]
        scales = self.tensors.array(f"{weight}.nested_absmax")
        return values * scales.repeat(state.nested_blocksize)[: len(values)] + np.float32(state.nested_offset)

    def _state(self, module: str) -> State:
        name = f"{module}{STATE}"
        require(self.tensors, name, (None,), "U8")
        file = f"{self.tensors.file_of(name)}: {name}"
        state = strict_json.decode(self.tensors.array(name).tobytes(), State, file)
        if min(state.shape) < 1 or math.prod(state.shape) % 2 or state.blocksize < 1 or state.nested_blocksize == 0:
            raise BundleError(mismatch(file, "shape", "an even number of values in blocks", f"{list(state.shape)}"))
        return state
