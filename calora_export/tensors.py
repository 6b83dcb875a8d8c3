"""The tensors of a directory's *.safetensors files: headers are read on open, bytes only when asked for.

The format: 8 bytes little-endian header length, a JSON header name -> {dtype, shape, data_offsets}, the data.
The safetensors package has no bfloat16 for numpy and hides the offsets, which the fingerprint needs.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import msgspec
import numpy as np

from calora_export.errors import BundleError, mismatch

FLOATS = ("F32", "F16", "BF16")

# numpy's name and the bytes of one element, by safetensors' name.
_DTYPES = {
    "BOOL": ("bool", 1), "U8": ("uint8", 1), "I8": ("int8", 1), "U16": ("uint16", 2), "I16": ("int16", 2),
    "U32": ("uint32", 4), "I32": ("int32", 4), "U64": ("uint64", 8), "I64": ("int64", 8),
    "F16": ("float16", 2), "F32": ("float32", 4), "F64": ("float64", 8), "BF16": ("bfloat16", 2),
    "F8_E4M3": ("float8_e4m3fn", 1), "F8_E5M2": ("float8_e5m2", 1),
}  # fmt: skip
# The bits that are all set exactly in NaN and Inf (E4M3 has no Inf).
_NONFINITE = {
    "F64": ("<u8", 0x7FF0_0000_0000_0000), "F32": ("<u4", 0x7F80_0000), "F16": ("<u2", 0x7C00),
    "BF16": ("<u2", 0x7F80), "F8_E5M2": ("u1", 0x7C), "F8_E4M3": ("u1", 0x7F),
}  # fmt: skip
_CHUNK = 1 << 20
_MAX_HEADER = 100_000_000  # the limit of the safetensors library


class _Entry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    dtype: str
    shape: tuple[Annotated[int, msgspec.Meta(ge=0)], ...]
    data_offsets: tuple[Annotated[int, msgspec.Meta(ge=0)], Annotated[int, msgspec.Meta(ge=0)]]


@dataclass(frozen=True)
class TensorInfo:
    """Where one tensor lies: bytes [start, end) of `file`; `dtype` as safetensors writes it (`F16` …)."""

    dtype: str
    shape: tuple[int, ...]
    file: Path
    start: int
    end: int


@dataclass(frozen=True)
class TensorIndex:
    """The tensors of all *.safetensors files of one directory; `label` is how errors name that directory. `metadata`:
    what the files' headers say in `__metadata__`.
    """

    directory: Path
    label: str
    tensors: dict[str, TensorInfo]
    metadata: Mapping[str, str] = field(default_factory=dict)

    @staticmethod
    def open(directory: Path, label: str | None = None) -> TensorIndex:
        """Read the headers; BundleError for no file, a truncated one, a bad header, a name in two files."""
        shown = str(directory) if label is None else label
        tensors: dict[str, TensorInfo] = {}
        metadata: dict[str, str] = {}
        files = sorted(directory.glob("*.safetensors"))
        if not files:
            raise BundleError(mismatch(shown, "*.safetensors", "at least one file", "none"))
        for file in files:
            found, said = _read_header(file, f"{shown}/{file.name}")
            metadata |= said
            for name, info in found.items():
                if name in tensors:
                    twice = f"it in {tensors[name].file.name} too"
                    raise BundleError(mismatch(f"{shown}/{file.name}", name, "a name of its own", twice))
                tensors[name] = info
        return TensorIndex(directory, shown, dict(sorted(tensors.items())), metadata)

    def names(self) -> tuple[str, ...]:
        """All names, sorted by code point."""
        return tuple(self.tensors)

    def info(self, name: str) -> TensorInfo:
        """Dtype, shape and place of `name`; BundleError when there is no such tensor."""
        if name not in self.tensors:
            raise BundleError(mismatch(self.label, name, "a tensor", "nothing"))
        return self.tensors[name]

    def file_of(self, name: str) -> str:
        """The file of `name` as errors name it; the directory when there is no such tensor."""
        return f"{self.label}/{self.tensors[name].file.name}" if name in self.tensors else self.label

    def array(self, name: str) -> np.ndarray:
        """The tensor as stored, read-only and memory-mapped; BF16 as ml_dtypes.bfloat16."""
        info = self.info(name)
        dtype = _numpy_dtype(info.dtype)
        if info.start == info.end:
            return np.empty(info.shape, dtype)
        return np.asarray(np.memmap(info.file, dtype, "r", info.start, info.shape))

    def float32(self, name: str) -> np.ndarray:
        """The tensor converted to float32, in memory of its own."""
        info = self.info(name)
        with info.file.open("rb") as file:  # a mapping costs more than reading an adapter's small tensors
            file.seek(info.start)
            data = bytearray(file.read(info.end - info.start))
        return np.frombuffer(data, _numpy_dtype(info.dtype)).reshape(info.shape).astype(np.float32, copy=False)

    def all_float32(self) -> dict[str, np.ndarray]:
        """Every tensor, converted."""
        return {name: self.float32(name) for name in self.tensors}

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors, headers not counted."""
        return sum(info.end - info.start for info in self.tensors.values())

    def fingerprint(self) -> str:
        """`sha256:<hex>` over `name dtype [d0,d1,…]\\n` and the bytes of every tensor (docs/bundle.md)."""
        digest = hashlib.sha256()
        for name, info in self.tensors.items():
            digest.update(f"{name} {info.dtype} [{','.join(map(str, info.shape))}]\n".encode())
            for chunk in self._chunks(name):
                digest.update(chunk)
        return f"sha256:{digest.hexdigest()}"

    def first_nonfinite(self) -> str | None:
        """The first float tensor by name that holds a NaN or an Inf; None when there is none."""
        for name, info in self.tensors.items():
            if info.dtype not in _NONFINITE:
                continue
            word, mask = _NONFINITE[info.dtype]
            for chunk in self._chunks(name):
                bits = np.frombuffer(chunk, word)
                if np.any((bits & mask) == mask):
                    return name
        return None

    def _chunks(self, name: str) -> Iterator[memoryview]:
        # Plain reads into one buffer: mapped pages would count as resident memory.
        info = self.info(name)
        left = info.end - info.start
        buffer = memoryview(bytearray(min(left, _CHUNK)))
        with info.file.open("rb") as file:
            file.seek(info.start)
            while left:
                size = file.readinto(buffer[: min(left, _CHUNK)])
                if size != min(left, _CHUNK):
                    expected = f"{left} more bytes"
                    raise BundleError(mismatch(self.file_of(name), name, expected, "the end of the file"))
                yield buffer[:size]
                left -= size


