"""Filters of synthetic images, with thresholds taken from the site's own photos.

    blank      one colour
    saturated  more clipped pixels than the photos have
    leak       a near-duplicate of a test photo
    class      a classifier doubts the class more than it doubts the photos
    duplicate  a near-duplicate of an earlier image of its class

Filters apply in this order: an image that is unfit by itself makes no later one a duplicate. Photos and
synthetic images are measured by the same code, each by itself, so the results are a function of the list of
images alone.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image

from synthkit import standalone
from synthkit.artifacts import fingerprint
from synthkit.calibration.filters.near_duplicates import (
    duplicate_threshold,
    find_near_duplicates,
    moved_distance,
    near_any,
    vector,
)
from synthkit.calibration.filters.reference_classifier import (
    BATCH,
    ReferenceClassifier,
    Words,
    open_classifier,
)
from synthkit.data.images import ImageSet
from synthkit.errors import BadImages, ConfigError, DataError, nearest

log = logging.getLogger(__name__)

BLANK, SATURATED, LEAK, CLASS, DUPLICATE = "blank", "saturated", "leak", "class", "duplicate"

#: Every filter, in the order in which an image meets them.
FILTERS = (BLANK, SATURATED, LEAK, CLASS, DUPLICATE)
NONE = "none"

_ONE_COLOUR = 2.0  # grey levels: the standard deviation that compression may leave of a plain area
_ALWAYS_FINE = 0.05  # share of clipped values that is no reason to reject, however few the photos have


Named = tuple[Path, str]
"""An image file and the class that it should show."""


@dataclass(frozen=True)
class ImageStatistics:
    """The measurements of one image that filters look at.

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


class Choices(Protocol):
    """What a user chooses, as `synthkit.recipes.settings.FilterSettings` has it."""

    @property
    def filter(self) -> str:
        """Names of filters, comma-separated, or "none"."""

    @property
    def filter_quantile(self) -> float:
        """Share of the photos that a threshold would reject."""

    @property
    def classifier(self) -> str | None:
        """Folder of a student or of CLIP."""


@dataclass(frozen=True)
class Thresholds:
    """From where on an image is rejected; None where no filter asks.

    Attributes:
        clipped: largest share of pixel values that may be 0 or 255.
        probability: smallest probability of the intended class.
        distance: largest distance of near-duplicates.
    """

    clipped: float | None = None
    probability: float | None = None
    distance: float | None = None


def chosen_filters(choices: Choices) -> tuple[str, ...]:
    """The filters that are on, in the order of `FILTERS`.

    Raises:
        ConfigError: a name is no filter's, or the quantile is no share.
    """
    names = [name.strip() for name in choices.filter.split(",") if name.strip() not in ("", NONE)]
    if unknown := [name for name in names if name not in FILTERS]:
        raise ConfigError(
            f"--filter: {unknown[0]!r} is no filter; there are {', '.join(FILTERS)}, and {NONE}"
            f"{nearest(unknown[0], FILTERS)}"
        )
    if not 0 <= choices.filter_quantile <= 1:
        raise ConfigError(
            f"[filter] filter_quantile = {choices.filter_quantile}: give a share of the photos, from 0 to 1"
        )
    return tuple(name for name in FILTERS if name in names)


def filter_inputs(choices: Choices, photos: ImageSet | None, test: ImageSet | None) -> dict[str, str]:
    """Fingerprints of all that the thresholds depend on, for a stage's key; empty with every filter off.

    Raises:
        ConfigError: a choice cannot be used, or a filter lacks what it needs.
    """
    filters = chosen_filters(choices)
    _refuse_missing(filters, choices, photos, test)
    inputs = {}
    if photos and set(filters) - {BLANK}:
        inputs["filter photos"] = photos.digest
    if test and LEAK in filters:
        inputs["filter test photos"] = test.digest
    if CLASS in filters:
        inputs["filter classifier"] = fingerprint(Path(str(choices.classifier)))
    return inputs


def _refuse_missing(
    filters: Sequence[str], choices: Choices, photos: ImageSet | None, test: ImageSet | None
) -> None:
    by_photos = [name for name in filters if name != BLANK]
    if by_photos and not photos:
        raise ConfigError(
            f"--filter {','.join(by_photos)}: thresholds come from your photos; give them with --real-dir"
        )
    if LEAK in filters and not test:
        raise ConfigError("--filter leak: compares with your test photos; give them with --test-dir")
    if CLASS in filters and not choices.classifier:
        raise ConfigError(
            "--filter class: needs a classifier; give the folder of a student or of a CLIP model with "
            "--classifier"
        )
    if CLASS in filters and not Path(str(choices.classifier)).is_dir():
        raise ConfigError(
            f"--classifier: no folder {choices.classifier}; give the folder of a student or of a CLIP model"
        )


