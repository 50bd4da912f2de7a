"""Grids of the images that filters rejected, one PNG per reason.

    synthetic/.rejected/<reason>/<class>-<index>-<attempt>.png ──► synthetic/.rejected/<reason>.png

Images and grids lie in a hidden folder: readers of class folders take a visible one for a class, and readers
of metadata.jsonl refuse a visible image without a line of its own.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

from synthkit.data.contact_sheet import contact_sheet
from synthkit.recipes.generation.rejections import REJECTED
from synthkit.standalone import open_image

_SHOWN = 24  # images per class


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
