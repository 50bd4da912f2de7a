"""fit() with its options: rates, averages, parts of a batch, held-out photos, curves; runs that go wrong."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("timm")

import torch

from synthkit.data.images import ImageSet
from synthkit.errors import ConfigError
from synthkit.learning import fit as training
from synthkit.learning.augmentation import random_views, timm_transform
from synthkit.learning.fit import Examples, FitSettings, fit
from synthkit.learning.gradients import Gradients, best_device
from synthkit.learning.students import Student
from tests.tiny_students import PREPROCESSING, colour_folders, lively_student, noise

COLOURS = ("blue", "green", "red")
SETTINGS = FitSettings(steps=6, lr=0.01, batch_size=8)


@pytest.fixture(scope="module")
def examples(tmp_path_factory: pytest.TempPathFactory) -> Examples:
    folder = colour_folders(tmp_path_factory.mktemp("colours") / "real", COLOURS, each=4)
    return Examples(ImageSet.scan(folder), PREPROCESSING)


def state(student: Student) -> dict[str, torch.Tensor]:
    return {key: value.clone() for key, value in student.model.state_dict().items()}


def fitted(examples: Examples, settings: FitSettings, **how: object) -> dict[str, torch.Tensor]:
    student = lively_student(classes=COLOURS)
    fit(student, examples, settings, **how)  # type: ignore[arg-type]
    return state(student)


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {"opt": "sgd"},
        {"opt": "adam"},
        {"opt": "nadamw"},
        {"opt": "lion"},
        {"opt": "rmsprop"},
        {"schedule": "cosine"},
        {"schedule": "step"},
        {"layer_decay": 0.5},
        {"ema": 0.9},
        {"augment": "rand-m9-mstd0.5"},
        {"augment": "none"},
    ],
    ids=str,
)
def test_each_option_changes_the_run_and_survives_an_interruption(
    examples: Examples, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, object]
) -> None:
    monkeypatch.setattr(training, "_CHECKPOINT_EVERY", 2)
    settings = replace(SETTINGS, **options)  # type: ignore[arg-type]
    whole = fitted(examples, settings)
    assert not equal(whole, fitted(examples, SETTINGS))
    checkpoint, curves = tmp_path / "c.safetensors", tmp_path / "curves.json"

    def kill(steps: int) -> None:
        if steps == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fitted(examples, settings, checkpoint=checkpoint, curves=curves, watch=(1, kill))
    assert equal(whole, fitted(examples, settings, checkpoint=checkpoint, curves=curves))
    assert len(json.loads(curves.read_text("utf-8"))["loss"]) == 6


def test_lower_units_learn_more_slowly(examples: Examples) -> None:
    student = lively_student(classes=COLOURS)
    settings = replace(SETTINGS, layer_decay=0.5)
    optimizer = training._optimizer(student.model, settings)
    names = {id(one): name for name, one in student.model.named_parameters()}
    for schedule in ("one-cycle", "cosine"):
        training._schedule(optimizer, replace(settings, schedule=schedule))(3)
        rates = {names[id(one)]: group["lr"] for group in optimizer.param_groups for one in group["params"]}
        assert 0 < rates["conv1.0.weight"] < rates["layer4.0.conv1.weight"] < rates["fc.weight"]


def test_the_average_of_the_weights_is_what_is_judged_and_kept(examples: Examples) -> None:
    student, seen = lively_student(classes=COLOURS), []
    fit(
        student,
        examples,
        replace(SETTINGS, ema=0.9),
        watch=(6, lambda steps: seen.append(state(student))),
    )
    assert equal(seen[-1], state(student))


def test_an_exception_under_the_average_restores_the_weights(examples: Examples) -> None:
    """The held-out photos are evaluated with the average; the run's own weights come back all the same."""
    student, at = lively_student(classes=COLOURS), []

    def fail() -> float:
        at.append(state(student))
        if len(at) == 3:  # timm's warm-up: before this step the average is the weights themselves
            raise RuntimeError("no photos")
        return 0.5

    with pytest.raises(RuntimeError, match="no photos"):
        fit(student, examples, replace(SETTINGS, steps=3, ema=0.9), held_out=fail)
    last = lively_student(classes=COLOURS)
    fit(last, examples, replace(SETTINGS, steps=3))
    assert equal(state(student), state(last)) and not equal(at[2], state(student))


def test_the_weights_that_did_best_on_held_out_photos_are_kept(examples: Examples, tmp_path: Path) -> None:
    student, tops, at = lively_student(classes=COLOURS), iter([0.1, 0.7, 0.3, 0.7, 0.5, 0.2]), []

    def look() -> float:
        at.append(state(student))
        return next(tops)

    fit(student, examples, SETTINGS, held_out=look, curves=tmp_path / "curves.json")
    assert len(at) == 6 and equal(at[3], state(student)), "the last of equal ones"
    curves = json.loads((tmp_path / "curves.json").read_text("utf-8"))
    assert curves["validation"] == [[1, 0.1], [2, 0.7], [3, 0.3], [4, 0.7], [5, 0.5], [6, 0.2]]
    assert len(curves["loss"]) == len(curves["lr"]) == 6
    assert max(curves["lr"]) == pytest.approx(0.01, rel=0.1)


