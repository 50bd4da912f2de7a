"""The benchmark of adaptation times every variant, and its figures add up."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

pytest.importorskip("timm")


from benchmarks.adapt_speed import expected, main, ratios
from synthkit.data.images import ImageSet
from synthkit.learning.fit import Examples
from synthkit.recipes.adaptation.strategies import LAST, AdaptationTask, StartingStudent
from synthkit.recipes.settings import AdaptSettings, TrainSettings
from tests.tiny_students import lively_student, photo_sets

COLOURS = ("blue", "green", "red")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return photo_sets(tmp_path_factory.mktemp("sets"), COLOURS, pool=3, test=2)


@pytest.fixture
def parts(folders: Path) -> tuple[Any, ...]:
    student = lively_student(0, COLOURS)
    photos = ImageSet.scan(folders / "pool")
    settings = AdaptSettings(adapt_steps=3, views=2, strategy="last-1")
    return (
        StartingStudent(student, False, None),
        Examples(photos, student.preprocessing),
        settings,
        TrainSettings(),
    )


@pytest.mark.slow
def test_the_command_times_every_way(folders: Path) -> None:
    words = "--student test_resnet --size 32 --classes 2 --shots 2 --no-whole".split()
    words += "--steps 3 --views 2 --runs 2".split()
    for name, folder in (("--real-dir", "pool"), ("--test-dir", "test"), ("--weights", "weights")):
        words += [name, str(folders / folder)]
    result = CliRunner().invoke(main, [*words, "--out", str(folders / "out.json")], catch_exceptions=False)
    assert result.exit_code == 0
    found = json.loads((folders / "out.json").read_text("utf-8"))
    variants = {"stage cached", "stage plain", "stage timm"}
    assert set(found["measured"]) == variants and found["n_test"] == 4, "two classes"
    assert all(len(one["all_seconds"]) == 2 and 0 <= one["top1"] <= 1 for one in found["measured"].values())
    assert set(found["ratios"]) == {"stage plain", "stage timm"}
    assert found["settings"]["photos"] == 4


def test_what_is_expected_counts_images(parts: tuple[Any, ...]) -> None:
    assert expected(AdaptationTask(*parts), LAST[0]) == {
        "cached": 9 * 3,
        "plain_stage": 3 * 32,
        "plain_whole": (1 + 3 * 3) * 3 * 32,
        "stage_ratio": round(96 / 27, 2),
        "whole_ratio": round(960 / 27, 2),
    }


def test_ratios_are_to_the_cached_way_of_the_same_kind() -> None:
    seconds = {
        "stage cached": 2.0,
        "stage plain": 5.0,
        "stage timm": 7.0,
        "whole cached": 4.0,
        "whole plain": 60.0,
    }
    found = ratios({name: {"seconds": one} for name, one in seconds.items()})
    assert found == {"stage plain": 2.5, "stage timm": 3.5, "whole plain": 15.0}
