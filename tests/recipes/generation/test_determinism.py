"""Image i of class c has the same bytes whatever else is generated, and in whatever order."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from benchmarks.generation import contents
from synthkit.data.images import ImageSet
from synthkit.diffusion import style_token as style_files
from synthkit.diffusion.style_token import StyleToken
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
    rng = np.random.default_rng(0)
    tokens = [StyleToken(name, rng.standard_normal((2, WIDTH), np.float32)) for name in ("<x>", "<x-2>")]
    style_files.save_all(tokens, path, "tiny", [0.5, 0.5])
    return path


@pytest.fixture(scope="module")
def whole_set(
    tiny_engines: Path, two_styles: Path, photos: ImageSet, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    out = tmp_path_factory.mktemp("everything") / "synthetic"
    generate(EVERYTHING, tiny_engines, SYNONYMS, two_styles, out, photos=photos)
    return out


def test_every_choice_is_made_per_image(whole_set: Path) -> None:
    lines = [json.loads(line) for line in (whole_set / "metadata.jsonl").read_text().splitlines()]
    assert {line["token"] for line in lines} == {None, "<x>", "<x-2>"}
    assert {line["steps"] for line in lines} == {2, 3, 4}
    assert {line["guidance"] > 1 for line in lines} == {True, False}
    assert {line["init"].split("/")[0] == line["class"] for line in lines} == {True}
    assert len({line["sha256"] for line in lines}) == 12


@pytest.mark.slow
@pytest.mark.parametrize(
    ("batch_size", "classes", "per_class"),
    [(1, CLASSES, 6), (5, CLASSES[::-1], 6), (4, CLASSES[1:], 6), (3, CLASSES, 8), (4, CLASSES, 2)],
    ids=["one by one", "other order", "one class", "more images", "fewer images"],
)
def test_an_image_has_the_same_bytes_whatever_else_is_generated(
    batch_size: int,
    classes: tuple[str, ...],
    per_class: int,
    whole_set: Path,
    tiny_engines: Path,
    two_styles: Path,
    photos: ImageSet,
    tmp_path: Path,
) -> None:
    settings = dataclasses.replace(EVERYTHING, batch_size=batch_size, per_class=per_class)
    words = {name: SYNONYMS[name] for name in classes}
    generate(settings, tiny_engines, words, two_styles, tmp_path / "synthetic", photos=photos)
    other, whole = contents(tmp_path / "synthetic"), contents(whole_set)
    shared = {f"{name}/{index:05d}.png" for name in classes for index in range(min(per_class, 6))}
    assert {name: other[name] for name in shared} == {name: whole[name] for name in shared}
