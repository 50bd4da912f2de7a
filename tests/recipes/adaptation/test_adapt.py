"""`adapt`: the strategy that suits the photos is selected by cross-validation, and only that is trained."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("timm")

import torch

from synthkit.artifacts import StageResult
from synthkit.data.images import ImageSet
from synthkit.errors import ConfigError, DataError, ModelError
from synthkit.learning.feature_cache import CachedFeatures
from synthkit.learning.fit import Examples, FitSettings, fit
from synthkit.learning.students import SYNTHETIC, Student, load_student, new_student
from synthkit.recipes.adaptation import selection, strategies
from synthkit.recipes.adaptation.adapt import Adapt, describe
from synthkit.recipes.adaptation.selection import CrossValidationResult, select_strategy
from synthkit.recipes.adaptation.strategies import AdaptationTask, StartingStudent, Strategy
from synthkit.recipes.settings import AdaptSettings, TrainSettings
from synthkit.recipes.train import TrainingData
from tests.stages import adapt, key, train
from tests.tiny_students import colour_folders

COLOURS = ("blue", "green", "red")
TRAINING = TrainSettings(student="test_resnet", epochs=1, real_steps=2, batch_size=6)
SETTINGS = AdaptSettings(adapt_steps=8, adapt_lr=0.1)


@pytest.fixture(autouse=True)
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(strategies, "_BATCH", 6)


def scan(folder: Path, each: int, seed: int, classes: tuple[str, ...] = COLOURS) -> ImageSet:
    return ImageSet.scan(colour_folders(folder, classes, each=each, seed=seed))


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("adapt")


@pytest.fixture(scope="module")
def photos(home: Path) -> ImageSet:
    return scan(home / "few_shots", 3, 1)


@pytest.fixture(scope="module")
def good(home: Path) -> Student:
    """A student that tells the colours apart, as from perfect synthetic images."""
    student = new_student("test_resnet", COLOURS, image_size=32)
    images = scan(home / "perfect", 6, 7)
    fit(student, Examples(images, student.preprocessing), FitSettings(40, 0.01, 18))
    return student


@pytest.fixture(scope="module")
def trained(home: Path, photos: ImageSet) -> Path:
    """What the stage `train` writes."""
    return train(TRAINING, TrainingData(scan(home / "synthetic", 4, 3), photos), home / "student").out


def permuted(student: Student) -> Student:
    """A good body whose head calls each colour by the next one's name."""
    wrong = student.clone()
    with torch.no_grad():
        wrong.head.weight.copy_(wrong.head.weight.roll(1, 0))
        wrong.head.bias.copy_(wrong.head.bias.roll(1, 0))
    return wrong


def saved(student: Student, folder: Path) -> Path:
    student.save(folder)
    return folder


def parameters(folder: Path) -> dict[str, torch.Tensor]:
    return dict(load_student(folder).model.state_dict())


def moved(first: Path, second: Path) -> set[str]:
    one, other = parameters(first), parameters(second)
    return {key for key in one if not torch.equal(one[key], other[key])}


def run(student: Path | None, photos: ImageSet, out: Path, **changes: Any) -> StageResult:
    return adapt(replace(SETTINGS, **changes), TRAINING, student, photos, out)


def choice(student: Student, photos: ImageSet, **changes: Any) -> tuple[str, dict[str, float]]:
    """The selected strategy, and each strategy's share of held-out photos that were right."""
    examples = Examples(photos, student.preprocessing)
    chosen = select_strategy(
        AdaptationTask(StartingStudent(student, True, None), examples, replace(SETTINGS, **changes), TRAINING)
    )
    return chosen.strategy.value, {one.strategy.value: one.top1 for one in chosen.cross_validation}


@pytest.mark.slow
def test_a_head_that_mixes_the_classes_up_is_adapted(good: Student, photos: ImageSet, tmp_path: Path) -> None:
    selected, scores = choice(permuted(good), photos)
    assert scores["unchanged"] == 0 and scores["last-1"] > 0.8
    assert selected != "unchanged" and scores[selected] == max(scores.values())
    result = run(saved(permuted(good), tmp_path / "student"), photos, tmp_path / "adapted")
    others = scan(tmp_path / "test", 4, 11)
    adapted = load_student(result.out)
    right = adapted.logits(others.load(adapted.preprocessing)).argmax(1).numpy() == others.labels
    assert right.mean() > 0.8


@pytest.mark.slow
def test_a_perfect_student_is_not_trained_anew(good: Student, photos: ImageSet) -> None:
    selected, scores = choice(good, photos)
    assert scores["unchanged"] == 1 and scores["full"] < 1, "2 steps from a new head are too few"
    assert selected == "unchanged", "of equal strategies the one that changes least"


