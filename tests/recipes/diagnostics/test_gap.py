"""The gap report: planted gaps are found where they are, and equal sets pass every limit."""

from __future__ import annotations

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
from synthkit.recipes.diagnostics.gap import advise, measure_gap
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


def measured(student: Student, synthetic: ImageSet, real: ImageSet, most: int = 200) -> dict[str, Any]:
    return measure_gap(student, "a test's", synthetic, real, most)


def test_sets_of_one_distribution_pass_every_limit(student: Student, real: ImageSet, tmp_path: Path) -> None:
    found = measured(student, folder(tmp_path / "s", 40, 1), real)
    content, looks = found["content"], found["appearance"]
    assert found["actions"] == {"synthetic_only": [], "added_to_real": []}
    assert (found["n_real"], found["n_synthetic"]) == (72, 120)
    assert found["features"] == {"source": "a test's", "dimensions": student.head.in_features}
    assert content["coverage"] == pytest.approx(content["expected_coverage"], abs=0.1)
    assert content["density"] == pytest.approx(1, abs=0.3)
    assert content["diversity"] == pytest.approx(1, abs=0.15)
    assert content["frechet_equal_counts"] < 1.5 * content["frechet_real_halves"]
    assert max(abs(one) for one in looks["offset"].values()) < 0.5
    assert abs(looks["high_frequencies_db"]) < 1 and content["frechet_count"] == 36
    assert content["head_top1_on_photos"] > 0.6 and sum(map(sum, content["confusion"])) == 120


def test_soft_and_pale_images_are_an_appearance_gap(student: Student, real: ImageSet, tmp_path: Path) -> None:
    def soften(image: Image.Image) -> Image.Image:
        return image.filter(ImageFilter.GaussianBlur(1.5)).point(lambda value: value // 2 + 127)

    found = measured(student, folder(tmp_path / "s", 40, 1, soften), real)
    looks = found["appearance"]
    assert looks["offset"]["red mean"] > 1 and looks["offset"]["green contrast"] < -1
    assert looks["high_frequencies_db"] < -10 and looks["offset"]["sharpness"] < -2
    alone = found["actions"]["synthetic_only"]
    assert alone[0]["gap"] == "appearance" and len(alone) == 3
    assert any("the images are soft" in one["action"] for one in alone)
    assert any("--vectors" in one["action"] for one in alone)


def test_a_single_look_asks_for_more_tokens(student: Student, real: ImageSet, tmp_path: Path) -> None:
    def of_one_look(image: Image.Image) -> Image.Image:
        pixels = np.asarray(image).astype(float)
        pixels = (pixels - pixels.mean((0, 1))) / pixels.std((0, 1)) * 45 + 140
        return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))

    found = measured(student, folder(tmp_path / "s", 40, 1, of_one_look), real)
    assert found["appearance"]["spread"]["red mean"] < 0.2
    assert any("--clusters" in one["action"] for one in found["actions"]["synthetic_only"])


def test_a_class_that_is_drawn_as_another_is_found(student: Student, real: ImageSet, tmp_path: Path) -> None:
    drawn = folder(tmp_path / "s", 40, 1, drawn_as=lambda name: "circle" if name == "cross" else name)
    found = measured(student, drawn, real)
    cross = found["per_class"]["cross"]
    assert cross["seen_right"] < 0.5 and cross["most_seen_as"] == "circle"
    assert found["per_class"]["square"]["seen_right"] > 0.6
    for regime in ("synthetic_only", "added_to_real"):
        first = found["actions"][regime][0]
        assert first["gap"] == "labels" and "'cross' other words in classes.toml" in first["action"]
        assert "most others for 'circle'" in first["why"]


def test_copies_of_one_image_cover_little(student: Student, real: ImageSet, tmp_path: Path) -> None:
    root = tmp_path / "s"
    random = np.random.default_rng(1)
    for name in CLASSES:
        (root / name).mkdir(parents=True)
        one = picture(name, random).astype(int)
        for index in range(40):
            grain = one + random.normal(0, 3, one.shape)
            Image.fromarray(grain.clip(0, 255).astype(np.uint8)).save(root / name / f"{index}.png")
    found = measured(student, ImageSet.scan(root), real)
    assert found["content"]["diversity"] < 0.4 and found["content"]["coverage"] < 0.5
    beside = found["actions"]["added_to_real"]
    assert beside[0]["gap"] != "appearance"
    assert any("--guidance" in one["action"] and one["gap"] == "content" for one in beside)


