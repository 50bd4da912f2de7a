from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from synthkit.data.images import ImageSet
from synthkit.errors import WorkspaceError
from synthkit.recipes.generation.plan import PlannedImage, SetPlan, make_plan
from synthkit.recipes.generation.rejections import REJECTED, RejectionLog, rejected_grids, rejected_images
from synthkit.recipes.settings import GenerateSettings


@pytest.fixture
def plan() -> SetPlan:
    return make_plan(GenerateSettings(per_class=3), {"a": "letter a", "b": "letter b"}, (), None)


def write(folder: Path, images: list[PlannedImage]) -> None:
    for image in images:
        path = folder / image.file_name
        path.parent.mkdir(exist_ok=True)
        if not path.exists():
            path.write_text(str(image.seed))


def named(rejections: RejectionLog, *names: str) -> list[PlannedImage]:
    return [image for image in rejections.images if f"{image.name}{image.index}" in names]


def test_rejected_images_make_room_for_their_resamples(plan: SetPlan, tmp_path: Path) -> None:
    rejections = RejectionLog(tmp_path, plan, retries=1)
    first = rejections.images
    write(tmp_path, first)
    rejections.reject(named(rejections, "a1", "b0"), ["blank", "class"])
    assert (tmp_path / REJECTED / "blank" / "a-00001-0.png").read_text() == str(first[1].seed)
    assert (tmp_path / REJECTED / "class" / "b-00000-0.png").exists()
    assert not (tmp_path / "a" / "00001.png").exists()
    assert [image.resample for image in rejections.images] == [0, 1, 0, 1, 0, 0]
    write(tmp_path, rejections.images)
    rejections.reject(named(rejections, "b0", "b2"), ["duplicate", "duplicate"])
    write(tmp_path, rejections.images)
    assert [(image.name, image.index, image.resample) for image in rejections.images] == [
        ("a", 0, 0),
        ("a", 1, 1),
        ("a", 2, 0),
        ("b", 1, 0),
        ("b", 2, 1),
    ]
    assert {name: totals.to_json() for name, totals in rejections.totals().items()} == {
        "a": {"kept": 3, "resampled": 1, "dropped": {}},
        "b": {"kept": 2, "resampled": 1, "dropped": {"duplicate": 1}},
    }


@pytest.mark.parametrize("moved", [0, 1, 2])
def test_a_run_killed_between_verdict_and_move_goes_on(plan: SetPlan, tmp_path: Path, moved: int) -> None:
    rejections = RejectionLog(tmp_path, plan, retries=2)
    write(tmp_path, rejections.images)
    rejections.reject(named(rejections, "a0", "a1"), ["blank", "blank"])
    for one in ("a-00000-0", "a-00001-0")[moved:]:  # as if these had not been moved any more
        number = one.split("-")[1]
        (tmp_path / REJECTED / "blank" / f"{one}.png").rename(tmp_path / "a" / f"{number}.png")
    again = RejectionLog(tmp_path, plan, retries=2)
    assert again.images == rejections.images
    assert not (tmp_path / "a" / "00000.png").exists() and not (tmp_path / "a" / "00001.png").exists()
    write(tmp_path, again.images)
    assert RejectionLog(tmp_path, plan, retries=2).images == again.images
    assert (tmp_path / "a" / "00000.png").read_text() == str(again.images[0].seed), "the new resample stays"


def test_rejected_images_are_no_class(plan: SetPlan, tmp_path: Path) -> None:
    rejections = RejectionLog(tmp_path, plan, retries=1)
    for number, image in enumerate(rejections.images):
        (tmp_path / image.name).mkdir(exist_ok=True)
        Image.new("RGB", (4, 4), (number, 0, 0)).save(tmp_path / image.file_name)
    rejections.reject(named(rejections, "a1"), ["class"])
    assert ImageSet.scan(tmp_path).counts() == {"a": 2, "b": 3}


def test_a_broken_journal_is_named(plan: SetPlan, tmp_path: Path) -> None:
    (tmp_path / REJECTED).mkdir()
    for text in ("{", json.dumps([{"name": "a"}]), "3"):
        (tmp_path / REJECTED / "journal.json").write_text(text)
        with pytest.raises(
            WorkspaceError, match=r"cannot read .*journal\.json; generate the set anew with --force"
        ):
            RejectionLog(tmp_path, plan, retries=1)


def rejected_set(root: Path) -> Path:
    for name, colour in (("a-b", "red"), ("c", "lime")):
        (root / name).mkdir(parents=True)
        Image.new("RGB", (8, 8), colour).save(root / name / "00000.png")
        for index, resample in ((10, 0), (2, 1), (2, 0)):
            path = root / ".rejected" / "class" / f"{name}-{index:05d}-{resample}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (8, 8), colour).save(path)
    (root / ".rejected" / "blank").mkdir()
    Image.new("RGB", (8, 8), "navy").save(root / ".rejected" / "blank" / "c-00003-0.png")
    (root / ".rejected" / "journal.json").write_text("[]", encoding="utf-8")
    return root


def test_images_are_found_by_reason_and_class_in_order(tmp_path: Path) -> None:
    found = rejected_images(rejected_set(tmp_path / "set"))
    assert {reason: list(classes) for reason, classes in found.items()} == {
        "blank": ["c"],
        "class": ["a-b", "c"],
    }
    assert [path.stem for path in found["class"]["a-b"]] == ["a-b-00002-0", "a-b-00002-1", "a-b-00010-0"]


def test_a_grid_per_reason_with_a_row_per_class(tmp_path: Path) -> None:
    folder = rejected_set(tmp_path / "set")
    before = ImageSet.scan(folder).digest
    grids = rejected_grids(folder)
    assert [path.name for path in grids] == ["blank.png", "class.png"]
    pixels = np.asarray(Image.open(grids[1]).convert("RGB"))
    for row, colour in enumerate(((255, 0, 0), (0, 255, 0))):
        band = pixels[row * 50 : row * 50 + 48]
        assert (band == colour).all(axis=-1).sum() == 3 * 48 * 48
    assert rejected_grids(folder) == grids  # again, over those of before
    assert ImageSet.scan(folder).digest == before


def test_grids_go_where_they_are_asked_to(tmp_path: Path) -> None:
    folder = rejected_set(tmp_path / "set")
    grids = rejected_grids(folder, tmp_path / "report" / "grids")
    assert [path.parent for path in grids] == [tmp_path / "report" / "grids"] * 2
    assert all(path.is_file() for path in grids)


def test_nothing_is_written_where_nothing_was_rejected(tmp_path: Path) -> None:
    (tmp_path / "set" / "a").mkdir(parents=True)
    assert rejected_grids(tmp_path / "set") == []
    assert [path.name for path in (tmp_path / "set").iterdir()] == ["a"]
