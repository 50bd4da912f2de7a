"""Class folders, bad files, splits, and preprocessing that equals timm's to the last bit."""

import shutil
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from synthkit import standalone
from synthkit.data.contact_sheet import contact_sheet
from synthkit.data.images import ImageSet, Preprocessing, class_prompt_names
from synthkit.errors import BadImages, ConfigError, DataError, ModelError
from tests.tiny_students import CLASSES, PREPROCESSING, class_folders, noise

RAMP = np.linspace(0, 255, 48 * 32).reshape(32, 48)


def written(path: Path, image: Image.Image, **options: object) -> Path:
    image.save(path, **options)
    return path


# --- Reading one file


def test_kinds_of_images_come_out_right(tmp_path: Path) -> None:
    grey = Image.fromarray(RAMP.round().astype(np.uint8))
    expected = np.asarray(grey.convert("RGB")).astype(int)
    cases = {
        "grey.png": grey,
        "palette.png": grey.convert("P"),
        "sixteen.png": Image.fromarray((RAMP * 257).round().astype(np.uint16)),
        "sixteen.tif": Image.fromarray((RAMP * 257).round().astype(np.uint16)),
        "integers.tif": Image.fromarray((RAMP * 257).round().astype(np.int32)),
        "unit.tif": Image.fromarray((RAMP / 255).astype(np.float32)),
        "float.tif": Image.fromarray(RAMP.astype(np.float32)),
        "opaque.png": grey.convert("RGBA"),
        "cmyk.tif": grey.convert("RGB").convert("CMYK"),
    }
    for name, image in cases.items():
        found = standalone.open_image(written(tmp_path / name, image))
        assert (found.mode, found.size) == ("RGB", (48, 32)), name
        assert np.abs(np.asarray(found).astype(int) - expected).max() <= 1, name


def test_sixteen_bits_are_scaled_not_clipped(tmp_path: Path) -> None:
    values = np.array([[0, 257, 32768, 65535]], dtype=np.uint16)
    found = standalone.open_image(written(tmp_path / "a.png", Image.fromarray(values)))
    assert np.asarray(found)[0, :, 0].tolist() == [0, 1, 128, 255]


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_transparency_becomes_white(tmp_path: Path, mode: str) -> None:
    image = Image.new("RGBA", (4, 4), (0, 0, 0, 0))
    image.paste((0, 0, 0, 255), (0, 0, 2, 4))
    found = standalone.open_image(written(tmp_path / "a.png", image.convert(mode)))
    assert np.asarray(found)[0, :, 0].tolist() == [0, 0, 255, 255]


def test_a_transparent_colour_of_a_palette_becomes_white(tmp_path: Path) -> None:
    image = Image.new("P", (2, 1))
    image.putpalette([0, 0, 0, 200, 0, 0])
    image.putpixel((1, 0), 1)
    found = standalone.open_image(written(tmp_path / "a.png", image, transparency=0))
    assert np.asarray(found)[0].tolist() == [[255, 255, 255], [200, 0, 0]]


@pytest.mark.parametrize(("orientation", "corner"), [(1, (0, 0)), (3, (1, 2)), (6, (0, 1)), (8, (2, 0))])
def test_exif_rotation_is_applied(tmp_path: Path, orientation: int, corner: tuple[int, int]) -> None:
    image = Image.new("L", (3, 2))
    image.putpixel((0, 0), 255)
    exif = Image.Exif()
    exif[0x0112] = orientation
    for name in ("a.png", "b.png"):
        deep = image if name == "a.png" else Image.fromarray(np.asarray(image).astype(np.uint16) * 257)
        found = np.asarray(standalone.open_image(written(tmp_path / name, deep, exif=exif)))[..., 0]
        assert found[corner] == 255
        assert found.shape == ((2, 3) if orientation in (1, 3) else (3, 2))


