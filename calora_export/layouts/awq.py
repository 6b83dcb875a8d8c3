"""AWQ, as AutoAWQ saves its `gemm` version: qweight, qzeros and scales, transposed and interleaved.

qweight int32 [in, out / 8] and qzeros int32 [groups, out / 8] are both packed along the output, eight columns a word in
the order 0 2 4 6 1 3 5 7; scales [groups, out].
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
from calora_export.layouts._words import require, signed, unpack
from calora_export.tensors import TensorIndex

MARKS = (".qweight",)
PLACES = (0, 4, 1, 5, 2, 6, 3, 7)
"""Where in a word the output columns 0 to 7 lie."""


class Config(msgspec.Struct, frozen=True):
    """What of the quantization_config says how to read; group_size -1 is one scale a row."""

    bits: int
    group_size: int
    zero_point: bool = True
    version: str | None = None
    format: str | None = None


def reader(config: bytes, tensors: TensorIndex, file: str) -> Reader:
    """UnsupportedError for other bits or another version (gemv, exllama …)."""
    made = strict_json.decode(config, Config, f"{file}: {KEY}")
    version = (made.version or made.format or "gemm").lower()
    if made.bits != 4:
        raise UnsupportedError(mismatch(file, f"{KEY}.bits", 4, made.bits))
    if version != "gemm":
        raise UnsupportedError(mismatch(file, f"{KEY}.version", "gemm", strict_json.plain(version)))
    if made.group_size < 1 and made.group_size != -1:
        raise BundleError(mismatch(file, f"{KEY}.group_size", "-1 or at least 1", made.group_size))
    return Reader(tensors, made)


@dataclass(frozen=True)
class Reader:
    tensors: TensorIndex
    config: Config

    def modules(self) -> Sequence[str]:
        return [name.removesuffix(".qweight") for name in self.tensors.names() if name.endswith(MARKS)]

    def format(self, module: str) -> WeightFormat:
        columns, words = require(self.tensors, f"{module}.qweight", (None, None), "I32")
        rows, group = words * 8, columns if self.config.group_size == -1 else self.config.group_size
        if columns % group:
            expected = f"a multiple of group_size {group}"
            raise BundleError(mismatch(self.tensors.label, f"{module}.qweight", expected, f"{columns} columns"))
        require(self.tensors, f"{module}.scales", (columns // group, rows))
        if self.config.zero_point:
            require(self.tensors, f"{module}.qzeros", (columns // group, words), "I32")
        return WeightFormat((rows, columns), 4, group, not self.config.zero_point)

    def read(self, module: str) -> PackedWeight:
        stored = self.format(module)
        assert stored.group_size is not None
        zero = None if stored.symmetric else self._signed(f"{module}.qzeros")
        scale = np.ascontiguousarray(self.tensors.array(f"{module}.scales").T)
        return PackedWeight(self._signed(f"{module}.qweight"), scale, 4, stored.group_size, zero)

    def _signed(self, name: str) -> np.ndarray:
        """int8 [out, …] of a tensor […, out / 8]."""
        codes = unpack(self.tensors.array(name), 4)
        codes = codes.reshape(len(codes), -1, 8)[:, :, PLACES].reshape(codes.shape)
        return signed(np.ascontiguousarray(codes.T), 4)
