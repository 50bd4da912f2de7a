"""`gap`: how a synthetic set differs from real photos, in looks and in content, and what may close the gap.

    synthetic, photos ──a student's input──┬── pixels ────► appearance: colour, contrast, sharpness, spectrum
                                           └── features ──► content: coverage, density, diversity, confusion,
                                                            Fréchet distance

Wang et al. 2024 (arXiv 2311.03959) hold the content gap to explain much of what synthetic training images
lose. The measures are named after their own literature (see `synthkit.metrics.distributions`); what each
limit rests on is said in `synthkit.recipes.diagnostics.gap_advice`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from synthkit.data.images import ImageSet
from synthkit.data.splits import stratified_folds
from synthkit.errors import DataError
from synthkit.metrics import classification as metrics
from synthkit.metrics import distributions as gap_measures
from synthkit.recipes.diagnostics.gap_advice import advise

if TYPE_CHECKING:
    from synthkit.learning.students import Student

_NEIGHBOURS = 5  # as Naeem et al. 2020 use; fewer where a class has no more photos
_FOLDS = 5  # of the photos, to see how far the head that only saw photos is to be trusted
_DRAWS = 10  # of equally many images, for a distance beside that of two halves of the photos
_CHANNELS = ("red", "green", "blue")
_TRAITS = (*(f"{name} mean" for name in _CHANNELS), *(f"{name} contrast" for name in _CHANNELS), "sharpness")


@dataclass(frozen=True)
class _Seen:
    """A set as a student sees it.

    Attributes:
        pixels: uint8 [N, H, W, 3].
        features: float32 [N, D].
        labels: class index [N].
    """

    pixels: np.ndarray
    features: np.ndarray
    labels: np.ndarray


def measure_gap(
    student: Student, source: str, synthetic: ImageSet, real: ImageSet, most: int, seed: int = 0
) -> dict[str, Any]:
    """Compare a synthetic set with real photos.

    Args:
        student: its features are what content is measured on; its input is what appearance is measured on.
        source: what to call it.
        synthetic: the synthetic set.
        real: real photos of the same classes.
        most: images of a class that are looked at, in both sets.
        seed: of draws and folds.

    Returns:
        `features` (source, dimensions), `n_real`, `n_synthetic`, `appearance`, `content`, `per_class` {name:
        measures} and `actions` (see `advise`). What cannot be measured with so few photos is None.

    Raises:
        DataError: the classes differ.
    """
    check_classes(synthetic, real)
    chosen = [_first(one, most) for one in (real.distinct(), synthetic)]
    photos, drawn = (_seen(student, one) for one in chosen)
    confusion, trusted = _confusion(photos, drawn, len(real.classes), seed)
    per_class = {
        name: _of_class(photos, drawn, label, confusion[label], real.classes)
        for label, name in enumerate(real.classes)
    }
    found = {
        "features": {"source": source, "dimensions": photos.features.shape[1]},
        "n_real": len(photos.labels),
        "n_synthetic": len(drawn.labels),
        "appearance": _appearance(photos, drawn),
        "content": {
            **_distances(photos, drawn, seed),
            **trusted,
            "confusion": confusion.tolist(),
            **_averages(per_class),
        },
        "per_class": per_class,
    }
    return {**found, "actions": advise(found)}


def check_classes(synthetic: ImageSet, real: ImageSet) -> None:
    """Refuse sets of different classes.

    Raises:
        DataError: names the classes that one of them lacks.
    """
    for one, other in ((real, synthetic), (synthetic, real)):
        lacking = [name for name in one.classes if name not in other.classes]
        if lacking:
            raise DataError(
                f"{other.root} has no class {', '.join(map(repr, lacking[:5]))}, which {one.root} has; "
                "give two folders with the same class folders"
            )


def _first(images: ImageSet, most: int) -> ImageSet:
    """At most so many images of a class; they lie in the order of their hashes, so any part is a fair one."""
    positions = [np.flatnonzero(images.labels == label)[:most] for label in range(len(images.classes))]
    return images.subset(np.concatenate(positions))


def _seen(student: Student, images: ImageSet) -> _Seen:
    pixels = images.load(student.preprocessing)
    return _Seen(pixels, student.features(pixels), images.labels)


def _traits(pixels: np.ndarray) -> np.ndarray:
    """Numbers of a photo's look [N, 7]: see `_TRAITS`."""
    return np.column_stack([gap_measures.channel_statistics(pixels), gap_measures.sharpness(pixels)])


