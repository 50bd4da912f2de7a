"""The paths that adaptation can take, and the choice among them on photos held out.

    photos ──┬─ unchanged ───────────────────────────────┐
             ├─ last 1, 2 or 4 units, head as --head says ┼─ cross-validation ─► the path, and its steps
             └─ full: all layers, new head (bridged++) ───┘

What the frozen layers say of the photos' views is computed once, for all paths and folds.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from synthkit.errors import ConfigError, nearest
from synthkit.images import stratified_folds
from synthkit.metrics import falls_behind, log_loss
from synthkit.recipes.settings import AdaptSettings, TrainSettings
from synthkit.recipes.train import real_fit_settings

if TYPE_CHECKING:
    from synthkit.last_layers import Views
    from synthkit.students import Student
    from synthkit.training import Examples, FitSettings, Lesson

log = logging.getLogger(__name__)

_MOST_FOLDS = 4
_CHECKPOINTS = 4  # of a path, at which the held-out photos are looked at
_BATCH = 32


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
class Verdict:
    """What cross-validation says of a path.

    Attributes:
        path: its name.
        steps: gradient steps after which the held-out photos were classified best.
        top1: share of held-out photos that were right.
        loss: mean negative log-likelihood of the held-out photos.
        judged: whether a photo was held out, bool [N]; not all where the path fell behind early.
        right: whether a photo was right when it was held out, bool [N].
    """

    path: str
    steps: int
    top1: float
    loss: float
    judged: np.ndarray
    right: np.ndarray

    def figures(self) -> dict[str, Any]:
        """path, steps, top1, loss, and `photos`: how many were held out."""
        return {
            "path": self.path,
            "steps": self.steps,
            "top1": self.top1,
            "loss": self.loss,
            "photos": int(self.judged.sum()),
        }


@dataclass(frozen=True)
class Choice:
    """The path to follow.

    Attributes:
        path: which.
        steps: its gradient steps.
        reason: why, for a person.
        verdicts: what cross-validation said of each path.
    """

    path: AdaptPath
    steps: int
    reason: str
    verdicts: list[Verdict]


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
        from synthkit.last_layers import before_last, see

        counts = [path.units for path in self.candidates if path.units]
        student = self.start.student
        try:
            frozen, places = before_last(student, counts)
        except NotImplementedError:
            return {}
        views = see(student, self.examples, frozen, self.settings.views, self.settings.seed)
        return {count: views.cut(place) for count, place in places.items()}

    @property
    def head(self) -> str:
        """How the head of a path over last units starts: "keep", "new" or "means".

        Means where the classes are new and have one photo each, zero where they have more. With
        mobilenetv2 at 96 pixels, three draws, judged on further photos, 60 steps from the means were ahead
        of 60 from zero, at 1, 2, 4, 8 and 16 photos per class, by 3.5, 0.3, 1.5, 2.0, 6.4 points on hand
        signs, 2.7, -1.5, -6.4, -8.0, -10.1 on scenes, and -2.5, 1.5, -0.1, -1.9, -1.6 on waste.
        """
        from synthkit.last_layers import takes_means

        if self.settings.head != "auto":
            return self.settings.head
        new = not self.start.knows_classes and self.folds < 2
        return "means" if new and takes_means(self.start.student.head) else "keep"

    def steps(self, path: AdaptPath) -> int:
        """Gradient steps of a path at the most."""
        if path is UNCHANGED:
            return 0
        return self.training.real_steps if path is FULL else self.settings.adapt_steps


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


def choose_path(site: Site) -> Choice:
    """The path to follow, and what cross-validation said of each.

    The photos are dealt into folds; each path is followed on all folds but one and judged on the one. The
    path with most held-out photos right is taken, the one that changes least where several are equal. All
    layers, whose fold costs more than all folds of the last units, are given up once they fall behind.
    """
    if len(site.candidates) == 1:
        return _as_asked(site, site.candidates[0])
    if site.folds < 2:
        default = _undecided(site.start)
        reason = "the default where a class has one photo, since none can be held out"
        return Choice(default, site.steps(default), reason, [])
    verdicts: list[Verdict] = []
    for path in site.candidates:
        verdicts.append(judge(path, site, rival=_best(verdicts) if path is FULL else None))
    best = _best([verdict for verdict in verdicts if verdict.judged.all()])
    reason = (
        f"{best.top1:.0%} of {len(site.labels)} held-out photos right in {site.folds}-fold cross-validation"
    )
    return Choice(PATHS[best.path], best.steps, reason, verdicts)


def _best(verdicts: Sequence[Verdict]) -> Verdict:
    return max(verdicts, key=lambda verdict: verdict.top1)  # the first of equal ones, as PATHS orders them


def _as_asked(site: Site, path: AdaptPath) -> Choice:
    """The one path that was asked for; where it does worse than the unchanged student, the reason says so."""
    choice = Choice(path, site.steps(path), "as asked for", [])
    if path is UNCHANGED or not site.start.knows_classes:
        return choice
    if site.folds < 2:
        return replace(choice, reason="as asked for; a class has one photo, so nothing says whether it helps")
    parent, asked = verdicts = [judge(UNCHANGED, site), judge(path, site, only_last=True)]
    if asked.top1 < parent.top1:
        reason = (
            f"as asked for, but {asked.top1:.0%} of {len(site.labels)} held-out photos were right, and "
            f"{parent.top1:.0%} with the student unchanged"
        )
        log.warning("adapt: %s does worse than the student as it was; %s", path.name, reason)
        return replace(choice, reason=reason, verdicts=verdicts)
    return replace(choice, verdicts=verdicts)


def _undecided(start: Start) -> AdaptPath:
    """The path where a class has one photo, so that nothing can be held out.

    In two draws of one photo per class each, judged on further photos outside the draw and the test set,
    training the last unit gained 2 and 7 points on handwritten digits and lost 9 and 20 on meter digits: what
    synthetic images taught is the safer choice. A new head has to learn.
    """
    return UNCHANGED if start.knows_classes else LAST[0]


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
    from synthkit.last_layers import split

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


def judge(path: AdaptPath, site: Site, only_last: bool = False, rival: Verdict | None = None) -> Verdict:
    """Follow a path once per fold, and look at the held-out photos on the way.

    Args:
        path: which.
        site: student and photos.
        only_last: judge what all steps lead to; otherwise the best of a few numbers of steps.
        rival: another path's verdict; the folds that are left are not tried once this path is behind it.
    """
    begun, labels = course(path, site), site.labels
    seen: dict[int, np.ndarray] = {}  # steps -> logits of every photo, each from the fold that held it out
    judged = np.zeros(len(labels), bool)

    for kept, held_out in stratified_folds(labels, site.folds, site.settings.seed):
        fold = begun.fold(kept)

        def look(steps: int, student: Student = fold.trained, rows: np.ndarray = held_out) -> None:
            logits = seen.setdefault(steps, np.zeros((len(labels), len(student.classes)), np.float32))
            logits[rows] = begun.lesson.logits(student, rows)

        follow(path, site, fold, look=look)
        judged[held_out] = True
        verdict = _verdict(path, seen, judged.copy(), labels, only_last)
        if rival and falls_behind(verdict.right[judged], rival.right[judged]):
            break
    return verdict


def _verdict(
    path: AdaptPath, seen: Mapping[int, np.ndarray], judged: np.ndarray, labels: np.ndarray, only_last: bool
) -> Verdict:
    scored = []
    for steps, logits in sorted(seen.items()):
        right = (logits.argmax(1) == labels) & judged
        share, loss = float(right[judged].mean()), log_loss(logits[judged], labels[judged])
        if steps or len(seen) == 1:  # a fresh start is no result, but where no step was asked for
            scored.append(Verdict(path.name, steps, share, loss, judged, right))
    return scored[-1] if only_last else max(scored, key=lambda verdict: (verdict.top1, -verdict.loss))


def follow(
    path: AdaptPath,
    site: Site,
    begun: Course,
    *,
    stop: int | None = None,
    look: Callable[[int], None] | None = None,
) -> None:
    """Train along a path, in place.

    Args:
        path: which.
        site: gives the settings.
        begun: what is trained, and on which photos.
        stop: gradient steps after which to stop on the schedule of all; None: all.
        look: called with the number of steps done, before the first and a few times on the way.
    """
    from synthkit.last_layers import head_from_means
    from synthkit.training import fit

    head = site.settings.head if path is FULL else site.head
    if head == "means" and path is not UNCHANGED:
        head_from_means(begun.trained, _head_name(begun.whole), begun.lesson, begun.labels)
    settings = replace(fit_settings(path, site), stop=stop)
    every = max(1, settings.steps // _CHECKPOINTS)
    fit(begun.trained, begun.lesson, settings, label=path.name, watch=(every, look) if look else None)


def _head_name(student: Student) -> str:
    return next(str(name) for name, module in student.model.named_modules() if module is student.head)


def fit_settings(path: AdaptPath, site: Site) -> FitSettings:
    """How a path is trained."""
    from synthkit.training import FitSettings

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
