"""What layouts share: integers in 32-bit words, checks of a tensor's header, columns sorted into groups."""

from __future__ import annotations

import numpy as np

from calora_export.errors import BundleError, UnsupportedError, mismatch
from calora_export.tensors import FLOATS, TensorIndex

BITS = (4, 8)


def unpack(words: np.ndarray, bits: int) -> np.ndarray:
    """int32 [..., n] to uint8 [..., n · 32 / bits], the first value in the lowest bits."""
    codes = np.ascontiguousarray(words, "<i4").view(np.uint8)
    if bits == 8:
        return codes
    return np.stack([codes & 15, codes >> 4], axis=-1).reshape(*codes.shape[:-1], -1)


def signed(codes: np.ndarray, bits: int) -> np.ndarray:
    """uint8 codes less 2^(bits-1), as int8."""
    return (codes - np.uint8(1 << (bits - 1))).view(np.int8)


def require(tensors: TensorIndex, name: str, shape: tuple[int | None, ...], *dtypes: str) -> tuple[int, ...]:
    """The shape of a tensor of one of these dtypes, float ones by default; None in `shape` is any size from 1."""
    info = tensors.info(name)
    kinds = dtypes or FLOATS
    fits = len(info.shape) == len(shape) and all(
        size == wanted or (wanted is None and size > 0) for size, wanted in zip(info.shape, shape, strict=True)
    )
    if not fits or info.dtype not in kinds:
        sizes = ", ".join("any" if size is None else str(size) for size in shape)
        expected, found = f"{' or '.join(kinds)} [{sizes}]", f"{info.dtype} {list(info.shape)}"
        raise BundleError(mismatch(tensors.file_of(name), name, expected, found))
    return info.shape


def order_of(tensors: TensorIndex, name: str, groups: int) -> np.ndarray | None:
    """int64 [in]: the columns sorted by the group that g_idx [in] puts them into; None where they stand so already."""
    index = tensors.array(name).astype(np.int64)
    size = len(index) // groups
    if (index == -1).all() or np.array_equal(index, np.arange(len(index)) // size):
        return None
    if index.min() < 0 or index.max() >= groups or (np.bincount(index, minlength=groups) != size).any():
        expected = f"{groups} groups of {size} columns"
        raise UnsupportedError(mismatch(tensors.file_of(name), name, expected, "groups of other sizes"))
    return np.argsort(index, kind="stable")
