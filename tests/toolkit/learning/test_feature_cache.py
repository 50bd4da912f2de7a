"""The last layers are trained on what the frozen ones make of a view, and that is the plain loop's result."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

pytest.importorskip("timm")

import torch

from synthkit.data.images import ImageSet
from synthkit.learning.feature_cache import extract_features, split
from synthkit.learning.fit import Examples, FitSettings, fit
from synthkit.learning.students import Student
from tests.tiny_students import class_folders, lively_student

KINDS = ("test_resnet", "test_efficientnet", "test_convnext")
SETTINGS = FitSettings(6, 0.01, 4, weight_decay=0.0, frozen_statistics=True)


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> ImageSet:
    return ImageSet.scan(class_folders(tmp_path_factory.mktemp("photos"), each=3))


def examples(photos: ImageSet, student: Student) -> Examples:
    return Examples(photos.with_classes(student.classes), student.preprocessing)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("units", [1, 2, 4])
def test_the_result_is_that_of_the_plain_loop_on_the_same_views(
    kind: str, units: int, photos: ImageSet
) -> None:
    """The plain loop runs each view through the whole student, in every step again."""
    fast, plain = lively_student(name=kind), lively_student(name=kind)
    for student in (fast, plain):
        student.train_only_last(units)
    cut = split(fast)
    fit(cut.trained, extract_features(fast, examples(photos, fast), cut.frozen, 2, 0), SETTINGS)
    fit(plain, extract_features(plain, examples(photos, plain), lambda images: (images,), 2, 0), SETTINGS)
    before, moved = lively_student(name=kind).model.state_dict(), 0
    for (name, one), (_, other) in zip(
        fast.model.named_parameters(), plain.model.named_parameters(), strict=True
    ):
        moved += not torch.equal(one, before[name])
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)
    assert moved, "nothing was trained"


def test_the_frozen_layers_see_each_view_once(photos: ImageSet) -> None:
    student = lively_student()
    student.train_only_last(1)
    cut = split(student)
    seen: list[int] = []

    def counted(images: torch.Tensor) -> tuple[torch.Tensor, ...]:
        seen.append(len(images))
        return cut.frozen(images)

    views = extract_features(student, examples(photos, student), counted, 3, 0)
    fit(cut.trained, views, SETTINGS)
    assert sum(seen) == len(photos) * (3 + 1), "three views and the photo itself"


def test_views_differ_and_clean_photos_are_judged(photos: ImageSet) -> None:
    student = lively_student()
    student.train_only_last(2)
    cut, some = split(student), examples(photos, student)
    views = extract_features(student, some, cut.frozen, 2, 0)
    assert all(not torch.equal(one[:, 0], one[:, 1]) for one in views.augmented)
    rows = np.array([4, 1])
    expected = student.logits(some.pixels(rows)).numpy()
    np.testing.assert_allclose(views.logits(cut.trained, rows), expected, rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(views.subset(rows).labels, views.labels[rows])


def test_targets_are_smoothed_as_asked(photos: ImageSet) -> None:
    student = lively_student()
    student.train_only_last(1)
    views = extract_features(student, examples(photos, student), split(student).frozen, 2, 0)
    rows, classes = np.array([4, 1]), len(student.classes)
    _, targets = views.batch(student, rows, 0, replace(SETTINGS, smoothing=0.3))
    expected = np.full((2, classes), 0.3 / classes)
    expected[[0, 1], views.labels[rows]] += 0.7
    np.testing.assert_allclose(targets, expected, rtol=1e-6)


class _Branching(torch.nn.Module):
    """Goes two ways by the values of its input, which a trace cannot follow."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.fc = torch.nn.Linear(3, 3), torch.nn.Linear(3, 3)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        mean = self.body(images.mean((2, 3)))
        return torch.as_tensor(self.fc(mean if mean.sum() > 0 else -mean))


class _BatchSized(torch.nn.Module):
    """Hands the batch size from a frozen to a trained layer."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.fc = torch.nn.Linear(3, 3), torch.nn.Linear(3, 3)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return torch.as_tensor(self.fc(self.body(images.mean((2, 3)))).view(images.shape[0], 3))


@pytest.mark.parametrize("model", [_Branching(), _BatchSized()])
def test_what_cannot_be_cut_is_refused(model: torch.nn.Module) -> None:
    student = replace(lively_student(), model=model)
    model.body.requires_grad_(False)
    with pytest.raises(NotImplementedError, match="test_resnet"):
        split(student)
