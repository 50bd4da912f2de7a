"""`gap`: how a synthetic set differs from real photos, in looks and in content, and what may close the gap.

    synthetic, photos ──a student's input──┬── pixels ────► appearance: colour, contrast, sharpness, spectrum
                                           └── features ──► content: coverage, density, diversity, confusion,
                                                            Fréchet distance

Wang et al. 2024 (arXiv 2311.03959) hold the content gap to explain much of what synthetic training images
lose. The measures are named after their own literature (see `synthkit.metrics.distributions`); what each
limit of the advice rests on stands beside it. The limits are ours; no paper gives them. They say where to
look first, not what a student will gain.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from synthkit.data.images import ImageSet
from synthkit.data.splits import stratified_folds
from synthkit.errors import DataError
from synthkit.metrics import classification as metrics
from synthkit.metrics import distributions as gap_measures

if TYPE_CHECKING:
    from synthkit.learning.students import Student

_NEIGHBOURS = 5  # as Naeem et al. 2020 use; fewer where a class has no more photos
_FOLDS = 5  # of the photos, to see how far the head that only saw photos is to be trusted
_DRAWS = 10  # of equally many images, for a distance beside that of two halves of the photos
_OFFSET = 0.8  # Cohen's (1988) large effect: 79 % of one set lie beyond the other's mean
_ERRORS = 2.0  # standard errors that an offset must pass, so that few photos raise no alarm
_SPREAD = 0.5  # two deviations of the synthetic set then reach one of the photos: 68 % of them
_DECIBEL = 3.0  # half or twice the power
_COVERAGE = 0.7  # of the coverage that images of the photos' own distribution would have
_DIVERSITY = 0.8  # of the photos' mean distance
_MOST = 3
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


@dataclass(frozen=True)
class _Finding:
    """One thing that is wrong.

    Attributes:
        gap: "appearance", "content" or "labels".
        excess: how far past its limit; 1 is at it.
        action: what to do.
        why: the value seen, the limit, and what the limit rests on.
    """

    gap: str
    excess: float
    action: str
    why: str


#: The order of the gaps where photos are trained on too: wrong labels stay wrong; images are worth what they
#: add to what the photos show themselves; how photos look is what the last layers learn from them.
_WITH_REAL = ("labels", "content", "appearance")


def advise(gap: Mapping[str, Any]) -> dict[str, list[dict[str, str]]]:
    """Two or three things to do, for both ways of use.

    Args:
        gap: what `measure_gap` found.

    Returns:
        `synthetic_only`: the farthest past their limit first; `added_to_real`: wrong labels, then content,
        then appearance. Each is a list of `gap`, `action` and `why`, empty where no limit is passed.
    """
    found = [
        *_labels(gap),
        *_low_coverage(gap),
        *_diversity(gap),
        *_offsets(gap),
        *_spread(gap),
        *_spectrum(gap),
    ]
    alone = sorted(found, key=lambda one: -one.excess)
    beside = sorted(alone, key=lambda one: _WITH_REAL.index(one.gap))
    return {"synthetic_only": _told(alone), "added_to_real": _told(beside)}


def _told(findings: list[_Finding]) -> list[dict[str, str]]:
    return [{"gap": one.gap, "action": one.action, "why": one.why} for one in findings[:_MOST]]


def _labels(gap: Mapping[str, Any]) -> Iterator[_Finding]:
    """Classes whose images a head of photos takes for another class, more often than chance explains."""
    content = gap["content"]
    trusted, held_out = content["head_top1_on_photos"], content["head_photos_held_out"]
    if trusted is None:
        return
    low = metrics.wilson_interval(round(trusted * held_out), held_out)[0]
    worst = [
        (low / max(one["seen_right"], 0.01), name, one)
        for name, one in gap["per_class"].items()
        if metrics.wilson_interval(round(one["seen_right"] * one["n_synthetic"]), one["n_synthetic"])[1] < low
    ]
    for excess, name, one in sorted(worst, key=lambda item: -item[0])[:1]:
        others = f" (and of {len(worst) - 1} more classes)" if len(worst) > 1 else ""
        yield _Finding(
            "labels",
            excess,
            f"give {name!r}{others} other words in classes.toml, or lean on your photos instead of its words "
            "with generate --init real; generate --filter class rejects such images",
            f"a head trained on the photos takes {one['seen_right']:.0%} of its images for it, most others "
            f"for {one['most_seen_as']!r}; of held-out photos it gets {trusted:.0%} right, at least "
            f"{low:.0%}: the 95 % intervals do not meet",
        )


def _low_coverage(gap: Mapping[str, Any]) -> Iterator[_Finding]:
    content = gap["content"]
    if content["coverage"] is None:
        return
    share = content["coverage"] / max(content["expected_coverage"], 1e-9)
    if share >= _COVERAGE:
        return
    narrow = (content["diversity"] or 1) < 1
    action = (
        "lower generate --guidance and give several prompt templates: the images crowd together"
        if narrow
        else "draw from your photos with generate --init real --strength 0.75: the images vary elsewhere"
    )
    worst = min(
        (one["coverage"], name) for name, one in gap["per_class"].items() if one["coverage"] is not None
    )
    yield _Finding(
        "content",
        _COVERAGE / max(share, 0.01),
        action,
        f"{content['coverage']:.0%} of the photos have a synthetic image near them, where images of their "
        f"own distribution would reach {content['expected_coverage']:.0%}; least {worst[1]!r} with "
        f"{worst[0]:.0%} (limit: {_COVERAGE:.0%} of what is expected)",
    )


def _diversity(gap: Mapping[str, Any]) -> Iterator[_Finding]:
    diversity = gap["content"]["diversity"]
    if diversity is not None and diversity < _DIVERSITY:
        yield _Finding(
            "content",
            _DIVERSITY / max(diversity, 0.01),
            "lower generate --guidance, which trades variety for likeness to the prompt (Ho & Salimans 2022)",
            f"two synthetic images of a class are {diversity:.2f} times as far apart as two photos "
            f"(limit {_DIVERSITY})",
        )


def _offsets(gap: Mapping[str, Any]) -> Iterator[_Finding]:
    appearance = gap["appearance"]
    name, offset = max(appearance["offset"].items(), key=lambda item: abs(item[1]))
    limit = max(_OFFSET, _ERRORS * appearance["offset_error"])
    if abs(offset) > limit:
        yield _Finding(
            "appearance",
            abs(offset) / limit,
            "learn the style with more --vectors or --steps; images drawn from your photos (generate --init "
            "real) keep more of their look",
            f"{name} is {offset:+.1f} standard deviations of the photos off (limit {limit:.1f}: a large "
            "effect, beyond two standard errors)",
        )


def _spread(gap: Mapping[str, Any]) -> Iterator[_Finding]:
    spread = gap["appearance"]["spread"]
    middle = sorted(spread.values())[len(spread) // 2]
    if middle < _SPREAD:
        yield _Finding(
            "appearance",
            _SPREAD / max(middle, 0.01),
            "learn a token per look: learn-style --clusters 3",
            f"colour, contrast and sharpness vary {middle:.2f} times as much as among the photos (limit "
            f"{_SPREAD}: then a third of the photos look like no synthetic image)",
        )


def _spectrum(gap: Mapping[str, Any]) -> Iterator[_Finding]:
    high = gap["appearance"]["high_frequencies_db"]
    if high < -_DECIBEL:
        yield _Finding(
            "appearance",
            -high / _DECIBEL,
            "draw with more generate --steps, or from your photos with --init real: the images are soft",
            f"fine detail has {high:+.1f} dB against the photos (limit {-_DECIBEL:.0f} dB, half the power)",
        )
    elif high > _DECIBEL:
        yield _Finding(
            "appearance",
            high / _DECIBEL,
            "lower generate --guidance or draw with more --steps: the images are harder or noisier",
            f"fine detail has {high:+.1f} dB against the photos (limit {_DECIBEL:.0f} dB, twice the power)",
        )