def fit_filters(choices: Choices, photos: ImageSet | None, test: ImageSet | None, words: Words) -> Filters:
    """Take the thresholds from the photos.

    Args:
        choices: which filters, the quantile and the classifier's folder.
        photos: the site's few shots.
        test: photos that nothing synthetic may resemble.
        words: class name of the synthetic set -> words for prompts, which CLIP is asked with.

    Raises:
        ConfigError: a choice cannot be used, or a filter lacks what it needs.
        ModelError: the classifier cannot be loaded or does not know a class.
        DataError: the photos are of a class that the set does not have.
        BadImages: a photo became unreadable.
        MissingExtra: torch or transformers is needed and absent.
    """
    filters = chosen_filters(choices)
    _refuse_missing(filters, choices, photos, test)
    classifier = _open_classifier(Path(str(choices.classifier)), photos, words) if CLASS in filters else None
    own = list(measure(_named(photos), classifier)) if photos and set(filters) - {BLANK} else []
    tests = list(measure(_named(test), None)) if test and LEAK in filters else []
    thresholds = _thresholds(filters, photos, own, choices.filter_quantile) if photos else Thresholds()
    return Filters(filters, choices.filter_quantile, thresholds, classifier, _vectors(own), _vectors(tests))


def _open_classifier(folder: Path, photos: ImageSet | None, words: Words) -> ReferenceClassifier:
    from synthkit.learning.students import untrained_on

    classifier = open_classifier(untrained_on(folder, photos) if photos else folder, words)
    unknown = [name for name in photos.classes if name not in classifier.classes] if photos else []
    if photos and unknown:
        raise DataError(
            f"--filter class: {photos.root} has photos of a class that the classifier does not know: "
            f"{', '.join(map(repr, unknown))}; give photos of the set's own classes"
        )
    return classifier


def _named(images: ImageSet) -> list[Named]:
    return [(item.path, images.classes[item.label]) for item in images.items]


def _vectors(statistics: Sequence[ImageStatistics]) -> np.ndarray:
    """Vectors of images, int16 [N, 768]."""
    return np.stack([one.vector for one in statistics]) if statistics else np.empty((0, 768), np.int16)


def _thresholds(
    filters: Sequence[str], photos: ImageSet, own: Sequence[ImageStatistics], quantile: float
) -> Thresholds:
    clipped = probability = distance = None
    if SATURATED in filters:
        clipped = max(_ALWAYS_FINE, float(np.quantile([one.clipped for one in own], 1 - quantile)))
    if CLASS in filters:
        probability = float(np.quantile([one.probability for one in own], quantile))
    if LEAK in filters or DUPLICATE in filters:
        moved = [moved_distance(open_picture(item.path)) for item in photos.items]
        distance = duplicate_threshold(moved, _vectors(own), photos.labels, quantile)
    return Thresholds(clipped, probability, distance)


def measure(images: Sequence[Named], classifier: ReferenceClassifier | None) -> Iterator[ImageStatistics]:
    """Statistics of images, in their order; no more than one image is held at full size.

    Raises:
        BadImages: a file cannot be read as an image.
    """
    for start in range(0, len(images), BATCH):
        yield from _measure_batch(images[start : start + BATCH], classifier)


def _measure_batch(
    images: Sequence[Named], classifier: ReferenceClassifier | None
) -> Iterator[ImageStatistics]:
    found, inputs = [], []
    for path, _ in images:
        picture = open_picture(path)
        found.append((_contrast(picture), _clipped(picture), vector(picture)))
        if classifier:
            inputs.append(classifier.prepare(picture))
    names = [name for _, name in images]
    probabilities = classifier.of_class(inputs, names).tolist() if classifier else [None] * len(images)
    for one, probability in zip(found, probabilities, strict=True):
        yield ImageStatistics(*one, probability)


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


