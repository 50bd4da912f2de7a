from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from synthkit.data.images import ImageSet
from synthkit.errors import ConfigError, DataError
from synthkit.recipes.generation.plan import (
    Range,
    SetPlan,
    guidance_range,
    image_seed,
    make_plan,
    steps_range,
)
from synthkit.recipes.settings import GenerateSettings

WORDS = {"7": "digit seven", "a": ("letter a", "small a", "an a")}
TOKENS = [("<one>", 0.75), ("<two>", 0.25)]


def plan(tokens: Any = (), photos: ImageSet | None = None, **values: Any) -> SetPlan:
    return make_plan(GenerateSettings(per_class=400, **values), WORDS, tokens, photos)


@pytest.fixture
def photos(tmp_path: Path) -> ImageSet:
    for name, count in (("7", 3), ("a", 2)):
        (tmp_path / name).mkdir()
        for number in range(count):
            Image.new("RGB", (4, 4), (number * 40, len(name), ord(name))).save(
                tmp_path / name / f"{number}.png"
            )
    return ImageSet.scan(tmp_path)


def test_seeds_are_those_of_earlier_sets() -> None:
    assert image_seed(0, "7", 3) == 221968626312874
    names = [
        (seed, name, index, resample)
        for seed in range(3)
        for name in ("1", "11")
        for index in range(30)
        for resample in range(3)
    ]
    assert len({image_seed(*name) for name in names}) == len(names)


def test_without_wishes_every_image_of_a_class_has_the_usual_prompt() -> None:
    images = plan([("<s>", 1.0)]).images()
    assert [(one.name, one.index) for one in images] == [(n, i) for n in ("7", "a") for i in range(400)]
    assert {one.prompt for one in images[:400]} == {"A digit seven photo in the style of <s>"}
    assert {one.prompt for one in plan().images()[:400]} == {"A digit seven photo"}
    assert {(one.steps, one.guidance, one.token, one.start) for one in images} == {(15, 2.0, "<s>", None)}


def test_choices_are_spread_and_do_not_depend_on_each_other() -> None:
    wishes: dict[str, Any] = {
        "steps": "12:14",
        "guidance": "1.5:3.0",
        "context": ("on a wet meter", "at night"),
        "template": (
            "{words} as {token}",
            "A {words} photo {context} in the style of {token}",
            "Just a {words}",
        ),
        "plain_share": 0.25,
    }
    images = plan(TOKENS, **wishes).images()
    tokens = Counter(one.token for one in images)
    assert [round(tokens[name] / 800, 1) for name in ("<one>", "<two>", None)] == [0.6, 0.2, 0.2]
    assert Counter(one.steps for one in images).keys() == {12, 13, 14}
    assert all(220 < count < 320 for count in Counter(one.steps for one in images).values())
    scales = [one.guidance for one in images]
    assert 1.5 <= min(scales) < 1.52 and 2.98 < max(scales) <= 3.0 and len(set(scales)) > 500
    fewer = plan(TOKENS, **{**wishes, "context": (), "steps": 15}).images()
    assert [(one.seed, one.token, one.guidance) for one in fewer] == [
        (one.seed, one.token, one.guidance) for one in images
    ]


def test_prompts_of_templates_and_contexts() -> None:
    template = ("{words} as {token}", "A {words} {context} in the style of {token}", "Just a {words}")
    images = plan(TOKENS, template=template, context=("on a wet meter",), plain_share=0.25).images()
    sevens = {one.prompt for one in images if one.name == "7"}
    assert sevens == {
        "digit seven as <one>, on a wet meter",
        "digit seven as <two>, on a wet meter",
        "A digit seven on a wet meter in the style of <one>",
        "A digit seven on a wet meter in the style of <two>",
        "Just a digit seven, on a wet meter",
    }
    assert all((one.token or "Just") in one.prompt for one in images)
    used = Counter(word for one in images for word in WORDS["a"] if one.name == "a" and word in one.prompt)
    assert all(100 < used[word] < 170 for word in WORDS["a"])


