"""The log of rejected images: which sample of each image counts, and which images were dropped.

    round:  every image exists ──► the filters look at all, in order of class and index ──► rejections
            rejections are logged ──► their files move to .rejected/<reason>/ ──► the images are resampled

The log is written before a file is moved, and all files are moved before an image is generated: a run that
follows a killed one can tell how far it came. The filters look at whole sets only, so that batches and
interruptions change no result. Without filters there is one round, and no log.

Rejected images lie in a hidden folder: readers of class folders would take a visible one for a class, and
readers of metadata.jsonl refuse a visible image without a line of its own.
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
from synthkit.recipes.generation.plan import PlannedImage, SetPlan, image_file
from synthkit.standalone import open_image

REJECTED = ".rejected"
"""Folder of rejected images in a synthetic set; hidden, so that it is not taken for a class."""

_LOG = "journal.json"
_SHOWN = 24  # images of a class in a grid


@dataclass(frozen=True, slots=True)
class Rejection:
    """One sample of an image that a filter rejected, and the filter's name."""

    name: str
    index: int
    resample: int
    reason: str

    @property
    def file_name(self) -> str:
        """Path of the rejected image below the synthetic set."""
        return f"{REJECTED}/{self.reason}/{self.name}-{self.index:05d}-{self.resample}.png"


@dataclass(frozen=True)
class ClassTotals:
    """The outcome of filtering for one class.

    Attributes:
        kept: images in the set.
        resampled: those of them that are not the first sample.
        dropped: reason -> images that were rejected at every resample.
    """

    kept: int
    resampled: int
    dropped: Mapping[str, int]

    def to_json(self) -> dict[str, Any]:
        """As JSON data."""
        return asdict(self)


class RejectionLog:
    """Rejections of a set, kept in its folder, and the images that are left to generate.

    Args:
        folder: the set; an interrupted run's log in it is continued.
        plan: makes images and resamples them.
        retries: times that a rejected image is resampled before it is dropped.

    Raises:
        WorkspaceError: the log cannot be read.
    """

    def __init__(self, folder: Path, plan: SetPlan, retries: int) -> None:
        self._folder, self._plan, self._retries = folder, plan, retries
        self._images: dict[tuple[str, int], PlannedImage] = {
            (image.name, image.index): image for image in plan.images()
        }
        self._dropped: list[Rejection] = []
        self.rejections = _read_log(folder / REJECTED / _LOG)
        self._count(self.rejections)
        self._move(self.rejections)

    @property
    def images(self) -> list[PlannedImage]:
        """The images that belong in the set, in order of class and index, each at the sample that counts."""
        return list(self._images.values())

    def reject(self, images: Sequence[PlannedImage], reasons: Sequence[str]) -> None:
        """Log rejections and move the files away; the images are to be resampled, or are dropped."""
        new = [
            Rejection(image.name, image.index, image.resample, reason)
            for image, reason in zip(images, reasons, strict=True)
        ]
        self.rejections += new
        (self._folder / REJECTED).mkdir(exist_ok=True)
        write_json(self._folder / REJECTED / _LOG, [asdict(rejection) for rejection in self.rejections])
        self._count(new)
        self._move(new)

    def totals(self) -> dict[str, ClassTotals]:
        """Class -> the outcome, in order of the names."""
        kept = Counter(image.name for image in self._images.values())
        resampled = Counter(image.name for image in self._images.values() if image.resample)
        dropped = {name: Counter[str]() for name in self._plan.words}
        for rejection in self._dropped:
            dropped[rejection.name][rejection.reason] += 1
        return {
            name: ClassTotals(kept[name], resampled[name], dict(dropped[name]))
            for name in sorted(self._plan.words)
        }

    def _count(self, rejections: Iterable[Rejection]) -> None:
        for rejection in rejections:
            key = rejection.name, rejection.index
            if rejection.resample < self._retries:
                self._images[key] = self._plan.resampled(self._images[key])
            else:
                del self._images[key]
                self._dropped.append(rejection)

    def _move(self, rejections: Iterable[Rejection]) -> None:
        """Move files that are still in place; those that have been moved are left alone."""
        for rejection in rejections:
            source = self._folder / image_file(rejection.name, rejection.index)
            target = self._folder / rejection.file_name
            if source.exists() and not target.exists():
                target.parent.mkdir(parents=True, exist_ok=True)
                source.rename(target)


def _read_log(path: Path) -> list[Rejection]:
    if not path.exists():
        return []
    try:
        return [Rejection(**fields) for fields in json.loads(path.read_text(encoding="utf-8"))]
    except (OSError, ValueError, TypeError):
        raise WorkspaceError(f"cannot read {path}; generate the set anew with --force") from None


def rejected_images(folder: Path) -> dict[str, dict[str, list[Path]]]:
    """Reason -> class -> the rejected images of a synthetic set, in order of class, index and resample."""
    files: dict[str, dict[str, list[Path]]] = defaultdict(lambda: defaultdict(list))
    for path in (folder / REJECTED).glob("*/*.png"):
        files[path.parent.name][_parts(path)[0]].append(path)
    return {
        reason: {name: sorted(files[reason][name], key=_parts) for name in sorted(files[reason])}
        for reason in sorted(files)
    }


def _parts(path: Path) -> tuple[str, int, int]:
    name, index, resample = path.stem.rsplit("-", 2)
    return name, int(index), int(resample)


def rejected_grids(folder: Path, out: Path | None = None) -> list[Path]:
    """Write a PNG grid per reason: a row per class with its name, its number of images and the first of them.

    Args:
        folder: the synthetic set.
        out: folder of the grids; None: beside the rejected images.

    Returns:
        The PNG files, in the order of the reasons; none where nothing was rejected.
    """
    place, files = out or folder / REJECTED, rejected_images(folder)
    if files:
        place.mkdir(parents=True, exist_ok=True)
    return [_grid(images, place / f"{reason}.png") for reason, images in files.items()]


def _grid(images: Mapping[str, Sequence[Path]], path: Path) -> Path:
    rows = [
        (f"{name}: {len(paths)}", [open_image(image) for image in paths[:_SHOWN]])
        for name, paths in images.items()
    ]
    contact_sheet(rows, path)
    return path
