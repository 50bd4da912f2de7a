"""`gap`: how a synthetic set differs from real photos, in appearance and in content, and what may help.

    synthetic, photos ──a student's input──┬── pixels ────► appearance: colour, contrast, sharpness, spectrum
                                           └── features ──► content: coverage, density, diversity, confusion,
                                                            Fréchet distance

Wang et al. 2024 (arXiv 2311.03959) attribute much of what synthetic training images lose to the content gap.
The measures carry the names of their own literature (see `synthkit.metrics.distributions`). The limits of the
advice are ours, each with its reason beside it; no paper gives them. They say where to look first, not what a
student will gain.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from synthkit.data.images import ImageSet
from synthkit.data.splits import stratified_folds
from synthkit.errors import DataError
from synthkit.metrics import classification, distributions

if TYPE_CHECKING:
    from synthkit.learning.students import Student

Kind = Literal["labels", "content", "appearance"]

_NEIGHBOURS = 5  # as Naeem et al. 2020 use; fewer where a class has no more photos
_FOLDS = 5  # of the photos, to measure the linear probe that the confusion comes from
_RESAMPLES = 10  # of equally many images, for a distance beside that of two halves of the photos
_CHANNELS = ("red", "green", "blue")
_STATISTICS = (
    *(f"{name} mean" for name in _CHANNELS),
    *(f"{name} contrast" for name in _CHANNELS),
    "sharpness",
)

_OFFSET_LIMIT = 0.8  # Cohen's (1988) large effect: 79 % of one set lie beyond the other's mean
_OFFSET_ERRORS = 2.0  # standard errors that an offset must pass, so that few photos raise no alarm
_SPREAD_LIMIT = 0.5  # two deviations of the synthetic set then reach one of the photos: 68 % of them
_DECIBEL_LIMIT = 3.0  # half or twice the power
_COVERAGE_LIMIT = 0.7  # of the coverage that images of the photos' own distribution would have
_DIVERSITY_LIMIT = 0.8  # of the photos' mean distance
_MAX_ACTIONS = 3


@dataclass(frozen=True)
class FeatureSource:
    """The network whose features content is measured on.

    Attributes:
        source: its name, and where its weights come from.
        dimensions: length of a feature vector.
    """

    source: str
    dimensions: int


@dataclass(frozen=True)
class Appearance:
    """Differences in colour, contrast, sharpness and spectrum.

    Attributes:
        offset: statistic -> difference of the means, in standard deviations of the photos.
        offset_error: standard error of an offset.
        spread: statistic -> standard deviation of the synthetic images divided by that of the photos.
        spectrum_db: power of the synthetic images against the photos by frequency, low to high, in decibels.
        low_frequencies_db: mean of the lowest third of the spectrum.
        high_frequencies_db: mean of the highest third.
    """

    offset: dict[str, float]
    offset_error: float
    spread: dict[str, float]
    spectrum_db: list[float]
    low_frequencies_db: float
    high_frequencies_db: float


@dataclass(frozen=True)
class Neighbourhood:
    """Density and coverage (Naeem et al. 2020) and diversity; None with too few images.

    Attributes:
        coverage: share of the photos with a synthetic image among their nearest neighbours.
        expected_coverage: the same, if both sets came from one distribution.
        density: photos whose neighbourhood a synthetic image lies in, relative to what is expected.
        diversity: mean distance of two synthetic images divided by that of two photos.
    """

    coverage: float | None
    expected_coverage: float | None
    density: float | None
    diversity: float | None


@dataclass(frozen=True)
class ClassContent(Neighbourhood):
    """Content of one class.

    Attributes:
        n_real: photos of the class.
        n_synthetic: synthetic images of the class.
        top1: share of its synthetic images that the linear probe of the photos assigns to the class.
        most_confused_with: the class that most of the others are assigned to; None where there are none.
    """

    n_real: int
    n_synthetic: int
    top1: float
    most_confused_with: str | None


@dataclass(frozen=True)
class Content(Neighbourhood):
    """Content of all classes; what `Neighbourhood` names is the mean over the classes.

    Attributes:
        frechet: Fréchet distance of all images.
        frechet_equal_counts: the same between half of the photos and equally many synthetic images.
        frechet_real_halves: the same between two halves of the photos.
        frechet_count: images on either side of the last two.
        linear_probe_top1_real: cross-validated top-1 of a linear probe of the photos; None with too few.
        linear_probe_top1_synthetic: share of the synthetic images that it assigns to their own class.
        linear_probe_n_real: held-out photos of the cross-validation.
        confusion: counts [class, class that the linear probe assigns].
    """

    frechet: float
    frechet_equal_counts: float | None
    frechet_real_halves: float | None
    frechet_count: int
    linear_probe_top1_real: float | None
    linear_probe_top1_synthetic: float
    linear_probe_n_real: int
    confusion: list[list[int]]


@dataclass(frozen=True)
class Action:
    """One thing to do.

    Attributes:
        gap: the kind of gap.
        action: what to do.
        reason: the value measured, the limit, and what the limit rests on.
    """

    gap: Kind
    action: str
    reason: str


@dataclass(frozen=True)
class Actions:
    """At most three actions for each use of the synthetic images; empty where no limit is passed.

    Attributes:
        synthetic_only: they are all that a student learns from; the farthest past its limit comes first.
        added_to_real: photos are trained on too; wrong labels, then content, then appearance.
    """

    synthetic_only: list[Action]
    added_to_real: list[Action]


@dataclass(frozen=True)
class GapResult:
    """A synthetic set compared with real photos.

    Attributes:
        features: the network that content was measured on.
        n_real: photos compared.
        n_synthetic: synthetic images compared.
        appearance: differences of the pixels.
        content: differences of the features.
        per_class: class name -> content of the class.
        actions: what may close the gap.
    """

    features: FeatureSource
    n_real: int
    n_synthetic: int
    appearance: Appearance
    content: Content
    per_class: dict[str, ClassContent]
    actions: Actions

    def to_json(self) -> dict[str, Any]:
        """Plain data for a JSON file."""
        return asdict(self)


@dataclass(frozen=True)
class _Sample:
    """Images of one domain.

    Attributes:
        pixels: uint8 [N, H, W, 3].
        features: float32 [N, D].
        labels: class index [N].
    """

    pixels: np.ndarray
    features: np.ndarray
    labels: np.ndarray


def measure_gap(
    student: Student, source: str, synthetic: ImageSet, real: ImageSet, per_class: int, seed: int = 0
) -> GapResult:
    """Compare a synthetic set with real photos.

    Args:
        student: content is measured on its features, appearance on its input.
        source: name of the student for the result.
        synthetic: the synthetic set.
        real: real photos of the same classes.
        per_class: most images of a class to compare, in both sets.
        seed: of resampling and folds.

    Raises:
        DataError: the classes differ.
    """
    check_classes(synthetic, real)
    photos = _sample(student, _first(real.distinct(), per_class))
    generated = _sample(student, _first(synthetic, per_class))
    names = real.classes
    predicted = _linear_probe(photos.features, photos.labels, generated.features)
    confusion = classification.confusion(predicted, generated.labels, len(names))
    classes = {
        name: _class_content(photos, generated, label, confusion[label], names)
        for label, name in enumerate(names)
    }
    probe_top1, n_held_out = _cross_validated_probe(photos, seed)
    appearance = _appearance(photos, generated)
    content = Content(
        **_mean_over_classes(classes),
        **_frechet_distances(photos, generated, seed),
        linear_probe_top1_real=probe_top1,
        linear_probe_top1_synthetic=round(classification.top1(predicted, generated.labels), 4),
        linear_probe_n_real=n_held_out,
        confusion=confusion.tolist(),
    )
    return GapResult(
        features=FeatureSource(source, photos.features.shape[1]),
        n_real=len(photos.labels),
        n_synthetic=len(generated.labels),
        appearance=appearance,
        content=content,
        per_class=classes,
        actions=advise(appearance, content, classes),
    )


def check_classes(synthetic: ImageSet, real: ImageSet) -> None:
    """Refuse sets of different classes.

    Raises:
        DataError: names the classes that one of them lacks.
    """
    for complete, other in ((real, synthetic), (synthetic, real)):
        lacking = [name for name in complete.classes if name not in other.classes]
        if lacking:
            raise DataError(
                f"{other.root} has no class {', '.join(map(repr, lacking[:5]))}, which {complete.root} has; "
                "give two folders with the same class folders"
            )


def _first(images: ImageSet, count: int) -> ImageSet:
    """At most `count` images of a class: a fair sample, because images lie in the order of their hashes."""
    positions = [np.flatnonzero(images.labels == label)[:count] for label in range(len(images.classes))]
    return images.subset(np.concatenate(positions))


def _sample(student: Student, images: ImageSet) -> _Sample:
    pixels = images.load(student.preprocessing)
    return _Sample(pixels, student.features(pixels), images.labels)


def _appearance(photos: _Sample, generated: _Sample) -> Appearance:
    real, synthetic = _image_statistics(photos.pixels), _image_statistics(generated.pixels)
    deviation = np.maximum(real.std(0), 1e-6)
    spectra = [distributions.power_spectrum(sample.pixels) for sample in (photos, generated)]
    decibel = 10 * (spectra[1] - spectra[0])
    third = max(1, len(decibel) // 3)
    return Appearance(
        offset=_by_statistic((synthetic.mean(0) - real.mean(0)) / deviation),
        offset_error=round(float(np.sqrt(1 / len(real) + 1 / len(synthetic))), 3),
        spread=_by_statistic(synthetic.std(0) / deviation),
        spectrum_db=[round(float(value), 2) for value in decibel],
        low_frequencies_db=round(float(decibel[:third].mean()), 2),
        high_frequencies_db=round(float(decibel[-third:].mean()), 2),
    )


def _image_statistics(pixels: np.ndarray) -> np.ndarray:
    """One row per image, in the order of `_STATISTICS`: [N, 7]."""
    return np.column_stack([distributions.channel_statistics(pixels), distributions.sharpness(pixels)])


def _by_statistic(values: np.ndarray) -> dict[str, float]:
    return {name: round(float(value), 3) for name, value in zip(_STATISTICS, values, strict=True)}


def _frechet_distances(photos: _Sample, generated: _Sample, seed: int) -> dict[str, Any]:
    """The fields of `Content` that begin with "frechet"."""
    overall = distributions.frechet_distance(photos.features, generated.features)
    random, half = np.random.default_rng(seed), len(photos.features) // 2
    count = min(half, len(generated.features))
    between_halves, between_sets = [], []
    for _ in range(_RESAMPLES if count > 1 else 0):
        order = random.permutation(len(photos.features))
        first, second = photos.features[order[:count]], photos.features[order[count : 2 * count]]
        picked = random.permutation(len(generated.features))[:count]
        between_halves.append(distributions.frechet_distance(first, second))
        between_sets.append(distributions.frechet_distance(first, generated.features[picked]))
    return {
        "frechet": round(overall, 4),
        "frechet_equal_counts": round(float(np.mean(between_sets)), 4) if between_sets else None,
        "frechet_real_halves": round(float(np.mean(between_halves)), 4) if between_halves else None,
        "frechet_count": count,
    }


def _cross_validated_probe(photos: _Sample, seed: int) -> tuple[float | None, int]:
    """Top-1 of a linear probe on held-out photos, and their number."""
    features, labels = photos.features, photos.labels
    correct = [
        _linear_probe(features[train], labels[train], features[held_out]) == labels[held_out]
        for train, held_out in stratified_folds(labels, _FOLDS, seed)
    ]
    if not correct:
        return None, 0
    every = np.concatenate(correct)
    return round(float(every.mean()), 4), len(every)


def _linear_probe(features: np.ndarray, labels: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Classes [M] that logistic regression on features [N, D] assigns to other features [M, D]."""
    from sklearn.linear_model import LogisticRegression

    if len(np.unique(labels)) == 1:
        return np.full(len(others), labels[0])
    deviation = features.std(0)
    scale = np.where(deviation > 1e-6, deviation, 1)
    standardised, others = ((values - features.mean(0)) / scale for values in (features, others))
    return np.asarray(LogisticRegression(max_iter=1000).fit(standardised, labels).predict(others))


