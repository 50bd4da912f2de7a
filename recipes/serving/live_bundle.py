"""The bundle that a service answers with, and its replacement while requests run.

A request takes what is current once and keeps it to its end, so that a swap in the middle drops nothing; the
old model's memory is given back when its last request is answered. This module knows nothing of HTTP.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from synthkit import standalone
from synthkit.artifacts import digest
from synthkit.engines.bundle.format import FACTS, Bundle, read_facts
from synthkit.errors import BundleError, SynthkitError, first_line

log = logging.getLogger(__name__)

Stamps = tuple[tuple[str, int, int, int], ...]


@dataclass(frozen=True)
class Current:
    """What one request is answered with.

    Attributes:
        bundle: the opened bundle.
        confidence: the content of its confidence.json; empty where it has none.
        digest: of bundle.json's content, which tells two bundles apart.
    """

    bundle: Bundle
    confidence: Mapping[str, Any]
    digest: str


class LiveBundle:
    """A bundle that follows its folder.

    Args:
        folder: the bundle's folder; a new version may take its place at any time.
        precision: which of its models runs; None takes the default of each version.

    Attributes:
        current: what to answer with now.
        problem: why the folder's present content cannot be used; empty when it is what is used.

    Raises:
        BundleError: the folder holds no usable bundle.
    """

    def __init__(self, folder: Path, precision: str | None = None) -> None:
        self._folder, self._precision = folder, precision
        self._seen = _stamps(folder)
        self.current = self._open()
        self.problem = ""

    def refresh(self) -> None:
        """Open and take over what the folder holds now, if it changed; what is broken never takes over.

        A folder that is being copied is tried again whenever one of its files has changed.
        """
        seen = _stamps(self._folder)
        if seen == self._seen:
            return
        self._seen = seen
        try:
            if digest(read_facts(self._folder).to_json()) != self.current.digest:
                self.current = self._open()
                log.info("now answering with version %s", self.current.bundle.facts.version)
            self.problem = ""
        except Exception as error:  # whatever a foreign folder provokes, the service goes on
            self.problem = _described(error)
            log.warning("kept the bundle in use: %s", self.problem)

    def _open(self) -> Current:
        bundle = Bundle.open(self._folder, self._precision)
        confidence = standalone.read_confidence(self._folder)
        if _stamps(self._folder) != self._seen:
            raise BundleError(f"{self._folder} changed while it was opened; open it again")
        return Current(bundle, confidence, digest(bundle.facts.to_json()))


def _stamps(folder: Path) -> Stamps:
    """Name, time, size and inode of bundle.json and its neighbours; empty where there is no bundle."""
    try:
        if not (folder / FACTS).is_file():
            return ()
        found = [(path.name, path.stat()) for path in folder.iterdir() if path.is_file()]
    except OSError:  # a file went away between the listing and the look
        return ()
    return tuple(sorted((name, stat.st_mtime_ns, stat.st_size, stat.st_ino) for name, stat in found))


def _described(error: Exception) -> str:
    text = first_line(error)
    return text if isinstance(error, SynthkitError) else f"{type(error).__name__}: {text}"