@pytest.mark.slow
def test_half_precision_stays_near_and_leaves_full_precision_weights(examples: Examples) -> None:
    full, half = fitted(examples, SETTINGS), fitted(examples, replace(SETTINGS, amp=True))
    assert not equal(full, half) and {value.dtype for value in half.values()} <= {torch.float32, torch.int64}
    assert torch.allclose(full["fc.weight"], half["fc.weight"], atol=0.1)


def batch(count: int) -> tuple[tuple[torch.Tensor, ...], torch.Tensor]:
    images = torch.rand((count, 3, 32, 32), generator=torch.Generator().manual_seed(1))
    return (images,), torch.eye(3)[torch.arange(count) % 3]


def gradients(student: Student, parts: int) -> tuple[float, torch.Tensor]:
    student.model.eval()  # BatchNorm's statistics of a part differ from the whole batch's
    loss = Gradients(student.model, "cpu", False, parts).add(*batch(8))
    return loss, torch.cat([one.grad.flatten() for one in student.model.parameters()])


def test_parts_of_a_batch_add_up_to_it() -> None:
    (loss, whole), (other, parts) = (gradients(lively_student(), parts) for parts in (1, 4))
    assert loss == pytest.approx(other, rel=1e-5)
    assert torch.allclose(whole, parts, atol=1e-5 * float(whole.abs().max()))


class SmallMemory(torch.nn.Module):
    """A model on a device that holds only so many images."""

    def __init__(self, model: torch.nn.Module, most: int) -> None:
        super().__init__()
        self.model, self.most, self.seen = model, most, []

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        self.seen.append(len(images))
        if len(images) > self.most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return self.model(images)


def test_a_batch_that_does_not_fit_is_halved_until_it_does(caplog: pytest.LogCaptureFixture) -> None:
    expected = gradients(lively_student(), 1)[1]
    student = lively_student()
    small = SmallMemory(student.model, most=2).eval()
    made = Gradients(small, "cpu", False, 1)
    made.add(*batch(8))
    assert small.seen == [8, 4, 2, 2, 2, 2] and made.parts == 4, "and what failed half-way does not count"
    found = torch.cat([one.grad.flatten() for one in small.parameters()])
    assert torch.allclose(found, expected, atol=1e-5 * float(expected.abs().max()))
    assert "out of memory with 8 images at once: going on with 4" in caplog.text
    made.add(*batch(8))
    assert small.seen[6:] == [2, 2, 2, 2], "the next batch begins with what fits"


def test_memory_for_less_than_two_images_ends_in_one_line() -> None:
    small = SmallMemory(lively_student().model, most=1)
    with pytest.raises(ConfigError, match="out of memory with 2 images at once; lower --image-size"):
        Gradients(small, "cpu", False, 1).add(*batch(8))


@pytest.mark.slow
def test_a_loss_that_is_no_number_stops_the_run_and_keeps_the_last_good_checkpoint(
    examples: Examples, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training, "_CHECKPOINT_EVERY", 2)
    checkpoint = tmp_path / "c.safetensors"
    student = lively_student(classes=COLOURS)

    def poison(steps: int) -> None:
        if steps == 4:
            with torch.no_grad():
                student.head.weight[0, 0] = float("nan")

    text = r"train: the loss is nan at step 5 of 6 with a peak learning rate of 0.01; lower it, .* 0.001"
    with pytest.raises(ConfigError, match=text + rf"; the weights after step 4 stay in {checkpoint}"):
        fit(student, examples, SETTINGS, checkpoint=checkpoint, watch=(1, poison))
    whole = fitted(examples, SETTINGS)
    assert equal(whole, fitted(examples, SETTINGS, checkpoint=checkpoint)), "it can be gone on from"


def test_weights_that_are_no_numbers_are_not_kept(
    examples: Examples, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training, "_CHECKPOINT_EVERY", 1)
    student = lively_student(classes=COLOURS)
    step = torch.optim.AdamW.step

    def broken(self: torch.optim.AdamW, *arguments: object) -> None:
        step(self, *arguments)
        student.head.bias.data.fill_(float("inf"))

    monkeypatch.setattr(torch.optim.AdamW, "step", broken)
    with pytest.raises(ConfigError, match="the weights are not finite any more at step 1"):
        fit(student, examples, SETTINGS, checkpoint=tmp_path / "c.safetensors")
    assert not (tmp_path / "c.safetensors").exists()


def test_timm_augmentation_is_each_image_s_own_and_leaves_other_randomness_alone() -> None:
    pixels = np.repeat(noise(1), 4, 0)
    generators = [torch.Generator().manual_seed(seed) for seed in (0, 0, 1)]
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    one, same, other = (random_views(pixels, "rand-m9-mstd0.5", generator) for generator in generators)
    assert torch.equal(torch.rand(3), expected)
    assert one.shape == (4, 3, 32, 32) and one.dtype == torch.float32 and one.min() >= 0 and one.max() <= 1
    assert torch.equal(one, same) and not torch.equal(one, other) and not torch.equal(one[0], one[1])
    with pytest.raises(ConfigError, match="timm knows no augmentation 'rnd'"):
        timm_transform("rnd", (8, 8))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_a_gpu_that_is_not_there_is_refused() -> None:
    assert best_device("auto").type == "cpu"
    with pytest.raises(ConfigError, match="torch finds no GPU"):
        best_device("cuda")
