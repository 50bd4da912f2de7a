"""Fine-tuning strategies: how much of a student learns the real photos, and how it is trained.

             ┌─ unchanged
    photos ──┼─ last-1, last-2, last-4: the last layer groups
             └─ full: all layers, as in bridged transfer++

The features that the frozen layers give for the photos are computed once, for all strategies and folds.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from synthkit.errors import ConfigError, nearest
from synthkit.recipes.settings import AdaptSettings, TrainSettings
from synthkit.recipes.train import real_fit_settings

if TYPE_CHECKING:
    from synthkit.learning.feature_cache import CachedFeatures
    from synthkit.learning.fit import Examples, FitSettings, LabelledData
    from synthkit.learning.students import Student

log = logging.getLogger(__name__)

_MAX_FOLDS = 4
_BATCH = 32

# Gradient steps over the last layer groups. A head that starts from nothing needs more.
_STEPS, _STEPS_OF_NEW_CLASSES = 60, 120


class Strategy(Enum):
    """A fine-tuning strategy; ordered from the one that changes least to the one that changes most."""

    UNCHANGED = "unchanged"
    LAST_1 = "last-1"
    LAST_2 = "last-2"
    LAST_4 = "last-4"
    FULL = "full"

    @property
    def layer_groups(self) -> int | None:
        """Layer groups that are trained, counted from the head; 0: none, None: all."""
        return _LAYER_GROUPS[self]


_LAYER_GROUPS = {
    Strategy.UNCHANGED: 0,
    Strategy.LAST_1: 1,
    Strategy.LAST_2: 2,
    Strategy.LAST_4: 4,
    Strategy.FULL: None,
}
LAST = (Strategy.LAST_1, Strategy.LAST_2, Strategy.LAST_4)


@dataclass(frozen=True)
class StartingStudent:
    """The student before adaptation.

    Attributes:
        student: trained on synthetic images, or fresh from pretrained weights.
        knows_classes: True if its head was trained on these classes.
        full: the same student after all layers learned these photos, if `train` has made it.
    """

    student: Student
    knows_classes: bool
    full: Student | None


@dataclass(frozen=True)
class AdaptationTask:
    """A student, the real photos, and the settings by which it may learn them.

    Attributes:
        start: the student before adaptation.
        examples: the photos.
        settings: of `adapt`.
        training: of `train`, for the strategy that trains all layers.
    """

    start: StartingStudent
    examples: Examples
    settings: AdaptSettings
    training: TrainSettings

    @property
    def labels(self) -> np.ndarray:
        """Class index of every photo, int64 [N]."""
        return np.asarray(self.examples.labels.numpy())

    @cached_property
    def folds(self) -> int:
        """Number of cross-validation folds; fewer than 2 if a class has a single photo."""
        return min(_MAX_FOLDS, int(np.bincount(self.labels).min()))

    @cached_property
    def candidates(self) -> list[Strategy]:
        """The strategies to choose from."""
        return candidates(self.settings, self.start.knows_classes)

    @cached_property
    def features(self) -> Mapping[int, CachedFeatures]:
        """Last layer groups -> the photos' features that enter them; empty if the student cannot be split."""
        counts = [strategy.layer_groups for strategy in self.candidates if strategy.layer_groups]
        try:
            return cached_features(
                self.start.student,
                self.examples,
                counts,
                views=self.settings.views,
                seed=self.settings.seed,
            )
        except NotImplementedError:
            return {}

    @property
    def head(self) -> str:
        """Initialisation of the head before its last layer groups are trained: "keep", "new" or "means".

        By default class means if the classes are new and have one photo each, otherwise the head as it is.
        """
        from synthkit.learning.feature_cache import takes_means

        if self.settings.head != "auto":
            return self.settings.head
        new = not self.start.knows_classes and self.folds < 2
        return "means" if new and takes_means(self.start.student.head) else "keep"

    def steps(self, strategy: Strategy) -> int:
        """Gradient steps of a strategy."""
        if strategy is Strategy.UNCHANGED:
            return 0
        if strategy is Strategy.FULL:
            return self.training.real_steps
        return self.settings.adapt_steps or (_STEPS if self.start.knows_classes else _STEPS_OF_NEW_CLASSES)


def candidates(settings: AdaptSettings, knows_classes: bool) -> list[Strategy]:
    """The strategies that the settings allow, those that change less before those that change more.

    Raises:
        ConfigError: there is no such strategy, or the student's head is new and would stay unchanged.
    """
    if settings.strategy == "auto":
        return [one for one in Strategy if knows_classes or one is not Strategy.UNCHANGED]
    names = [strategy.value for strategy in Strategy]
    if settings.strategy not in names:
        raise ConfigError(
            f"no strategy {settings.strategy!r}{nearest(settings.strategy, names)}; there are auto, "
            + ", ".join(names)
        )
    strategy = Strategy(settings.strategy)
    if strategy is Strategy.UNCHANGED and not knows_classes:
        raise ConfigError(
            "--strategy unchanged needs a student that was trained on these classes; leave out --no-synth, "
            "or name such a student's folder with --student"
        )
    return [strategy]


