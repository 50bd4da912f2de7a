"""The gap report: planted gaps are found where they are, and equal sets pass every limit."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageFilter

pytest.importorskip("timm")
pytest.importorskip("sklearn")

from synthkit.data.images import ImageSet
from synthkit.errors import DataError
from synthkit.learning.students import Student
from synthkit.recipes.diagnostics.gap import (
    Actions,
    Appearance,
    ClassContent,
    Content,
    FeatureSource,
    GapResult,
    advise,
    measure_gap,
)
from tests.tiny_students import lively_student

CLASSES = ("circle", "cross", "square")


@pytest.fixture(scope="module")
def student() -> Student:
    return lively_student(5, CLASSES)


def picture(name: str, random: np.random.Generator) -> np.ndarray:
    """A shape of any size, place and colour on any paper, with some grain."""
    y, x = np.mgrid[:32, :32] - random.uniform(12, 20, (2, 1, 1))
    size = random.uniform(5, 9)
    shape = {
        "circle": np.abs(np.hypot(x, y) - size) < 2,
        "cross": (np.abs(x) < 1.5) | (np.abs(y) < 1.5),
        "square": np.maximum(np.abs(x), np.abs(y)) < size,
    }[name]
    paper, ink = random.uniform(100, 230, 3), random.uniform(0, 90, 3)
    pixels = np.where(shape[..., None], ink, paper) + random.normal(0, 8, (32, 32, 3))
    return np.asarray(pixels.clip(0, 255).astype(np.uint8))


def folder(root: Path, each: int, seed: int, change: Any = None, drawn_as: Any = None) -> ImageSet:
    random = np.random.default_rng(seed)
    for name in CLASSES:
        (root / name).mkdir(parents=True)
        for index in range(each):
            image = Image.fromarray(picture(drawn_as(name) if drawn_as else name, random))
            (change(image) if change else image).save(root / name / f"{index}.png")
    return ImageSet.scan(root)


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> ImageSet:
    return folder(tmp_path_factory.mktemp("real") / "photos", 24, 0)


def compare(student: Student, synthetic: ImageSet, real: ImageSet, per_class: int = 200) -> GapResult:
    return measure_gap(student, "a test's", synthetic, real, per_class)


def test_sets_of_one_distribution_pass_every_limit(student: Student, real: ImageSet, tmp_path: Path) -> None:
    result = compare(student, folder(tmp_path / "s", 40, 1), real)
    content, appearance = result.content, result.appearance
    assert result.actions == Actions([], [])
    assert (result.n_real, result.n_synthetic) == (72, 120)
    assert result.features == FeatureSource("a test's", student.head.in_features)
    assert content.coverage == pytest.approx(content.expected_coverage, abs=0.1)
    assert content.density == pytest.approx(1, abs=0.3)
    assert content.diversity == pytest.approx(1, abs=0.15)
    assert content.frechet_equal_counts < 1.5 * content.frechet_real_halves
    assert max(abs(one) for one in appearance.offset.values()) < 0.5
    assert abs(appearance.high_frequencies_db) < 1 and content.frechet_count == 36
    # .60 to .81 over five students, each with photos of its own; by chance 1/3.
    assert content.linear_probe_top1_real > 0.5 and sum(map(sum, content.confusion)) == 120


def test_soft_and_pale_images_are_an_appearance_gap(student: Student, real: ImageSet, tmp_path: Path) -> None:
    def soften(image: Image.Image) -> Image.Image:
        return image.filter(ImageFilter.GaussianBlur(1.5)).point(lambda value: value // 2 + 127)

    result = compare(student, folder(tmp_path / "s", 40, 1, soften), real)
    appearance = result.appearance
    assert appearance.offset["red mean"] > 1 and appearance.offset["green contrast"] < -1
    assert appearance.high_frequencies_db < -10 and appearance.offset["sharpness"] < -2
    alone = result.actions.synthetic_only
    assert alone[0].gap == "appearance" and len(alone) == 3
    assert any("the images are soft" in one.action for one in alone)
    assert any("learn-style.vectors" in one.action for one in alone)


def test_a_single_look_asks_for_more_tokens(student: Student, real: ImageSet, tmp_path: Path) -> None:
    def of_one_look(image: Image.Image) -> Image.Image:
        pixels = np.asarray(image).astype(float)
        pixels = (pixels - pixels.mean((0, 1))) / pixels.std((0, 1)) * 45 + 140
        return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))

    result = compare(student, folder(tmp_path / "s", 40, 1, of_one_look), real)
    assert result.appearance.spread["red mean"] < 0.2
    assert any("--clusters" in one.action for one in result.actions.synthetic_only)


def test_a_class_that_is_drawn_as_another_is_found(student: Student, real: ImageSet, tmp_path: Path) -> None:
    drawn = folder(tmp_path / "s", 40, 1, drawn_as=lambda name: "circle" if name == "cross" else name)
    result = compare(student, drawn, real)
    cross = result.per_class["cross"]
    # Over five students, each with photos of its own: .03 to .35, and .75 to .93 for the squares.
    assert cross.top1 < 0.5 and cross.most_confused_with == "circle"
    assert result.per_class["square"].top1 > 0.6
    for first in (result.actions.synthetic_only[0], result.actions.added_to_real[0]):
        assert first.gap == "labels" and "'cross' other words in classes.toml" in first.action
        assert "most others to 'circle'" in first.reason


def test_copies_of_one_image_cover_little(student: Student, real: ImageSet, tmp_path: Path) -> None:
    root = tmp_path / "s"
    random = np.random.default_rng(1)
    for name in CLASSES:
        (root / name).mkdir(parents=True)
        one = picture(name, random).astype(int)
        for index in range(40):
            grain = one + random.normal(0, 3, one.shape)
            Image.fromarray(grain.clip(0, 255).astype(np.uint8)).save(root / name / f"{index}.png")
    result = compare(student, ImageSet.scan(root), real)
    assert result.content.diversity < 0.4 and result.content.coverage < 0.5
    beside = result.actions.added_to_real
    assert beside[0].gap != "appearance"
    assert any("--guidance" in one.action and one.gap == "content" for one in beside)


def test_one_photo_of_a_class_leaves_out_what_it_cannot_tell(
    student: Student, real: ImageSet, tmp_path: Path
) -> None:
    one_each = real.subset([0, 24, 48])
    result = compare(student, folder(tmp_path / "s", 5, 1), one_each)
    assert result.per_class["cross"].coverage is None and result.content.coverage is None
    assert result.content.linear_probe_top1_real is None and result.content.frechet_count == 1
    assert result.content.frechet_real_halves is None
    assert not [one for one in result.actions.synthetic_only if one.gap != "appearance"]


def test_no_more_images_than_asked_for_are_looked_at(
    student: Student, real: ImageSet, tmp_path: Path
) -> None:
    result = compare(student, folder(tmp_path / "s", 9, 1), real, per_class=4)
    assert (result.n_real, result.n_synthetic) == (12, 12)


def test_folders_of_other_classes_are_refused(student: Student, real: ImageSet, tmp_path: Path) -> None:
    drawn = folder(tmp_path / "s", 2, 1)
    (tmp_path / "s" / "square").rename(tmp_path / "s" / "star")
    drawn = ImageSet.scan(tmp_path / "s")
    with pytest.raises(DataError, match=r"s has no class 'square', which .*photos has"):
        compare(student, drawn, real)
    with pytest.raises(DataError, match=r"photos has no class 'star'"):
        compare(student, ImageSet(drawn.root, (*CLASSES, "star"), drawn.items), real)


FINE = Appearance(
    offset={"red mean": 0.0},
    offset_error=0.1,
    spread={"red mean": 1.0},
    spectrum_db=[0.0],
    low_frequencies_db=0.0,
    high_frequencies_db=0.0,
)
CLASS = ClassContent(
    coverage=0.9,
    expected_coverage=1.0,
    density=1.0,
    diversity=1.0,
    n_real=20,
    n_synthetic=100,
    top1=0.9,
    most_confused_with="b",
)


def advice(appearance: Appearance = FINE, of_class: ClassContent = CLASS, **content: Any) -> Actions:
    usual = Content(
        coverage=0.9,
        expected_coverage=1.0,
        density=1.0,
        diversity=1.0,
        frechet=1.0,
        frechet_equal_counts=1.0,
        frechet_real_halves=1.0,
        frechet_count=10,
        linear_probe_top1_real=0.9,
        linear_probe_top1_synthetic=0.9,
        linear_probe_n_real=100,
        confusion=[[90]],
    )
    return advise(appearance, replace(usual, **content), {"a": of_class})


def test_advice_depends_on_whether_the_images_crowd_or_stray() -> None:
    assert advice() == Actions([], [])
    (crowded,) = advice(coverage=0.5, diversity=0.9).synthetic_only
    (strayed,) = advice(coverage=0.5, diversity=1.2).synthetic_only
    assert "--guidance" in crowded.action and "generate.init=real" in strayed.action
    assert "50% of the photos" in strayed.reason and "100%" in strayed.reason


def test_an_offset_within_its_error_raises_no_alarm() -> None:
    off = replace(FINE, offset={"red mean": -1.2}, offset_error=0.7)
    assert advice(off).synthetic_only == []
    (only,) = advice(replace(off, offset_error=0.3)).synthetic_only
    assert "red mean is -1.2 standard deviations" in only.reason


def test_beside_photos_wrong_labels_and_content_come_before_appearance() -> None:
    soft = replace(FINE, high_frequencies_db=-30.0)
    actions = advice(soft, replace(CLASS, top1=0.6), coverage=0.6)
    assert [action.gap for action in actions.synthetic_only] == ["appearance", "labels", "content"]
    assert [action.gap for action in actions.added_to_real] == ["labels", "content", "appearance"]


def test_hard_images_are_told_from_soft_ones() -> None:
    (hard,) = advice(replace(FINE, high_frequencies_db=6.0)).synthetic_only
    assert "harder or noisier" in hard.action and "limit 3 dB, twice the power" in hard.reason
    (soft,) = advice(replace(FINE, high_frequencies_db=-6.0)).synthetic_only
    assert "the images are soft" in soft.action and "limit -3 dB, half the power" in soft.reason
