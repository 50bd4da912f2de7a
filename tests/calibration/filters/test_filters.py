"""Filters: each catches a planted image and leaves the good ones; results hang on the list alone."""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageEnhance

from synthkit.artifacts import Manifest, write_json
from synthkit.calibration.filters import filters as filters_module
from synthkit.calibration.filters.filters import Filters, chosen_filters, filter_inputs, fit_filters
from synthkit.calibration.filters.reference_classifier import BATCH
from synthkit.data.images import ImageSet
from synthkit.errors import BadImages, ConfigError, DataError, ModelError
from synthkit.recipes.settings import FilterSettings
from tests.colour_classes import CLASSES, WORDS, class_folders, colour_student, picture, tiny_clip
from tests.tiny_students import lively_student


def in_order(root: Path) -> list[tuple[Path, str]]:
    return [(path, path.parent.name) for path in sorted(root.glob("*/*.png"))]


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> ImageSet:
    return ImageSet.scan(class_folders(tmp_path_factory.mktemp("photos") / "real", 4, 0, faintest=70))


@pytest.fixture(scope="module")
def held_out(tmp_path_factory: pytest.TempPathFactory) -> ImageSet:
    return ImageSet.scan(class_folders(tmp_path_factory.mktemp("photos") / "test", 6, 100))


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return colour_student(tmp_path_factory.mktemp("classifier"))


@pytest.fixture
def synthetic(tmp_path: Path) -> Path:
    return class_folders(tmp_path / "synthetic", 5, seed=200)


def settings(filters: str, student: Path | None = None, **further: Any) -> FilterSettings:
    return FilterSettings(filter=filters, classifier=str(student) if student else None, **further)


def rejected(filters: Filters, root: Path) -> dict[str, str]:
    """File -> reason of what the filters reject of a set."""
    images = in_order(root)
    found = zip(images, filters.reasons(images), strict=True)
    return {f"{name}/{path.stem}": reason for (path, name), reason in found if reason}


def test_each_filter_catches_what_was_planted_and_nothing_else(
    photos: ImageSet, held_out: ImageSet, student: Path, synthetic: Path
) -> None:
    everything = settings("blank,saturated,class,duplicate,leak", student, filter_quantile=0.0)
    filters = fit_filters(everything, photos, held_out, WORDS)
    assert rejected(filters, synthetic) == {}
    plant_one_of_each(synthetic, held_out)
    assert rejected(filters, synthetic) == {
        "red/00001": "blank",
        "red/00002": "saturated",
        "green/00003": "class",
        "blue/00004": "duplicate",
        "blue/00001": "leak",
    }
    for name in ("blank", "saturated", "class", "duplicate", "leak"):
        alone = fit_filters(settings(name, student, filter_quantile=0.0), photos, held_out, WORDS)
        assert set(rejected(alone, synthetic).values()) == {name}


def plant_one_of_each(synthetic: Path, held_out: ImageSet) -> None:
    Image.new("RGB", (32, 32), (30, 60, 200)).save(synthetic / "red" / "00001.png")
    loud = ImageEnhance.Contrast(picture("red", 301)).enhance(6)
    loud.save(synthetic / "red" / "00002.png")
    picture("red", 302).save(synthetic / "green" / "00003.png")
    darker = ImageEnhance.Brightness(Image.open(synthetic / "blue" / "00002.png")).enhance(0.9)
    darker.save(synthetic / "blue" / "00004.png")
    leaked = next(item.path for item in held_out.items if held_out.classes[item.label] == "blue")
    Image.open(leaked).resize((40, 40), Image.Resampling.BICUBIC).save(synthetic / "blue" / "00001.png")


def test_a_duplicate_is_one_within_its_class_and_of_an_image_that_stays(
    photos: ImageSet, held_out: ImageSet, synthetic: Path
) -> None:
    shutil.copy(synthetic / "blue" / "00000.png", synthetic / "red" / "00004.png")
    leaked = held_out.items[0].path
    for number in (1, 2):
        shutil.copy(leaked, synthetic / "green" / f"0000{number}.png")
    filters = fit_filters(settings("duplicate"), photos, None, WORDS)
    assert rejected(filters, synthetic) == {"green/00002": "duplicate"}
    filters = fit_filters(settings("duplicate,leak"), photos, held_out, WORDS)
    assert rejected(filters, synthetic) == {"green/00001": "leak", "green/00002": "leak"}


def test_copies_of_the_photos_are_counted_and_stay(photos: ImageSet, synthetic: Path) -> None:
    filters = fit_filters(settings("duplicate"), photos, None, WORDS)
    assert filters.near_photos(in_order(synthetic)) == 0
    shutil.copy(photos.items[0].path, synthetic / "blue" / "00003.png")
    assert rejected(filters, synthetic) == {}
    assert filters.near_photos(in_order(synthetic)) == 1
    assert fit_filters(settings("blank"), photos, None, WORDS).near_photos(in_order(synthetic)) is None


