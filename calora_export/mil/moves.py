"""Operators that move or make values without computing on them: shapes, slices, margins, ranges."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn import functional as F

from calora_export.mil.kernels import Builder, Given, Kernel, moving, working_type

_MOST_AXES = 32


def reshape(given: Given) -> Kernel:
    """A shape with one −1 (whatever is left) and zeros (the input's dimension, counted from the right, or 1)."""

    def run(x: torch.Tensor, shape: torch.Tensor) -> torch.Tensor:
        wanted = shape.tolist()
        if 0 in wanted:
            missing = len(wanted) - x.dim()
            own = (1,) * missing + x.shape[max(0, -missing) :]
            wanted = [size or known for size, known in zip(wanted, own, strict=True)]
        return x.reshape(wanted)

    return moving(run, "x", "shape")


def reshape_like(given: Given) -> Kernel:
    """A shape put together from parts of other tensors' shapes."""
    begins, ends, open_ends = (
        [constant.array.item() for constant in given.parameters[name] if constant is not None]
        for name in given.present("begins", "ends", "end_masks")
    )

    def run(x: torch.Tensor, *models: torch.Tensor) -> torch.Tensor:
        parts = zip(models, begins, ends, open_ends, strict=True)
        return x.reshape([size for model, b, e, rest in parts for size in model.shape[b : None if rest else e]])

    return moving(run, "x", "ref_tensors")


def expand_dims(given: Given) -> Kernel:
    """New axes of size 1, numbered in the result."""
    axes = given.ints("axes") or ()

    def run(x: torch.Tensor) -> torch.Tensor:
        rank = x.dim() + len(axes)
        for axis in sorted(axis % rank for axis in axes):
            x = x.unsqueeze(axis)
        return x

    return moving(run, "x")


def squeeze(given: Given) -> Kernel:
    """Without some axes (or all) of size 1; an axis of another size stays."""
    axes = given.ints("axes")
    return moving(torch.squeeze if axes is None else lambda x: x.squeeze(axes), "x")


def flatten2d(given: Given) -> Kernel:
    """Two axes: everything before `axis`, everything from it."""
    axis = given.value("axis", 1)

    def run(x: torch.Tensor) -> torch.Tensor:
        before = x.shape[:axis].numel()
        return x.reshape(before, x.numel() // before)

    return moving(run, "x")


def transpose(given: Given) -> Kernel:
    """The axes in another order."""
    order = given.ints("perm")
    return moving(lambda x: x.permute(order), "x")


def pixel_shuffle(given: Given) -> Kernel:
    """Channels into space."""
    factor = given.needed("upscale_factor")
    return moving(lambda x: F.pixel_shuffle(x, factor), "x")


def pixel_unshuffle(given: Given) -> Kernel:
    """Space into channels."""
    factor = given.needed("downscale_factor")
    return moving(lambda x: F.pixel_unshuffle(x, int(factor)), "x")


def concat(given: Given) -> Kernel:
    """Tensors (and scalars) one after the other, or their elements in turn."""
    axis, in_turn = given.needed("axis"), given.value("interleave", False)

    def run(*values: torch.Tensor) -> torch.Tensor:
        if not in_turn:
            return torch.cat([value if value.dim() else value.reshape(1) for value in values], axis)
        first = axis % values[0].dim()
        return torch.stack(values, first + 1).flatten(first, first + 1)

    return moving(run, "values")


def stack(given: Given) -> Kernel:
    """Tensors side by side along a new axis."""
    axis = given.needed("axis")
    return moving(lambda *values: torch.stack(values, axis), "values")


def split(given: Given) -> Kernel:
    """Parts of given sizes, or of one size."""
    axis, sizes, parts = given.needed("axis"), given.ints("split_sizes"), given.value("num_splits", 1)

    def run(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return torch.split(x, list(sizes) if sizes else x.shape[axis] // parts, axis)

    return moving(run, "x")


class _Region:
    """The part of a tensor that begin, end, stride and their masks name, as an index for torch.

    torch has no negative steps: such an axis is cut forwards, and `reversed` are the axes of the result to turn round.
    """

    def __init__(self, given: Given) -> None:
        none = (False,) * _MOST_AXES
        self._steps = given.ints("stride") or (1,) * _MOST_AXES
        self._from_start = given.ints("begin_mask") or none
        self._to_end = given.ints("end_mask") or none
        self._single = given.ints("squeeze_mask") or none
        self._fixed: tuple[slice | int, ...] | None = None
        self.reversed = self._reversed()
        self.inputs: tuple[str, ...] = ("begin", "end")
        ends = [given.parameters[name][0] for name in self.inputs]
        if not self.reversed and None not in ends:
            self._fixed = self._index(*[tuple(given.constant(name).tolist()) for name in self.inputs])
            self.inputs = ()

    def _reversed(self) -> list[int]:
        kept = [step for step, single in zip(self._steps, self._single, strict=False) if not single]
        return [axis for axis, step in enumerate(kept) if step < 0]

    def index(self, x: torch.Tensor, bounds: Sequence[torch.Tensor]) -> tuple[slice | int, ...]:
        """The index; `bounds` are the values of `inputs`."""
        if self._fixed is not None:
            return self._fixed
        index = self._index(*[bound.tolist() for bound in bounds])
        return tuple(map(_forwards, index, x.shape)) if self.reversed else index

    def _index(self, begin: Sequence[int], end: Sequence[int]) -> tuple[slice | int, ...]:
        return tuple(
            first if single else slice(None if open_begin else first, None if open_end else last, step)
            for first, last, step, open_begin, open_end, single in zip(
                begin, end, self._steps, self._from_start, self._to_end, self._single, strict=False
            )
        )


def _forwards(part: slice | int, size: int) -> slice | int:
    """The same elements of an axis of this size with a positive step."""
    if isinstance(part, int) or part.step > 0:
        return part
    span = range(*part.indices(size))
    return slice(span[-1], span[0] + 1, -part.step) if span else slice(0, 0)


def slice_by_index(given: Given) -> Kernel:
    """x[begin:end:stride, …] as numpy has it; an axis of `squeeze_mask` is one index."""
    region = _Region(given)

    def run(x: torch.Tensor, *bounds: torch.Tensor) -> torch.Tensor:
        part = x[region.index(x, bounds)]
        return part.flip(region.reversed) if region.reversed else part

    return moving(run, "x", *region.inputs)


def slice_update(given: Given) -> Kernel:
    """x with x[begin:end:stride, …] replaced."""
    region = _Region(given)

    def overwrite(x: torch.Tensor, update: torch.Tensor, *bounds: torch.Tensor) -> torch.Tensor:
        place = x[region.index(x, bounds)]
        update = update.reshape(place.shape)
        place.copy_(update.flip(region.reversed) if region.reversed else update)
        return x

    def run(x: torch.Tensor, update: torch.Tensor, *bounds: torch.Tensor) -> torch.Tensor:
        return overwrite(x.clone(), update, *bounds)

    return Kernel(("x", "update", *region.inputs), run, exact=True, overwrite=overwrite)


def slice_by_size(given: Given) -> Kernel:
    """From `begin`, `size` elements; −1 is all that follow."""

    def run(x: torch.Tensor, begin: torch.Tensor, size: torch.Tensor) -> torch.Tensor:
        firsts = [first % length if first < 0 else first for first, length in zip(begin.tolist(), x.shape, strict=True)]
        return x[tuple(slice(b, None if n < 0 else b + n) for b, n in zip(firsts, size.tolist(), strict=True))]

    return moving(run, "x", "begin", "size")


def pad(given: Given) -> Kernel:
    """Constant, mirrored or repeated margins of the last axes."""
    mode = given.value("mode", "constant")
    value = given.value("constant_val", 0.0)
    if mode not in ("constant", "reflect", "replicate"):
        raise given.refusal("mode", "constant, reflect or replicate", mode)

    def run(x: torch.Tensor, pads: torch.Tensor) -> torch.Tensor:
        sides = [(before, after) for before, after in pads.reshape(-1, 2).tolist()]
        if mode == "constant":
            return F.pad(x, [side for pair in reversed(sides) for side in pair], value=value)
        for axis, (before, after) in enumerate(sides, x.dim() - len(sides)):
            size = x.shape[axis]
            places = torch.arange(-before, size + after)
            if mode == "reflect":
                places = places.abs()
                places = torch.where(places >= size, 2 * (size - 1) - places, places)
            x = x.index_select(axis, places.clamp(0, size - 1))
        return x

    return moving(run, "x", "pad")


def tile(given: Given) -> Kernel:
    """The tensor repeated along each axis."""
    return moving(lambda x, repeats: x.repeat(repeats.tolist()), "x", "reps")


def reverse(given: Given) -> Kernel:
    """The order along some axes (or all) turned round."""
    axes = given.ints("axes")
    return moving(lambda x: x.flip(axes or tuple(range(x.dim()))), "x")


def band_part(given: Given) -> Kernel:
    """The matrix's diagonal with so many diagonals below and above it; the rest is zero."""
    lower, upper = given.value("lower", -1), given.value("upper", -1)

    def run(x: torch.Tensor) -> torch.Tensor:
        x = x if upper < 0 else x.tril(upper)
        return x if lower < 0 else x.triu(-lower)

    return moving(run, "x")


def range_1d(given: Given) -> Kernel:
    """start, start + step, … below end."""
    kind = working_type(given.outputs[0])

    def run(start: torch.Tensor, end: torch.Tensor, step: torch.Tensor) -> torch.Tensor:
        return torch.arange(start.item(), end.item(), step.item(), dtype=kind)

    return Kernel(("start", "end", "step"), run, exact=not given.floating)


def fill(given: Given) -> Kernel:
    """One value in a shape."""
    value, kind = given.value("value", 0.0), working_type(given.outputs[0])
    return Kernel(("shape",), lambda shape: torch.full(shape.tolist(), value, dtype=kind), exact=True)


def fill_like(given: Given) -> Kernel:
    """One value in another tensor's shape."""
    value, kind = given.value("value", 0.0), working_type(given.outputs[0])
    return Kernel(("ref_tensor",), lambda model: torch.full(model.shape, value, dtype=kind), exact=True)


def shape(given: Given) -> Kernel:
    """The sizes of a tensor's axes."""
    return Kernel(("x",), lambda x: torch.tensor(x.shape, dtype=torch.int32), exact=True)


def identity(given: Given) -> Kernel:
    """The tensor itself."""
    return moving(lambda x: x, "x")


BUILDERS: dict[str, Builder] = {
    "band_part": band_part,
    "concat": concat,
    "expand_dims": expand_dims,
    "fill": fill,
    "fill_like": fill_like,
    "flatten2d": flatten2d,
    "identity": identity,
    "pad": pad,
    "pixel_shuffle": pixel_shuffle,
    "pixel_unshuffle": pixel_unshuffle,
    "range_1d": range_1d,
    "reshape": reshape,
    "reshape_like": reshape_like,
    "reverse": reverse,
    "shape": shape,
    "slice_by_index": slice_by_index,
    "slice_by_size": slice_by_size,
    "slice_update": slice_update,
    "split": split,
    "squeeze": squeeze,
    "stack": stack,
    "tile": tile,
    "transpose": transpose,
}
