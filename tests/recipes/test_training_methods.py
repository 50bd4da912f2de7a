"""Every training method trains what it says, for the number of steps that makes it comparable."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
from click.testing import CliRunner

pytest.importorskip("timm")

import torch

from synthkit.cli import main
from synthkit.data.images import ImageSet
from synthkit.errors import ConfigError
from synthkit.learning import fit as training
from synthkit.learning.fit import Examples, FitSettings
from synthkit.learning.mixed_batches import MixedBatches
from synthkit.learning.students import SYNTHETIC, load_student
from synthkit.recipes.settings import TrainSettings
from synthkit.recipes.train import BRIDGED, METHODS, TrainingData
from tests.stages import given, key, train, train_stage
from tests.tiny_students import colour_folders, lively_student

SETTINGS = TrainSettings(student="test_resnet", epochs=2, real_steps=3, batch_size=8)
Runs = list[tuple[str, Any, FitSettings]]


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> Runs:
    """What `fit` is called with; it trains as usual."""
    seen: Runs = []
    real: Callable[..., None] = training.fit

    def watched(student: Any, batches: Any, settings: FitSettings, *, label: str, **others: Any) -> None:
        seen.append((label, batches, settings))
        real(student, batches, settings, label=label, **others)

    monkeypatch.setattr(training, "fit", watched)
    return seen


def state(folder: Path) -> dict[str, torch.Tensor]:
    return dict(load_student(folder).model.state_dict())


def equal(one: Path, other: Path) -> bool:
    left, right = state(one), state(other)
    return all(torch.equal(left[key], right[key]) for key in left)


def test_settings_and_table_name_the_same_methods() -> None:
    assert set(get_args(get_type_hints(TrainSettings)["method"])) == set(METHODS)
    assert TrainSettings().method == BRIDGED


# Name -> (label, steps, images per step, Mixup) of every stage; 4 steps on synthetic images, 3 on real ones.
EXPECTED = {
    "vanilla": [("train on real", 3, 8, 0.0)],
    "vanilla-matched": [("train on real", 7, 8, 0.0)],
    "vanilla-mixup": [("train on real", 7, 8, 0.2)],
    "synthetic": [("train on synthetic", 4, 8, 0.2)],
    "mixed": [("train on mixed", 7, 8, 0.0)],
    "joint": [("train on mixed", 7, 8, 0.0)],
    "mixed-auxbn": [("train on mixed", 7, 8, 0.0)],
    "bridged": [("train on synthetic", 4, 8, 0.0), ("train on real", 3, 8, 0.0)],
    "bridged++": [("train on synthetic", 4, 8, 0.2), ("train on real", 3, 8, 0.0)],
}


@pytest.mark.parametrize("name", METHODS)
def test_stages_and_steps(data: TrainingData, tmp_path: Path, runs: Runs, name: str) -> None:
    settings = replace(SETTINGS, method=name)  # type: ignore[arg-type]
    result = train(settings, data, tmp_path / "student")
    assert [(label, one.steps, one.batch_size, one.mixup) for label, _, one in runs] == EXPECTED[name]
    metrics = result.manifest.metrics
    total = sum(metrics[key] for key in metrics if key.endswith("_steps"))
    assert total == sum(steps for _, steps, _, _ in EXPECTED[name])
    student = load_student(result.out)
    assert student.preprocessing.input_size == (3, 32, 32), "the same size, whatever is learned from"
    assert not [key for key in state(result.out) if "aux" in key]
    last = result.out / SYNTHETIC if name == "synthetic" else result.out
    assert len(json.loads((last / "curves.json").read_text("utf-8"))["loss"]) == EXPECTED[name][-1][1]
    assert not [path for path in result.out.rglob(".*") if path.name != ".key.json"]


@pytest.mark.slow
def test_what_is_blended(data: TrainingData, tmp_path: Path, runs: Runs) -> None:
    asked = [
        ("mixed", {}, 1 / 3, None),  # 6 photos of 18 images
        ("mixed", {"real_share": 0.25}, 0.25, None),
        ("joint", {}, 0.5, 0.8),
        ("joint", {"real_share": 0.25, "real_weight": 0.6}, 0.25, 0.6),
        ("mixed-auxbn", {}, 0.5, None),
    ]
    for number, (name, changes, share, weight) in enumerate(asked):
        settings = replace(SETTINGS, real_steps=0, epochs=1, method=name, **changes)  # type: ignore[arg-type]
        train(settings, data, tmp_path / str(number))
        batches = runs[-1][1]
        assert isinstance(batches, MixedBatches) and (batches.share, batches.weight) == (
            pytest.approx(share),
            weight,
        )
    assert isinstance(vanilla_batches(data, tmp_path, runs), Examples)


def vanilla_batches(data: TrainingData, tmp_path: Path, runs: Runs) -> Any:
    train(replace(SETTINGS, real_steps=1, method="vanilla"), data, tmp_path / "vanilla")
    return runs[-1][1]


def test_bridged_keeps_the_head_and_bridged_plus_does_not(data: TrainingData, tmp_path: Path) -> None:
    for name, kept in (("bridged", True), (BRIDGED, False)):
        settings = replace(SETTINGS, real_steps=0, method=name)  # type: ignore[arg-type]
        out = train(settings, data, tmp_path / name).out
        assert equal(out, out / SYNTHETIC) is kept


def test_matched_vanilla_is_the_photos_alone_for_all_steps(data: TrainingData, tmp_path: Path) -> None:
    matched = train(replace(SETTINGS, method="vanilla-matched"), data, tmp_path / "matched").out
    alone = replace(SETTINGS, real_steps=7, image_size=32)
    assert equal(matched, train(alone, replace(data, synthetic=None), tmp_path / "alone").out)


@pytest.mark.parametrize(
    ("name", "missing", "text"),
    [
        ("vanilla", "photos", "--method vanilla needs --real-dir"),
        ("vanilla-matched", "synthetic", "needs --synth-dir and --real-dir; its number of steps"),
        ("synthetic", "synthetic", "--method synthetic needs --synth-dir"),
        ("mixed", "photos", "--method mixed needs --synth-dir and --real-dir"),
    ],
)
def test_what_a_method_needs_is_named(
    data: TrainingData, tmp_path: Path, name: str, missing: str, text: str
) -> None:
    with pytest.raises(ConfigError, match=text):
        settings = replace(SETTINGS, method=name)  # type: ignore[arg-type]
        train(settings, replace(data, **{missing: None}), tmp_path / "student")


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"real_share": 1.0}, "real_share = 1.0: must lie between 0 and 1"),
        ({"real_weight": 1.5}, "real_weight = 1.5: must be at most 1"),
        ({"layer_decay": 0.0}, "layer_decay = 0.0: must be above 0"),
        ({"ema": 1.0}, "ema = 1.0: must be below 1"),
        ({"accumulate": 3}, "accumulate = 3: batches of 8 images cannot be cut"),
        ({"method": "mixed-auxbn", "batch_size": 7}, "batch_size = 7: mixed-auxbn"),
    ],
)
def test_values_out_of_range_are_refused(
    data: TrainingData, tmp_path: Path, changes: dict[str, Any], text: str
) -> None:
    with pytest.raises(ConfigError, match=text):
        train(replace(SETTINGS, **changes), data, tmp_path / "student")


def test_every_setting_but_the_device_counts(data: TrainingData, tmp_path: Path) -> None:
    usual = key(train_stage(SETTINGS, data, tmp_path))
    changes: list[dict[str, Any]] = [
        {"method": "joint"},
        {"real_share": 0.4},
        {"real_weight": 0.7},
        {"held_out": 1},
        {"opt": "sgd"},
        {"schedule": "cosine"},
        {"layer_decay": 0.8},
        {"ema": 0.9},
        {"augment": "none"},
        {"amp": True},
        {"accumulate": 2},
    ]
    keys = [key(train_stage(replace(SETTINGS, **one), data, tmp_path)) for one in changes]
    assert len({usual, *keys}) == len(changes) + 1
    assert key(train_stage(replace(SETTINGS, device="cpu"), data, tmp_path)) == usual


@pytest.mark.slow
def test_the_student_does_not_depend_on_names_and_order_of_the_files(
    data: TrainingData, tmp_path: Path
) -> None:
    """Nor on where the folders lie."""
    sets = []
    for index, images in enumerate((data.synthetic, data.photos)):
        assert images is not None
        for item in reversed(images.items):  # written in another order, under other names
            folder = tmp_path / f"elsewhere {index}" / images.classes[item.label] / item.sha256[:2]
            folder.mkdir(parents=True, exist_ok=True)
            shutil.copy(item.path, folder / f"photo {item.sha256[5:]}.png")
        sets.append(ImageSet.scan(tmp_path / f"elsewhere {index}"))
    for name in (BRIDGED, "mixed"):
        settings = replace(SETTINGS, method=name, held_out=1)  # type: ignore[arg-type]
        here = train(settings, data, tmp_path / name)
        there = train(settings, TrainingData(*sets), tmp_path / "other" / name)
        assert here.manifest.key == there.manifest.key
        assert here.manifest.outputs == there.manifest.outputs


def test_held_out_photos_choose_and_are_not_learned(data: TrainingData, tmp_path: Path, runs: Runs) -> None:
    settings = replace(SETTINGS, held_out=1)
    out = train(settings, data, tmp_path / "student").out
    assert [len(batches) for _, batches, _ in runs] == [12, 3]
    curves = json.loads((out / "curves.json").read_text("utf-8"))
    assert [step for step, _ in curves["validation"]] == [1, 2, 3]
    assert json.loads((out / SYNTHETIC / "curves.json").read_text("utf-8"))["validation"] == []


def test_too_few_photos_hold_nothing_out_and_say_so(
    data: TrainingData, tmp_path: Path, runs: Runs, caplog: pytest.LogCaptureFixture
) -> None:
    train(replace(SETTINGS, held_out=2), data, tmp_path / "student")
    assert [len(batches) for _, batches, _ in runs] == [12, 6]
    assert "no photos are held out and the last weights are kept, since" in caplog.text
    assert "has 2 photos; train.held_out = 2 takes 4 of each class" in caplog.text


def call(workspace: Path, *words: str | Path) -> Any:
    return CliRunner().invoke(main, ["--workspace", str(workspace), "train", *map(str, words)])


def folders(data: TrainingData) -> list[str | Path]:
    assert data.synthetic and data.photos
    return ["--synth-dir", data.synthetic.root, "--real-dir", data.photos.root]


QUICK = "--student test_resnet --epochs 1 --set train.real_steps=2 --set train.batch_size=8".split()


@pytest.mark.slow
def test_the_command_takes_method_and_options(data: TrainingData, tmp_path: Path) -> None:
    settings = (
        "real_weight=0.7 opt=sgd schedule=cosine layer_decay=0.8 ema=0.5 augment=rand-m5 amp=true "
        "accumulate=2 held_out=1 device=cpu"
    )
    options = ["--method", "joint", *given(*(f"train.{one}" for one in settings.split()))]
    result = call(tmp_path / "w", *folders(data), *QUICK, *options, "--json")
    assert result.exit_code == 0, result.stderr
    answer = json.loads(result.stdout)
    assert answer["mixed_steps"] == 4 and load_student(tmp_path / "w/student").classes
    again = call(tmp_path / "w", *folders(data), *QUICK, *options)
    assert (
        "joint: 0 steps on 12 synthetic, 0 on 6 real images, 4 on both (unchanged, skipped)" in again.stdout
    )


def test_the_same_image_in_two_classes_is_refused_by_name(tmp_path: Path) -> None:
    photos = colour_folders(tmp_path / "photos", ("a", "b"), each=2)
    shutil.copy(photos / "a" / "0.png", photos / "b" / "copy.png")
    result = call(tmp_path / "w", "--real-dir", photos, *QUICK)
    assert result.exit_code == 1 and result.stderr.count("\n") == 1
    assert "1 image(s) of" in result.stderr and "lie in two classes" in result.stderr
    assert str(photos / "a" / "0.png") in result.stderr and str(photos / "b" / "copy.png") in result.stderr


def test_a_learning_rate_that_blows_up_ends_in_one_line(data: TrainingData, tmp_path: Path) -> None:
    result = call(tmp_path / "w", *folders(data), *QUICK, *given("train.lr=1e30"))
    assert result.exit_code == 1 and result.stderr.strip().count("\n") == 0, result.stderr
    assert "with a peak learning rate of 1e+30; lower it" in result.stderr
    assert not (tmp_path / "w/student").exists()


def test_weights_of_another_architecture_name_it(data: TrainingData, tmp_path: Path) -> None:
    lively_student(name="resnet10t").save(tmp_path / "weights")
    weights = tmp_path / "weights" / "model.safetensors"
    result = call(tmp_path / "w", *folders(data), *QUICK, "--weights", weights)
    assert result.exit_code == 1 and result.stderr.count("\n") == 1
    assert "holds no weights of test_resnet" in result.stderr
    assert "; they are weights of resnet10t; name the architecture" in result.stderr
