"""`adapt`: the student meets the site. Its last layers learn the real photos, by the path that suits them.

    student/synthetic/ ──┬─ unchanged ───────────────────────────────┐
                         ├─ last-1, last-2, last-4: layer groups ────┼─ cross-validated on photos ─► adapted/
    student/ ────────────┴─ full: all layers, new head (bridged++) ──┘

Hennicke et al. 2024 (arXiv 2405.03243) find the synthetic-to-real drop in the last layers, Li et al. 2024
(arXiv 2403.19866) retrain all of them; which of the two wins depends on the site, so the photos decide.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from synthkit.artifacts import Key, fingerprint, read_manifest
from synthkit.data.images import ImageSet
from synthkit.errors import DataError, ModelError
from synthkit.learning.curves import CURVES
from synthkit.recipes.adaptation.selection import select_strategy
from synthkit.recipes.adaptation.strategies import (
    AdaptationTask,
    StartingStudent,
    Strategy,
    candidates,
    prepare,
    train_strategy,
)
from synthkit.recipes.settings import AdaptSettings, TrainSettings
from synthkit.recipes.train import (
    BRIDGED,
    TrainingData,
    check_settings,
    untrained_student,
    weights_fingerprint,
)

if TYPE_CHECKING:
    from synthkit.learning.students import Student

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Adapt:
    """The stage `adapt`.

    Attributes:
        settings: of the stage.
        training: how all layers are trained, and which student is taken where no folder is given.
        student_dir: what `train` writes, or another timm folder; None: start from pretrained weights.
        photos: the real few shots.
        out: the folder to write.
    """

    name: ClassVar[str] = "adapt"
    version: ClassVar[int] = 1

    settings: AdaptSettings
    training: TrainSettings
    student_dir: Path | None
    photos: ImageSet
    out: Path

    def check(self, *, fetch: bool) -> None:
        """Refuse settings that contradict each other.

        Args:
            fetch: has no part in this stage; pretrained weights are fetched when it runs.

        Raises:
            ConfigError: the strategy needs a student that knows the classes, or there are no weights.
        """
        candidates(self.settings, knows_classes=self.student_dir is not None)
        check_settings(self.training)
        if self.student_dir is None and self.training.weights:
            weights_fingerprint(Path(self.training.weights))

    def key(self) -> Key:
        """Photos and student, or weights, by content.

        Raises:
            ModelError: there is no student's folder.
        """
        inputs = {"photos": self.photos.digest}
        if self.student_dir:
            if not self.student_dir.is_dir():
                raise ModelError(
                    f"no student in {self.student_dir}; give a timm folder, or run `synthkit train` first"
                )
            inputs["student"] = fingerprint(self.student_dir)
        elif self.training.weights:
            inputs["weights"] = weights_fingerprint(Path(self.training.weights))
        return Key(inputs, {self.name: self.settings, "train": self.training})

    def run(self, work: Path, previous: Path | None) -> dict[str, Any]:
        """Select a strategy by cross-validation and train by it.

        Returns:
            The strategy, the reason and the result of every strategy.
        """
        from synthkit.learning.fit import Examples

        start = _start(self.student_dir, self.training, self.photos)
        distinct = self.photos.distinct().with_classes(start.student.classes)
        examples = Examples(distinct, start.student.preprocessing)
        task = AdaptationTask(start, examples, self.settings, self.training)
        selection = select_strategy(task)
        log.info("adapt: %s, %s", selection.strategy.value, selection.reason)
        _adapted_student(task, selection.strategy, work / CURVES).save(work)
        return {
            "strategy": selection.strategy.value,
            "steps": task.steps(selection.strategy),
            "reason": selection.reason,
            "cross_validation": [result.to_json() for result in selection.cross_validation],
        }


def _start(student_dir: Path | None, training: TrainSettings, photos: ImageSet) -> StartingStudent:
    from synthkit.learning.students import SYNTHETIC, load_student, was_trained_on

    if student_dir is None:
        return StartingStudent(untrained_student(training, TrainingData(None, photos)), False, None)
    synthetic = student_dir / SYNTHETIC
    student = load_student(synthetic if synthetic.is_dir() else student_dir)
    if set(student.classes) != set(photos.classes):
        raise DataError(
            f"the student in {student_dir} knows the classes {', '.join(student.classes)}, the photos show "
            f"{', '.join(photos.classes)}; train a student on these classes"
        )
    learned = was_trained_on(student_dir, photos)
    if learned and synthetic.is_dir():
        return StartingStudent(student, True, _reusable_full_finetune(student_dir, training))
    if learned:
        log.warning(
            "adapt: %s has learned these very photos, so cross-validation favours leaving it unchanged; "
            "name a strategy with --strategy, or adapt the student of --method synthetic",
            student_dir,
        )
    return StartingStudent(student, True, None)


def _reusable_full_finetune(student_dir: Path, training: TrainSettings) -> Student | None:
    """The student that learned these photos, if `train` made it as the strategy "full" would."""
    from synthkit.learning.students import load_student

    manifest = read_manifest(student_dir)
    same = manifest is not None and manifest.settings == {"train": asdict(training)}
    return load_student(student_dir) if same and training.method == BRIDGED else None


def _adapted_student(task: AdaptationTask, strategy: Strategy, curves: Path) -> Student:
    if strategy is Strategy.FULL and task.start.full and task.settings.head == "auto":
        return task.start.full
    trainable = prepare(strategy, task)
    train_strategy(strategy, task, trainable, curves=curves)
    return trainable.student


def describe(results: Sequence[Mapping[str, Any]]) -> str:
    """The cross-validation as a short table."""
    most = max((result["photos"] for result in results), default=0)
    return "\n".join(
        f"  {result['strategy']:<10} {result['top1']:.0%} of held-out photos"
        + f", stopped early after {result['photos']} of {most}" * (result["photos"] < most)
        for result in results
    )
