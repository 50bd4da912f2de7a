"""What the filters look at in an image: photos and synthetic images are measured by the same code.

An image's traits depend on its own pixels and class alone, whatever is measured beside it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from synthkit import standalone
from synthkit.calibration.filters.near_duplicates import vector
from synthkit.calibration.filters.reference_classifier import BATCH, ClassJudge
from synthkit.errors import BadImages

Named = tuple[Path, str]
"""An image file and the class that it should show."""


@dataclass(frozen=True)
class Traits:
    """What is measured of one image.

    Attributes:
        contrast: largest standard deviation of a channel, in grey levels of 255.
        clipped: share of the values that are 0 or 255.
        vector: what near-duplicates are told by, int16 [768].
        probability: of the intended class; None without a classifier.
    """

    contrast: float
    clipped: float
    vector: np.ndarray
    probability: float | None


def measure(images: Sequence[Named], judge: ClassJudge | None) -> Iterator[Traits]:
    """Traits of images, in their order; no more than one image is held at full size.

    Raises:
        BadImages: a file cannot be read as an image.
    """
    for start in range(0, len(images), BATCH):
        yield from _measure_batch(images[start : start + BATCH], judge)


def _measure_batch(images: Sequence[Named], judge: ClassJudge | None) -> Iterator[Traits]:
    found, inputs = [], []
    for path, _ in images:
        picture = open_picture(path)
        found.append((_contrast(picture), _clipped(picture), vector(picture)))
        if judge:
            inputs.append(judge.prepare(picture))
    names = [name for _, name in images]
    probabilities = judge.of_class(inputs, names).tolist() if judge else [None] * len(images)
    for one, probability in zip(found, probabilities, strict=True):
        yield Traits(*one, probability)


def open_picture(path: Path) -> Image.Image:
    """The RGB picture of a file.

    Raises:
        BadImages: the file cannot be read as an image.
    """
    try:
        return standalone.open_image(path)
    except standalone.UnusableImage as error:
        raise BadImages([(path, str(error))]) from None


def _contrast(picture: Image.Image) -> float:
    return float(np.asarray(picture, np.float32).std(axis=(0, 1)).max())


def _clipped(picture: Image.Image) -> float:
    pixels = np.asarray(picture)
    return float(((pixels == 0) | (pixels == 255)).mean())
