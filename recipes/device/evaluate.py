"""Top-1 of a bundle on a test folder that shares no image with what the student was trained on."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from synthkit import standalone
from synthkit.data.images import ImageSet
from synthkit.data.splits import refuse_shared
from synthkit.engines.bundle.format import Bundle
from synthkit.metrics import classification as metrics

_CHUNK = 256  # images decoded at once


@dataclass(frozen=True)
class Answers:
    """What a bundle's threshold makes of test images.

    Attributes:
        threshold: below this probability the answer is "unknown".
        coverage: share of images that get an answer.
        unknown: number of the others.
        accuracy: share of right answers; None where there is none.
        interval: its 95 % interval (Wilson).
    """

    threshold: float
    coverage: float
    unknown: int
    accuracy: float | None
    interval: tuple[float, float] | None


@dataclass(frozen=True)
class LabelSets:
    """What a bundle's sets of labels hold on test images.

    Attributes:
        threshold: the labels at least this likely form the set.
        mean_size: labels in a set on average.
        coverage: share of images whose set holds the right label.
        empty: number of empty sets.
    """

    threshold: float
    mean_size: float
    coverage: float
    empty: int


@dataclass(frozen=True)
class Evaluation:
    """A bundle on test images.

    Attributes:
        top1: share that it gets right, 0..1.
        n_test: number of images.
        interval: 95 % interval of top1 (Wilson).
        per_class: class name -> top1, of the classes that have images.
        confusion: number of images [true class, predicted class].
        calibration_error: expected calibration error of the probabilities.
        seconds: how long it took.
        answers: with the bundle's threshold; None where it has none.
        sets: with the bundle's sets of labels; None where it gives none.
    """

    top1: float
    n_test: int
    interval: tuple[float, float]
    per_class: Mapping[str, float]
    confusion: list[list[int]]
    calibration_error: float
    seconds: float
    answers: Answers | None = None
    sets: LabelSets | None = None

    def to_json(self) -> dict[str, Any]:
        """The JSON object of `synthkit evaluate --json`."""
        return {name: value for name, value in asdict(self).items() if value is not None}


def evaluate_bundle(bundle: Bundle, test_dir: Path, skip_bad: bool = False) -> Evaluation:
    """Measure a bundle.

    Args:
        bundle: an opened bundle.
        test_dir: class folders; classes of the bundle may be absent, others are refused.
        skip_bad: leave unreadable files out instead of refusing the folder.

    Raises:
        DataError: a class is unknown, or an image was trained on.
    """
    started = time.perf_counter()
    images = ImageSet.scan(test_dir, skip_bad).with_classes(bundle.labels)
    trained_on = bundle.facts.provenance.get("trained_on", [])
    known = dict.fromkeys(trained_on, "trained on")
    refuse_shared(images, known, ("the training photos", str(test_dir)))
    logits, labels = compute_logits(bundle, images), images.labels
    predicted = logits.argmax(axis=1)
    confidence = standalone.read_confidence(bundle.folder)
    scores = standalone.softmax(logits.astype(np.float64)).round(6)  # as `predict` compares them
    best, right = scores.max(axis=1), scores.argmax(axis=1) == labels
    threshold, least = confidence.get("threshold"), confidence.get("conformal_threshold")
    return Evaluation(
        top1=metrics.top1(predicted, labels),
        n_test=len(labels),
        interval=metrics.wilson_interval(int(np.sum(predicted == labels)), len(labels)),
        per_class=metrics.per_class(predicted, labels, images.classes),
        confusion=metrics.confusion(predicted, labels, len(images.classes)).tolist(),
        calibration_error=metrics.calibration_error(best, right),
        answers=None if threshold is None else _answers(right[best >= threshold], len(labels), threshold),
        sets=None if least is None else _label_sets(scores >= least, labels, least),
        seconds=round(time.perf_counter() - started, 3),
    )


def _answers(right: np.ndarray, count: int, threshold: float) -> Answers:
    """Figures of the images that get an answer; right: which of these answers are right, bool."""
    answered = len(right)
    return Answers(
        threshold,
        coverage=answered / count,
        unknown=count - answered,
        accuracy=float(right.mean()) if answered else None,
        interval=metrics.wilson_interval(int(right.sum()), answered) if answered else None,
    )


def _label_sets(inside: np.ndarray, labels: np.ndarray, threshold: float) -> LabelSets:
    """Figures of the sets; inside: which labels belong to each image's set, bool [N, classes]."""
    return LabelSets(
        threshold,
        mean_size=float(inside.sum(axis=1).mean()),
        coverage=float(inside[np.arange(len(labels)), labels].mean()),
        empty=int(np.sum(~inside.any(axis=1))),
    )


def predict_labels(bundle: Bundle, images: ImageSet) -> np.ndarray:
    """Index of the predicted class of every image."""
    return np.asarray(compute_logits(bundle, images).argmax(axis=1))


def compute_logits(bundle: Bundle, images: ImageSet) -> np.ndarray:
    """Logits of every image [N, classes], a few hundred of them decoded at once."""
    positions = range(len(images))
    chunks = [images.subset(positions[start : start + _CHUNK]) for start in positions[::_CHUNK]]
    return np.concatenate([bundle.logits(one.load(bundle.preprocessing)) for one in chunks])
