"""The head's start, the gate before a path that was asked for, and one pass for all paths."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("timm")

import torch

from synthkit.data.images import ImageSet
from synthkit.errors import ModelError
from synthkit.learning.feature_cache import before_last, extract_features, head_from_means, split
from synthkit.learning.fit import Examples
from synthkit.learning.students import Student, load_student
from synthkit.recipes.adaptation import selection, strategies
from synthkit.recipes.adaptation.selection import CrossValidationResult, cross_validate, select_strategy
from synthkit.recipes.adaptation.strategies import (
    LAST,
    AdaptationTask,
    StartingStudent,
    Strategy,
    candidates,
    prepare,
    train_strategy,
)
from synthkit.recipes.settings import AdaptSettings, TrainSettings
from tests.stages import adapt
from tests.tiny_students import colour_folders, lively_student

COLOURS = ("blue", "green", "red")
SETTINGS = AdaptSettings(adapt_steps=4, adapt_lr=0.01)
TRAINING = TrainSettings(student="test_resnet", real_steps=2, batch_size=6)


@pytest.fixture(autouse=True)
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(strategies, "_BATCH", 6)


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> ImageSet:
    return ImageSet.scan(colour_folders(tmp_path_factory.mktemp("photos"), COLOURS, each=3))


def task(photos: ImageSet, knows_classes: bool = True, **changes: Any) -> AdaptationTask:
    student = lively_student(0, COLOURS)
    examples = Examples(photos, student.preprocessing)
    return AdaptationTask(
        StartingStudent(student, knows_classes, None), examples, replace(SETTINGS, **changes), TRAINING
    )


def right(student: Student, photos: ImageSet) -> float:
    pixels = photos.load(student.preprocessing)
    return float(np.mean(student.logits(pixels).argmax(1).numpy() == photos.labels))


@pytest.mark.parametrize("kind", ["test_resnet", "test_efficientnet", "test_convnext"])
def test_one_pass_sees_what_a_pass_per_path_sees(kind: str, photos: ImageSet) -> None:
    student = lively_student(0, COLOURS, kind)
    examples = Examples(photos, student.preprocessing)
    frozen, places = before_last(student, [1, 2, 3])
    together = extract_features(student, examples, frozen, 2, 5)
    for count, place in places.items():
        student.train_only_last(count)
        alone = extract_features(student, examples, split(student).frozen, 2, 5)
        views = together.select(place)
        for one, other in zip(
            (*views.augmented, *views.clean), (*alone.augmented, *alone.clean), strict=True
        ):
            torch.testing.assert_close(one, other)


@pytest.mark.slow
def test_the_frozen_layers_see_the_photos_once_for_all_paths_and_folds(
    photos: ImageSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []
    monkeypatch.setattr(
        "synthkit.learning.feature_cache.extract_features",
        lambda *arguments: calls.append(len(arguments[1])) or extract_features(*arguments),
    )
    select_strategy(task(photos, knows_classes=False))
    assert calls == [len(photos)]


def test_class_means_are_the_nearest_mean_classifier(photos: ImageSet) -> None:
    here = task(photos, head="means")
    trainable = prepare(LAST[0], here)
    features = trainable.data.clean[0].flatten(1).numpy()
    head_from_means(trainable.trained, "fc", trainable.data, trainable.labels)
    means = np.stack([features[photos.labels == label].mean(0) for label in range(3)])
    expected = -np.square(features[:, None] - means[None]).sum(-1) / 2
    given = trainable.data.logits(trainable.trained, np.arange(len(photos)))
    centred = given - given.mean(1, keepdims=True)
    expected -= expected.mean(1, keepdims=True)
    ratio = centred.std() / expected.std()
    np.testing.assert_allclose(centred, ratio * expected, rtol=1e-3, atol=1e-3 * centred.std())
    at_means = means @ trainable.trained.model.fc.weight.detach().numpy().T
    at_means += trainable.trained.model.fc.bias.detach().numpy()
    assert np.diag(at_means).mean() == pytest.approx(3.0, rel=1e-3)


@pytest.mark.slow
def test_class_means_come_from_the_photos_that_are_learned(
    photos: ImageSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a fold the photos held out must not shape the head."""
    seen: list[int] = []
    monkeypatch.setattr(
        "synthkit.learning.feature_cache.head_from_means",
        lambda _student, _head, data, _labels: seen.append(len(data)),
    )
    select_strategy(task(photos, knows_classes=False, head="means"))
    assert seen == [6] * len(seen), "three folds of three photos each"
    assert 3 * len(LAST) < len(seen) <= 3 * len([*LAST, Strategy.FULL]), (
        "all layers may be stopped early early"
    )


