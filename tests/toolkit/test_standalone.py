"""Pictures as they come: read as a person sees them, or refused with what they are and what to do."""

from __future__ import annotations

import ast
import io
import struct
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, TiffImagePlugin

from synthkit import standalone
from synthkit.standalone import UnusableImage, open_image


def refusal(path: Path | io.BytesIO) -> str:
    with pytest.raises(UnusableImage) as caught:
        open_image(path)
    return str(caught.value)


@pytest.mark.parametrize(
    ("head", "reason"),
    [
        (b"\0\0\0\x24ftypheic\0\0\0\0mif1heic", "HEIC photo"),
        (b"\0\0\0\x24ftypmif1\0\0\0\0mif1heic", "HEIC photo"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:12\nsize 3\n", "Git LFS pointer"),
        (b"\0\0\0\x18ftypcrx \0\0\0\1", "raw file"),
        (b"FUJIFILMCCD-RAW 0201", "raw file"),
        (b"\0\0\0\x18ftypisom\0\0\2\0", "a video"),
        (b"%PDF-1.7\n", "a PDF"),
        (b"\n<!DOCTYPE html><html>404", "a web page"),
        (b"", "empty file"),
        (b"MZ\x90", "not an image"),
    ],
)
@pytest.mark.parametrize("name", ["IMG_0001.jpg", "IMG_0002.HIF", "photo"])
def test_the_content_says_what_a_file_is(tmp_path: Path, head: bytes, reason: str, name: str) -> None:
    path = tmp_path / name
    path.write_bytes(head)
    assert reason in refusal(path)
    assert reason in refusal(io.BytesIO(head)), "also as an upload"


def test_a_raw_file_is_not_taken_for_its_thumbnail(tmp_path: Path) -> None:
    tags = TiffImagePlugin.ImageFileDirectory_v2()
    tags[254] = 1
    tags[330] = 8
    Image.new("RGB", (16, 12), (90, 120, 40)).save(tmp_path / "thumb.tif", tiffinfo=tags)
    (tmp_path / "thumb.tif").rename(tmp_path / "DSC_0001.NEF")
    assert "raw file" in refusal(tmp_path / "DSC_0001.NEF")
    Image.new("RGB", (16, 12), (90, 120, 40)).save(tmp_path / "plain.tif")
    assert open_image(tmp_path / "plain.tif").size == (16, 12)


@pytest.mark.parametrize("suffix", ["png", "webp", "tif"])
def test_alpha_that_is_zero_everywhere_was_left_unset(tmp_path: Path, suffix: str) -> None:
    pixels = np.full((6, 8, 4), (200, 40, 10, 0), np.uint8)
    path = tmp_path / f"photo.{suffix}"
    Image.fromarray(pixels).save(path, **({"lossless": True, "exact": True} if suffix == "webp" else {}))
    assert np.asarray(open_image(path)).reshape(-1, 3).tolist() == [[200, 40, 10]] * 48
    pixels[0, 0, 3] = 255  # one opaque pixel: the others are meant to be transparent
    Image.fromarray(pixels).save(path, **({"lossless": True, "exact": True} if suffix == "webp" else {}))
    assert np.asarray(open_image(path))[1].tolist() == [[255, 255, 255]] * 8


def test_a_photo_of_a_hundred_megapixels_is_scaled_while_it_is_decoded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 40_000)  # instead of 89 million
    path = tmp_path / "phone.jpg"
    picture = Image.new("RGB", (320, 240), (200, 40, 10))
    exif = picture.getexif()
    exif[274] = 6  # a quarter turn
    picture.save(path, exif=exif)
    for source in (path, io.BytesIO(path.read_bytes())):
        read = open_image(source)
        assert read.size == (120, 160)
        assert np.abs(np.asarray(read)[60, 60].astype(int) - (200, 40, 10)).max() < 4
    Image.new("RGB", (640, 480)).save(path)
    assert "a decompression bomb" in refusal(path)
    Image.new("1", (320, 240)).save(tmp_path / "big.png")
    assert "a decompression bomb" in refusal(tmp_path / "big.png")


def test_an_error_of_the_program_is_no_fault_of_the_photo(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(_image: Image.Image) -> Image.Image:
        raise TypeError("unexpected keyword argument")

    Image.new("RGB", (8, 8)).save(tmp_path / "photo.png")
    monkeypatch.setattr(standalone, "_as_rgb", broken)
    with pytest.raises(TypeError):
        open_image(tmp_path / "photo.png")


def test_truncated_data_is_the_photo_s_fault(tmp_path: Path) -> None:
    Image.effect_noise((64, 64), 90).save(tmp_path / "photo.jpg")
    content = (tmp_path / "photo.jpg").read_bytes()
    (tmp_path / "photo.jpg").write_bytes(content[: len(content) // 2])
    assert "truncated" in refusal(tmp_path / "photo.jpg")
    (tmp_path / "bad.tif").write_bytes(b"II*\0" + struct.pack("<I", 8) + b"\xff" * 40)
    assert refusal(tmp_path / "bad.tif")


def test_the_source_is_python_3_8() -> None:
    """predict.py runs on JetPack 5."""
    source = Path(standalone.__file__).read_text(encoding="utf-8")
    tree = ast.parse(source, feature_version=(3, 8))
    calls = [ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Call)]
    assert not [call for call in calls if "strict=" in call or call.startswith("sorted_")]
    assert not [call for call in calls if ".removeprefix(" in call or ".removesuffix(" in call]
    assert "from __future__ import annotations" in source, "annotations are newer than that"