def _appearance(photos: _Seen, drawn: _Seen) -> dict[str, Any]:
    """Offsets in standard deviations of the photos, spreads as ratios, the spectrum in decibels."""
    real, synthetic = _traits(photos.pixels), _traits(drawn.pixels)
    deviation = np.maximum(real.std(0), 1e-6)
    offset = (synthetic.mean(0) - real.mean(0)) / deviation
    spectra = [gap_measures.power_spectrum(one.pixels) for one in (photos, drawn)]
    decibel = 10 * (spectra[1] - spectra[0])
    third = max(1, len(decibel) // 3)
    return {
        "offset": _named(offset),
        "spread": _named(synthetic.std(0) / deviation),
        "offset_error": round(float(np.sqrt(1 / len(real) + 1 / len(synthetic))), 3),
        "spectrum_db": [round(float(one), 2) for one in decibel],
        "low_frequencies_db": round(float(decibel[:third].mean()), 2),
        "high_frequencies_db": round(float(decibel[-third:].mean()), 2),
    }


def _named(values: np.ndarray) -> dict[str, float]:
    return {name: round(float(value), 3) for name, value in zip(_TRAITS, values, strict=True)}


def _distances(photos: _Seen, drawn: _Seen, seed: int) -> dict[str, float | None]:
    """Fréchet distances: of all images; and of equally many, beside two halves of the photos themselves."""
    whole = gap_measures.frechet_distance(photos.features, drawn.features)
    random, half = np.random.default_rng(seed), len(photos.features) // 2
    count = min(half, len(drawn.features))
    halves, sets = [], []
    for _ in range(_DRAWS if count > 1 else 0):
        order = random.permutation(len(photos.features))
        first, second = photos.features[order[:count]], photos.features[order[count : 2 * count]]
        picked = random.permutation(len(drawn.features))[:count]
        halves.append(gap_measures.frechet_distance(first, second))
        sets.append(gap_measures.frechet_distance(first, drawn.features[picked]))
    return {
        "frechet": round(whole, 4),
        "frechet_equal_counts": round(float(np.mean(sets)), 4) if sets else None,
        "frechet_real_halves": round(float(np.mean(halves)), 4) if halves else None,
        "frechet_count": count,
    }


def _confusion(
    photos: _Seen, drawn: _Seen, classes: int, seed: int
) -> tuple[np.ndarray, dict[str, float | None]]:
    """What a head that only saw photos takes the synthetic images for, and how far it is to be trusted."""
    predicted = _real_head(photos.features, photos.labels, drawn.features)
    right = [
        _real_head(photos.features[learn], photos.labels[learn], photos.features[hold]) == photos.labels[hold]
        for learn, hold in stratified_folds(photos.labels, _FOLDS, seed)
    ]
    held_out = np.concatenate(right) if right else np.zeros(0)
    return metrics.confusion(predicted, drawn.labels, classes), {
        "head_top1_on_photos": round(float(held_out.mean()), 4) if len(held_out) else None,
        "head_top1_on_synthetic": round(metrics.top1(predicted, drawn.labels), 4),
        "head_photos_held_out": len(held_out),
    }


def _real_head(features: np.ndarray, labels: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Classes that logistic regression on some features gives to others."""
    from sklearn.linear_model import LogisticRegression

    deviation = features.std(0)
    scale = np.where(deviation > 1e-6, deviation, 1)
    centred, asked = ((one - features.mean(0)) / scale for one in (features, others))
    if len(np.unique(labels)) == 1:
        return np.full(len(others), labels[0])
    return np.asarray(LogisticRegression(max_iter=1000).fit(centred, labels).predict(asked))


def _of_class(
    photos: _Seen, drawn: _Seen, label: int, confused: np.ndarray, names: tuple[str, ...]
) -> dict[str, Any]:
    real, synthetic = (one.features[one.labels == label] for one in (photos, drawn))
    others = np.where(np.arange(len(names)) == label, -1, confused)
    return {
        "n_real": len(real),
        "n_synthetic": len(synthetic),
        **_coverage(real, synthetic),
        "seen_right": round(float(confused[label] / confused.sum()), 4),
        "most_seen_as": names[int(others.argmax())] if others.max() > 0 else None,
    }


def _coverage(real: np.ndarray, synthetic: np.ndarray) -> dict[str, float | None]:
    k = min(_NEIGHBOURS, len(real) - 1)
    spread, own = gap_measures.mean_distance(synthetic), gap_measures.mean_distance(real)
    density, coverage = gap_measures.density_and_coverage(real, synthetic, k) if k else (None, None)
    expected = gap_measures.expected_coverage(len(real), len(synthetic), k) if k else None
    diversity = spread / own if spread is not None and own else None
    values = {"coverage": coverage, "expected_coverage": expected, "density": density, "diversity": diversity}
    return {name: None if one is None else round(float(one), 4) for name, one in values.items()}


def _averages(per_class: Mapping[str, Mapping[str, Any]]) -> dict[str, float | None]:
    """Mean over the classes that a measure could be taken of."""
    averages: dict[str, float | None] = {}
    for name in ("coverage", "expected_coverage", "density", "diversity"):
        known = [one[name] for one in per_class.values() if one[name] is not None]
        averages[name] = round(float(np.mean(known)), 4) if known else None
    return averages
