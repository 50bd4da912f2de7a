"""Rounds of a filtered set: which attempt at each image counts, which were rejected, which were given up.

    round:  every image is there ──► all are judged, in order of class and index ──► rejections
            rejections written down ──► their files moved to .rejected/<reason>/ ──► next attempts are drawn

What was rejected is written down before a file is moved, and all are moved before anything is drawn: whenever
a run is killed, the next one finds in which of these steps it was. Verdicts come on whole sets alone, so that
batches and interruptions change none. Without filters there is one round, and nothing is written down.
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from synthkit.artifacts import write_json
from synthkit.data.contact_sheet import contact_sheet
from synthkit.errors import WorkspaceError
from synthkit.recipes.generation.plan import Planned, SetPlan, image_file
from synthkit.standalone import open_image

REJECTED = ".rejected"
"""Folder of rejected images in a synthetic set; hidden, so that it passes for no class."""

_JOURNAL = "journal.json"
_SHOWN = 24  # images of a class in a grid


@dataclass(frozen=True, slots=True)
class Rejection:
    """One attempt at an image that a filter rejected, and the filter's name."""

    name: str
    index: int
    attempt: int
    reason: str

    @property
    def file_name(self) -> str:
        """Path of the rejected image below the synthetic set."""
        return f"{REJECTED}/{self.reason}/{self.name}-{self.index:05d}-{self.attempt}.png"


class Rounds:
    """The state of a set's rounds, which lives in its folder.

    Args:
        folder: the set; an interrupted run's state in it is taken up.
        plan: makes images and their next attempts.
        retries: how often a rejected image is drawn again before it is given up.
    """

    def __init__(self, folder: Path, plan: SetPlan, retries: int) -> None:
        self._folder, self._plan, self._retries = folder, plan, retries
        self._images: dict[tuple[str, int], Planned] = {
            (image.name, image.index): image for image in plan.images()
        }
        self._given_up: list[Rejection] = []
        self.rejections = _read_journal(folder / REJECTED / _JOURNAL)
        self._count(self.rejections)
        self._move(self.rejections)

    @property
    def images(self) -> list[Planned]:
        """The images that are to be in the set, in order of class and index, at the attempt that counts."""
        return list(self._images.values())

    def reject(self, images: Sequence[Planned], reasons: Sequence[str]) -> None:
        """Write rejections down and move the files away; the images' next attempts take their places."""
        new = [
            Rejection(image.name, image.index, image.attempt, reason)
            for image, reason in zip(images, reasons, strict=True)
        ]
        self.rejections += new
        (self._folder / REJECTED).mkdir(exist_ok=True)
        write_json(self._folder / REJECTED / _JOURNAL, [asdict(one) for one in self.rejections])
        self._count(new)
        self._move(new)

    def totals(self) -> dict[str, dict[str, Any]]:
        """Class -> images kept, those of them that are not the first attempt, and given up by reason."""
        kept = Counter(image.name for image in self._images.values())
        redrawn = Counter(image.name for image in self._images.values() if image.attempt)
        given_up = {name: Counter[str]() for name in self._plan.words}
        for one in self._given_up:
            given_up[one.name][one.reason] += 1
        return {
            name: {"kept": kept[name], "redrawn": redrawn[name], "given_up": dict(given_up[name])}
            for name in sorted(self._plan.words)
        }

    def _count(self, rejections: Iterable[Rejection]) -> None:
        for one in rejections:
            key = one.name, one.index
            if one.attempt < self._retries:
                self._images[key] = self._plan.again(self._images[key])
            else:
                del self._images[key]
                self._given_up.append(one)

    def _move(self, rejections: Iterable[Rejection]) -> None:
        """Move what is still in its place; what has been moved already is left alone."""
        for one in rejections:
            source = self._folder / image_file(one.name, one.index)
            target = self._folder / one.file_name
            if source.exists() and not target.exists():
                target.parent.mkdir(parents=True, exist_ok=True)
                source.rename(target)


def _read_journal(path: Path) -> list[Rejection]:
    if not path.exists():
        return []
    try:
        return [Rejection(**one) for one in json.loads(path.read_text(encoding="utf-8"))]
    except (OSError, ValueError, TypeError):
        raise WorkspaceError(f"cannot read {path}; draw the set anew with --force") from None


def rejected_images(folder: Path) -> dict[str, dict[str, list[Path]]]:
    """Reason -> class -> the rejected images of a synthetic set, in order of class, index and attempt."""
    found: dict[str, dict[str, list[Path]]] = defaultdict(lambda: defaultdict(list))
    for path in (folder / REJECTED).glob("*/*.png"):
        found[path.parent.name][_parts(path)[0]].append(path)
    return {
        reason: {name: sorted(found[reason][name], key=_parts) for name in sorted(found[reason])}
        for reason in sorted(found)
    }


def _parts(path: Path) -> tuple[str, int, int]:
    name, index, attempt = path.stem.rsplit("-", 2)
    return name, int(index), int(attempt)


def rejected_grids(folder: Path, out: Path | None = None) -> list[Path]:
    """Write a grid per reason: a row per class with its name, how many there are, and the first of them.

    Args:
        folder: the synthetic set.
        out: folder of the grids; None: beside the rejected images.

    Returns:
        The PNG files, in the order of the reasons; none where nothing was rejected.
    """
    place, found = out or folder / REJECTED, rejected_images(folder)
    if found:
        place.mkdir(parents=True, exist_ok=True)
    return [_grid(images, place / f"{reason}.png") for reason, images in found.items()]


def _grid(images: Mapping[str, Sequence[Path]], path: Path) -> Path:
    rows = [
        (f"{name}: {len(found)}", [open_image(one) for one in found[:_SHOWN]])
        for name, found in images.items()
    ]
    contact_sheet(rows, path)
    return path
