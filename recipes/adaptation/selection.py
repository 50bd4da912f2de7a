"""Selection of the fine-tuning strategy by cross-validation on the real photos.

candidates ──each trained on all folds but one, evaluated on the one──► results ──► strategy
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from synthkit.data.splits import stratified_folds
from synthkit.metrics.classification import is_worse, log_loss
from synthkit.recipes.adaptation.strategies import (
    AdaptationTask,
    StartingStudent,
    Strategy,
    prepare,
    train_strategy,
)

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class CrossValidationResult:
    """Cross-validation of one strategy.

    Attributes:
        strategy: the strategy.
        steps: its gradient steps.
        top1: share of held-out photos that were classified correctly.
        loss: mean negative log-likelihood of the held-out photos.
        evaluated: photos that were held out, bool [N]; not all if the strategy was stopped early.
        correct: photos that were held out and classified correctly, bool [N].
    """

    strategy: Strategy
    steps: int
    top1: float
    loss: float
    evaluated: np.ndarray
    correct: np.ndarray

    def to_json(self) -> dict[str, Any]:
        """strategy, steps, top1, loss, and `photos`: the number that was held out."""
        return {
            "strategy": self.strategy.value,
            "steps": self.steps,
            "top1": self.top1,
            "loss": self.loss,
            "photos": int(self.evaluated.sum()),
        }


@dataclass(frozen=True)
class Selection:
    """The selected strategy.

    Attributes:
        strategy: the strategy.
        reason: the reason in words.
        cross_validation: the results that it rests on; empty if there are none.
    """

    strategy: Strategy
    reason: str
    cross_validation: list[CrossValidationResult]


def select_strategy(task: AdaptationTask) -> Selection:
    """Select a strategy by cross-validation.

    A fold of all layers costs more than all folds of the last layer groups, so the strategy "full" is stopped
    early if it has little chance (see `should_stop_early`).
    """
    if len(task.candidates) == 1:
        return _as_requested(task, task.candidates[0])
    if task.folds < 2:
        reason = "the default where a class has one photo, since none can be held out"
        return Selection(_default(task.start), reason, [])
    results: list[CrossValidationResult] = []
    for strategy in task.candidates:
        baseline = _baseline(task.start, results) if strategy is Strategy.FULL else None
        results.append(cross_validate(strategy, task, baseline=baseline))
    finished = [result for result in results if result.evaluated.all()]
    selected = _select(task.start, finished)
    reason = (
        f"{selected.top1:.0%} of {len(task.labels)} held-out photos right in {task.folds}-fold "
        "cross-validation"
    )
    if selected.top1 < _best(finished).top1:
        reason += "; the default, since no strategy is ahead of it by more than chance"
    return Selection(selected.strategy, reason, results)


def _select(start: StartingStudent, results: Sequence[CrossValidationResult]) -> CrossValidationResult:
    """The best result; if the classes are new, the default unless it is clearly worse than others."""
    if start.knows_classes:
        return _best(results)
    default = _baseline(start, results)
    better = [result for result in results if is_worse(default.correct, result.correct)]
    return _best(better or [default])


def _baseline(start: StartingStudent, results: Sequence[CrossValidationResult]) -> CrossValidationResult:
    """The result to beat: the best one or, if the classes are new, the default's."""
    if start.knows_classes:
        return _best(results)
    return next(result for result in results if result.strategy is _default(start))


def should_stop_early(start: StartingStudent, correct: np.ndarray, baseline: np.ndarray) -> bool:
    """True if further folds are not worth their time.

    A student that knows its classes must not be clearly worse than the baseline so far. One with new classes
    must be better, since it would have to be clearly better in the end.

    Args:
        start: the student before adaptation.
        correct: photos held out so far that are classified correctly, bool [N].
        baseline: the same of the baseline, bool [N].
    """
    if start.knows_classes:
        return is_worse(correct, baseline)
    return int(correct.sum()) <= int(baseline.sum())


def _best(results: Sequence[CrossValidationResult]) -> CrossValidationResult:
    """The result with the highest top-1; of equal ones that of the strategy that changes least."""
    return max(results, key=lambda result: result.top1)


def _as_requested(task: AdaptationTask, strategy: Strategy) -> Selection:
    """The requested strategy; the reason says so if it does worse than the unchanged student."""
    selection = Selection(strategy, "as asked for", [])
    if strategy is Strategy.UNCHANGED or not task.start.knows_classes:
        return selection
    if task.folds < 2:
        reason = "as asked for; a class has one photo, so nothing says whether it helps"
        return replace(selection, reason=reason)
    results = [cross_validate(Strategy.UNCHANGED, task), cross_validate(strategy, task)]
    unchanged, requested = results
    if requested.top1 < unchanged.top1:
        reason = (
            f"as asked for, but {requested.top1:.0%} of {len(task.labels)} held-out photos were right, and "
            f"{unchanged.top1:.0%} with the student unchanged"
        )
        log.warning("adapt: %s does worse than the student as it was; %s", strategy.value, reason)
        return replace(selection, reason=reason, cross_validation=results)
    return replace(selection, cross_validation=results)


def _default(start: StartingStudent) -> Strategy:
    """The strategy to take without evidence for another one."""
    return Strategy.UNCHANGED if start.knows_classes else Strategy.LAST_4


def cross_validate(
    strategy: Strategy, task: AdaptationTask, baseline: CrossValidationResult | None = None
) -> CrossValidationResult:
    """Train by a strategy once per fold, and evaluate it on the photos that are held out.

    Args:
        strategy: the strategy.
        task: student and photos.
        baseline: the result to beat; remaining folds are skipped if `should_stop_early`.
    """
    trainable, labels = prepare(strategy, task), task.labels
    logits = np.zeros((len(labels), len(trainable.student.classes)), np.float32)
    evaluated = np.zeros(len(labels), bool)
    for training, validation in stratified_folds(labels, task.folds, task.settings.seed):
        fold = trainable.fold(training)
        train_strategy(strategy, task, fold)
        logits[validation] = trainable.data.logits(fold.trained, validation)
        evaluated[validation] = True
        correct = (logits.argmax(1) == labels) & evaluated
        if baseline and should_stop_early(task.start, correct[evaluated], baseline.correct[evaluated]):
            break
    loss = log_loss(logits[evaluated], labels[evaluated])
    top1 = float(correct[evaluated].mean())
    return CrossValidationResult(strategy, task.steps(strategy), top1, loss, evaluated, correct)
