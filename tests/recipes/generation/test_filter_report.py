"""Grids of rejected images: one per reason, a row per class, where no reader takes them for the set."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from synthkit.data.images import ImageSet
from synthkit.recipes.generation.filter_report import rejected_grids, rejected_images


def rejected_set(root: Path) -> Path:
    for name, colour in (("a-b", "red"), ("c", "lime")):
        (root / name).mkdir(parents=True)
        Image.new("RGB", (8, 8), colour).save(root / name / "00000.png")
        for index, attempt in ((10, 0), (2, 1), (2, 0)):
            path = root / ".rejected" / "class" / f"{name}-{index:05d}-{attempt}.png"
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