def test_verdicts_do_not_depend_on_rounds_or_batches(
    photos: ImageSet, held_out: ImageSet, student: Path, tmp_path: Path
) -> None:
    """Filtering a growing set, in parts and after an interruption, ends as that of the whole set."""
    root = class_folders(tmp_path / "many", 30, seed=200)
    plant_one_of_each(root, held_out)
    images = in_order(root)
    everything = settings("blank,saturated,class,duplicate,leak", student, filter_quantile=0.5)
    whole = fit_filters(everything, photos, held_out, WORDS).reasons(images)
    assert len(images) > BATCH and whole.count("class") > 5
    growing = fit_filters(everything, photos, held_out, WORDS)
    for end in (1, 7, 65, len(images)):
        growing.reasons(images[:end])
    assert growing.reasons(images) == whole
    backwards = fit_filters(everything, photos, held_out, WORDS)
    backwards.reasons(images[::-1])
    assert backwards.reasons(images) == whole


def test_an_image_is_measured_once_and_again_when_it_is_replaced(
    photos: ImageSet, synthetic: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[Path] = []
    read = filters_module.open_picture
    monkeypatch.setattr(filters_module, "open_picture", lambda path: opened.append(path) or read(path))
    filters = fit_filters(settings("blank,duplicate"), photos, None, WORDS)
    opened.clear()
    filters.reasons(in_order(synthetic))
    filters.reasons(in_order(synthetic))
    assert len(opened) == 15
    replaced = synthetic / "red" / "00001.png"
    save_as(replaced, picture("red", 7))
    assert rejected(filters, synthetic) == {}
    before = replaced.stat()
    save_as(synthetic / "new", Image.new("RGB", (32, 32), "navy"))
    os.utime(synthetic / "new", ns=(before.st_atime_ns, before.st_mtime_ns))
    (synthetic / "new").replace(replaced)  # as large and as old as the one before
    assert replaced.stat().st_size == before.st_size
    assert rejected(filters, synthetic) == {"red/00001": "blank"}
    save_as(replaced, picture("red", 8))  # into the same file
    os.utime(replaced, ns=(before.st_atime_ns, before.st_mtime_ns + 1000))
    assert rejected(filters, synthetic) == {}
    assert opened[15:] == [replaced] * 3


def save_as(path: Path, image: Image.Image) -> None:
    """Write an image as BMP, whose size in bytes does not depend on the pixels."""
    image.save(path, "BMP")


def test_clipped_pixels_are_held_against_the_photos_own(photos: ImageSet, tmp_path: Path) -> None:
    """Photos in black and white make black and white fine; nothing below one value in twenty is held against
    anybody."""
    root, loud = tmp_path / "synthetic", tmp_path / "loud"
    for name in CLASSES:
        for folder, seed in ((root, 0), (loud, 50)):
            (folder / name).mkdir(parents=True)
            for index in range(4):
                hard = ImageEnhance.Contrast(picture(name, seed + index)).enhance(8)
                hard.save(folder / name / f"{index}.png")
    calm = fit_filters(settings("saturated"), photos, None, WORDS)
    assert calm.thresholds.clipped == 0.05
    assert len(rejected(calm, root)) == 12
    hard_photos = fit_filters(settings("saturated", filter_quantile=0.0), ImageSet.scan(loud), None, WORDS)
    assert hard_photos.thresholds.clipped == max(clipped(path) for path in loud.glob("*/*.png"))
    assert len(rejected(hard_photos, root)) < 6


def clipped(path: Path) -> float:
    pixels = np.asarray(Image.open(path))
    return float(np.isin(pixels, (0, 255)).mean())


def test_the_class_threshold_is_a_quantile_of_the_photos_scores(photos: ImageSet, student: Path) -> None:
    from synthkit.learning.students import load_student

    loaded = load_student(student)
    inputs = photos.with_classes(loaded.classes).load(loaded.preprocessing)
    scores = loaded.logits(inputs).double().softmax(1).numpy()[np.arange(len(photos)), photos.labels]
    for quantile in (0.0, 0.25, 1.0):
        choices = settings("class", student, filter_quantile=quantile)
        fitted = fit_filters(choices, photos, None, WORDS)
        assert fitted.thresholds.probability == pytest.approx(np.quantile(scores, quantile), abs=1e-6)


def test_a_student_that_learned_the_photos_rates_by_what_it_was_before(
    photos: ImageSet, student: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trained = tmp_path / "trained"
    lively_student(1, CLASSES).save(trained)
    manifest = Manifest("train", 1, "", {"photos": photos.digest}, {}, {}, {}, {}, {}, 0.0)
    write_json(trained / "manifest.json", vars(manifest))
    fit_filters(settings("class", trained), photos, None, WORDS)
    assert "has learned these very photos" in caplog.text
    shutil.copytree(student, trained / "synthetic")
    caplog.clear()
    with caplog.at_level(logging.INFO):
        found = fit_filters(settings("class", trained), photos, None, WORDS)
    assert "synthetic in it has not, and is taken" in caplog.text
    before = fit_filters(settings("class", student), photos, None, WORDS)
    assert found.thresholds == before.thresholds


def test_nothing_is_rejected_and_nothing_read_with_no_filter(tmp_path: Path) -> None:
    filters = fit_filters(FilterSettings(), None, None, WORDS)
    assert filters.reasons([(tmp_path / "absent.png", "red")]) == [None]
    assert filter_inputs(FilterSettings(), None, None) == {}
    assert filters.describe()["thresholds"] == {}


def test_describe_tells_thresholds_and_sources(photos: ImageSet, held_out: ImageSet, student: Path) -> None:
    everything = settings("leak,blank,class,duplicate,saturated", student)
    filters = fit_filters(everything, photos, held_out, WORDS)
    told = json.loads(json.dumps(filters.describe()))
    assert list(told["thresholds"]) == ["blank", "saturated", "leak", "class", "duplicate"]
    assert told["photos"] == 12 and told["quantile"] == 0.05
    assert told["thresholds"]["leak"]["test_photos"] == 18
    assert told["thresholds"]["class"] == {
        "probability_below": filters.thresholds.probability,
        "classifier": "student test_resnet",
    }
    assert 0 < told["thresholds"]["duplicate"]["distance_up_to"] < 0.5


def test_inputs_name_what_the_thresholds_hang_on(
    photos: ImageSet, held_out: ImageSet, student: Path, tmp_path: Path
) -> None:
    def keys(filters: str) -> Sequence[str]:
        return sorted(filter_inputs(settings(filters, student), photos, held_out))

    assert keys("blank") == []
    assert keys("duplicate") == ["filter photos"]
    assert keys("leak") == ["filter photos", "filter test photos"]
    assert keys("class,blank") == ["filter classifier", "filter photos"]
    first = filter_inputs(settings("class", student), photos, None)
    other = shutil.copytree(student, tmp_path / "other")
    assert filter_inputs(settings("class", other), photos, None) == first
    lively_student(3, CLASSES).save(other)
    assert filter_inputs(settings("class", other), photos, None) != first


@pytest.mark.parametrize(
    ("filters", "message"),
    [
        ("blanc", r"--filter: 'blanc' is no filter; there are blank, .*, and none; did you mean blank"),
        ("blank,saturated", r"--filter saturated: thresholds come from your photos; .* --real-dir"),
        ("leak", r"--filter leak: thresholds come from your photos"),
    ],
)
def test_bad_choices_without_photos(filters: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        fit_filters(settings(filters), None, None, WORDS)


@pytest.mark.parametrize("quantile", [-0.1, 1.5])
def test_a_quantile_is_a_share(photos: ImageSet, quantile: float) -> None:
    with pytest.raises(ConfigError, match=rf"filter_quantile = {quantile}: .*from 0 to 1"):
        chosen_filters(settings("blank", filter_quantile=quantile))


def test_filters_that_lack_what_they_need(photos: ImageSet, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--filter leak: .* give them with --test-dir"):
        fit_filters(settings("leak"), photos, None, WORDS)
    with pytest.raises(ConfigError, match=r"--filter class: needs a classifier; .* --classifier"):
        fit_filters(settings("class"), photos, None, WORDS)
    with pytest.raises(ConfigError, match=r"--classifier: no folder .*nowhere"):
        fit_filters(settings("class", tmp_path / "nowhere"), photos, None, WORDS)


def test_classifiers_that_cannot_be_used(photos: ImageSet, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelError, match=r"empty is no classifier: it has no readable config.json"):
        fit_filters(settings("class", tmp_path / "empty"), photos, None, WORDS)
    lively_student(0, ("red", "green", "violet")).save(tmp_path / "other")
    with pytest.raises(ModelError, match=r"does not know the class 'blue', only red, green, violet"):
        fit_filters(settings("class", tmp_path / "other"), photos, None, WORDS)
    clip = tiny_clip(tmp_path / "clip")
    (clip / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"cannot load CLIP from .*it needs config.json, model.safetensors"):
        fit_filters(settings("class", clip), photos, None, WORDS)


def test_photos_of_other_classes_and_images_that_cannot_be_read(
    photos: ImageSet, tmp_path: Path, synthetic: Path
) -> None:
    folder = tiny_clip(tmp_path / "clip")
    with pytest.raises(DataError, match=r"a class that the classifier does not know: 'blue'"):
        fit_filters(settings("class", folder), photos, None, {"red": "red", "green": "green"})
    filters = fit_filters(settings("blank"), None, None, WORDS)
    with pytest.raises(BadImages, match=r"gone.png"):
        filters.reasons([(synthetic / "red" / "gone.png", "red")])
    torn = synthetic / "red" / "00000.png"
    torn.write_bytes(torn.read_bytes()[:60])
    with pytest.raises(BadImages, match=r"00000.png"):
        filters.reasons(in_order(synthetic))
