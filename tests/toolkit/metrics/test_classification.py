"""Shares, confusion and intervals against numbers worked out by hand or elsewhere."""

import numpy as np
import pytest

from synthkit.metrics import classification as metrics

LABELS = np.array([0, 0, 0, 1, 1, 3])
PREDICTED = np.array([0, 1, 0, 1, 1, 0])


def test_top1_and_per_class_leave_absent_classes_out() -> None:
    assert metrics.top1(PREDICTED, LABELS) == pytest.approx(4 / 6)
    found = metrics.per_class(PREDICTED, LABELS, ["a", "b", "c", "d"])
    assert found == {"a": pytest.approx(2 / 3), "b": 1.0, "d": 0.0}


def test_log_loss_survives_large_logits() -> None:
    logits = np.array([[0.0, 0.0], [1000.0, 0.0], [0.0, np.log(3)]])
    assert metrics.log_loss(logits, np.array([0, 0, 0])) == pytest.approx((np.log(2) + 0 + np.log(4)) / 3)


def test_confusion_rows_are_the_true_classes() -> None:
    assert metrics.confusion(PREDICTED, LABELS, 4).tolist() == [
        [2, 1, 0, 0],
        [0, 2, 0, 0],
        [0, 0, 0, 0],
        [1, 0, 0, 0],
    ]


@pytest.mark.parametrize(
    ("right", "total", "interval"),
    [(8, 10, (0.4902, 0.9433)), (0, 10, (0.0, 0.2775)), (10, 10, (0.7225, 1.0)), (50, 100, (0.4038, 0.5962))],
)
def test_wilson_interval(right: int, total: int, interval: tuple[float, float]) -> None:
    assert metrics.wilson_interval(right, total) == pytest.approx(interval, abs=1e-4)


@pytest.mark.parametrize(
    ("won", "lost", "worse"),
    [(0, 0, False), (0, 1, False), (0, 2, True), (2, 4, False), (1, 4, True), (4, 1, False)],
)
def test_worse_is_more_than_a_standard_deviation_below(won: int, lost: int, worse: bool) -> None:
    correct = np.array([True] * (5 + won) + [False] * (3 + lost))
    baseline = np.array([True] * 5 + [False] * (won + 3) + [True] * lost)
    assert metrics.is_worse(correct, baseline) == worse
    assert not metrics.is_worse(correct, baseline, z=10)


def test_holm_steps_down_and_leaves_out_what_was_not_tested() -> None:
    # R: p.adjust(c(.01, .04, .03, .005), "holm")
    assert metrics.holm([0.01, 0.04, None, 0.03, 0.005]) == [0.03, 0.06, None, 0.06, 0.02]
    assert metrics.holm([0.7, 0.6]) == [1.0, 1.0] and metrics.holm([]) == []
