"""`train`: two stages, skipped when nothing changed, and never done twice after an interruption."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("timm")

import torch
from PIL import Image

from synthkit.data.images import ImageSet
from synthkit.errors import ConfigError, DataError, ModelError
from synthkit.learning import fit as training
from synthkit.learning.students import SYNTHETIC, load_student
from synthkit.recipes.settings import TrainSettings
from synthkit.recipes.train import TrainingData, synthetic_steps
from tests.stages import key, train, train_stage
from tests.tiny_students import CLASSES, colour_folders, lively_student, noise

SETTINGS = TrainSettings(student="test_resnet", epochs=2, real_steps=3, batch_size=8)


@pytest.fixture(scope="module")
def made(data: TrainingData, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(SETTINGS, data, tmp_path_factory.mktemp("train") / "student").out


def parameters(folder: Path) -> dict[str, torch.Tensor]:
    return dict(load_student(folder).model.state_dict())


def same(first: Path, second: Path) -> bool:
    one, other = parameters(first), parameters(second)
    return all(torch.equal(one[key], other[key]) for key in one)


def test_both_students_are_kept(made: Path, data: TrainingData) -> None:
    assert load_student(made).classes == load_student(made / SYNTHETIC).classes == tuple(sorted(CLASSES))
    assert not same(made, made / SYNTHETIC)
    assert load_student(made).preprocessing.input_size == (3, 32, 32), "the synthetic images' size"
    assert not [path for path in made.rglob(".*") if path.name != ".key.json"]


def test_the_metrics_count_steps_and_images(made: Path, data: TrainingData, tmp_path: Path) -> None:
    metrics = train(SETTINGS, data, made).manifest.metrics
    assert metrics == {"n_synthetic": 12, "n_real": 6, "synthetic_steps": 4, "real_steps": 3}
    assert synthetic_steps(SETTINGS, TrainingData(None, data.photos)) == 0


def test_an_unchanged_stage_is_skipped_and_forced(made: Path, data: TrainingData, tmp_path: Path) -> None:
    assert train(SETTINGS, data, made).skipped
    before = (made / "model.safetensors").read_bytes()
    assert not train(SETTINGS, data, made, force=True).skipped
    assert (made / "model.safetensors").read_bytes() == before, "the same inputs give the same student"


def test_what_changes_the_student_redoes_it(made: Path, data: TrainingData, tmp_path: Path) -> None:
    usual = key(train_stage(SETTINGS, data, made))
    others = ImageSet.scan(colour_folders(tmp_path / "other", CLASSES, each=2, seed=5))
    lively_student().save(tmp_path / "weights")
    given = replace(SETTINGS, weights=str(tmp_path / "weights"))
    keys = {
        key(train_stage(replace(SETTINGS, seed=1), data, made)),
        key(train_stage(replace(SETTINGS, epochs=3), data, made)),
        key(train_stage(SETTINGS, replace(data, photos=others), made)),
        key(train_stage(SETTINGS, replace(data, synthetic=others), made)),
        key(train_stage(SETTINGS, replace(data, synthetic=None), made)),
        key(train_stage(given, data, made)),
    }
    lively_student(seed=1).save(tmp_path / "weights")
    keys.add(key(train_stage(given, data, made)))
    assert len({usual, *keys}) == 8
    assert key(train_stage(SETTINGS, data, tmp_path / "elsewhere")) == usual


class Interrupted(Exception):
    pass


def failing_fit(stage: str, at: int) -> Callable[..., None]:
    """`fit` that is killed after some steps of one stage, and counts on as usual in others."""
    real = training.fit

    def watched(*arguments: Any, label: str, **others: Any) -> None:
        def kill(steps: int) -> None:
            if steps == at:
                raise Interrupted

        real(*arguments, label=label, **others, watch=(1, kill) if label == stage else None)

    return watched


@pytest.mark.parametrize(("stage", "at"), [("train on synthetic", 3), ("train on real", 2)])
def test_an_interrupted_run_ends_as_an_uninterrupted_one(
    made: Path, data: TrainingData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str, at: int
) -> None:
    monkeypatch.setattr(training, "_CHECKPOINT_EVERY", 2)
    with monkeypatch.context() as patch:
        patch.setattr(training, "fit", failing_fit(stage, at))
        with pytest.raises(Interrupted):
            train(SETTINGS, data, tmp_path / "student")
    assert not (tmp_path / "student").exists()
    done: list[str] = []
    real = training.fit

    def count(student: Any, examples: Any, settings: Any, *, label: str, **others: Any) -> None:
        done.append(label)
        real(student, examples, settings, label=label, **others)

    monkeypatch.setattr(training, "fit", count)
    result = train(SETTINGS, data, tmp_path / "student")
    assert done == (
        ["train on real"] if stage == "train on real" else ["train on synthetic", "train on real"]
    )
    assert same(result.out, made) and same(result.out / SYNTHETIC, made / SYNTHETIC)


def test_the_real_stage_begins_with_a_new_head(data: TrainingData, made: Path, tmp_path: Path) -> None:
    out = train(replace(SETTINGS, real_steps=0), data, tmp_path / "student").out
    after, before = parameters(out), parameters(out / SYNTHETIC)
    assert {key for key in after if not torch.equal(after[key], before[key])} == {"fc.weight", "fc.bias"}


def test_one_kind_of_images_is_enough(data: TrainingData, tmp_path: Path) -> None:
    real = train(SETTINGS, replace(data, synthetic=None), tmp_path / "real")
    assert not (real.out / SYNTHETIC).exists()
    assert real.manifest.metrics["synthetic_steps"] == 0
    assert load_student(real.out).preprocessing.input_size == (3, 64, 64)
    synthetic = train(SETTINGS, replace(data, photos=None), tmp_path / "synthetic")
    assert same(synthetic.out, synthetic.out / SYNTHETIC)
    with pytest.raises(ConfigError, match="nothing to train on"):
        train(SETTINGS, TrainingData(None, None), tmp_path / "none")


def test_weights_are_where_training_starts(data: TrainingData, tmp_path: Path) -> None:
    start = lively_student(seed=2, classes=("x", "y"))
    start.save(tmp_path / "weights")
    settings = replace(SETTINGS, weights=str(tmp_path / "weights"), lr=0.0, real_steps=1)
    out = train(settings, replace(data, synthetic=None), tmp_path / "student").out
    own, given = parameters(out), start.model.state_dict()
    assert torch.equal(own["conv1.0.weight"], given["conv1.0.weight"])
    assert load_student(out).preprocessing == start.preprocessing


def test_what_cannot_be_trained_is_refused(data: TrainingData, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no weights .*absent"):
        train(replace(SETTINGS, weights="absent"), data, tmp_path / "student")
    with pytest.raises(ModelError, match=r"knows no student 'test_resnt'.*test_resnet"):
        train(replace(SETTINGS, student="test_resnt"), data, tmp_path / "student")
    foreign = ImageSet.scan(colour_folders(tmp_path / "foreign", ("a", "b"), each=1))
    with pytest.raises(DataError, match="differ in the classes"):
        train(SETTINGS, replace(data, photos=foreign), tmp_path / "student")
    assert not (tmp_path / "student").exists()


def test_large_synthetic_images_are_trained_at_a_usual_size(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / "large" / name).mkdir(parents=True)
        pixels = np.resize(noise(1)[0], (300, 260, 3))
        Image.fromarray(pixels + np.uint8(name == "b")).save(tmp_path / "large" / name / "0.png")
    data = TrainingData(ImageSet.scan(tmp_path / "large"), None)
    out = train(replace(SETTINGS, epochs=1), data, tmp_path / "student").out
    assert load_student(out).preprocessing.input_size == (3, 224, 224)