class Filters:
    """Fitted filters; made by `fit_filters`.

    Args:
        filters: names of those that are on.
        quantile: share of the photos that each threshold would reject.
        thresholds: what was taken from the photos.
        classifier: the classifier, or None.
        photos: vectors of the photos, int16 [P, 768].
        tests: vectors of the test photos, int16 [T, 768].
    """

    def __init__(
        self,
        filters: Sequence[str],
        quantile: float,
        thresholds: Thresholds,
        classifier: ReferenceClassifier | None,
        photos: np.ndarray,
        tests: np.ndarray,
    ) -> None:
        self.filters = tuple(filters)
        self.quantile = quantile
        self.thresholds = thresholds
        self._classifier = classifier
        self._photos, self._tests = photos, tests
        self._seen: dict[tuple[object, ...], tuple[str | None, np.ndarray]] = {}

    def reasons(self, images: Sequence[Named]) -> list[str | None]:
        """The name of the filter that rejects each image, or None.

        Of two near-duplicates the earlier in the list stays. An image is measured when it is first seen, and
        again when its file has changed.

        Args:
            images: file and intended class of every image of the set so far, in the order of the set.

        Raises:
            BadImages: a file cannot be read as an image.
        """
        if not self.filters:
            return [None] * len(images)
        seen = self._measured(images)
        results = [fault for fault, _ in seen]
        if DUPLICATE in self.filters:
            for name in dict.fromkeys(name for _, name in images):
                fit = [i for i, one in enumerate(images) if one[1] == name and results[i] is None]
                for position in self._near_duplicates(fit, seen):
                    results[position] = DUPLICATE
        return results

    def near_photos(self, images: Sequence[Named]) -> int | None:
        """Number of images that are near-duplicates of one of the site's own photos.

        These are not rejected: the photos are there to be learned from. None where no filter that is on
        measures distances.
        """
        if self.thresholds.distance is None:
            return None
        vectors = [one for _, one in self._measured(images)]
        return int(near_any(np.stack(vectors), self._photos, self.thresholds.distance).sum()) if images else 0

    def describe(self) -> dict[str, Any]:
        """Thresholds and what they came from, as JSON data for a manifest."""
        limits = self.thresholds
        told: dict[str, dict[str, Any]] = {
            BLANK: {"contrast_below": _ONE_COLOUR},
            SATURATED: {"clipped_above": limits.clipped},
            LEAK: {"distance_up_to": limits.distance, "test_photos": len(self._tests)},
            CLASS: {
                "probability_below": limits.probability,
                "classifier": self._classifier.name if self._classifier else None,
            },
            DUPLICATE: {"distance_up_to": limits.distance},
        }
        thresholds = {name: told[name] for name in self.filters}
        return {"quantile": self.quantile, "photos": len(self._photos), "thresholds": thresholds}

    def _near_duplicates(
        self, positions: Sequence[int], seen: Sequence[tuple[str | None, np.ndarray]]
    ) -> Iterator[int]:
        if positions and self.thresholds.distance is not None:
            found = find_near_duplicates(np.stack([seen[i][1] for i in positions]), self.thresholds.distance)
            yield from (position for position, one in zip(positions, found, strict=True) if one)

    def _measured(self, images: Sequence[Named]) -> list[tuple[str | None, np.ndarray]]:
        """What is wrong with each image by itself, and its vector."""
        keys = [(*_identity(path), name) for path, name in images]
        new = [i for i, key in enumerate(keys) if key not in self._seen]
        statistics = list(measure([images[i] for i in new], self._classifier))
        leaks = near_any(_vectors(statistics), self._tests, self.thresholds.distance or 0.0)
        for i, one, leak in zip(new, statistics, leaks, strict=True):
            self._seen[keys[i]] = (self._fault(one, bool(leak)), one.vector)
        return [self._seen[key] for key in keys]

    def _fault(self, statistics: ImageStatistics, leak: bool) -> str | None:
        limits = self.thresholds
        faults = {
            BLANK: statistics.contrast < _ONE_COLOUR,
            SATURATED: limits.clipped is not None and statistics.clipped > limits.clipped,
            LEAK: leak,
            CLASS: limits.probability is not None and (statistics.probability or 0.0) < limits.probability,
        }
        return next((name for name in self.filters if faults.get(name)), None)


def _identity(path: Path) -> tuple[object, ...]:
    """What changes when a file is written anew."""
    try:
        status = path.stat()
    except OSError as error:
        raise BadImages([(path, str(error.strerror))]) from None
    return str(path), status.st_ino, status.st_size, status.st_mtime_ns