@pytest.mark.slow
def test_the_verdicts_say_which_and_why(good: Student, photos: ImageSet, tmp_path: Path) -> None:
    metrics = run(saved(good, tmp_path / "student"), photos, tmp_path / "adapted").manifest.metrics
    assert [one["strategy"] for one in metrics["cross_validation"]] == [one.value for one in Strategy]
    assert "of 9 held-out photos right in 3-fold cross-validation" in metrics["reason"]
    chosen = next(one for one in metrics["cross_validation"] if one["strategy"] == metrics["strategy"])
    assert metrics["steps"] == chosen["steps"]
    assert json.loads((tmp_path / "adapted" / "manifest.json").read_text("utf-8"))["metrics"] == metrics
    text = describe(metrics["cross_validation"])
    assert text.count("\n") == 4 and "unchanged  100% of held-out photos" in text


@pytest.mark.slow
def test_the_curves_of_the_path_are_kept(trained: Path, photos: ImageSet, tmp_path: Path) -> None:
    result = run(trained, photos, tmp_path / "adapted", strategy="last-1")
    curves = json.loads((result.out / "curves.json").read_text("utf-8"))
    assert len(curves["loss"]) == len(curves["lr"]) == result.manifest.metrics["steps"] == 8


@pytest.mark.slow
def test_all_layers_are_stopped_early_once_they_fall_behind(good: Student, photos: ImageSet) -> None:
    examples = Examples(photos, good.preprocessing)
    chosen = select_strategy(AdaptationTask(StartingStudent(good, True, None), examples, SETTINGS, TRAINING))
    figures = {result.strategy.value: result.to_json() for result in chosen.cross_validation}
    assert figures["full"]["photos"] < 9 and figures["last-4"]["photos"] == 9
    assert f"stopped early after {figures['full']['photos']} of 9" in describe(list(figures.values()))


@pytest.mark.slow
def test_all_layers_that_keep_up_are_judged_on_every_photo(good: Student, photos: ImageSet) -> None:
    """A start that has lost its way, where all layers have as good a chance as any."""
    lost = replace(SETTINGS, adapt_lr=1e-9)
    task = AdaptationTask(
        StartingStudent(permuted(good), True, None), Examples(photos, good.preprocessing), lost, TRAINING
    )
    full = select_strategy(task).cross_validation[-1]
    assert full.evaluated.all() and full.top1 == full.correct.mean()