def _class_content(
    photos: _Sample, generated: _Sample, label: int, confused: np.ndarray, names: tuple[str, ...]
) -> ClassContent:
    real, synthetic = (sample.features[sample.labels == label] for sample in (photos, generated))
    others = np.where(np.arange(len(names)) == label, -1, confused)
    return ClassContent(
        **_neighbourhood(real, synthetic),
        n_real=len(real),
        n_synthetic=len(synthetic),
        top1=round(float(confused[label] / confused.sum()), 4),
        most_confused_with=names[int(others.argmax())] if others.max() > 0 else None,
    )


def _neighbourhood(real: np.ndarray, synthetic: np.ndarray) -> dict[str, Any]:
    """The fields of `Neighbourhood` for features [N, D] and [M, D]."""
    k = min(_NEIGHBOURS, len(real) - 1)
    spread, own = distributions.mean_distance(synthetic), distributions.mean_distance(real)
    density, coverage = distributions.density_and_coverage(real, synthetic, k) if k else (None, None)
    values = {
        "coverage": coverage,
        "expected_coverage": distributions.expected_coverage(len(real), len(synthetic), k) if k else None,
        "density": density,
        "diversity": spread / own if spread is not None and own else None,
    }
    return {name: None if value is None else round(float(value), 4) for name, value in values.items()}