def cached_features(
    student: Student, examples: Examples, counts: Sequence[int], *, views: int, seed: int
) -> dict[int, CachedFeatures]:
    """Last layer groups -> the features that enter them, all from one pass through the layers before.

    Args:
        student: any.
        examples: the photos, at least one.
        counts: numbers of last layer groups, counted from the head.
        views: augmented views of each photo.
        seed: of the augmentation.

    Raises:
        NotImplementedError: the student cannot be split.
    """
    from synthkit.engines.student.frozen_layers import in_onnxruntime
    from synthkit.learning.feature_cache import before_last, extract_features
    from synthkit.learning.students import to_unit_range

    frozen, places = before_last(student, counts)
    few = student.normalise(to_unit_range(examples.pixels(np.arange(min(2, len(examples))))))
    features = extract_features(student, examples, in_onnxruntime(frozen, few), views, seed)
    return {count: features.select(place) for count, place in places.items()}


@dataclass(frozen=True)
class Trainable:
    """A student ready to be trained, and its training data.

    Attributes:
        student: the whole student.
        trained: the part that is trained: the student itself, or its last layers, which share parameters.
        data: the photos as `trained` takes them.
        labels: class index of each photo, int64 [N].
    """

    student: Student
    trained: Student
    data: LabelledData
    labels: np.ndarray

    def fold(self, positions: np.ndarray) -> Trainable:
        """A copy of the trained part, with the photos at the given positions."""
        return Trainable(
            self.student, self.trained.clone(), self.data.subset(positions), self.labels[positions]
        )


def prepare(strategy: Strategy, task: AdaptationTask) -> Trainable:
    """A copy of the starting student, ready to be trained by a strategy."""
    from synthkit.learning.feature_cache import split

    student = task.start.student.clone()
    if strategy is Strategy.FULL:
        if task.settings.head == "new":
            student.zero_head()
        elif task.settings.head == "auto" and task.start.knows_classes:
            # Bridged transfer++, "FC reinit".
            student.reset_head(task.settings.seed)
        return Trainable(student, student, task.examples, task.labels)
    student.train_only_last(strategy.layer_groups or 0)
    if strategy is Strategy.UNCHANGED:
        return Trainable(student, student, task.examples, task.labels)
    if task.settings.head == "new":
        student.zero_head()
    try:
        features = task.features[strategy.layer_groups or 0]
        return Trainable(student, split(student).trained, features, task.labels)
    except (NotImplementedError, KeyError) as error:
        log.info("adapt: every step runs through the frozen layers too (%s)", error)
        return Trainable(student, student, task.examples, task.labels)


def initialise_head(strategy: Strategy, task: AdaptationTask, trainable: Trainable) -> None:
    """Set the head to the class means of the training data, if the task asks for it, in place."""
    from synthkit.learning.feature_cache import head_from_means

    head = task.settings.head if strategy is Strategy.FULL else task.head
    if head == "means" and strategy is not Strategy.UNCHANGED:
        name = _head_name(trainable.student)
        head_from_means(trainable.trained, name, trainable.data, trainable.labels)


def train_strategy(
    strategy: Strategy, task: AdaptationTask, trainable: Trainable, *, curves: Path | None = None
) -> None:
    """Train by a strategy, in place.

    Args:
        strategy: one of the task's.
        task: source of the settings.
        trainable: from `prepare`.
        curves: file for losses and learning rates.
    """
    from synthkit.learning.fit import fit

    initialise_head(strategy, task, trainable)
    settings = fit_settings(strategy, task)
    fit(trainable.trained, trainable.data, settings, label=strategy.value, curves=curves)


def _head_name(student: Student) -> str:
    return next(str(name) for name, module in student.model.named_modules() if module is student.head)


def fit_settings(strategy: Strategy, task: AdaptationTask) -> FitSettings:
    """Settings of `fit` for a strategy."""
    from synthkit.learning.fit import FitSettings

    if strategy is Strategy.FULL:
        return real_fit_settings(task.training)
    return FitSettings(
        task.steps(strategy),
        task.settings.adapt_lr,
        _BATCH,
        # The prior is the head as it is, not a head of zeros.
        weight_decay=0.0,
        frozen_statistics=True,
        seed=task.settings.seed,
    )
