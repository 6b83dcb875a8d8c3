"""A trainer's state dict: tensors by name, taken one by one so that what is left over can be refused."""

from __future__ import annotations

import pickle
import shutil
import tempfile
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from calora_export.adapter_format import CONFIG, PICKLED, WEIGHTS
from calora_export.errors import BundleError, mismatch
from calora_export.strict_json import plain

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Checkpoint:
    """The tensors of `file` by the names that the trainer gave them."""

    file: Path
    tensors: dict[str, Tensor]

    def shape(self, key: str) -> tuple[int, ...]:
        """The shape of a tensor; BundleError when there is none of that name."""
        return tuple(self._tensor(key).shape)

    def take(self, key: str, shape: Sequence[int]) -> np.ndarray:
        """The tensor as float32; BundleError unless it has this shape and finite floats."""
        tensor = self._tensor(key)
        if tuple(tensor.shape) != tuple(shape):
            raise self.wrong(key, list(shape), list(tensor.shape))
        if not tensor.dtype.is_floating_point:
            raise self.wrong(key, "floats", str(tensor.dtype).removeprefix("torch."))
        array = np.array(tensor.detach().float().numpy())
        if not np.isfinite(array).all():
            raise self.wrong(key, "finite values", "NaN or Inf")
        return array

    def integer(self, key: str) -> int:
        """The one integer of a tensor; BundleError for anything else."""
        tensor = self._tensor(key)
        if tensor.numel() != 1 or tensor.dtype.is_floating_point:
            raise self.wrong(key, "one integer", f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}")
        return int(tensor)

    def sites(self, marker: str) -> dict[str, set[str]]:
        """`<site><marker><part>` keys as site → parts; BundleError for any other key."""
        found: dict[str, set[str]] = {}
        for key in self.tensors:
            site, mark, part = key.rpartition(marker)
            if not mark:
                hint = f"keep only the adapter's: {{k: v for k, v in state.items() if {marker!r} in k}}"
                raise self.wrong(key, f"<site>{marker}…", "another key", hint)
            found.setdefault(site, set()).add(part)
        if not found:
            raise self.wrong("tensors", f"<site>{marker}…", "none")
        return found

    def require(self, site: str, marker: str, found: set[str], wanted: Iterable[str]) -> None:
        """BundleError unless a site has exactly the parts `wanted`."""
        expected = set(wanted)
        for part in sorted(found - expected):
            raise self.wrong(f"{site}{marker}{part}", f"only {', '.join(sorted(expected))}", "this key")
        for part in sorted(expected - found):
            raise self.wrong(f"{site}{marker}{part}", "a tensor", "nothing")

    def site_shape(self, site: str, linears: Mapping[str, tuple[int, int]], key: str) -> tuple[int, int]:
        """(out, in) of the base's layer `site`; BundleError when the base has no such layer."""
        if site not in linears:
            example = next((name for name in linears if name.endswith(site.rsplit(".", 1)[-1])), next(iter(linears)))
            raise self.wrong(key, f"a linear layer of the base, such as {example}", plain(site))
        return linears[site]

    def wrong(self, key: str, expected: object, found: object, hint: str = "") -> BundleError:
        """The error about one key of the file."""
        return BundleError(mismatch(self.file, plain(key), expected, found, hint))

    def _tensor(self, key: str) -> Tensor:
        if key not in self.tensors:
            raise self.wrong(key, "a tensor", "nothing")
        return self.tensors[key]


def read(file: Path, prefix: str = "") -> Checkpoint:
    """The state dict in `file`, which may be a pickle: only tensors are loaded. `prefix` is cut off names.

    BundleError for no file, another kind of pickle, or values that are no tensors.
    """
    if not file.is_file():
        raise BundleError(mismatch(file, "checkpoint", "a file", "a directory" if file.is_dir() else "nothing"))
    state = _safetensors(file) if file.suffix == ".safetensors" else _pickle(file)
    return Checkpoint(file, {name.removeprefix(prefix): tensor for name, tensor in state.items()})


@contextmanager
def peft_directory(source: Path) -> Iterator[Path]:
    """`source`; or, where its weights are a pickle, as PEFT's older versions wrote them, a copy with safetensors.

    BundleError as `read`.
    """
    if (source / WEIGHTS).is_file() or not (source / PICKLED).is_file():
        yield source
        return
    from safetensors.torch import save_file

    state = read(source / PICKLED).tensors
    with tempfile.TemporaryDirectory() as scratch:
        shutil.copyfile(source / CONFIG, Path(scratch) / CONFIG)
        save_file({name: tensor.contiguous().clone() for name, tensor in state.items()}, Path(scratch) / WEIGHTS)
        yield Path(scratch)


def _safetensors(file: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(file)
    except (SafetensorError, OSError) as problem:
        raise BundleError(mismatch(file, "file", "safetensors", f"an error: {_first_line(problem)}")) from None


def _pickle(file: Path) -> dict[str, Tensor]:
    import torch

    try:
        with warnings.catch_warnings():  # about pickles of other kinds, which are refused in a line of their own
            warnings.simplefilter("ignore")
            state = torch.load(file, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError, KeyError) as problem:
        hint = "torch.save(model.state_dict(), file) writes one"
        more = isinstance(problem, pickle.UnpicklingError)
        found = "a pickle of more than tensors" if more else f"an error: {_first_line(problem)}"
        raise BundleError(mismatch(file, "file", "a state dict of tensors", found, hint)) from None
    if not isinstance(state, dict):
        raise BundleError(mismatch(file, "file", "a state dict of tensors", type(state).__name__))
    for key, value in state.items():
        if not isinstance(key, str) or not isinstance(value, torch.Tensor):
            raise BundleError(mismatch(file, plain(str(key)), "a tensor", type(value).__name__))
    return dict(state)


def _first_line(problem: Exception) -> str:
    return plain((str(problem) or type(problem).__name__).splitlines()[0])