def _mean_over_classes(classes: Mapping[str, ClassContent]) -> dict[str, Any]:
    """The fields of `Neighbourhood` as means over the classes where they could be measured."""
    means = {}
    for name in ("coverage", "expected_coverage", "density", "diversity"):
        values = [getattr(content, name) for content in classes.values()]
        known = [value for value in values if value is not None]
        means[name] = round(float(np.mean(known)), 4) if known else None
    return means


@dataclass(frozen=True)
class _Finding:
    """An action, and how far past its limit the measure is: 1 is at the limit."""

    excess: float
    action: Action


#: The order where photos are trained on too: wrong labels stay wrong; images are worth what they add to what
#: the photos show; the photos' appearance is what the last layers learn from them.
_ORDER_WITH_REAL = ("labels", "content", "appearance")


def advise(appearance: Appearance, content: Content, classes: Mapping[str, ClassContent]) -> Actions:
    """The actions that the measures suggest."""
    findings = [
        *_check_labels(content, classes),
        *_check_coverage(content, classes),
        *_check_diversity(content),
        *_check_offset(appearance),
        *_check_spread(appearance),
        *_check_spectrum(appearance),
    ]
    alone = [finding.action for finding in sorted(findings, key=lambda finding: -finding.excess)]
    added = sorted(alone, key=lambda action: _ORDER_WITH_REAL.index(action.gap))
    return Actions(alone[:_MAX_ACTIONS], added[:_MAX_ACTIONS])


