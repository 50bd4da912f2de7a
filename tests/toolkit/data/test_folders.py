"""Folders as people have them: what was meant is told, bookkeeping left out, nothing dropped in silence."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import pytest
from PIL import Image

from synthkit.data.folders import class_folders, list_images
from synthkit.data.images import ImageSet
from synthkit.errors import BadImages, DataError
from tests.tiny_students import colour_folders

CLASSES = ("blue", "green", "red")


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    return colour_folders(tmp_path / "photos", CLASSES, each=2)


def tree(root: Path, *parts: str) -> Path:
    """A data set's root: each part holds the classes."""
    for seed, part in enumerate(parts):
        colour_folders(root / part, CLASSES, each=1, seed=seed)
    return root


def refusal(root: Path, fewest: int = 2) -> str:
    with pytest.raises(DataError) as caught:
        ImageSet.scan(root, fewest=fewest)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("parts", "photos", "test"),
    [
        (("train", "valid"), "train", "valid"),
        (("Train", "TEST"), "Train", "TEST"),
        (("train", "val", "test"), "train", "test"),
        (("photos", "test"), "photos", "test"),
        (("training", "holdout"), "training", "holdout"),
    ],
)
def test_the_root_of_a_data_set_is_refused_with_what_was_meant(
    tmp_path: Path, parts: tuple[str, ...], photos: str, test: str
) -> None:
    root = tree(tmp_path / "shop", *parts)
    (root / "README.txt").write_text("about these photos")
    (root / ".git").mkdir()
    for fewest in (1, 2):  # as test images too
        text = refusal(root, fewest)
        assert f"did you mean --real-dir {root / photos} --test-dir {root / test}?" in text


def test_a_split_among_the_classes_is_no_class(photos: Path) -> None:
    colour_folders(photos / "test", CLASSES, each=1, seed=7)
    text = refusal(photos)
    assert f"holds test, which is a part of a data set and no class; did you mean --test-dir {photos}" in text


def test_parts_without_classes_are_no_classes_either(tmp_path: Path) -> None:
    colour_folders(tmp_path / "set", ("test", "train"), each=2)
    assert "in each there must be one folder of images per class" in refusal(tmp_path / "set")


def test_a_wrapped_folder_is_named(tmp_path: Path, photos: Path) -> None:
    (tmp_path / "wrap").mkdir()
    photos.rename(tmp_path / "wrap" / "photos")
    assert f"give {tmp_path / 'wrap' / 'photos'}" in refusal(tmp_path / "wrap")


def test_nested_folders_belong_to_their_class(tmp_path: Path) -> None:
    """Days, cameras: the same names in every class are no data set's parts."""
    for name in CLASSES:
        colour_folders(tmp_path / "set" / name, ("monday", "tuesday"), each=1, seed=len(name))
    assert ImageSet.scan(tmp_path / "set").counts() == dict.fromkeys(CLASSES, 2)
    colour_folders(tmp_path / "one" / "red", ("monday", "tuesday"), each=1)
    assert ImageSet.scan(tmp_path / "one", fewest=1).counts() == {"red": 2}


def test_a_class_may_be_called_like_a_part(tmp_path: Path) -> None:
    colour_folders(tmp_path / "set", ("pool", "sauna", "test"), each=1)
    assert ImageSet.scan(tmp_path / "set").classes == ("pool", "sauna", "test")


def test_bookkeeping_is_left_out_and_named_once(photos: Path, caplog: pytest.LogCaptureFixture) -> None:
    before = ImageSet.scan(photos)
    for name in ("@eaDir", "#recycle", "__MACOSX", "lost+found", "$RECYCLE.BIN", "System Volume Information"):
        for folder in (photos, photos / "red"):
            colour_folders(folder / name, ("0.png",), each=1, seed=3)
    sidecars = ("0.txt", "labels.csv", "0.xml", "0.json")
    for name in ("Thumbs.db", "ehthumbs.db", "desktop.ini", "Icon\r", *sidecars):
        (photos / "red" / name).write_bytes(b"\0\1\2")
    (photos / "red" / "._0.png").write_bytes(b"resource fork")
    for suffix in (".NEF", ".mov", ".AAE", ".xmp"):  # raw file, live photo, edits beside 0.png
        (photos / "red" / f"0{suffix}").write_bytes(b"MM\0*")
    with caplog.at_level(logging.INFO):
        after = ImageSet.scan(photos)
    assert after.digest == before.digest
    assert caplog.text.count("that are no images") == 1 and "left out 12 file(s)" in caplog.text


def test_what_cannot_be_followed_or_read_is_told(photos: Path) -> None:
    (photos / "red" / "gone.jpg").symlink_to(photos / "elsewhere.jpg")
    with pytest.raises(BadImages) as caught:
        ImageSet.scan(photos)
    assert f"{photos / 'red' / 'gone.jpg'} (a link to nothing)" in str(caught.value)
    assert len(ImageSet.scan(photos, skip_bad=True)) == 6


def test_a_folder_that_cannot_be_listed_is_told(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    closed = photos / "red" / "closed"
    closed.mkdir()
    scandir = os.scandir

    def refused(path: str | Path) -> object:
        if Path(path) == closed:
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refused)
    with pytest.raises(BadImages, match=r"closed \(cannot be listed: Permission denied\)"):
        ImageSet.scan(photos)


def test_links_in_circles_end(photos: Path) -> None:
    (photos / "red" / "again").symlink_to(photos / "red")
    assert len(list_images(photos / "red").images) == 2


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("Kiwi", "kiwi"), "'Kiwi' and 'kiwi' in .* differ in case or blanks alone"),
        (("glacier", "glacier "), "'glacier' and 'glacier ' in .* differ in case or blanks alone"),
        (("a\nb", "c"), "holds a line break"),
    ],
)
def test_names_that_cannot_be_classes(tmp_path: Path, names: tuple[str, ...], message: str) -> None:
    colour_folders(tmp_path / "set", names, each=1)
    with pytest.raises(DataError, match=message):
        class_folders(tmp_path / "set", 2)


def test_a_class_folder_whose_name_is_no_utf8_is_refused(tmp_path: Path, photos: Path) -> None:
    latin = os.fsencode(photos) + b"/Gr\xfcn"
    try:
        os.mkdir(latin)  # noqa: PTH102
    except OSError:
        pytest.skip("this file system takes UTF-8 alone")
    Image.new("RGB", (8, 8), (9, 99, 9)).save(os.fsdecode(latin) + "/0.png")
    assert "b'Gr\\xfcn' in" in refusal(photos) and "is not UTF-8; rename the folder" in refusal(photos)
