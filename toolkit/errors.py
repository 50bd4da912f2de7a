"""Every error that synthkit raises on purpose.

A message says what is wrong, the value seen and what to do. The command line prints a `SynthkitError` as one
line and exits with 1; anything else is a bug and keeps its traceback.

    SynthkitError
    ├── ConfigError        a recipe file or an option holds a value that cannot be used
    ├── DataError          an image, a class folder or a data split cannot be used
    │   └── BadImages      one or more files are not readable images
    ├── ModelError         a generator, a student or a style token is unknown, absent or does not fit
    ├── EngineError        a runtime, a provider or an engine file is missing or does not work
    ├── ParityError        an exported model does not compute what its source computes
    ├── BundleError        a bundle is incomplete, altered or of another version
    ├── WorkspaceError     a workspace is locked by another run, read-only or full
    └── MissingExtra       an optional dependency is not installed
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from pathlib import Path


class SynthkitError(Exception):
    """The root of the tree; its text is one line for the user."""


class ConfigError(SynthkitError):
    """A recipe file or an option holds a value that cannot be used."""


class DataError(SynthkitError):
    """An image, a class folder or a data split cannot be used."""


class BadImages(DataError):
    """One or more files are not readable images.

    Args:
        failures: (path, reason) of every unreadable file.
    """

    def __init__(self, failures: Sequence[tuple[Path, str]]) -> None:
        self.failures = tuple(failures)
        listed = "; ".join(f"{path} ({reason})" for path, reason in failures)
        super().__init__(
            f"{len(failures)} file(s) cannot be used as images: {listed}; "
            "repair or remove them, or leave them out with --skip-bad"
        )

    def __reduce__(self) -> tuple[type[BadImages], tuple[object, ...]]:
        """So that a child process can hand it to its parent."""
        return type(self), (self.failures,)


class ModelError(SynthkitError):
    """A generator, a student or a style token is unknown, absent or does not fit."""


class EngineError(SynthkitError):
    """A runtime, a provider or an engine file is missing or does not work."""


class ParityError(SynthkitError):
    """An exported model does not compute what its source computes."""


class BundleError(SynthkitError):
    """A bundle is incomplete, altered or of another version."""


class WorkspaceError(SynthkitError):
    """A workspace is locked by another run, read-only or full."""


class MissingExtra(SynthkitError):
    """An optional dependency is not installed.

    Args:
        module: the module that could not be imported.
        extra: the extra of synthkit that brings it, for example "train".
    """

    def __init__(self, module: str, extra: str) -> None:
        super().__init__(
            f"the Python package {module!r} is not installed; "
            f"install it with: pip install 'synthkit-edge[{extra}]'"
        )
        self._missing = (module, extra)

    def __reduce__(self) -> tuple[type[MissingExtra], tuple[str, str]]:
        """So that a child process can hand it to its parent."""
        return type(self), self._missing


def nearest(word: str, known: Iterable[str], count: int = 3) -> str:
    """Phrase that offers the known words most like a mistyped one; empty when none is near.

    Args:
        word: what the user typed.
        known: the words that would have been valid.
        count: how many to offer at the most.
    """
    close = difflib.get_close_matches(word, list(known), n=count, cutoff=0.5)
    return f"; did you mean {' or '.join(close)}?" if close else ""


def abridged(items: Sequence[str], limit: int, separator: str) -> str:
    """Items as one text; of more than the limit the first, and how many more there are."""
    shown = separator.join(items[:limit])
    return f"{shown} and {len(items) - limit} more" if len(items) > limit else shown


def first_line(error: Exception) -> str:
    """What an error says, without the stack or the hints below it; empty where it says nothing."""
    return str(error).strip().split("\n")[0][:300]
