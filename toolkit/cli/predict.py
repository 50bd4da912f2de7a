"""`synthkit predict`: classify images with a bundle."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from synthkit import standalone
from synthkit.cli import options
from synthkit.errors import BadImages, DataError, abridged

if TYPE_CHECKING:
    from synthkit.engines.bundle.format import Bundle, Prediction

_CHUNK = 256  # files decoded at once


@options.command("predict")
@options.folder("--bundle", "Bundle.  [default: WORKSPACE/bundle]")
@click.option("--top", type=click.IntRange(min=1), default=3, show_default=True, help="Labels per image.")
@click.argument(
    "images", nargs=-1, required=True, type=click.Path(path_type=Path), metavar="IMAGE_OR_FOLDER..."
)
def command(workspace: Path, bundle: Path | None, top: int, images: tuple[Path, ...]) -> options.Output:
    """Classify images with a bundle; torch is not needed.

    A folder stands for the images in it and below. Files that cannot be read are listed at the end; they stop
    nothing, and the command then ends with 1. Where a threshold was fitted (`synthkit update ... --coverage
    0.9`), a less certain answer is "unknown".

    \b
    Example: synthkit predict --bundle ./bundle photo.jpg
    Example: synthkit predict --bundle ./bundle ./photos --json
    """
    from synthkit.engines.bundle.format import Bundle
    from synthkit.engines.bundle.versions import find_again

    folder = bundle or workspace / "bundle"
    find_again(folder)
    files, failures = _files(images)
    predictions = [] if not files else list(_classified(Bundle.open(folder), files, top, failures))
    listed = abridged([f"{path} ({reason})" for path, reason in failures], 10, "; ")
    unusable = f"{len(failures)} file(s) cannot be used as images: {listed}"
    if not predictions:
        raise DataError(unusable if failures else f"no image in {', '.join(map(str, images))}")
    answers = [one.to_json() for one in predictions]
    text = standalone.as_text(answers)
    unread = [{"path": str(path), "reason": reason} for path, reason in failures]
    data = {"predictions": answers, "failures": unread}
    return options.Output(data, f"{text}\n{unusable}" if failures else text, ok=not failures)


def _files(images: Sequence[Path]) -> tuple[list[Path], list[tuple[Path, str]]]:
    """The files that are meant, and what of the folders cannot be listed."""
    from synthkit.data.folders import list_images

    files: list[Path] = []
    failures: list[tuple[Path, str]] = []
    for path in images:
        if path.is_dir():
            listing = list_images(path)
            files += listing.images
            failures += listing.failures
        else:
            files.append(path)
    return files, failures


def _classified(
    bundle: Bundle, files: Sequence[Path], top: int, failures: list[tuple[Path, str]]
) -> Iterable[Prediction]:
    """A chunk after the other, so that memory stays flat; what cannot be read is added to the failures."""
    for start in range(0, len(files), _CHUNK):
        chunk = list(files[start : start + _CHUNK])
        try:
            yield from bundle.predict(chunk, top)
        except BadImages as error:
            failures += error.failures
            bad = {path for path, _ in error.failures}
            yield from bundle.predict([path for path in chunk if path not in bad], top)
