"""TensorRT's timing cache: kernel timings kept between builds, so that the next one is much faster.

One file per GPU and TensorRT version, since TensorRT refuses the timings of another. Two builds may share it:
it is read and written under a lock, and written atomically. A cache that cannot be used costs time and
nothing else, so trouble with it is a warning.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from synthkit.artifacts import lock, write_bytes
from synthkit.engines.tensorrt.plan_cache import Machine

log = logging.getLogger(__name__)


def timing_cache_path(folder: Path | None, machine: Machine) -> Path:
    """The machine's cache file.

    Args:
        folder: the cache folder; None: the user's own.
        machine: whose timings.
    """
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return (folder or home / "synthkit") / f"{machine.label}_{machine.capability}.timing"


def load_timings(config: Any, path: Path) -> None:
    """Give a builder configuration the timings of a file, or an empty cache to fill."""
    with _locked(path):
        known = path.read_bytes() if path.is_file() else b""
    for content in dict.fromkeys([known, b""]):
        cache = config.create_timing_cache(content)
        if cache is not None and config.set_timing_cache(cache, ignore_mismatch=False):
            return
        log.warning("build-engines: the timing cache %s cannot be used; building without it", path)


def save_timings(config: Any, path: Path) -> None:
    """Write a configuration's timings back, with what another build has added to the file meanwhile."""
    cache = config.get_timing_cache()
    if cache is None:
        return
    with _locked(path):
        other = config.create_timing_cache(path.read_bytes()) if path.is_file() else None
        if other is not None and not cache.combine(other, ignore_mismatch=False):
            log.warning("build-engines: the timing cache %s is of another machine; replacing it", path)
        content = cache.serialize()
        if content is not None:
            write_bytes(path, bytes(content))


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_name(f".{path.name}.lock").open("a") as stream:
        lock(stream, wait=True)
        yield
