"""The paths that adaptation can take, and how each is followed; `path_choice` chooses among them.

             ┌─ unchanged
    photos ──┼─ last 1, 2 or 4 units, head as --head says
             └─ full: all layers, new head (bridged++)

What the frozen layers say of the photos' views is computed once, for all paths and folds.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from synthkit.errors import ConfigError, nearest
from synthkit.recipes.settings import AdaptSettings, TrainSettings
from synthkit.recipes.train import real_fit_settings

if TYPE_CHECKING:
    from synthkit.learning.feature_cache import Views
    from synthkit.learning.fit import Examples, FitSettings, Lesson
    from synthkit.learning.students import Student

log = logging.getLogger(__name__)

_MOST_FOLDS = 4
_BATCH = 32

# Of the last units. A head that begins with nothing needs more: with mobilenetv2 at 96 pixels, 4 and 16
# photos of hand signs, scenes, waste and groceries, judged on further photos, last-4 was right in 68.4 %
# after 60 steps, 71.4 % after 120 and 71.5 % after 240.
_STEPS, _STEPS_OF_NEW_CLASSES = 60, 120


@dataclass(frozen=True)
class AdaptPath:
    """One way to adapt.

    Attributes:
        name: as `--path` takes it.
        units: timm units that are trained, counted from the head; 0: none, None: all.
    """

    name: str
    units: int | None


UNCHANGED, FULL = AdaptPath("unchanged", 0), AdaptPath("full", None)
LAST = tuple(AdaptPath(f"last-{count}", count) for count in (1, 2, 4))
PATHS = {path.name: path for path in (UNCHANGED, *LAST, FULL)}


@dataclass(frozen=True)
class Start:
    """Where adaptation begins.

    Attributes:
        student: trained on synthetic images, or fresh from pretrained weights.
        knows_classes: whether its head was trained on these very classes.
        full: the same student after all layers learned these very photos, where `train` has made it.
    """

    student: Student
    knows_classes: bool
    full: Student | None


@dataclass(frozen=True)
class Site:
    """A student, the photos of a site, and how the one may learn the other.

    Attributes:
        start: where adaptation begins.
        examples: the photos.
        settings: of `adapt`.
        training: of `train`, for the path that trains all layers.
    """

    start: Start
    examples: Examples
    settings: AdaptSettings
    training: TrainSettings

    @property
    def labels(self) -> np.ndarray:
        """Class index of every photo, int64 [N]."""
        return np.asarray(self.examples.labels.numpy())

    @cached_property
    def folds(self) -> int:
        """Into how many parts the photos are dealt; fewer than 2 where a class has one photo."""
        return min(_MOST_FOLDS, int(np.bincount(self.labels).min()))

    @cached_property
    def candidates(self) -> list[AdaptPath]:
        """The paths that may be taken."""
        return candidates(self.settings, self.start.knows_classes)

    @cached_property
    def seen(self) -> Mapping[int, Views]:
        """Units -> the photos as the last so many units see them; empty where the student cannot be cut."""
        counts = [path.units for path in self.candidates if path.units]
        how = {"views": self.settings.views, "seed": self.settings.seed}
        try:
            return seen_by_last(self.start.student, self.examples, counts, **how)
        except NotImplementedError:
            return {}

    @property
    def head(self) -> str:
        """How the head of a path over last units starts: "keep", "new" or "means".

        Means where the classes are new and have one photo each, zero where they have more. With
        mobilenetv2 at 96 pixels, three draws, judged on further photos, 60 steps from the means were ahead
        of 60 from zero, at 1, 2, 4, 8 and 16 photos per class, by 3.5, 0.3, 1.5, 2.0, 6.4 points on hand
        signs, 2.7, -1.5, -6.4, -8.0, -10.1 on scenes, and -2.5, 1.5, -0.1, -1.9, -1.6 on waste.
        """
        from synthkit.learning.feature_cache import takes_means

        if self.settings.head != "auto":
            return self.settings.head
        new = not self.start.knows_classes and self.folds < 2
        return "means" if new and takes_means(self.start.student.head) else "keep"

    def steps(self, path: AdaptPath) -> int:
        """Gradient steps of a path."""
        if path is UNCHANGED:
            return 0
        if path is FULL:
            return self.training.real_steps
        return self.settings.adapt_steps or (_STEPS if self.start.knows_classes else _STEPS_OF_NEW_CLASSES)


def candidates(settings: AdaptSettings, knows_classes: bool) -> list[AdaptPath]:
    """The paths that the settings leave open, those that change less before those that change more.

    Raises:
        ConfigError: `--path` names no path, or contradicts `--layers`.
    """
    if settings.path == "auto" and settings.layers == "auto":
        return [path for path in PATHS.values() if knows_classes or path is not UNCHANGED]
    if settings.path == "auto":
        return [PATHS[f"last-{settings.layers}"]]
    if settings.path not in PATHS:
        names = ", ".join(["auto", *PATHS])
        raise ConfigError(
            f"no path {settings.path!r}{nearest(settings.path, PATHS)}; --path is one of {names}"
        )
    if settings.layers != "auto" and settings.path != f"last-{settings.layers}":
        raise ConfigError(f"--path {settings.path} and --layers {settings.layers} differ; give one of them")
    if settings.path == UNCHANGED.name and not knows_classes:
        raise ConfigError(
            "--path unchanged needs a student that was trained on these classes; leave out --no-synth, "
            "or name such a student's folder with --student"
        )
    return [PATHS[settings.path]]


def seen_by_last(
    student: Student, examples: Examples, counts: Sequence[int], *, views: int, seed: int
) -> dict[int, Views]:
    """Units -> photos as the last so many units see them, all from one pass through the layers before.

    Args:
        student: any.
        examples: the photos, at least one.
        counts: how many units, counted from the head.
        views: augmented views of each photo.
        seed: of the augmentation.

    Raises:
        NotImplementedError: the student cannot be cut.
    """
    from synthkit.engines.student.frozen_layers import in_onnxruntime
    from synthkit.learning.feature_cache import before_last, see
    from synthkit.learning.students import to_unit_range

    frozen, places = before_last(student, counts)
    few = student.normalise(to_unit_range(examples.pixels(np.arange(min(2, len(examples))))))
    seen = see(student, examples, in_onnxruntime(frozen, few), views, seed)
    return {count: seen.cut(place) for count, place in places.items()}


@dataclass(frozen=True)
class Course:
    """What a path trains, and on what.

    Attributes:
        whole: the student that comes out.
        trained: what is trained of it: the student itself, or its last layers, whose parameters it shares.
        lesson: the photos in the form that `trained` takes.
        labels: their class indices, int64 [N].
    """

    whole: Student
    trained: Student
    lesson: Lesson
    labels: np.ndarray

    def fold(self, kept: np.ndarray) -> Course:
        """The same, on a copy of what is trained and with some of the photos."""
        return Course(self.whole, self.trained.clone(), self.lesson.subset(kept), self.labels[kept])


def course(path: AdaptPath, site: Site) -> Course:
    """A copy of the starting student, made ready for a path."""
    from synthkit.learning.feature_cache import split

    student = site.start.student.clone()
    if path is FULL:
        if site.start.knows_classes and site.settings.head in ("auto", "new"):
            student.new_head(site.settings.seed)  # bridged transfer++, "FC reinit"
        return Course(student, student, site.examples, site.labels)
    student.train_only_last(path.units or 0)
    if path is UNCHANGED:
        return Course(student, student, site.examples, site.labels)
    if site.settings.head == "new":
        student.clear_head()
    try:
        return Course(student, split(student).trained, site.seen[path.units or 0], site.labels)
    except (NotImplementedError, KeyError) as error:
        log.info("adapt: every step runs through the frozen layers too (%s)", error)
        return Course(student, student, site.examples, site.labels)


def follow(
    path: AdaptPath,
    site: Site,
    begun: Course,
    *,
    look: Callable[[int], None] | None = None,
    curves: Path | None = None,
) -> None:
    """Train along a path, in place.

    Args:
        path: which.
        site: gives the settings.
        begun: what is trained, and on which photos.
        look: called with the number of steps done, before the first and after the last.
        curves: file for losses and learning rates.
    """
    from synthkit.learning.feature_cache import head_from_means
    from synthkit.learning.fit import fit

    head = site.settings.head if path is FULL else site.head
    if head == "means" and path is not UNCHANGED:
        head_from_means(begun.trained, _head_name(begun.whole), begun.lesson, begun.labels)
    settings = fit_settings(path, site)
    watch = (settings.steps, look) if look else None
    fit(begun.trained, begun.lesson, settings, label=path.name, watch=watch, curves=curves)


def _head_name(student: Student) -> str:
    return next(str(name) for name, module in student.model.named_modules() if module is student.head)


def fit_settings(path: AdaptPath, site: Site) -> FitSettings:
    """How a path is trained."""
    from synthkit.learning.fit import FitSettings

    if path is FULL:
        return real_fit_settings(site.training)
    return FitSettings(
        site.steps(path),
        site.settings.adapt_lr,
        _BATCH,
        weight_decay=0.0,  # the prior is the head as it is, not a head of zeros
        frozen_statistics=True,
        seed=site.settings.seed,
    )
