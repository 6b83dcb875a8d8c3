"""MoEfication (arXiv 2110.01786): a layer whose outputs are neurons of experts, of which few compute for a token.

The checkpoint keeps the dense layer, and has beside it which expert each neuron belongs to and the small network that
scores the experts. Its authors pickle these two; here they are tensors of the base, under the layer's name:

    <site>.experts.labels  I32 or I64 [out]        the expert of each neuron, from 0
    <site>.experts.hidden  float [hidden, in]      scores = score · tanh(hidden · x / |x|)
    <site>.experts.scores  float [experts, hidden]
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from calora_export.errors import BundleError, mismatch
from calora_export.tensors import FLOATS, TensorIndex

PARTS = ("labels", "hidden", "scores")


@dataclass(frozen=True)
class Experts:
    """labels int64 [out], hidden float32 [hidden, in], scores float32 [experts, hidden]; top_k of them compute."""

    labels: np.ndarray
    hidden: np.ndarray
    scores: np.ndarray
    top_k: int


def sites(tensors: TensorIndex) -> tuple[str, ...]:
    """The layers that have experts."""
    ending = ".experts.labels"
    return tuple(name.removesuffix(ending) for name in tensors.names() if name.endswith(ending))


def read(tensors: TensorIndex, site: str, shape: tuple[int, int], top_k: int) -> Experts:
    """The experts of a layer [out, in]; BundleError when a tensor is missing or does not fit."""
    labels, hidden, scores = (f"{site}.experts.{part}" for part in PARTS)
    width = _rows(tensors, hidden, shape[1])
    experts = _rows(tensors, scores, width)
    info = tensors.info(labels)
    if info.shape != shape[:1] or info.dtype not in ("I32", "I64"):
        raise _wrong(tensors, labels, f"I64 [{shape[0]}]", f"{info.dtype} {list(info.shape)}")
    owners = tensors.array(labels).astype(np.int64)
    if owners.min() < 0 or owners.max() >= experts:
        raise _wrong(tensors, labels, f"experts from 0 to {experts - 1}", f"{owners.min()} to {owners.max()}")
    if top_k > experts:
        raise _wrong(tensors, scores, f"at least top_k {top_k} experts", f"{experts}")
    return Experts(owners, tensors.float32(hidden), tensors.float32(scores), top_k)


def _rows(tensors: TensorIndex, name: str, columns: int) -> int:
    info = tensors.info(name)
    if len(info.shape) != 2 or info.shape[1] != columns or not info.shape[0] or info.dtype not in FLOATS:
        raise _wrong(tensors, name, f"{' or '.join(FLOATS)} [rows, {columns}]", f"{info.dtype} {list(info.shape)}")
    return info.shape[0]


def _wrong(tensors: TensorIndex, name: str, expected: str, found: str) -> BundleError:
    return BundleError(mismatch(tensors.file_of(name), name, expected, found))
