"""Keeping libraries from talking to the user."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr


@contextmanager
def libraries() -> Iterator[None]:
    """What is written to stderr is dropped, also by native code, and so are warnings. Exceptions pass."""
    kept = os.dup(2)
    with open(os.devnull, "w") as nothing, redirect_stderr(nothing), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        os.dup2(nothing.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(kept, 2)
            os.close(kept)


@contextmanager
def absent(*modules: str) -> Iterator[None]:
    """As if these were not installed, unless imported already: for a library that imports all that it knows."""
    hidden = [name for name in modules if name not in sys.modules]
    for name in hidden:
        sys.modules[name] = None  # type: ignore[assignment]  # what makes an import fail
    try:
        yield
    finally:
        for name in hidden:
            del sys.modules[name]
