"""Keeping libraries from talking to the user."""

from __future__ import annotations

import os
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