def _check_labels(content: Content, classes: Mapping[str, ClassContent]) -> Iterator[_Finding]:
    """Classes whose images the linear probe confuses more often than chance explains."""
    real, held_out = content.linear_probe_top1_real, content.linear_probe_n_real
    if real is None:
        return
    low = classification.wilson_interval(round(real * held_out), held_out)[0]
    confused = [
        (low / max(of_class.top1, 0.01), name, of_class)
        for name, of_class in classes.items()
        if _upper_bound(of_class.top1, of_class.n_synthetic) < low
    ]
    for excess, name, of_class in sorted(confused, key=lambda item: -item[0])[:1]:
        others = f" (and of {len(confused) - 1} more classes)" if len(confused) > 1 else ""
        action = Action(
            "labels",
            f"give {name!r}{others} other words in classes.toml, or start from your photos instead of the "
            "words with generate --set generate.init=real; generate --filter class rejects such images",
            f"a linear probe of the photos assigns {of_class.top1:.0%} of its images to it, most others "
            f"to {of_class.most_confused_with!r}; of held-out photos it gets {real:.0%} right, at least "
            f"{low:.0%}: the 95 % intervals do not meet",
        )
        yield _Finding(excess, action)


def _upper_bound(share: float, count: int) -> float:
    return classification.wilson_interval(round(share * count), count)[1]


