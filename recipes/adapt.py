"""`adapt`: the student meets the site. Its last layers learn the real photos, by the path that suits them.

    student/synthetic/ ──┬─ unchanged ────────────────────────────────┐
                         ├─ last 1, 2 or 4 units, head kept ──────────┼─ cross-validated on photos ─► adapted/
    student/ ────────────┴─ full: all layers, new head (bridged++) ───┘

Hennicke et al. 2024 (arXiv 2405.03243) find the synthetic-to-real drop in the last layers, Li et al. 2024
(arXiv 2403.19866) retrain all of them; which of the two wins depends on the site, so the photos decide.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from synthkit.artifacts import Request, StageResult, fingerprint, read_manifest, run_stage
from synthkit.errors import ConfigError, DataError, ModelError, nearest
from synthkit.images import ImageSet, stratified_folds
from synthkit.metrics import log_loss, top1
from synthkit.recipes.settings import AdaptSettings, TrainSettings
from synthkit.recipes.train import (
    SYNTHETIC,
    Material,
    real_fit_settings,
    untrained_student,
    weights_fingerprint,
)

if TYPE_CHECKING:
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
    """

    path: str
    steps: int
    top1: float
    loss: float


def adapt_request(
    settings: AdaptSettings, training: TrainSettings, student_dir: Path | None, photos: ImageSet, out: Path
) -> Request:
    """What `adapt` would make.

    Raises:
        ConfigError: `--path` names no path, or contradicts `--layers`.
        ModelError: there is no student's folder.
    """
    _candidates(settings, knows_classes=student_dir is not None)
    if student_dir and not student_dir.is_dir():
        raise ModelError(f"no student in {student_dir}; give a timm folder, or run `synthkit train` first")
    inputs = {"photos": photos.digest}
    if student_dir:
        inputs["student"] = fingerprint(student_dir)
    elif training.weights:
        inputs["weights"] = weights_fingerprint(Path(training.weights))
    config = {"adapt": asdict(settings), "train": {**asdict(training), "weights": bool(training.weights)}}
    return Request(stage="adapt", out=out, inputs=inputs, config=config)


def adapt(
    settings: AdaptSettings,
    training: TrainSettings,
    student_dir: Path | None,
    photos: ImageSet,
    out: Path,
    force: bool = False,
) -> StageResult:
    """Make the adapted student's folder, or find it made.

    Args:
        settings: the stage's settings.
        training: how all layers are trained, and which student is taken where no folder is given.
        student_dir: what `train` wrote, or another timm folder; None: start from pretrained weights.
        photos: the real few shots.
        out: the folder to write.
        force: adapt again even when nothing changed.

    Returns:
        The stage; its metrics are the path, the reason and every path's verdict.
    """

    def produce(work: Path) -> dict[str, Any]:
        from synthkit.training import Examples

        start = _start(student_dir, training, photos)
        examples = Examples(photos.with_classes(start.student.classes), start.student.preprocessing)
        path, steps, reason, verdicts = choose_path(start, examples, settings, training)
        log.info("adapt: %s, %s", path.name, reason)
        if path is FULL and start.full and steps == training.real_steps:
            student = start.full
        else:
            begun = course(path, start, examples, settings)
            _train(path, begun.trained, begun.lesson, settings, training, stop=steps)
            student = begun.whole
        student.save(work)
        scores = [asdict(verdict) for verdict in verdicts]
        return {"path": path.name, "steps": steps, "reason": reason, "cross_validation": scores}

    return run_stage(adapt_request(settings, training, student_dir, photos, out), produce, force=force)


def _start(student_dir: Path | None, training: TrainSettings, photos: ImageSet) -> Start:
    from synthkit.students import load_student

    if student_dir is None:
        return Start(untrained_student(training, Material(None, photos)), False, None)
    synthetic = student_dir / SYNTHETIC
    student = load_student(synthetic if synthetic.is_dir() else student_dir)
    if set(student.classes) != set(photos.classes):
        raise DataError(
            f"the student in {student_dir} knows the classes {', '.join(student.classes)}, the photos show "
            f"{', '.join(photos.classes)}; train a student on these classes"
        )
    manifest = read_manifest(student_dir)
    learned = synthetic.is_dir() and manifest is not None and manifest.inputs.get("photos") == photos.digest
    return Start(student, True, load_student(student_dir) if learned else None)


def choose_path(
    start: Start, examples: Examples, settings: AdaptSettings, training: TrainSettings
) -> tuple[AdaptPath, int, str, list[Verdict]]:
    """The path to follow, its gradient steps, the reason, and what cross-validation said of each path.

    The photos are dealt into folds; each path is followed on all folds but one and judged on the one. The
    path with most held-out photos right is taken, the one that changes least where several are equal.
    """
    candidates = _candidates(settings, start.knows_classes)
    if len(candidates) == 1:
        return candidates[0], _steps(candidates[0], settings, training), "as asked for", []
    folds = min(_MOST_FOLDS, int(np.bincount(examples.labels.numpy()).min()))
    if folds < 2:
        default = _undecided(start)
        reason = "the default where a class has one photo, since none can be held out"
        return default, _steps(default, settings, training), reason, []
    verdicts = [_judge(path, start, examples, settings, training, folds) for path in candidates]
    best = max(verdicts, key=lambda verdict: verdict.top1)  # the first of equal ones, as PATHS orders them
    reason = f"{best.top1:.0%} of {len(examples)} held-out photos right in {folds}-fold cross-validation"
    return PATHS[best.path], best.steps, reason, verdicts