def test_a_resample_is_another_image() -> None:
    maker = plan(guidance="1:9")
    first = maker.image("7", 4)
    second, third = maker.resampled(first), maker.resampled(maker.resampled(first))
    assert [one.resample for one in (first, second, third)] == [0, 1, 2]
    assert len({(one.seed, one.guidance) for one in (first, second, third)}) == 3
    assert second == maker.image("7", 4, 1)


def test_images_start_from_photos_of_their_class(photos: ImageSet) -> None:
    assert plan(photos=photos).image("7", 0).start is None
    images = plan(photos=photos, init="real").images()
    starts = Counter(one.start.name for one in images if one.start)
    assert starts.keys() == {"7/0.png", "7/1.png", "7/2.png", "a/0.png", "a/1.png"}
    assert all(one.start and one.start.name.startswith(one.name) for one in images)
    assert min(starts.values()) > 90
    renamed = photos.root / "7" / "z.png"
    (photos.root / "7" / "0.png").rename(renamed)
    again = plan(photos=ImageSet.scan(photos.root), init="real").images()
    assert [one.start.sha256 for one in again if one.start] == [
        one.start.sha256 for one in images if one.start
    ]


def test_a_class_without_photos_cannot_start_from_them(photos: ImageSet) -> None:
    with pytest.raises(DataError, match="no photo of class 'b' to start from"):
        make_plan(GenerateSettings(init="real"), {"7": "x", "b": "y"}, (), photos)
    with pytest.raises(
        ConfigError, match=r"generate.init = real starts from photos; name their folder with --real-dir"
    ):
        plan(init="real")


def test_ranges() -> None:
    assert steps_range(15) == steps_range("15") == Range(15, 15, whole=True)
    assert guidance_range("1.5:3") == Range(1.5, 3.0, whole=False)
    for value in ("", "a", "3:1", "1:2:3", "0", "-1", "2.5", ":", "nan"):
        with pytest.raises(ConfigError, match="must be a whole number of 1 or more, or a range LOW:HIGH"):
            steps_range(value)
    for value in ("-1:2", "1:nan", "inf"):
        with pytest.raises(ConfigError, match=r"guidance = .* must be a number of 0 or more"):
            guidance_range(value)


@pytest.mark.parametrize(
    ("values", "tokens", "message"),
    [
        ({"strength": 1.5}, (), "strength = 1.5: must lie between 0 and 1"),
        ({"plain_share": 1.01}, (), "plain_share = 1.01: must lie between 0 and 1"),
        ({"strength": 0.05, "init": "real"}, (), "0.05 of 15 steps is less than one step"),
        ({"template": ("  ",)}, (), "must be a text that is not empty"),
        ({"template": (7,)}, (), "template = 7"),
        ({"context": ("",)}, (), "must be a text that is not empty"),
        ({"template": ("a photo",)}, (), r"does not name the class; write \{words\} into it"),
        ({"template": ("{word}",)}, (), r"unknown place \{word\}; did you mean words"),
        ({"template": ("{words",)}, (), "cannot be read"),
        ({"template": ("{words} {token}",)}, (), "there is no style"),
        ({"template": ("{words}",)}, TOKENS, r"write \{token\} into one, or generate .* plain_share = 1"),
    ],
)
def test_settings_that_cannot_be_used(values: dict[str, Any], tokens: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        plan(tokens, **values)


def test_classes_that_cannot_be_used() -> None:
    settings = GenerateSettings()
    for words, message in (
        ({"a/b": "a"}, "cannot be folder names"),
        ({".a": "a"}, "cannot be folder names"),
        ({}, "no classes were given"),
        ({"a": " "}, "class 'a' has no words, so its prompt would be empty"),
        ({"a": ()}, "class 'a' has no words"),
    ):
        with pytest.raises(ConfigError, match=message):
            make_plan(settings, words, (), None)