def test_class_means_need_a_linear_head(photos: ImageSet) -> None:
    student = lively_student(0, COLOURS)
    student.model.fc = torch.nn.Linear(student.model.fc.in_features, 3, bias=False)
    with pytest.raises(ModelError, match=r"not linear with a bias; use --set adapt.head=new"):
        head_from_means(student, "fc", Examples(photos, student.preprocessing), photos.labels)


@pytest.mark.parametrize(("head", "kept"), [("auto", True), ("keep", True), ("new", False)])
def test_the_head_starts_as_asked(photos: ImageSet, head: str, kept: bool) -> None:
    trainable = prepare(LAST[1], task(photos, head=head))
    weight = trainable.student.model.fc.weight
    assert torch.equal(weight, lively_student(0, COLOURS).model.fc.weight) == kept
    assert kept or not weight.any()


def test_all_layers_get_a_random_head_unless_another_one_is_asked_for(photos: ImageSet) -> None:
    before = lively_student(0, COLOURS).model.fc.weight
    fresh = prepare(Strategy.FULL, task(photos)).student.model.fc.weight
    assert fresh.any() and not torch.equal(fresh, before)
    assert torch.equal(prepare(Strategy.FULL, task(photos, head="keep")).student.model.fc.weight, before)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", [*LAST, Strategy.FULL])
@pytest.mark.parametrize("knows_classes", [True, False])
def test_a_new_head_means_zeros_for_every_strategy(
    photos: ImageSet, strategy: Strategy, knows_classes: bool
) -> None:
    head = prepare(strategy, task(photos, knows_classes, head="new")).student.head
    assert not any(parameter.any() for parameter in head.parameters())


@pytest.mark.slow
def test_means_are_where_training_starts(photos: ImageSet) -> None:
    """With a learning rate of almost nothing, what comes out is the nearest mean."""
    here = task(photos, head="means", adapt_lr=1e-9)
    trainable = prepare(LAST[0], here)
    train_strategy(LAST[0], here, trainable)
    kept = task(photos, head="keep", adapt_lr=1e-9)
    start = prepare(LAST[0], kept)
    train_strategy(LAST[0], kept, start)
    assert right(trainable.student, photos) > max(0.8, right(start.student, photos))


@pytest.mark.parametrize(
    ("knows_classes", "head", "each", "expected"),
    [
        (True, "auto", 1, "keep"),
        (False, "auto", 1, "means"),
        (False, "auto", 2, "keep"),
        (False, "keep", 1, "keep"),
        (True, "means", 2, "means"),
    ],
)
def test_new_classes_of_one_photo_start_from_their_means(
    tmp_path: Path, knows_classes: bool, head: str, each: int, expected: str
) -> None:
    photos = ImageSet.scan(colour_folders(tmp_path / "photos", COLOURS, each=each))
    here = task(photos, knows_classes, head=head)
    assert here.head == expected
    here.start.student.model.fc = torch.nn.Linear(here.start.student.model.fc.in_features, 3, bias=False)
    assert here.head == ("keep" if head == "auto" else head), "a head that cannot take means"


