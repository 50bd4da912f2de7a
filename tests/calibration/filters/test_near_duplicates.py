"""Near-duplicates: what counts as one, and that the answer depends on nothing but pixels and order."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image, ImageEnhance

from synthkit.calibration.filters.near_duplicates import (
    duplicate_threshold,
    find_near_duplicates,
    moved_distance,
    near_any,
    vector,
)


def scene(seed: int, side: int = 32) -> Image.Image:
    """A smooth random picture, as different from another seed's as photos of other things are."""
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((side, side), Image.Resampling.BICUBIC)


def as_jpeg(image: Image.Image) -> Image.Image:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=60)
    return Image.open(buffer).convert("RGB")


def vectors(*images: Image.Image) -> np.ndarray:
    return np.stack([vector(image) for image in images])


def fitted(images: list[Image.Image], labels: list[int] | None = None, quantile: float = 0.05) -> float:
    moved = [moved_distance(image) for image in images]
    return duplicate_threshold(moved, vectors(*images), np.array(labels or range(len(images))), quantile)


@pytest.mark.parametrize(
    "alter",
    [
        as_jpeg,
        lambda image: image.resize((50, 50), Image.Resampling.BICUBIC),
        lambda image: ImageEnhance.Brightness(image).enhance(0.8),
        lambda image: ImageEnhance.Contrast(image).enhance(0.6),
        lambda image: image.rotate(0.5, Image.Resampling.BICUBIC),
    ],
    ids=["jpeg", "resized", "darker", "weaker", "turned"],
)
def test_an_altered_copy_is_a_near_duplicate_and_another_picture_does_not(alter) -> None:
    pictures = [scene(seed) for seed in range(12)]
    limit = fitted(pictures)
    assert not find_near_duplicates(vectors(*pictures), limit).any()
    with_copy = vectors(*pictures, alter(pictures[3]))
    assert find_near_duplicates(with_copy, limit).tolist() == [False] * 12 + [True]


def test_the_earlier_stays_and_a_near_duplicate_marks_no_others() -> None:
    base = np.zeros(768, np.int16)
    line = np.stack([base, base, base])
    line[1, 0], line[2, 0] = 100, 200  # a chain: the ends are too far apart to be near
    limit = 150 / 2048
    assert find_near_duplicates(line, limit).tolist() == [False, True, False]
    assert find_near_duplicates(line[::-1], limit).tolist() == [False, True, False]
    assert find_near_duplicates(line[[1, 0, 2]], limit).tolist() == [False, True, True]


def test_verdicts_do_not_change_where_blocks_end() -> None:
    """1,100 pictures lie in three blocks; each result is what a plain loop over all pairs finds."""
    rng = np.random.default_rng(0)
    many = rng.integers(-100, 100, (1100, 768)).astype(np.int16)
    many[600] = many[3]  # in another block
    many[1050] = many[1030]  # in the same
    many[1051] = many[1050]  # of a repeat
    many[20] = many[10] + 1
    found = np.flatnonzero(find_near_duplicates(many, 30 / 2048))
    assert found.tolist() == [20, 600, 1050, 1051]


def test_the_limit_follows_the_photos_not_their_number() -> None:
    sharp, soft = [scene(seed) for seed in range(40)], []
    for picture in sharp:
        soft.append(picture.resize((4, 4), Image.Resampling.BOX).resize((32, 32), Image.Resampling.BICUBIC))
    assert fitted(soft) < 0.8 * fitted(sharp)
    assert fitted(sharp[:4]) == pytest.approx(fitted(sharp), rel=0.25)
    assert fitted(sharp, quantile=0.0) < fitted(sharp, quantile=0.5) < fitted(sharp, quantile=1.0)


def test_photos_that_are_closer_than_moved_ones_set_the_limit() -> None:
    apart = [scene(0), scene(1)]
    alike = [scene(0), ImageEnhance.Brightness(scene(0)).enhance(0.95)]
    assert fitted(apart, [0, 0]) == fitted(apart, [0, 1])  # two that differ widely set nothing
    assert fitted(alike, [0, 0]) < 0.5 * fitted(apart, [0, 0])
    assert fitted(alike, [0, 1]) == pytest.approx(fitted(apart, [0, 1]), rel=0.5)  # of two classes
    assert fitted([scene(0), scene(0)], [0, 0]) == fitted([scene(0)])  # a copy counts for nothing


def test_flat_pictures_are_not_told_apart_by_their_noise() -> None:
    rng = np.random.default_rng(0)
    grey = [Image.fromarray(rng.integers(127, 129, (32, 32, 3), dtype=np.uint8)) for _ in range(2)]
    assert find_near_duplicates(vectors(*grey), 0.3).tolist() == [False, True]
    assert not find_near_duplicates(vectors(grey[0], scene(0)), 0.3).any()


def test_squares_are_exact_for_the_longest_vectors() -> None:
    """A result at the very limit hangs on it: float32 sums of such products are integers below 2^24."""
    longest = vectors(*(scene(seed) for seed in range(600)))
    exact = longest[:1].astype(np.int64) - longest.astype(np.int64)
    squares = (exact * exact).sum(1)
    for position in (1, 299, 599):
        limit = float(squares[position]) ** 0.5 / 2048
        assert near_any(longest[:1], longest[position : position + 1], limit + 1e-9)[0]
        assert not near_any(longest[:1], longest[position : position + 1], limit - 1e-4)[0]


def test_near_any_of_nothing() -> None:
    nothing = np.empty((0, 768), np.int16)
    assert near_any(vectors(scene(0)), nothing, 1.0).tolist() == [False]
    assert near_any(nothing, vectors(scene(0)), 1.0).tolist() == []
