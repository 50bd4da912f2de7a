"""Progress of long work: a bar on a terminal, a line now and then in a log file."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator
from typing import Any, TextIO, TypeVar

from tqdm import tqdm

_T = TypeVar("_T")
_LINE_EVERY = 30.0  # seconds
_LINE = "{desc}: {n_fmt} of {total_fmt}, {elapsed} elapsed, {remaining} left"


class _Lines:
    """Stream for a bar whose every state becomes a line of its own, as a log file needs it.

    Args:
        stream: where the lines go.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> None:
        """Write what is left of a state without carriage returns and blanks."""
        if line := text.strip():
            self._stream.write(f"{line}\n")

    def flush(self) -> None:
        """Flush the stream."""
        self._stream.flush()


def progress_bar(total: int, label: str, *, done: int = 0) -> Any:
    """Make a tqdm bar on stderr, to `update` and `close`, or to use in a `with` statement.

    On a terminal it is a bar that goes away at the end; elsewhere it writes a line every half minute, so that
    short work writes none. `TQDM_DISABLE`, which --quiet sets, silences both.

    Args:
        total: number of steps.
        label: what is being done.
        done: number of steps that an earlier run has done.
    """
    return tqdm(total=total, initial=done, **_options(label))


def progress(items: Iterable[_T], label: str, *, total: int | None = None, done: int = 0) -> Iterator[_T]:
    """Pass items on and show how many there have been, as `progress_bar` does.

    Args:
        items: what to go through.
        label: what is being done.
        total: number of steps; of what has a length it is the length.
        done: number of steps that an earlier run has done.
    """
    yield from tqdm(items, total=total, initial=done, **_options(label))


def _options(label: str) -> dict[str, Any]:
    common = {"desc": label, "leave": False, "disable": bool(os.environ.get("TQDM_DISABLE"))}
    if sys.stderr.isatty():
        return common
    return {
        **common,
        "file": _Lines(sys.stderr),
        "mininterval": _LINE_EVERY,
        "miniters": 1,  # by itself tqdm tells a slow loop again after ten seconds
        "delay": _LINE_EVERY,
        "bar_format": _LINE,
    }
