"""Operators that work with places: gathers, scatters, sorting."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from calora_export.mil.kernels import Builder, Given, Kernel, moving, working_type

_POSITIVE_INDICES = 7  # since iOS 17 a negative index is out of range


def gather(given: Given) -> Kernel:
    """x's slices at the indices, along one axis, perhaps separately for each leading index."""
    given.ignore("validate_indices")
    axis, batch = given.value("axis", 0), given.value("batch_dims", 0)
    wrap = given.generation < _POSITIVE_INDICES

    def run(x: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
        place = axis % x.dim()
        if wrap:
            indices = torch.where(indices < 0, indices + x.shape[place], indices)
        if batch:
            return _gather_each(x, indices, place, batch)
        found = x.index_select(place, indices.reshape(-1))
        return found.reshape(x.shape[:place] + indices.shape + x.shape[place + 1 :])

    return moving(run, "x", "indices")


def _gather_each(x: torch.Tensor, indices: torch.Tensor, axis: int, batch: int) -> torch.Tensor:
    leading = x.shape[:batch]
    rows = leading.numel()
    flat = x.reshape(rows, *x.shape[batch:]).movedim(axis - batch + 1, 1)
    found = flat[torch.arange(rows)[:, None], indices.reshape(rows, -1)]
    found = found.reshape(rows, *indices.shape[batch:], *flat.shape[2:])
    count = indices.dim() - batch
    found = found.movedim(tuple(range(1, 1 + count)), tuple(range(axis - batch + 1, axis - batch + 1 + count)))
    return found.reshape(*leading, *found.shape[1:])


def gather_along_axis(given: Given) -> Kernel:
    """numpy's take_along_axis."""
    given.ignore("validate_indices")
    axis = given.value("axis", 0)
    return moving(lambda x, indices: torch.gather(x, axis, indices.long()), "x", "indices")


def _places(data: torch.Tensor, indices: torch.Tensor, batch: int) -> tuple[torch.Tensor, ...]:
    """Index tensors, one per leading axis of `data`, from the last axis of `indices`."""
    within = indices.unbind(-1)
    grids = torch.meshgrid(*[torch.arange(size) for size in indices.shape[:-1]], indexing="ij")
    return tuple(grid.long() for grid in grids[:batch]) + tuple(part.long() for part in within)


def gather_nd(given: Given) -> Kernel:
    """x[indices[…, 0], indices[…, 1], …]."""
    given.ignore("validate_indices")
    batch = given.value("batch_dims", 0)
    return moving(lambda x, indices: x[_places(x, indices, batch)], "x", "indices")


_COMBINE: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "div": torch.div,
    "max": torch.maximum,
    "min": torch.minimum,
    "mul": torch.mul,
}


def _scatterer(given: Given, places: Callable[[torch.Tensor, torch.Tensor], tuple[Any, ...]]) -> Kernel:
    given.ignore("validate_indices")
    mode = given.value("mode", "add")
    if mode not in ("add", "sub", "update", *_COMBINE):
        raise given.refusal("mode", "add, sub, update, " + ", ".join(_COMBINE), mode)

    def run(data: torch.Tensor, indices: torch.Tensor, updates: torch.Tensor) -> torch.Tensor:
        where = places(data, indices)
        if mode in ("add", "sub"):
            return data.index_put(where, updates if mode == "add" else -updates, accumulate=True)
        return data.index_put(where, updates if mode == "update" else _COMBINE[mode](data[where], updates))

    return Kernel(("data", "indices", "updates"), run, exact=mode == "update" or not given.floating)


def scatter(given: Given) -> Kernel:
    """Slices along one axis replaced by, or combined with, updates."""
    axis = given.value("axis", 0)

    def places(data: torch.Tensor, indices: torch.Tensor) -> tuple[Any, ...]:
        place = axis % data.dim()
        wheres = [torch.arange(size) for size in data.shape]
        wheres[place] = indices.long()
        return torch.meshgrid(*wheres, indexing="ij")

    return _scatterer(given, places)


def scatter_along_axis(given: Given) -> Kernel:
    """numpy's put_along_axis, or a combination."""
    axis = given.value("axis", 0)

    def places(data: torch.Tensor, indices: torch.Tensor) -> tuple[Any, ...]:
        wheres = list(torch.meshgrid(*[torch.arange(size) for size in indices.shape], indexing="ij"))
        wheres[axis] = indices.long()
        return tuple(wheres)

    return _scatterer(given, places)


def scatter_nd(given: Given) -> Kernel:
    """data[indices[…, 0], indices[…, 1], …] replaced by, or combined with, updates."""
    return _scatterer(given, lambda data, indices: _places(data, indices, 0))


def _sorter(given: Given) -> Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]:
    """A function that gives the sorted values and their places; equal values keep their order."""
    axis, falling = given.value("axis", -1), not given.value("ascending", False)
    return lambda x: torch.sort(x, dim=axis, descending=falling, stable=True)


def topk(given: Given) -> Kernel:
    """The k largest (or smallest) values along an axis, sorted, and where they were."""
    axis, count, ordered = given.value("axis", -1), given.value("k", 1), _sorter(given)
    given.ignore("sort", "output_indices_dtype", "return_indices")
    alone = len(given.outputs) == 1

    def run(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        values, places = ordered(x)
        found = values.narrow(axis, 0, count), places.narrow(axis, 0, count).int()
        return found[:1] if alone else found

    return Kernel(("x",), run, exact=True)


def argsort(given: Given) -> Kernel:
    """The places of the sorted values."""
    ordered = _sorter(given)
    return Kernel(("x",), lambda x: ordered(x)[1].int(), exact=True)


def one_hot(given: Given) -> Kernel:
    """A new axis that is `on` at the index and `off` elsewhere."""
    axis, kind = given.value("axis", -1), working_type(given.outputs[0])
    on, off = given.value("on_value", 1), given.value("off_value", 0)

    def run(indices: torch.Tensor, size: torch.Tensor) -> torch.Tensor:
        place = axis % (indices.dim() + 1)
        classes = torch.arange(int(size)).reshape(-1, *[1] * (indices.dim() - place))
        hit = indices.unsqueeze(place) == classes
        return torch.where(hit, torch.tensor(on, dtype=kind), torch.tensor(off, dtype=kind))

    return Kernel(("indices", "one_hot_vector_size"), run, exact=True)


def non_zero(given: Given) -> Kernel:
    """The places of the values that are not zero."""
    return Kernel(("x",), lambda x: torch.nonzero(x).int(), exact=True)


BUILDERS: dict[str, Builder] = {
    "argsort": argsort,
    "gather": gather,
    "gather_along_axis": gather_along_axis,
    "gather_nd": gather_nd,
    "non_zero": non_zero,
    "one_hot": one_hot,
    "scatter": scatter,
    "scatter_along_axis": scatter_along_axis,
    "scatter_nd": scatter_nd,
    "topk": topk,
}