@pytest.mark.slow
def test_a_path_that_was_stopped_early_is_not_taken(
    good: Student, photos: ImageSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However well it did on the few photos that it was judged on."""
    stopped = CrossValidationResult(Strategy.FULL, 2, 1.0, 0.0, np.arange(9) < 3, np.arange(9) < 3)
    real = selection.cross_validate
    monkeypatch.setattr(
        selection,
        "cross_validate",
        lambda strategy, *rest, **more: (
            stopped if strategy is Strategy.FULL else real(strategy, *rest, **more)
        ),
    )
    assert choice(permuted(good), photos, adapt_lr=1e-9)[0] != "full"


@pytest.mark.slow
def test_no_photo_is_judged_by_a_student_that_saw_it(
    good: Student, photos: ImageSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    folds: list[tuple[set[int], set[int]]] = []  # of each call of fit: photos learned, photos judged

    def watching(kind: type[Any]) -> None:
        real_subset, real_logits = kind.subset, kind.logits

        def subset(self: Any, indices: Any) -> Any:
            folds.append((set(indices.tolist()), set()))
            return real_subset(self, indices)

        def logits(self: Any, student: Student, indices: Any) -> Any:
            folds[-1][1].update(indices.tolist())
            return real_logits(self, student, indices)

        monkeypatch.setattr(kind, "subset", subset)
        monkeypatch.setattr(kind, "logits", logits)

    watching(Examples)
    watching(CachedFeatures)
    choice(good, photos)
    assert len(folds) == 4 * 3 + 1, "four paths in three folds, all layers in the one where they fell behind"
    assert all(learned | judged == set(range(9)) and not learned & judged for learned, judged in folds)


def test_unchanged_keeps_every_weight(trained: Path, photos: ImageSet, tmp_path: Path) -> None:
    result = run(trained, photos, tmp_path / "adapted", strategy="unchanged")
    assert not moved(result.out, trained / SYNTHETIC)
    assert (result.manifest.metrics["steps"], result.manifest.metrics["reason"]) == (0, "as asked for")


@pytest.mark.slow
@pytest.mark.parametrize("count", [1, 2, 4])
def test_layers_train_so_many_units_and_no_statistics(
    good: Student, photos: ImageSet, tmp_path: Path, count: int
) -> None:
    student = saved(good, tmp_path / "student")
    result = run(student, photos, tmp_path / "adapted", strategy=f"last-{count}", adapt_steps=3)
    units = good.layer_groups()[-count:]
    assert result.manifest.metrics["strategy"] == f"last-{count}"
    assert moved(result.out, student) == {name for unit in units for name in unit}


def test_a_student_that_cannot_be_cut_is_adapted_all_the_same(
    good: Student, photos: ImageSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(student: Student) -> None:
        raise NotImplementedError(student.architecture)

    monkeypatch.setattr("synthkit.learning.feature_cache.split", refuse)
    student = saved(good, tmp_path / "student")
    result = run(student, photos, tmp_path / "adapted", strategy="last-1", adapt_steps=3)
    assert moved(result.out, student) == {"fc.weight", "fc.bias"}


@pytest.mark.slow
def test_the_full_path_ends_where_train_does(trained: Path, photos: ImageSet, tmp_path: Path) -> None:
    taken = run(trained, photos, tmp_path / "taken", strategy="full").out
    assert not moved(taken, trained)
    alone = saved(load_student(trained / SYNTHETIC), tmp_path / "alone")
    assert not moved(run(alone, photos, tmp_path / "followed", strategy="full").out, trained)


@pytest.mark.slow
@pytest.mark.parametrize(("method", "steps"), [("synthetic", 2), ("bridged", 2), ("bridged++", 3)])
def test_only_bridged_transfer_of_these_settings_is_taken_for_the_full_path(
    home: Path, photos: ImageSet, tmp_path: Path, method: str, steps: int
) -> None:
    settings = replace(TRAINING, method=method, real_steps=steps)  # type: ignore[arg-type]
    made = train(settings, TrainingData(scan(tmp_path / "drawn", 3, 3), photos), tmp_path / "student").out
    assert moved(run(made, photos, tmp_path / "adapted", strategy="full").out, made)


def test_the_full_path_learns_the_photos_that_were_given(trained: Path, tmp_path: Path) -> None:
    """The student's folder holds one that learned other photos, which says nothing of these."""
    others = scan(tmp_path / "others", 2, 21)
    assert moved(run(trained, others, tmp_path / "adapted", strategy="full").out, trained)


def test_one_photo_of_a_class_leaves_nothing_to_hold_out(
    trained: Path, good: Student, tmp_path: Path
) -> None:
    """What knows the classes stays as it is; a new head has to learn."""
    one = scan(tmp_path / "one", 1, 5)
    metrics = run(trained, one, tmp_path / "adapted").manifest.metrics
    assert (metrics["strategy"], metrics["steps"], metrics["cross_validation"]) == ("unchanged", 0, [])
    assert "one photo" in metrics["reason"]
    settings = replace(TRAINING, weights=str(saved(good, tmp_path / "weights")))
    fresh = adapt(SETTINGS, settings, None, one, tmp_path / "fresh").manifest.metrics
    assert (fresh["strategy"], fresh["steps"]) == ("last-4", 8)


@pytest.mark.slow
def test_no_steps_on_real_photos_is_a_choice_too(good: Student, photos: ImageSet) -> None:
    examples, start = Examples(photos, good.preprocessing), StartingStudent(good, True, None)
    assert (
        select_strategy(
            AdaptationTask(start, examples, SETTINGS, replace(TRAINING, real_steps=0))
        ).strategy.value
        != "full"
    )


@pytest.mark.slow
def test_a_student_that_learned_the_photos_is_no_fair_judge_of_them(
    trained: Path, photos: ImageSet, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run(trained, photos, tmp_path / "fair", strategy="last-1")
    assert "has learned these very photos" not in caplog.text
    biased = shutil.copytree(trained, tmp_path / "student", ignore=shutil.ignore_patterns("synthetic"))
    run(biased, photos, tmp_path / "biased", strategy="last-1")
    assert f"{biased} has learned these very photos" in caplog.text


def test_an_unchanged_stage_is_skipped(trained: Path, photos: ImageSet, tmp_path: Path) -> None:
    first = run(trained, photos, tmp_path / "adapted", strategy="last-1")
    again = run(trained, photos, tmp_path / "adapted", strategy="last-1")
    assert again.skipped and again.manifest == first.manifest


@pytest.mark.slow
def test_names_folders_and_order_of_the_photos_change_no_weight(
    trained: Path, photos: ImageSet, tmp_path: Path
) -> None:
    for item in photos.items:
        folder = tmp_path / "elsewhere" / photos.classes[item.label] / item.sha256[:2]
        folder.mkdir(parents=True)
        shutil.copy(item.path, folder / f"photo {item.sha256[:6]}.png")
    moved_photos = ImageSet.scan(tmp_path / "elsewhere")
    first = run(trained, photos, tmp_path / "first", strategy="last-2")
    other = run(trained, moved_photos, tmp_path / "other", strategy="last-2")
    assert not moved(first.out, other.out)
    assert first.manifest.metrics == other.manifest.metrics


@pytest.mark.slow
def test_the_number_of_threads_changes_no_answer(trained: Path, photos: ImageSet, tmp_path: Path) -> None:
    """Sums may round otherwise; what is chosen and answered stays."""
    before, found = torch.get_num_threads(), {}
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            result = run(trained, photos, tmp_path / str(threads))
            student = load_student(result.out)
            found[threads] = (
                student.logits(photos.load(student.preprocessing)),
                result.manifest.metrics["strategy"],
            )
    finally:
        torch.set_num_threads(before)
    assert found[1][1] == found[2][1]
    torch.testing.assert_close(found[1][0], found[2][0], rtol=1e-3, atol=1e-3)


def test_what_changes_the_result_redoes_it(
    good: Student, trained: Path, photos: ImageSet, tmp_path: Path
) -> None:
    def of(settings: AdaptSettings = SETTINGS, dir: Path = trained, images: ImageSet = photos) -> str:
        return key(Adapt(settings, TRAINING, dir, images, tmp_path / "adapted"))

    student = saved(good, tmp_path / "student")
    others = scan(tmp_path / "others", 2, 5)
    keys = [of(), of(replace(SETTINGS, seed=1)), of(replace(SETTINGS, strategy="last-2")), of(images=others)]
    keys.append(of(dir=student))
    saved(permuted(good), student)
    assert len({*keys, of(dir=student)}) == 6


@pytest.mark.slow
def test_without_synthetic_images_a_weights_folder_is_the_start(
    good: Student, photos: ImageSet, tmp_path: Path
) -> None:
    """`--no-synth --weights DIR`: the body is the given one, the head is new, and it learns."""
    weights = saved(good, tmp_path / "weights")
    settings = replace(TRAINING, weights=str(weights))
    result = adapt(SETTINGS, settings, None, photos, tmp_path / "adapted")
    scores = {one["strategy"]: one["top1"] for one in result.manifest.metrics["cross_validation"]}
    assert "unchanged" not in scores and scores["last-1"] > 0.8
    forced = adapt(replace(SETTINGS, strategy="last-1"), settings, None, photos, tmp_path / "head")
    assert moved(forced.out, weights) == {"fc.weight", "fc.bias"}
    keys = [key(Adapt(SETTINGS, settings, None, photos, tmp_path / "adapted"))]
    saved(permuted(good), weights)
    keys.append(key(Adapt(SETTINGS, settings, None, photos, tmp_path / "adapted")))
    assert len(set(keys)) == 2


def refusal(call: Callable[[], Any], kind: type[Exception]) -> str:
    with pytest.raises(kind) as caught:
        call()
    return str(caught.value)


def test_what_cannot_be_done_is_refused_before_any_work(
    trained: Path, photos: ImageSet, tmp_path: Path
) -> None:
    out = tmp_path / "adapted"
    text = refusal(lambda: run(trained, photos, out, strategy="lst-2"), ConfigError)
    assert "no strategy 'lst-2'; did you mean last-2" in text and "unchanged" in text
    assert "no student in" in refusal(lambda: run(tmp_path / "absent", photos, out), ModelError)
    text = refusal(lambda: run(None, photos, out, strategy="unchanged"), ConfigError)
    assert "--no-synth" in text and "--student" in text
    settings = replace(TRAINING, weights=str(tmp_path / "absent"))
    assert "no weights" in refusal(lambda: adapt(SETTINGS, settings, None, photos, out), ConfigError)
    assert not list(tmp_path.iterdir())
    foreign = scan(tmp_path / "foreign", 2, 1, ("blue", "green", "pink"))
    text = refusal(lambda: run(trained, foreign, out), DataError)
    assert "knows the classes blue, green, red, the photos show blue, green, pink" in text


@pytest.mark.slow
def test_the_order_of_a_student_s_classes_is_kept(good: Student, photos: ImageSet, tmp_path: Path) -> None:
    """A folder from elsewhere may list its classes in another order than the photos' folders have."""
    turned = permuted(good)
    student = Student(turned.model, turned.architecture, {}, ("red", "blue", "green"), turned.preprocessing)
    result = run(saved(student, tmp_path / "student"), photos, tmp_path / "adapted")
    assert load_student(result.out).classes == ("red", "blue", "green")
    assert result.manifest.metrics["cross_validation"][0]["top1"] == 1.0