def _undecided(start: Start) -> AdaptPath:
    """The path where a class has one photo, so that nothing can be held out.

    In two draws of one photo per class each, judged on further photos outside the draw and the test set,
    training the last unit gained 2 and 7 points on handwritten digits and lost 9 and 20 on meter digits: what
    synthetic images taught is the safer choice. A new head has to learn.
    """
    return UNCHANGED if start.knows_classes else LAST[0]


def _candidates(settings: AdaptSettings, knows_classes: bool) -> list[AdaptPath]:
    if settings.path != "auto":
        if settings.path not in PATHS:
            names = ", ".join(["auto", *PATHS])
            raise ConfigError(
                f"no path {settings.path!r}{nearest(settings.path, PATHS)}; --path is one of {names}"
            )
        if settings.layers != "auto" and settings.path != f"last-{settings.layers}":
            raise ConfigError(
                f"--path {settings.path} and --layers {settings.layers} differ; give one of them"
            )
        if settings.path == UNCHANGED.name and not knows_classes:
            raise ConfigError(
                "--path unchanged needs a student that was trained on these classes; leave out --no-synth, "
                "or name such a student's folder with --student"
            )
        return [PATHS[settings.path]]
    if settings.layers != "auto":
        return [PATHS[f"last-{settings.layers}"]]
    return [path for path in PATHS.values() if knows_classes or path is not UNCHANGED]


def _steps(path: AdaptPath, settings: AdaptSettings, training: TrainSettings) -> int:
    if path is UNCHANGED:
        return 0
    return training.real_steps if path is FULL else settings.adapt_steps


@dataclass(frozen=True)
class Course:
    """What a path trains, and on what.

    Attributes:
        whole: the student that comes out.
        trained: what is trained of it: the student itself, or its last layers, whose parameters it shares.
        lesson: the photos in the form that `trained` takes.
    """

    whole: Student
    trained: Student
    lesson: Lesson


def course(path: AdaptPath, start: Start, examples: Examples, settings: AdaptSettings) -> Course:
    """A copy of the starting student, made ready for a path.

    Where only the last units are trained, the photos pass the frozen ones here, once.
    """
    from synthkit.last_layers import see, split

    student = start.student.clone()
    if path is FULL:
        if start.knows_classes:
            student.new_head(settings.seed)  # bridged transfer++, "FC reinit"
        return Course(student, student, examples)
    student.train_only_last(path.units or 0)
    if path is UNCHANGED:
        return Course(student, student, examples)
    try:
        cut = split(student)
    except NotImplementedError as error:
        log.info("adapt: every step runs through the frozen layers too (%s)", error)
        return Course(student, student, examples)
    return Course(student, cut.trained, see(student, examples, cut.frozen, settings.views, settings.seed))


def _judge(
    path: AdaptPath,
    start: Start,
    examples: Examples,
    settings: AdaptSettings,
    training: TrainSettings,
    folds: int,
) -> Verdict:
    """Follow a path once per fold, and look at the held-out photos a few times on the way."""
    labels = examples.labels.numpy()
    begun = course(path, start, examples, settings)
    seen: dict[int, np.ndarray] = {}  # steps -> logits of every photo, each from the fold that held it out

    for kept, held_out in stratified_folds(labels, folds, settings.seed):
        student = begun.trained.clone()

        def look(steps: int, student: Student = student, rows: np.ndarray = held_out) -> None:
            logits = seen.setdefault(steps, np.zeros((len(labels), len(student.classes)), np.float32))
            logits[rows] = begun.lesson.logits(student, rows)

        _train(path, student, begun.lesson.subset(kept), settings, training, look=look)
    scored = [
        Verdict(path.name, steps, top1(logits.argmax(1), labels), log_loss(logits, labels))
        for steps, logits in sorted(seen.items())
        if steps or len(seen) == 1  # a fresh start is no result, but where no step was asked for
    ]
    return max(scored, key=lambda verdict: (verdict.top1, -verdict.loss))


def _train(
    path: AdaptPath,
    student: Student,
    lesson: Lesson,
    settings: AdaptSettings,
    training: TrainSettings,
    *,
    stop: int | None = None,
    look: Callable[[int], None] | None = None,
) -> None:
    from synthkit.training import fit

    fit_settings = replace(_path_settings(path, settings, training), stop=stop)
    every = max(1, fit_settings.steps // _CHECKPOINTS)
    fit(student, lesson, fit_settings, label=path.name, watch=(every, look) if look else None)


def _path_settings(path: AdaptPath, settings: AdaptSettings, training: TrainSettings) -> FitSettings:
    from synthkit.training import FitSettings

    if path is FULL:
        return real_fit_settings(training)
    return FitSettings(
        _steps(path, settings, training),
        settings.adapt_lr,
        _BATCH,
        weight_decay=0.0,  # the prior is the head as it is, not a head of zeros
        frozen_statistics=True,
        seed=settings.seed,
    )


def describe(verdicts: Sequence[dict[str, Any]]) -> str:
    """The cross-validation as a short table for a person."""
    return "\n".join(f"  {one['path']:<10} {one['top1']:.0%} of held-out photos" for one in verdicts)
