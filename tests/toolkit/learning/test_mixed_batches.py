"""BatchSource of both kinds, and the second BatchNorm that goes with them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("timm")

import torch
import torch.nn.functional as F

from synthkit.data.images import ImageSet
from synthkit.errors import ConfigError
from synthkit.learning.auxiliary_norm import auxiliary_norms
from synthkit.learning.fit import Examples, FitSettings, fit
from synthkit.learning.mixed_batches import MixedBatches, dealt
from synthkit.learning.students import Student
from tests.tiny_students import PREPROCESSING, colour_folders, lively_student, noise

COLOURS = ("blue", "green", "red")
PLAIN = FitSettings(steps=4, lr=0.01, batch_size=8, smoothing=0.0, augment="none")


@pytest.fixture(scope="module")
def kinds(tmp_path_factory: pytest.TempPathFactory) -> tuple[Examples, Examples]:
    root = tmp_path_factory.mktemp("kinds")
    sets = [
        ImageSet.scan(colour_folders(root / name, COLOURS, each=each, seed=each))
        for name, each in (("real", 2), ("synthetic", 5))
    ]
    real, synthetic = (Examples(one, PREPROCESSING) for one in sets)
    return real, synthetic


@pytest.fixture
def student() -> Student:
    return lively_student(classes=COLOURS)


def test_a_stream_deals_every_image_once_before_any_twice() -> None:
    stream = dealt(5, 0, 15, seed=3)
    assert all(sorted(stream[start : start + 5]) == list(range(5)) for start in (0, 5, 10))
    assert dealt(5, 4, 7, seed=3).tolist() == stream[4:11].tolist()
    assert dealt(5, 0, 15, seed=4).tolist() != stream.tolist() and not len(dealt(5, 3, 0, seed=0))


@pytest.mark.parametrize(("share", "numbers"), [(0.5, [4, 4, 4]), (0.3, [2, 2, 3]), (0.05, [0, 0, 1])])
def test_batches_hold_the_share_of_photos_first(
    kinds: tuple[Examples, Examples], student: Student, share: float, numbers: list[int]
) -> None:
    blend = MixedBatches(*kinds, share)
    assert len(blend) == 21
    known = {
        kind: {one.tobytes() for one in student.normalise(unit(examples)).numpy()}
        for kind, examples in zip(("real", "synthetic"), kinds, strict=True)
    }
    for step, number in enumerate(numbers):
        (images,), targets = blend.batch(student, np.zeros(8, int), step, PLAIN)
        found = ["real" if one.tobytes() in known["real"] else "synthetic" for one in images.numpy()]
        assert found == ["real"] * number + ["synthetic"] * (8 - number)
        assert torch.allclose(targets.sum(1), torch.ones(8)), "every image counts alike"


def unit(examples: Examples) -> torch.Tensor:
    return torch.as_tensor(examples.pixels(np.arange(len(examples)))).permute(0, 3, 1, 2).float() / 255


def test_the_weighted_loss_is_the_weighted_sum_of_both_means(
    kinds: tuple[Examples, Examples], student: Student
) -> None:
    (images,), targets = MixedBatches(*kinds, 0.25, weight=0.8).batch(student, np.zeros(8, int), 0, PLAIN)
    student.model.eval()
    logits, labels = student.model(images).detach(), targets.argmax(1)
    real, synthetic = (float(F.cross_entropy(logits[part], labels[part])) for part in (slice(2), slice(2, 8)))
    assert float(F.cross_entropy(logits, targets)) == pytest.approx(0.8 * real + 0.2 * synthetic, rel=1e-5)


def test_both_kinds_have_randomness_of_their_own(kinds: tuple[Examples, Examples], student: Student) -> None:
    blend, settings = MixedBatches(kinds[0], kinds[0], 0.5), replace(PLAIN, augment="default")
    (images,), _ = blend.batch(student, np.zeros(8, int), 0, settings)
    assert not torch.equal(images[:4], images[4:])
    assert torch.equal(images, blend.batch(student, np.zeros(8, int), 0, settings)[0][0])


@pytest.mark.parametrize("name", ["test_resnet", "mobilenetv2_035"])
def test_photos_never_meet_the_synthetic_statistics(name: str) -> None:
    one, other = (lively_student(name=name) for _ in range(2))
    images = torch.randn((4, 3, 32, 32), generator=torch.Generator().manual_seed(0))
    keys = list(one.model.state_dict())
    with auxiliary_norms(one.model, name):
        one.model.train()
        one.model(torch.cat([images, 5 + 3 * images]))
    other.model.train()
    other.model(images)
    found, expected = one.model.state_dict(), other.model.state_dict()
    assert list(found) == keys, "nothing of the auxiliary ones is left"
    assert all(torch.allclose(found[key], expected[key], atol=1e-5) for key in keys)


def test_both_norms_learn_and_only_the_first_one_remains(
    kinds: tuple[Examples, Examples], student: Student, tmp_path: Path
) -> None:
    before = {key: value.clone() for key, value in student.model.state_dict().items()}
    with auxiliary_norms(student.model, "test_resnet"):
        aux = [key for key in student.model.state_dict() if "aux_bn" in key and key.endswith(".weight")]
        fit(student, MixedBatches(*kinds, 0.5), PLAIN)
        inside = {key: value.clone() for key, value in student.model.state_dict().items()}
        logits = student.logits(noise(4))
    assert aux and all(not torch.equal(inside[key], inside[key.replace("aux_bn.0.", "")]) for key in aux)
    assert torch.equal(student.logits(noise(4)), logits), "eval mode knows the first norm alone"
    after = student.model.state_dict()
    assert all(torch.equal(after[key], inside[key]) for key in after)
    assert not torch.equal(after["bn1.weight"], before["bn1.weight"])
    student.save(tmp_path / "student")  # a plain timm folder again
    from synthkit.learning.students import load_student

    assert torch.equal(load_student(tmp_path / "student").logits(noise(4)), logits)


def test_a_student_without_batch_norm_is_refused() -> None:
    model = lively_student(name="test_vit").model
    with pytest.raises(ConfigError, match="'test_vit' has no BatchNorm"), auxiliary_norms(model, "test_vit"):
        pass