def bad_files(folder: Path) -> dict[str, str]:
    """Writes one of each, and gives file name -> part of the reason."""
    written(folder / "whole.jpg", Image.fromarray(noise(1, 64)[0]))
    content = (folder / "whole.jpg").read_bytes()
    (folder / "whole.jpg").unlink()
    (folder / "cut.jpg").write_bytes(content[: len(content) // 2])
    written(folder / "whole.png", Image.fromarray(noise(1, 64)[0]))
    content = (folder / "whole.png").read_bytes()
    (folder / "whole.png").unlink()
    (folder / "cut.png").write_bytes(content[: len(content) // 2])
    (folder / "text.jpg").write_text("not a picture")
    (folder / "empty.png").write_bytes(b"")
    (folder / "phone.HEIC").write_bytes(b"\0\0\0\x18ftypheic")
    Image.new("1", (9500, 9500)).save(folder / "large.png")
    Image.new("1", (14000, 14000)).save(folder / "bomb.png")
    Image.new("L", (4000, 2)).save(folder / "strip.png")
    Image.fromarray(np.array([[np.nan, 1]], dtype=np.float32)).save(folder / "nan.tif")
    Image.fromarray(np.array([[-5, 1]], dtype=np.int32)).save(folder / "minus.tif")
    return {
        "cut.jpg": "truncated",
        "cut.png": "truncated",
        "text.jpg": "not an image",
        "empty.png": "empty file",
        "phone.HEIC": "convert it to JPEG",
        "large.png": "decompression bomb",
        "bomb.png": "decompression bomb",
        "strip.png": "one side over 200 times the other",
        "nan.tif": "pixel values",
        "minus.tif": "pixel values from -5 to 1",
    }


@pytest.mark.slow
def test_bad_files_give_one_short_reason_each(tmp_path: Path) -> None:
    for name, reason in bad_files(tmp_path).items():
        with pytest.raises(standalone.UnusableImage, match=reason) as caught:
            standalone.open_image(tmp_path / name)
        assert "\n" not in str(caught.value) and len(str(caught.value)) <= 120, name
    with pytest.raises(standalone.UnusableImage, match="no such file"):
        standalone.open_image(tmp_path / "absent.png")


# --- Preprocessing


@pytest.mark.parametrize("crop_mode", standalone.CROP_MODES)
@pytest.mark.parametrize("input_size", [(3, 32, 32), (3, 33, 47), (3, 20, 9)])
def test_preprocessing_equals_timms(crop_mode: str, input_size: tuple[int, int, int]) -> None:
    from timm.data import create_transform

    sizes = [(1, 1), (37, 91), (200, 33), (32, 32), (161, 120), (3, 17), (46, 31)]
    for interpolation, crop_pct in [
        ("bicubic", 0.875),
        ("bilinear", 0.95),
        ("nearest", 1.0),
        ("lanczos", 1.1),
    ]:
        config = {
            "input_size": input_size, "interpolation": interpolation, "crop_pct": crop_pct,
            "crop_mode": crop_mode, "mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225),
        }  # fmt: skip
        preprocessing = Preprocessing.from_timm(config)
        transform = create_transform(**config, is_training=False, normalize=False)
        for width, height in sizes:
            image = Image.fromarray(noise(1, 200)[0, :height, :width])
            expected = transform(image).numpy().transpose(1, 2, 0)
            assert np.array_equal(preprocessing(image), expected), (interpolation, crop_pct, image.size)


def test_preprocessing_of_odd_files_equals_timms(tmp_path: Path) -> None:
    from timm.data import create_transform

    config = {**PREPROCESSING.to_json(), "input_size": (3, 32, 32)}
    transform = create_transform(**config, is_training=False)
    mean, std = np.array(PREPROCESSING.mean), np.array(PREPROCESSING.std)
    colour = Image.fromarray(noise(1, 50)[0, :, :37])
    for name, image in {"grey.png": colour.convert("L"), "cmyk.jpg": colour.convert("CMYK")}.items():
        path = written(tmp_path / name, image)
        ours = (PREPROCESSING(standalone.open_image(path)) / 255 - mean) / std
        theirs = transform(Image.open(path).convert("RGB")).numpy().transpose(1, 2, 0)
        assert np.abs(ours - theirs).max() < 1e-5, name


def test_preprocessing_survives_json_and_refuses_what_it_cannot_do() -> None:
    assert Preprocessing.from_timm(PREPROCESSING.to_json()) == PREPROCESSING
    good = PREPROCESSING.to_json()
    assert Preprocessing.from_timm({**good, "crop_mode": None}).crop_mode == "center"
    for name, value in [
        ("interpolation", "random"),
        ("input_size", (1, 8, 8)),
        ("crop_mode", "x"),
        ("crop_pct", 0),
    ]:
        with pytest.raises(ModelError, match=name):
            Preprocessing.from_timm({**good, name: value})


# --- Class folders


def test_scan_finds_classes_in_order_and_ignores_what_is_no_image(tmp_path: Path) -> None:
    root = class_folders(tmp_path)
    (root / ".git").mkdir()
    (root / "Ω" / "nested" / "deeper").mkdir(parents=True)
    Image.fromarray(noise(1)[0]).save(root / "Ω" / "nested" / "deeper" / "x.webp")
    for name in (".DS_Store", "a dog/.DS_Store", "a dog/Thumbs.db", "classes.toml", "metadata.jsonl"):
        (root / name).write_text("")
    images = ImageSet.scan(root)
    assert images.classes == tuple(sorted(CLASSES)) == ("a dog", "Ærø brücke", "Ω")
    assert images.counts() == {"a dog": 2, "Ærø brücke": 2, "Ω": 3}
    assert images.labels.tolist() == [0, 0, 1, 1, 2, 2, 2]
    assert images.load(PREPROCESSING).shape == (7, 32, 32, 3)
    assert "x.webp" in {item.path.name for item in images.items}
    few = images.subset([6, 0])
    assert few.labels.tolist() == [2, 0] and few.items == (images.items[6], images.items[0])


def test_the_order_of_the_images_is_that_of_their_contents(tmp_path: Path) -> None:
    """Other names in another folder give the very same arrays, so that nothing learned can depend on them."""
    first, second = ImageSet.scan(class_folders(tmp_path / "a", each=4)), tmp_path / "elsewhere"
    for place, item in enumerate(reversed(first.items)):
        (second / first.classes[item.label]).mkdir(parents=True, exist_ok=True)
        shutil.copyfile(item.path, second / first.classes[item.label] / f"{place}{item.path.suffix}")
    np.testing.assert_array_equal(ImageSet.scan(second).load(PREPROCESSING), first.load(PREPROCESSING))


def test_decomposed_letters_of_a_mac_name_the_same_class(tmp_path: Path) -> None:
    images = ImageSet.scan(class_folders(tmp_path, ["bru\u0308cke", "a"]))
    assert images.with_classes(["a", "br\u00fccke"]).labels.tolist() == [0, 0, 1, 1]


@pytest.mark.slow
def test_all_bad_files_are_listed_at_once_or_left_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    root = class_folders(tmp_path, ["a", "b"])
    bad = bad_files(root / "a")
    with pytest.raises(BadImages, match="--skip-bad") as caught:
        ImageSet.scan(root)
    assert {path.name for path, _ in caught.value.failures} == set(bad)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        images = ImageSet.scan(root, skip_bad=True)
    assert images.counts() == {"a": 2, "b": 2}
    assert all(name in caplog.text for name in bad)


def make_missing(root: Path) -> None:
    root.rmdir()


def make_file(root: Path) -> None:
    root.rmdir()
    root.write_text("")


def make_loose(root: Path) -> None:
    Image.new("L", (2, 2)).save(root / "photo.png")


def make_one_class(root: Path) -> None:
    class_folders(root, ["only"])


def make_empty_class(root: Path) -> None:
    class_folders(root, ["a", "b"])
    (root / "bare").mkdir()


def make_all_bad(root: Path) -> None:
    class_folders(root, ["a", "b"])
    for path in (root / "b").iterdir():
        path.write_text("")


def make_line_break(root: Path) -> None:
    class_folders(root, ["a", "b\nc"])


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (make_missing, "no folder"),
        (make_file, "is a file"),
        (lambda root: None, "is empty"),
        (make_loose, "photo.png but no class folder"),
        (make_one_class, "one class only, 'only'"),
        (make_empty_class, "no usable image in class 'bare'"),
        (make_all_bad, "no usable image in class 'b'"),
        (make_line_break, "line break"),
    ],
)
def test_unusable_folders_are_refused_in_one_line(
    tmp_path: Path, make: Callable[[Path], None], text: str
) -> None:
    root = tmp_path / "few shots"
    root.mkdir()
    make(root)
    with pytest.raises(DataError, match=text) as caught:
        ImageSet.scan(root, skip_bad=True)
    assert str(root) in str(caught.value) and "\n" not in str(caught.value)


def test_with_classes_names_an_unknown_class(tmp_path: Path) -> None:
    images = ImageSet.scan(class_folders(tmp_path, ["cat", "dog"]))
    moved = images.with_classes(["bird", "dog", "cat"])
    assert moved.labels.tolist() == [2, 2, 1, 1] and moved.classes == ("bird", "dog", "cat")
    with pytest.raises(DataError, match=r"'dog'.*did you mean dogs"):
        images.with_classes(["cat", "dogs"])


def test_class_words(tmp_path: Path) -> None:
    assert class_prompt_names(tmp_path, ["red_cup", "7"]) == {"red_cup": "red cup", "7": "7"}
    (tmp_path / "classes.toml").write_text('7 = "digit seven"\n', encoding="utf-8")
    assert class_prompt_names(tmp_path, ["red_cup", "7"]) == {"red_cup": "red cup", "7": "digit seven"}
    (tmp_path / "classes.toml").write_text('red_cop = "cup"\n7 = 7\n', encoding="utf-8")
    with pytest.raises(ConfigError, match=r"'red_cop'; did you mean red_cup.*7 = 7 must be a text"):
        class_prompt_names(tmp_path, ["red_cup", "7"])


# --- Splits


def test_an_image_in_two_classes_is_refused(tmp_path: Path) -> None:
    images = ImageSet.scan(class_folders(tmp_path / "a", each=2))
    wrong = tmp_path / "a" / images.classes[1] / "moved.png"
    wrong.write_bytes(images.items[0].path.read_bytes())
    with pytest.raises(DataError, match=r"1 image\(s\) of .* lie in two classes: .*moved\.png is also"):
        ImageSet.scan(tmp_path / "a")


def test_contact_sheet_holds_every_picture(tmp_path: Path) -> None:
    red, blue = Image.new("RGB", (90, 90), "red"), np.full((8, 8, 3), (0, 0, 255), np.uint8)
    contact_sheet([("real", [red]), ("with a longer label", [blue, red])], tmp_path / "sheet.png", cell=20)
    sheet = np.asarray(Image.open(tmp_path / "sheet.png"))
    assert np.sum((sheet == (255, 0, 0)).all(-1)) == 800 and np.sum((sheet == (0, 0, 255)).all(-1)) == 400
    assert sheet.shape[0] == 44 and (sheet[:, :20] < 100).any()