def _check_coverage(content: Content, classes: Mapping[str, ClassContent]) -> Iterator[_Finding]:
    if content.coverage is None or content.expected_coverage is None:
        return
    share = content.coverage / max(content.expected_coverage, 1e-9)
    if share >= _COVERAGE_LIMIT:
        return
    measured = [
        (of_class.coverage, name) for name, of_class in classes.items() if of_class.coverage is not None
    ]
    worst_coverage, worst_name = min(measured)
    action = Action(
        "content",
        "lower generate --guidance and give several prompt templates: the images crowd together"
        if (content.diversity or 1) < 1
        else "start from your photos (generate --set generate.init=real): the images vary elsewhere",
        f"{content.coverage:.0%} of the photos have a synthetic image near them, where images of their "
        f"own distribution would reach {content.expected_coverage:.0%}; least {worst_name!r} with "
        f"{worst_coverage:.0%} (limit: {_COVERAGE_LIMIT:.0%} of what is expected)",
    )
    yield _Finding(_COVERAGE_LIMIT / max(share, 0.01), action)


def _check_diversity(content: Content) -> Iterator[_Finding]:
    diversity = content.diversity
    if diversity is not None and diversity < _DIVERSITY_LIMIT:
        action = Action(
            "content",
            "lower generate --guidance, which trades variety for likeness to the prompt (Ho & Salimans 2022)",
            f"two synthetic images of a class are {diversity:.2f} times as far apart as two photos "
            f"(limit {_DIVERSITY_LIMIT})",
        )
        yield _Finding(_DIVERSITY_LIMIT / max(diversity, 0.01), action)


def _check_offset(appearance: Appearance) -> Iterator[_Finding]:
    name, offset = max(appearance.offset.items(), key=lambda item: abs(item[1]))
    limit = max(_OFFSET_LIMIT, _OFFSET_ERRORS * appearance.offset_error)
    if abs(offset) > limit:
        action = Action(
            "appearance",
            "learn the style with more --steps or learn-style.vectors; images that start from your photos "
            "(generate --set generate.init=real) keep more of their appearance",
            f"{name} is {offset:+.1f} standard deviations of the photos off (limit {limit:.1f}: a large "
            "effect, beyond two standard errors)",
        )
        yield _Finding(abs(offset) / limit, action)


def _check_spread(appearance: Appearance) -> Iterator[_Finding]:
    middle = sorted(appearance.spread.values())[len(appearance.spread) // 2]
    if middle < _SPREAD_LIMIT:
        action = Action(
            "appearance",
            "learn a token for each kind of appearance: learn-style --clusters 3",
            f"colour, contrast and sharpness vary {middle:.2f} times as much as among the photos (limit "
            f"{_SPREAD_LIMIT}: then a third of the photos resemble no synthetic image)",
        )
        yield _Finding(_SPREAD_LIMIT / max(middle, 0.01), action)


def _check_spectrum(appearance: Appearance) -> Iterator[_Finding]:
    high = appearance.high_frequencies_db
    if abs(high) <= _DECIBEL_LIMIT:
        return
    action = Action(
        "appearance",
        "generate with more --steps, or from your photos with --set generate.init=real: the images are soft"
        if high < 0
        else "lower generate --guidance or use more --steps: the images are harder or noisier",
        f"fine detail has {high:+.1f} dB against the photos (limit {np.sign(high) * _DECIBEL_LIMIT:.0f} dB, "
        f"{'half' if high < 0 else 'twice'} the power)",
    )
    yield _Finding(abs(high) / _DECIBEL_LIMIT, action)