def test_all_layers_start_from_means_only_when_asked(
    photos: ImageSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    monkeypatch.setattr(
        "synthkit.learning.feature_cache.head_from_means", lambda *_arguments: calls.append("set")
    )
    for head in ("auto", "means"):
        here = task(photos, False, head=head)
        train_strategy(Strategy.FULL, here, prepare(Strategy.FULL, here))
    assert calls == ["set"]


def test_a_new_head_is_tried_on_last_units_only() -> None:
    auto = AdaptSettings()
    assert candidates(auto, knows_classes=False) == [*LAST, Strategy.FULL]
    assert candidates(auto, knows_classes=True) == [Strategy.UNCHANGED, *LAST, Strategy.FULL]


@pytest.mark.parametrize(
    ("knows_classes", "right", "expected"),
    [
        (False, {"last-2": 7, "last-4": 6, "full": 7}, "last-4"),  # ahead by one photo: chance
        (False, {"last-2": 8, "last-4": 6, "full": 9}, "full"),
        (False, {"last-2": 9, "last-4": 6, "full": 9}, "last-2"),
        (True, {"unchanged": 6, "last-2": 7, "last-4": 6, "full": 7}, "last-2"),
        (True, {"unchanged": 7, "last-2": 7, "last-4": 7, "full": 7}, "unchanged"),
    ],
)
def test_the_default_for_new_classes_is_left_for_a_path_that_is_clearly_ahead(
    photos: ImageSet,
    monkeypatch: pytest.MonkeyPatch,
    knows_classes: bool,
    right: dict[str, int],
    expected: str,
) -> None:
    """Of nine photos the first so many are right along each path."""

    def verdict(strategy: Strategy, *_rest: Any, **_more: Any) -> CrossValidationResult:
        count = right.get(strategy.value, 0)
        return CrossValidationResult(strategy, 4, count / 9, 1.0, np.ones(9, bool), np.arange(9) < count)

    monkeypatch.setattr(selection, "cross_validate", verdict)
    assert select_strategy(task(photos, knows_classes)).strategy.value == expected


@pytest.mark.parametrize(("knows_classes", "judged"), [(True, 9), (False, 3)])
def test_all_layers_that_are_no_better_are_stopped_early_where_classes_are_new(
    photos: ImageSet, knows_classes: bool, judged: int
) -> None:
    here = task(photos, knows_classes)
    equal = cross_validate(Strategy.FULL, here)
    assert equal.evaluated.all()
    again = cross_validate(Strategy.FULL, here, baseline=equal)
    assert again.evaluated.sum() == judged
    assert again.top1 == again.correct[again.evaluated].mean() > 0, "a share of those that were held out"


def test_the_reason_says_why_the_default_is_kept(photos: ImageSet, monkeypatch: pytest.MonkeyPatch) -> None:
    def verdict(strategy: Strategy, *_rest: Any, **_more: Any) -> CrossValidationResult:
        count = 7 if strategy is Strategy.FULL else 6
        return CrossValidationResult(strategy, 4, count / 9, 1.0, np.ones(9, bool), np.arange(9) < count)

    monkeypatch.setattr(selection, "cross_validate", verdict)
    assert "no strategy is ahead of it by more than chance" in select_strategy(task(photos, False)).reason
    assert "chance" not in select_strategy(task(photos)).reason


def spoiling(photos: ImageSet, tmp_path: Path) -> tuple[Path, AdaptSettings]:
    """A student that knows the photos, and settings that make it forget them."""
    good = task(photos, head="means", adapt_lr=1e-9)
    trainable = prepare(LAST[0], good)
    train_strategy(LAST[0], good, trainable)
    trainable.student.save(tmp_path / "student")
    return tmp_path / "student", replace(SETTINGS, strategy="last-1", head="new", adapt_lr=1e-9)


@pytest.mark.slow
def test_a_path_that_makes_the_student_worse_is_not_taken_in_silence(
    photos: ImageSet, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    student, settings = spoiling(photos, tmp_path)
    with caplog.at_level(logging.WARNING, "synthkit"):
        metrics = adapt(settings, TRAINING, student, photos, tmp_path / "adapted").manifest.metrics
    assert metrics["strategy"] == "last-1", "it is what was asked for"
    assert "as asked for, but" in metrics["reason"] and "with the student unchanged" in metrics["reason"]
    parent, asked = metrics["cross_validation"]
    assert parent["strategy"] == "unchanged" and parent["top1"] > asked["top1"]
    assert "last-1 does worse than the student as it was" in caplog.text


@pytest.mark.slow
def test_left_to_itself_adapt_is_never_worse_than_the_parent(photos: ImageSet, tmp_path: Path) -> None:
    student, settings = spoiling(photos, tmp_path)
    auto = replace(settings, strategy="auto")
    metrics = adapt(auto, TRAINING, student, photos, tmp_path / "adapted").manifest.metrics
    scores = {one["strategy"]: one["top1"] for one in metrics["cross_validation"]}
    assert scores[metrics["strategy"]] >= scores["unchanged"]
    assert right(load_student(tmp_path / "adapted"), photos) >= right(load_student(student), photos)


def test_a_path_that_helps_is_taken_without_a_word(
    photos: ImageSet, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    lively_student(0, COLOURS).save(tmp_path / "student")
    settings = replace(SETTINGS, strategy="last-1", head="means")
    with caplog.at_level(logging.WARNING, "synthkit"):
        metrics = adapt(settings, TRAINING, tmp_path / "student", photos, tmp_path / "a").manifest.metrics
    assert metrics["reason"] == "as asked for" and not caplog.text
    parent, asked = metrics["cross_validation"]
    assert asked["top1"] >= parent["top1"] and asked["steps"] == metrics["steps"] == 4


def test_with_one_photo_nothing_can_be_said_of_a_path(tmp_path: Path) -> None:
    one = ImageSet.scan(colour_folders(tmp_path / "one", COLOURS, each=1))
    choice = select_strategy(task(one, strategy="last-1"))
    assert "nothing says whether it helps" in choice.reason and not choice.cross_validation


@pytest.mark.slow
def test_copies_do_not_judge_themselves(photos: ImageSet, tmp_path: Path) -> None:
    """A photo held out of a fold must not have a copy in it."""
    for item in photos.items:
        folder = tmp_path / "copied" / photos.classes[item.label]
        folder.mkdir(parents=True, exist_ok=True)
        for name in ("a", "b"):
            (folder / f"{name}{item.path.name}").write_bytes(item.path.read_bytes())
    lively_student(0, COLOURS).save(tmp_path / "student")
    copied = ImageSet.scan(tmp_path / "copied")
    metrics = adapt(SETTINGS, TRAINING, tmp_path / "student", copied, tmp_path / "adapted").manifest.metrics
    assert "of 9 held-out photos" in metrics["reason"]


def test_the_tuned_defaults(photos: ImageSet) -> None:
    """Values that were chosen by measurement; a change of one needs a new measurement."""
    known, new = (replace(task(photos, known), settings=AdaptSettings()) for known in (True, False))
    for here, steps in ((known, 60), (new, 120)):
        for strategy in LAST:
            settings = strategies.fit_settings(strategy, here)
            assert (settings.steps, settings.lr, settings.weight_decay) == (steps, 0.001, 0.0)
            assert (settings.smoothing, settings.frozen_statistics) == (0.1, True)
    assert AdaptSettings() == AdaptSettings("auto", "auto", None, 0.001, 8, 0)
    training = TrainSettings()
    assert (training.student, training.epochs, training.real_steps) == ("resnet10t", 12, 100)
    assert (training.lr, training.batch_size, training.mixup) == (0.002, 64, 0.2)
    assert (training.method, training.real_weight, training.opt) == ("bridged++", 0.8, "adamw")
    full = strategies.fit_settings(Strategy.FULL, replace(known, training=training))
    assert (full.steps, full.lr, full.batch_size, full.weight_decay, full.smoothing) == (
        100,
        0.002,
        32,
        0.02,
        0.1,
    )


def test_targets_of_cached_features_are_smoothed(photos: ImageSet) -> None:
    here = task(photos)
    trainable = prepare(Strategy.LAST_1, here)
    settings = strategies.fit_settings(Strategy.LAST_1, here)
    _, targets = trainable.data.batch(trainable.trained, np.arange(3), 0, settings)
    expected = np.full((3, 3), 0.1 / 3)
    expected[np.arange(3), trainable.labels[:3]] += 0.9
    np.testing.assert_allclose(targets.numpy(), expected, rtol=1e-6)