def test_one_photo_of_a_class_leaves_out_what_it_cannot_tell(
    student: Student, real: ImageSet, tmp_path: Path
) -> None:
    one_each = real.subset([0, 24, 48])
    found = measured(student, folder(tmp_path / "s", 5, 1), one_each)
    assert found["per_class"]["cross"]["coverage"] is None and found["content"]["coverage"] is None
    assert found["content"]["head_top1_on_photos"] is None and found["content"]["frechet_count"] == 1
    assert found["content"]["frechet_real_halves"] is None
    assert not [one for one in found["actions"]["synthetic_only"] if one["gap"] != "appearance"]


def test_no_more_images_than_asked_for_are_looked_at(
    student: Student, real: ImageSet, tmp_path: Path
) -> None:
    found = measured(student, folder(tmp_path / "s", 9, 1), real, most=4)
    assert (found["n_real"], found["n_synthetic"]) == (12, 12)


def test_folders_of_other_classes_are_refused(student: Student, real: ImageSet, tmp_path: Path) -> None:
    drawn = folder(tmp_path / "s", 2, 1)
    (tmp_path / "s" / "square").rename(tmp_path / "s" / "star")
    drawn = ImageSet.scan(tmp_path / "s")
    with pytest.raises(DataError, match=r"s has no class 'square', which .*photos has"):
        measured(student, drawn, real)
    with pytest.raises(DataError, match=r"photos has no class 'star'"):
        measured(student, ImageSet(drawn.root, (*CLASSES, "star"), drawn.items), real)


def gap_of(**content: Any) -> dict[str, Any]:
    usual = {
        "coverage": 0.9, "expected_coverage": 1.0, "density": 1.0, "diversity": 1.0,
        "head_top1_on_photos": 0.9, "head_photos_held_out": 100,
    }  # fmt: skip
    one = {"coverage": 0.9, "seen_right": 0.9, "n_synthetic": 100, "most_seen_as": "b"}
    return {
        "appearance": {
            "offset": {"red mean": 0.0},
            "offset_error": 0.1,
            "spread": {"red mean": 1.0},
            "high_frequencies_db": 0.0,
        },
        "content": {**usual, **content},
        "per_class": {"a": one},
    }


def test_advice_depends_on_whether_the_images_crowd_or_stray() -> None:
    assert advise(gap_of()) == {"synthetic_only": [], "added_to_real": []}
    (crowded,) = advise(gap_of(coverage=0.5, diversity=0.9))["synthetic_only"]
    (strayed,) = advise(gap_of(coverage=0.5, diversity=1.2))["synthetic_only"]
    assert "--guidance" in crowded["action"] and "--init real" in strayed["action"]
    assert "50% of the photos" in strayed["why"] and "100%" in strayed["why"]


def test_an_offset_within_its_error_raises_no_alarm() -> None:
    gap = gap_of()
    gap["appearance"].update(offset={"red mean": -1.2}, offset_error=0.7)
    assert advise(gap)["synthetic_only"] == []
    gap["appearance"]["offset_error"] = 0.3
    (only,) = advise(gap)["synthetic_only"]
    assert "red mean is -1.2 standard deviations" in only["why"]


def test_beside_photos_wrong_labels_and_content_come_before_looks() -> None:
    gap = gap_of(coverage=0.6)
    gap["appearance"]["high_frequencies_db"] = -30.0
    gap["per_class"]["a"].update(seen_right=0.6, most_seen_as="b")
    actions = advise(gap)
    assert [one["gap"] for one in actions["synthetic_only"]] == ["appearance", "labels", "content"]
    assert [one["gap"] for one in actions["added_to_real"]] == ["labels", "content", "appearance"]


def test_hard_images_are_told_from_soft_ones() -> None:
    gap = gap_of()
    gap["appearance"]["high_frequencies_db"] = 6.0
    assert "harder or noisier" in advise(gap)["synthetic_only"][0]["action"]