def _numpy_dtype(name: str) -> np.dtype:
    if name in ("BF16", "F8_E4M3", "F8_E5M2"):
        import ml_dtypes  # only when a file has such tensors: every command pays for imports

        return np.dtype(getattr(ml_dtypes, _DTYPES[name][0]))
    return np.dtype(_DTYPES[name][0])


def _read_header(path: Path, shown: str) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    try:
        with path.open("rb") as file:
            head = file.read(8)
            length = int.from_bytes(head, "little")
            size = path.stat().st_size
            if len(head) < 8 or length > min(size - 8, _MAX_HEADER):
                hint = "a Git LFS pointer, not the file itself" if head == b"version " else ""
                expected = f"at most {max(size - 8, 0)} bytes, the rest of the file"
                raise BundleError(mismatch(shown, "header length", expected, f"{length}", hint))
            header = file.read(length)
    except OSError as problem:
        raise BundleError(mismatch(shown, "file", "a readable file", problem.strerror)) from None
    return _parse_header(header, path, 8 + length, size, shown)


def _parse_header(
    header: bytes, path: Path, data: int, size: int, shown: str
) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    """Infos by name, and metadata, from the JSON `header`; `data` is where the bytes begin, `size` the file's."""
    try:
        raw = msgspec.json.decode(header, type=dict[str, msgspec.Raw])
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as problem:
        raise BundleError(mismatch(shown, "header", "a JSON object", f"an error: {problem}")) from None
    said = raw.pop("__metadata__", None)
    try:
        metadata = {} if said is None else msgspec.json.decode(said, type=dict[str, str])
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as problem:
        raise BundleError(mismatch(shown, "__metadata__", "texts by name", f"an error: {problem}")) from None
    infos: dict[str, TensorInfo] = {}
    for name, text in raw.items():
        if not name.isprintable():
            raise BundleError(mismatch(shown, "header", "printable tensor names", repr(name)))
        try:
            entry = msgspec.json.decode(text, type=_Entry)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as problem:
            expected = "dtype, shape and data_offsets"
            raise BundleError(mismatch(shown, name, expected, f"an error: {problem}")) from None
        if entry.dtype not in _DTYPES:
            raise BundleError(mismatch(shown, f"{name} dtype", "one of " + ", ".join(_DTYPES), entry.dtype))
        start, end = entry.data_offsets
        nbytes = math.prod(entry.shape) * _DTYPES[entry.dtype][1]
        if end - start != nbytes:
            expected = f"{nbytes} bytes for {entry.dtype} {list(entry.shape)}"
            raise BundleError(mismatch(shown, f"{name} data_offsets", expected, f"{end - start}"))
        infos[name] = TensorInfo(entry.dtype, entry.shape, path, data + start, data + end)
    _check_cover(infos, data, size, shown)
    return infos, metadata


def _check_cover(infos: dict[str, TensorInfo], data: int, size: int, shown: str) -> None:
    """The tensors must cover the data without holes or overlaps: that is how truncation shows."""
    position = data
    for name, info in sorted(infos.items(), key=lambda item: (item[1].start, item[1].end)):
        if info.start != position:
            key, found = f"{name} data_offsets", f"{info.start - data}"
            raise BundleError(mismatch(shown, key, f"start {position - data}", found))
        position = info.end
    if position != size:
        hint = "the file is truncated" if size < position else "bytes that belong to no tensor"
        raise BundleError(mismatch(shown, "file size", f"{position} bytes", f"{size}", hint))
