"""The weight file of a .mlpackage: MIL blob storage, version 2.

A header of 64 bytes (count u32, version u32), then for each blob 64 bytes that describe it (sentinel u32, type u32,
size u64, offset u64, padding u64 in bits) and its data, each on a multiple of 64 bytes. Little endian. A value that is
smaller than a byte is packed from the lowest bit up and may straddle two bytes.
(coremltools, mlmodel/src/MILBlob/Blob/StorageFormat.hpp)
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path

import ml_dtypes
import numpy as np

from calora_export.errors import PackageError, mismatch

_ALIGNMENT = 64
_SENTINEL = 0xDEADBEEF
_VERSION = 2
_BLOB_TYPES = dict(
    enumerate(
        (
            "float16",
            "float32",
            "uint8",
            "int8",
            "bfloat16",
            "int16",
            "uint16",
            "int4",
            "uint1",
            "uint2",
            "uint4",
            "uint3",
        )
        + ("uint6", "int32", "uint32", "float8_e4m3fn", "float8_e5m2"),
        start=1,
    )
)
_WHOLE_TYPES = {
    name: np.dtype(getattr(ml_dtypes, name, name))
    for name in ("bool", "float16", "float32", "float64", "bfloat16", "float8_e4m3fn", "float8_e5m2")
    + ("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64")
}
_PACKED_BITS = {"int4": 4, "uint1": 1, "uint2": 2, "uint3": 3, "uint4": 4, "uint6": 6}


@dataclass(frozen=True)
class Blob:
    """Where one tensor of a weight file lies: its MIL type and its bytes."""

    dtype: str
    offset: int
    size: int
    padding_bits: int

    @property
    def count(self) -> int:
        """How many elements it holds."""
        return (self.size * 8 - self.padding_bits) // bits_of(self.dtype)


@dataclass(frozen=True)
class WeightFile:
    """A mapped weight file; nothing is read from it before it is asked for."""

    name: str
    data: np.ndarray  # uint8, the whole file

    def blob(self, at: int) -> Blob:
        """The blob described at byte `at`; PackageError when there is none or its data lie outside the file."""
        key = f"blob at byte {at}"
        if at % _ALIGNMENT or at < _ALIGNMENT or at + _ALIGNMENT > len(self.data):
            found = f"a file of {len(self.data)} bytes"
            raise PackageError(mismatch(self.name, key, "a description of 64 aligned bytes", found))
        sentinel, kind, size, offset, padding = struct.unpack_from("<IIQQQ", self.data[at : at + _ALIGNMENT].tobytes())
        if sentinel != _SENTINEL:
            raise PackageError(mismatch(self.name, key, f"the sentinel {_SENTINEL:#x}", f"{sentinel:#x}"))
        dtype = _BLOB_TYPES.get(kind)
        if dtype is None:
            raise PackageError(mismatch(self.name, key, f"a type from 1 to {max(_BLOB_TYPES)}", kind))
        if offset % _ALIGNMENT or offset < at + _ALIGNMENT or offset + size > len(self.data):
            found = f"{len(self.data)} bytes"
            raise PackageError(mismatch(self.name, key, f"{size} bytes of data from byte {offset}", found))
        if padding >= 8 or (size * 8 - padding) % bits_of(dtype):
            raise PackageError(
                mismatch(self.name, key, f"whole values of {dtype}", f"{size} bytes less {padding} bits")
            )
        return Blob(dtype, offset, size, padding)

    def array(self, blob: Blob) -> np.ndarray:
        """The blob's elements in one dimension: a view of the file, or int8/uint8 where they had to be unpacked."""
        return from_bytes(self.data[blob.offset : blob.offset + blob.size], blob.dtype, blob.count)


def map_weights(file: Path, package: str) -> WeightFile:
    """Map a weight file; PackageError when it can not be read or does not begin with the header of version 2."""
    name = f"{package}/{file.name}"
    try:
        data = np.memmap(file, dtype=np.uint8, mode="c")  # copy on write: torch takes no read-only arrays
    except (OSError, ValueError) as error:  # ValueError: an empty file
        reason = error.strerror if isinstance(error, OSError) else "an empty file"
        raise PackageError(mismatch(name, "header", "a weight file", reason)) from error
    if len(data) < _ALIGNMENT:
        raise PackageError(mismatch(name, "header", f"{_ALIGNMENT} bytes", len(data)))
    version = struct.unpack_from("<II", data[:_ALIGNMENT].tobytes())[1]
    if version != _VERSION:
        raise PackageError(mismatch(name, "header: version", _VERSION, version))
    return WeightFile(name, data)


def bits_of(dtype: str) -> int:
    """How many bits one stored element takes."""
    return _PACKED_BITS.get(dtype) or _WHOLE_TYPES[dtype].itemsize * 8


def storage(dtype: str) -> np.dtype:
    """The numpy type that holds elements of a MIL type: its own, or a byte for one that is smaller."""
    if dtype in _PACKED_BITS:
        return np.dtype(np.int8 if dtype == "int4" else np.uint8)
    return _WHOLE_TYPES[dtype]


def from_bytes(data: np.ndarray, dtype: str, count: int) -> np.ndarray:
    """The first `count` elements of bytes (uint8), as `storage(dtype)`."""
    if dtype not in _PACKED_BITS:
        return data[: count * bits_of(dtype) // 8].view(_WHOLE_TYPES[dtype])
    unsigned = unpack(data, _PACKED_BITS[dtype], count)
    return (unsigned.view(np.int8) ^ 8) - 8 if dtype == "int4" else unsigned  # the sign bit of four, spread over a byte


def unpack(data: np.ndarray, bits: int, count: int) -> np.ndarray:
    """`count` unsigned integers of 1, 2, 3, 4, 6 or 8 bits from packed bytes, as uint8."""
    if 8 % bits == 0:
        shifts = np.arange(0, 8, bits, dtype=np.uint8)
        return ((data[:, None] >> shifts) & np.uint8((1 << bits) - 1)).reshape(-1)[:count]
    digits = np.unpackbits(data, bitorder="little")[: count * bits].reshape(count, bits)
    return np.packbits(digits, axis=1, bitorder="little").reshape(-1)
