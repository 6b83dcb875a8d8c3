"""GPTQ, as AutoGPTQ and GPTQModel save it: qweight, qzeros, scales and g_idx, all transposed.

qweight int32 [in · bits / 32, out] is packed along the input; qzeros int32 [groups, out · bits / 32] along the output;
scales [groups, out]; g_idx int32 [in] is the group of each column, which act-order (desc_act) mixes. The first
checkpoint format, `gptq`, stores every zero point less one; `gptq_v2` as it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import msgspec
import numpy as np

from calora_export import strict_json
from calora_export.compression import PackedWeight, WeightFormat
from calora_export.errors import BundleError, UnsupportedError, mismatch
from calora_export.layouts import KEY
from calora_export.layouts._words import BITS, order_of, require, signed, unpack
from calora_export.tensors import TensorIndex

MARKS = (".qweight",)
FORMATS = ("gptq", "gptq_v2")


class Config(msgspec.Struct, frozen=True):
    """What of the quantization_config says how to read; group_size -1 is one scale a row."""

    bits: int
    group_size: int
    sym: bool = True
    checkpoint_format: str | None = None
    format: str | None = None


def reader(config: bytes, tensors: TensorIndex, file: str) -> Reader:
    """UnsupportedError for other bits or another checkpoint format (Marlin, EXL2 …)."""
    made = strict_json.decode(config, Config, f"{file}: {KEY}")
    form = made.checkpoint_format or made.format or "gptq"
    if made.bits not in BITS:
        raise UnsupportedError(mismatch(file, f"{KEY}.bits", " or ".join(map(str, BITS)), made.bits))
    if form not in FORMATS:
        shown = strict_json.plain(form)
        raise UnsupportedError(mismatch(file, f"{KEY}.checkpoint_format", " or ".join(FORMATS), shown))
    if made.group_size < 1 and made.group_size != -1:
        raise BundleError(mismatch(file, f"{KEY}.group_size", "-1 or at least 1", made.group_size))
    return Reader(tensors, made, 1 if form == "gptq" else 0)


@dataclass(frozen=True)
class Reader:
    """`less`: what the stored zero points are short of."""

    tensors: TensorIndex
    config: Config
    less: int

    def modules(self) -> Sequence[str]:
        return [name.removesuffix(".qweight") for name in self.tensors.names() if name.endswith(MARKS)]

    def format(self, module: str) -> WeightFormat:
        tensors, bits = self.tensors, self.config.bits
        words, rows = require(tensors, f"{module}.qweight", (None, None), "I32")
        columns = words * 32 // bits
        group = columns if self.config.group_size == -1 else self.config.group_size
        if columns % group:
            found = f"{columns} columns"
            raise BundleError(mismatch(tensors.label, f"{module}.qweight", f"a multiple of group_size {group}", found))
        require(tensors, f"{module}.scales", (columns // group, rows))
        require(tensors, f"{module}.qzeros", (columns // group, -(-rows * bits // 32)), "I32")
        if f"{module}.g_idx" in tensors.tensors:
            require(tensors, f"{module}.g_idx", (columns,), "I32", "I64")
        return WeightFormat((rows, columns), bits, group, self.config.sym)

    def read(self, module: str) -> PackedWeight:
        stored, tensors, bits = self.format(module), self.tensors, self.config.bits
        rows, columns = stored.shape
        group, index = stored.group_size, f"{module}.g_idx"
        assert group is not None
        codes = unpack(tensors.array(f"{module}.qweight").T, bits)
        order = order_of(tensors, index, columns // group) if index in tensors.tensors else None
        q = signed(codes if order is None else np.ascontiguousarray(codes[:, order]), bits)
        scale = np.ascontiguousarray(tensors.array(f"{module}.scales").T)
        return PackedWeight(q, scale, bits, group, self._zero(f"{module}.qzeros", rows), order=order)

    def _zero(self, name: str, rows: int) -> np.ndarray | None:
        """int8 [out, groups]; None for a symmetric checkpoint, which stores the middle everywhere."""
        bits, top = self.config.bits, (1 << self.config.bits) - 1
        codes = unpack(self.tensors.array(name), bits)[:, :rows].T
        if self.less and codes.max() == top:
            hint = f"libraries read {top} as 0 or as {top + 1}: save it as gptq_v2"
            raise UnsupportedError(mismatch(self.tensors.file_of(name), name, f"less than {top}", top, hint))
        zero = signed(np.ascontiguousarray(codes + np.uint8(self.less)), bits)
        if not self.config.sym:
            return zero
        if zero.any():
            found = int(zero.flat[np.flatnonzero(zero)[0]]) + (1 << (bits - 1))
            expected = f"{1 << (bits - 1)} everywhere, as {KEY}.sym says"
            raise BundleError(mismatch(self.tensors.file_of(name), name, expected, found))
        return None
