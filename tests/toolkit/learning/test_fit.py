"""fit(): it learns, leaves alone what is frozen, and ends the same however often it was interrupted."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("timm")

import torch
import torch.nn.functional as F

from synthkit.data.images import ImageSet
from synthkit.learning import fit as training
from synthkit.learning.augmentation import augment, mix
from synthkit.learning.fit import Examples, FitSettings, fit, one_cycle
from synthkit.learning.students import Student
from tests.tiny_students import PREPROCESSING, colour_folders, lively_student

COLOURS = ("blue", "green", "red")
SETTINGS = FitSettings(steps=8, lr=0.01, batch_size=6)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> ImageSet:
    return ImageSet.scan(colour_folders(tmp_path_factory.mktemp("colours") / "real", COLOURS, each=4))


@pytest.fixture(scope="module")
def examples(images: ImageSet) -> Examples:
    return Examples(images, PREPROCESSING)


@pytest.fixture
def student() -> Student:
    return lively_student(seed=1, classes=COLOURS)


def state(student: Student) -> dict[str, torch.Tensor]:
    return {key: value.clone() for key, value in student.model.state_dict().items()}


def changed(student: Student, before: dict[str, torch.Tensor]) -> set[str]:
    return {key for key, value in student.model.state_dict().items() if not torch.equal(value, before[key])}


def loss(student: Student, examples: Examples) -> float:
    logits = student.logits(examples.pixels(np.arange(len(examples))))
    return float(F.cross_entropy(logits, examples.labels))


def right(student: Student, examples: Examples) -> float:
    logits = student.logits(examples.pixels(np.arange(len(examples))))
    return float((logits.argmax(1) == examples.labels).float().mean())


@pytest.mark.slow
def test_it_learns_what_can_be_told_apart(student: Student, examples: Examples, tmp_path: Path) -> None:
    before = loss(student, examples)
    fit(student, examples, FitSettings(steps=50, lr=0.01, batch_size=12, smoothing=0.0))
    assert loss(student, examples) < before / 4
    others = ImageSet.scan(colour_folders(tmp_path / "test", COLOURS, each=4, seed=9))
    assert right(student, Examples(others, PREPROCESSING)) > 0.9
    assert not student.model.training


@pytest.mark.slow
def test_it_learns_with_mixup_and_an_odd_batch(student: Student, examples: Examples) -> None:
    fit(student, examples, FitSettings(steps=50, lr=0.01, batch_size=11, mixup=0.2))
    assert right(student, examples) > 0.9


def test_frozen_parameters_and_statistics_do_not_move(student: Student, examples: Examples) -> None:
    before = state(student)
    student.train_only_last(1)
    fit(student, examples, replace(SETTINGS, frozen_statistics=True))
    assert changed(student, before) == {"fc.weight", "fc.bias"}


def test_unfrozen_statistics_do_move(student: Student, examples: Examples) -> None:
    before = state(student)
    student.train_only_last(1)
    fit(student, examples, SETTINGS)
    assert any(key.endswith("running_mean") for key in changed(student, before))


def test_nothing_moves_in_no_steps(student: Student, examples: Examples) -> None:
    before = state(student)
    fit(student, examples, replace(SETTINGS, steps=0))
    assert not changed(student, before)


class Interrupted(Exception):
    pass


def interrupt_at(stop: int) -> tuple[int, Callable[[int], None]]:
    def call(steps: int) -> None:
        if steps == stop:
            raise Interrupted

    return 1, call


@pytest.mark.slow
@pytest.mark.parametrize("mixup", [0.0, 0.3])
def test_an_interrupted_run_ends_as_an_uninterrupted_one(
    examples: Examples, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mixup: float
) -> None:
    monkeypatch.setattr(training, "_CHECKPOINT_EVERY", 2)
    settings = replace(SETTINGS, mixup=mixup)
    whole, broken = lively_student(classes=COLOURS), lively_student(classes=COLOURS)
    fit(whole, examples, settings)
    checkpoint = tmp_path / "c.safetensors"
    for stop in (3, 5):
        with pytest.raises(Interrupted):
            fit(broken, examples, settings, checkpoint=checkpoint, watch=interrupt_at(stop))
        broken = lively_student(seed=stop, classes=COLOURS)  # a new process knows the checkpoint alone
    steps: list[int] = []
    torch.manual_seed(99)
    np.random.seed(99)
    fit(broken, examples, settings, checkpoint=checkpoint, watch=(1, steps.append))
    assert steps == [0, 5, 6, 7, 8], "what the checkpoint held is not done again"
    assert not changed(broken, state(whole))


def test_watch_is_called_first_after_every_n_steps_and_last(student: Student, examples: Examples) -> None:
    seen: list[int] = []
    fit(student, examples, SETTINGS, watch=(3, seen.append))
    assert seen == [0, 3, 6, 8]


def test_the_seed_decides_the_run(examples: Examples) -> None:
    runs = []
    for seed in (0, 0, 1):
        one = lively_student(classes=COLOURS)
        fit(one, examples, replace(SETTINGS, seed=seed))
        runs.append(state(one)["fc.weight"])
    assert torch.equal(runs[0], runs[1]) and not torch.equal(runs[0], runs[2])


def test_every_image_comes_once_before_any_comes_twice() -> None:
    batches = training._order(10, FitSettings(steps=9, lr=1.0, batch_size=4, seed=3))
    stream = np.concatenate([next(batches) for _ in range(10)])
    for start in range(0, 40, 10):
        assert sorted(stream[start : start + 10]) == list(range(10))
    small = training._order(3, FitSettings(steps=9, lr=1.0, batch_size=7))
    assert sorted(np.bincount(next(small))) == [2, 2, 3]


def test_examples_are_the_same_in_memory_and_from_disk(
    images: ImageSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    within = Examples(images, PREPROCESSING)
    monkeypatch.setattr(training, "_IN_MEMORY", 0)
    without = Examples(images, PREPROCESSING)
    picked = np.array([7, 0, 7])
    assert without._pixels is None and within._pixels is not None
    assert np.array_equal(within.pixels(picked), without.pixels(picked))
    some = np.array([1, 5, 9])
    for one in (within.subset(some), without.subset(some)):
        assert one.labels.tolist() == [0, 1, 2]
        assert np.array_equal(one.pixels(np.array([2])), within.pixels(np.array([9])))


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_augmentation_keeps_shape_and_range_and_is_each_image_s_own() -> None:
    one = torch.rand((1, 3, 16, 16), generator=generator(1))
    found = augment(one.expand(5, -1, -1, -1), generator())
    assert found.shape == (5, 3, 16, 16) and found.dtype == torch.float32
    assert found.min() >= 0 and found.max() <= 1 and torch.isfinite(found).all()
    assert all(not torch.allclose(found[i], found[j], atol=0.01) for i in range(5) for j in range(i))
    assert torch.equal(found, augment(one.expand(5, -1, -1, -1), generator()))


def test_augmentation_never_mirrors() -> None:
    """A bright left half stays left: digits and arrows change their meaning in a mirror."""
    images = torch.zeros((64, 3, 16, 16))
    images[..., :6] = 1
    found = augment(images, generator())
    assert (found[..., :5].mean((1, 2, 3)) > found[..., 11:].mean((1, 2, 3))).all()


def test_mixed_targets_sum_to_one_and_follow_the_images() -> None:
    images = torch.rand((5, 3, 4, 4), generator=generator(1))
    targets = F.one_hot(torch.arange(5), 6).float()
    mixed, soft = mix(images, targets, 0.4, generator())
    assert torch.allclose(soft.sum(1), torch.ones(5))
    share = soft[0, 0]
    assert 0 < share < 1
    assert torch.allclose(mixed[0], share * images[0] + (1 - share) * images[4], atol=1e-6)
    assert torch.allclose(soft[0, 4], 1 - share)
    assert torch.allclose(mixed[2], images[2]), "the middle of an odd batch meets itself"


def test_the_rate_rises_then_falls() -> None:
    rates = [one_cycle(step / 100) for step in range(100)]
    assert rates[0] == 0.01 and max(rates) == rates[5] == 1.0
    assert rates[5:] == sorted(rates[5:], reverse=True) and 0.01 < rates[-1] < 0.02


@pytest.mark.parametrize(("kind", "last"), [("test_efficientnet", True), ("test_resnet", False)])
def test_depthwise_convolutions_get_channels_last(kind: str, last: bool, examples: Examples) -> None:
    """The same images, laid out in memory as such networks learn fastest from them."""
    student, rows = lively_student(name=kind, classes=COLOURS), np.arange(4)
    (images,), _ = examples.batch(student, rows, 0, SETTINGS)
    assert images.is_contiguous(memory_format=torch.channels_last) == last
    assert images.is_contiguous() != last
    (others,), _ = examples.batch(lively_student(name="test_resnet", classes=COLOURS), rows, 0, SETTINGS)
    torch.testing.assert_close(images, others)
