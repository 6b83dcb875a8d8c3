"""What an operator of the reference runtime is made of.

A *builder* looks once at what an operation gives (its constants, its outputs' types) and returns a *kernel*: the names
of the tensors that it wants at run time and a function of them. Values at run time are torch tensors: bool, int32,
int64 where 32 bits do not hold the type, and float32; a float16 value is a float32 tensor of values of float16.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch

from calora_export.errors import PackageError, UnsupportedError, mismatch

FLOATS = frozenset({"float16", "float32", "float64", "bfloat16", "float8_e4m3fn", "float8_e5m2"})
FAULTS = (
    RuntimeError,
    LookupError,
    ValueError,
    TypeError,
    ArithmeticError,
)  # of torch and numpy, about shapes and values
_WIDE = frozenset({"int64", "uint64", "uint32"})


class Constant:
    """A value that is known before the run. It is decoded when it is asked for, and kept only as a tensor."""

    def __init__(self, load: Callable[[], np.ndarray | torch.Tensor]) -> None:
        self._load = load

    @property
    def array(self) -> np.ndarray:
        """The value as it is stored; types of less than a byte as int8 or uint8."""
        value = self._load()
        return value.numpy() if isinstance(value, torch.Tensor) else value

    @cached_property
    def tensor(self) -> torch.Tensor:
        """The value as kernels take it."""
        value = self._load()
        return value if isinstance(value, torch.Tensor) else working(value)


@dataclass(frozen=True)
class Given:
    """One operation as its builder sees it: each parameter's constants (None where a value comes only at run time)."""

    operator: str
    name: str
    generation: int  # 5 is iOS 15, 8 is iOS 18
    parameters: Mapping[str, Sequence[Constant | None]]
    outputs: Sequence[str]  # dtypes
    asked: set[str] = field(default_factory=set)  # a parameter that no one asks for is one that no one heeds

    def has(self, name: str) -> bool:
        """Whether the operation gives this parameter."""
        self.asked.add(name)
        return bool(self.parameters.get(name))

    def ignore(self, *names: str) -> None:
        """These parameters change no result of a program that is right."""
        self.asked.update(names)

    def present(self, *names: str) -> tuple[str, ...]:
        """Those of the names that the operation gives."""
        return tuple(name for name in names if self.has(name))

    def constant(self, name: str) -> np.ndarray:
        """A parameter that has to be known before the run; UnsupportedError when it is not."""
        self.asked.add(name)
        found = self.parameters[name][0]
        if found is None:
            raise self.refusal(name, "a constant", "a value computed at run time")
        return found.array

    def value(self, name: str, default: Any) -> Any:
        """A scalar parameter as a Python number, bool or string."""
        return self.constant(name).item() if self.has(name) else default

    def needed(self, name: str) -> Any:
        """The same where there is no default."""
        if not self.has(name):
            raise self.refusal(name, "a value", "nothing")
        return self.value(name, None)

    def ints(self, name: str, default: tuple[int, ...] | None = None) -> tuple[int, ...] | None:
        """A vector parameter as Python integers (or bools)."""
        return tuple(self.constant(name).reshape(-1).tolist()) if self.has(name) else default

    def refusal(self, parameter: str, expected: object, found: object) -> UnsupportedError:
        """The error of a parameter that the reference runtime does not compute."""
        return UnsupportedError(mismatch("coreml", f"{self.operator} ({self.name}): {parameter}", expected, found))

    @property
    def floating(self) -> bool:
        """Whether the first output is a number with a fraction."""
        return self.outputs[0] in FLOATS


@dataclass(frozen=True)
class Kernel:
    """A function of the named tensors; one result, or a tuple where the operation has several outputs."""

    inputs: tuple[str, ...]
    run: Callable[..., Any]
    exact: bool = False  # its results are values of its inputs (or no fractions): nothing to round
    shares: bool = False  # a result may lie in an input's memory
    overwrite: Callable[..., Any] | None = None  # the same, into the memory of the first input


Builder = Callable[[Given], Kernel]


def moving(function: Callable[..., Any], *inputs: str) -> Kernel:
    """A kernel that only moves values."""
    return Kernel(inputs, function, exact=True, shares=True)


def working_type(dtype: str) -> torch.dtype:
    """The torch type that holds values of a MIL type at run time."""
    if dtype in FLOATS:
        return torch.float32
    if dtype == "bool":
        return torch.bool
    return torch.int64 if dtype in _WIDE else torch.int32


def working(array: np.ndarray) -> torch.Tensor:
    """A stored value as kernels take it: a view where the types agree."""
    if array.dtype.name in _WIDE:
        array = array.astype(np.int64, copy=False)
    elif array.dtype.name not in ("bool", "float16", "float32"):
        array = array.astype(np.float32 if array.dtype.name in FLOATS else np.int32, copy=False)
    array = np.require(array, requirements=["C", "W"])  # torch takes no read-only arrays
    value = torch.from_numpy(array).reshape(array.shape)
    return value.float() if value.dtype == torch.float16 else value  # torch widens much faster than numpy


@contextmanager
def telling(place: str) -> Iterator[None]:
    """What goes wrong inside is a PackageError of one line that begins with the place."""
    try:
        yield
    except FAULTS as error:
        raise fault(place, error) from error


def fault(place: str, error: Exception) -> PackageError:
    """The error of an operation that can not be built or run: a damaged package, or inputs that do not fit together."""
    reason = str(error).splitlines()[0] if str(error) else "no reason"
    return PackageError(
        f"{place}: {type(error).__name__}: {reason}" if isinstance(error, LookupError) else f"{place}: {reason}"
    )


def half(value: torch.Tensor) -> torch.Tensor:
    """Round to float16 and back: inf above 65504."""
    return value.half().float()
