"""Near-duplicate pictures: how alike two are, and from where on that is too alike on one site.

    picture ─► 16 x 16 RGB thumbnail ─► mean removed, length 1 ─► rounded to integers ("vector")
    distance = length of the difference of two vectors, 0 (alike up to brightness and contrast) to 2

How far apart the nearest two of some photos are depends on their number: two to three times as far among 4
of a class as among 160, so nearest neighbours alone would call most of a large set duplicates. A photo and
itself moved by a little are equally far apart in every set, so that is the measure; where different photos
are closer than that, they are.

Integers make every sum exact in float32, so that an answer does not depend on how a matrix product is
blocked. NumPy and Pillow; this module knows no file.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image

_SIDE = 16
_LENGTH = 2048  # of a vector; its square and every partial sum of a product of two stay below 2^24
_FLAT = 2.0  # grey levels: weaker contrast is not blown up to full length
_MOVED = 1 / 64  # of the side, along both axes: half a pixel of a 32-pixel image
_BLOCK = 512


def vector(image: Image.Image, box: tuple[float, float, float, float] | None = None) -> np.ndarray:
    """What is compared of a picture, int16 [768].

    Args:
        image: an RGB image of any size.
        box: the part to look at, in pixels; None: all.
    """
    thumbnail = image.resize((_SIDE, _SIDE), Image.Resampling.BILINEAR, box)
    values = np.asarray(thumbnail, np.float64).ravel()
    values -= values.mean()
    length = max(float(np.linalg.norm(values)), _FLAT * values.size**0.5)
    return np.asarray(np.round(values * (_LENGTH / length)), np.int16)


def moved_distance(image: Image.Image) -> float:
    """Distance between two views of one picture, a 64th of the side apart along both axes."""
    width, height = image.size
    across, down = width * _MOVED, height * _MOVED
    first = vector(image, (0, 0, width - across, height - down))
    second = vector(image, (across, down, width, height))
    return float(np.sqrt(_squares(first[None], second[None])[0, 0]) / _LENGTH)


def duplicate_threshold(
    moved: Sequence[float], vectors: np.ndarray, labels: np.ndarray, quantile: float
) -> float:
    """Distance up to which two pictures of a site count as near-duplicates.

    The quantile of the photos' own `moved_distance`, or of the distances from a photo to the nearest other
    one of its class where that is smaller. Exact copies among the photos count for nothing.

    Args:
        moved: `moved_distance` of each of the site's photos.
        vectors: of the photos, int16 [N, 768].
        labels: class index per photo.
        quantile: share of the photos, 0 to 1.
    """
    own = float(np.quantile(moved, quantile))
    nearest = [one for label in np.unique(labels) for one in _nearest_others(vectors[labels == label])]
    return min(own, float(np.quantile(nearest, quantile))) if nearest else own


def _nearest_others(vectors: np.ndarray) -> list[float]:
    squares = _squares(vectors, vectors)
    squares[squares == 0] = np.inf  # itself, and copies of it
    nearest = squares.min(axis=1)
    return [float(one) for one in np.sqrt(nearest[np.isfinite(nearest)]) / _LENGTH]


def find_near_duplicates(vectors: np.ndarray, limit: float) -> np.ndarray:
    """Mark the pictures that are near-duplicates of an earlier one that is not marked, bool [N].

    Args:
        vectors: int16 [N, 768], in the order that decides which of two is the earlier.
        limit: largest distance of near-duplicates.
    """
    repeated = np.zeros(len(vectors), bool)
    for start in range(0, len(vectors), _BLOCK):
        block = vectors[start : start + _BLOCK]
        before = vectors[:start][~repeated[:start]]
        within = _are_near(block, block, limit)
        found = near_any(block, before, limit)
        for row in range(len(block)):
            found[row] |= bool((within[row, :row] & ~found[:row]).any())
        repeated[start : start + len(block)] = found
    return repeated


def near_any(vectors: np.ndarray, others: np.ndarray, limit: float) -> np.ndarray:
    """Mark the pictures that are near-duplicates of one of the others, bool [N].

    Args:
        vectors: int16 [N, 768].
        others: int16 [M, 768].
        limit: largest distance of near-duplicates.
    """
    blocks = range(0, len(vectors), _BLOCK)
    found = [_are_near(vectors[at : at + _BLOCK], others, limit).any(axis=1) for at in blocks]
    return np.concatenate(found) if found else np.zeros(0, bool)


def _are_near(first: np.ndarray, second: np.ndarray, limit: float) -> np.ndarray:
    return np.asarray(_squares(first, second) <= (limit * _LENGTH) ** 2)


def _squares(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Squared differences, float32 [N, M], in units of the vectors' integers."""
    a, b = first.astype(np.float32), second.astype(np.float32)
    return np.asarray((a * a).sum(1)[:, None] + (b * b).sum(1)[None] - 2 * (a @ b.T))
