"""Sets in which every image has choices of its own, and single images of them drawn again."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from benchmarks.generation import contents
from synthkit.data.images import ImageSet
from synthkit.diffusion import style_token as style_files
from synthkit.diffusion.style_token import StyleToken
from synthkit.errors import DataError
from synthkit.recipes.generation.redo import find_set, redo
from synthkit.recipes.settings import GenerateSettings
from tests.stages import generate
from tests.tiny_models import WIDTH

pytest.importorskip("onnxruntime")
CLASSES = ("b", "ä x")


EVERYTHING = GenerateSettings(
    per_class=6,
    steps="2:4",
    guidance="0.2:1.8",
    template=("{words} as {token}", "{words} {context}"),
    context=("at night", "in rain"),
    negative="blur",
    plain_share=0.4,
    init="real",
    strength=0.7,
    batch_size=4,
)
SYNONYMS = {"b": ("letter b", "small b"), "ä x": "letter a"}


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> ImageSet:
    root = tmp_path_factory.mktemp("photos")
    for name in CLASSES:
        (root / name).mkdir()
        for number in range(3):
            pixels = np.random.default_rng([number, len(name)]).integers(0, 256, (20, 24, 3), np.uint8)
            Image.fromarray(pixels).save(root / name / f"{number}.png")
    return ImageSet.scan(root)


@pytest.fixture(scope="module")
def two_styles(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("styles") / "learned_embeds.safetensors"
    draw = np.random.default_rng(0)
    tokens = [StyleToken(name, draw.standard_normal((2, WIDTH), np.float32)) for name in ("<x>", "<x-2>")]
    style_files.save_all(tokens, path, "tiny", [0.5, 0.5])
    return path


@pytest.fixture(scope="module")
def drawn_by_everything(
    tiny_engines: Path, two_styles: Path, photos: ImageSet, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    out = tmp_path_factory.mktemp("everything") / "synthetic"
    generate(EVERYTHING, tiny_engines, SYNONYMS, two_styles, out, photos=photos)
    return out


def test_images_with_choices_of_their_own_do_not_depend_on_the_batch(
    drawn_by_everything: Path, tiny_engines: Path, two_styles: Path, photos: ImageSet, tmp_path: Path
) -> None:
    lines = [json.loads(line) for line in (drawn_by_everything / "metadata.jsonl").read_text().splitlines()]
    assert {line["token"] for line in lines} == {None, "<x>", "<x-2>"}
    assert {line["steps"] for line in lines} == {2, 3, 4} and {line["guidance"] > 1 for line in lines} == {
        True,
        False,
    }
    assert {line["init"].split("/")[0] == line["class"] for line in lines} == {True}
    assert len({line["sha256"] for line in lines}) == 12
    other = dataclasses.replace(EVERYTHING, batch_size=1)
    generate(other, tiny_engines, SYNONYMS, two_styles, tmp_path / "synthetic", photos=photos)
    assert contents(tmp_path / "synthetic") == contents(drawn_by_everything)


def test_an_image_can_be_drawn_again(
    drawn_by_everything: Path, tiny_engines: Path, two_styles: Path, photos: ImageSet
) -> None:
    for name in ("b/00000.png", "ä x/00004.png"):
        result = redo(drawn_by_everything, name, tiny_engines, two_styles, photos)
        assert result.same and result.content == (drawn_by_everything / name).read_bytes()


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('"index": 0', '"index": 1', "line 1: file_name = 'b/00000.png' is not that of class 'b', index 1"),
        ('"seed": ', '"seed": x', "line 1: is not JSON"),
        ('"seed": ', '"sed": ', "line 1: lacks seed"),
        ('"steps": ', '"steps": -', r"line 1: seed \d+, steps -"),
        ('"strength": 0', '"strength": 7', r"line 1: strength = 7\.7 must lie in 0 to 1"),
        ('"prompt": "', '"prompt": "An ', "line 1: metadata.jsonl was changed after the set was finished"),
        ('"attempt": 0', '"attempt": "0"', "line 1: attempt = '0' is of the wrong kind"),
    ],
)
def test_edited_metadata_is_refused_by_line(
    drawn_by_everything: Path,
    tiny_engines: Path,
    two_styles: Path,
    photos: ImageSet,
    tmp_path: Path,
    old: str,
    new: str,
    message: str,
) -> None:
    shutil.copytree(drawn_by_everything, tmp_path / "set")
    path = tmp_path / "set" / "metadata.jsonl"
    text = path.read_text(encoding="utf-8")
    path.write_text(text.replace(old, new, 1), encoding="utf-8")
    with pytest.raises(DataError, match=message):
        redo(tmp_path / "set", "b/00000.png", tiny_engines, two_styles, photos)


def test_what_another_set_was_drawn_with_is_refused(
    drawn_by_everything: Path,
    tiny_engines: Path,
    tiny_epsilon_engines: Path,
    tiny_style: Path,
    two_styles: Path,
    photos: ImageSet,
    tmp_path: Path,
) -> None:
    root, name = drawn_by_everything, "b/00000.png"
    with pytest.raises(DataError, match="line 1: drawn with other engines"):
        redo(root, name, tiny_epsilon_engines, two_styles, photos)
    with pytest.raises(DataError, match=r"line 1: drawn with other style .* --style"):
        redo(root, name, tiny_engines, tiny_style, photos)
    with pytest.raises(DataError, match=r"line 1: the image starts from the photo b/\d\.png"):
        redo(root, name, tiny_engines, two_styles, None)
    with pytest.raises(DataError, match=r"has no image 'b/00099\.png'"):
        redo(root, "b/00099.png", tiny_engines, two_styles, photos)
    assert find_set(root / name, tmp_path) == find_set(Path(name), root) == (root, name)
    with pytest.raises(DataError, match="lies in no synthetic set"):
        find_set(Path("b/1.png"), tmp_path)
