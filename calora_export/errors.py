"""The exception tree.

CaloraError                 every error that a user can cause; the command line prints it in one line
├── BundleError             what goes in is wrong
├── PackageError            a package is wrong or has been changed
├── RecipeError             a recipe or a device profile is wrong
├── FingerprintError        an adapter and a base that were not trained for each other
├── UnsupportedError        right, but not possible on this target
└── DeviceError             a device went away or refused
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

NAMED = 12  # so many of a thousand names an error lists


class CaloraError(Exception):
    """A user's mistake or a limit, told in one line."""


class BundleError(CaloraError):
    """A bundle, or a checkpoint that becomes one, is not what its format says."""


class PackageError(CaloraError):
    """A package is not what its package.json says."""


class RecipeError(CaloraError):
    """A recipe or device profile is not what its format says."""


class FingerprintError(CaloraError):
    """An adapter was trained for another base."""


class UnsupportedError(CaloraError):
    """A target cannot hold what the bundle contains."""


class DeviceError(CaloraError):
    """A device refused, vanished or answered nonsense."""


def mismatch(file: str | Path, key: str, expected: object, found: object, hint: str = "") -> str:
    """The one-line form of every error about a value: file, key, expected, found, what to do."""
    line = f"{file}: {key}: expected {expected}, found {found}"
    return f"{line} ({hint})" if hint else line


def one_of(names: Sequence[str]) -> str:
    """What may be expected in the place of a name that is none of these."""
    more = f" … ({len(names)} in all)" if len(names) > NAMED else ""
    return f"one of {', '.join(names[:NAMED]) or 'none'}{more}"
