"""The benchmark of adaptation: the same schedule for every way, and figures that add up."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

pytest.importorskip("timm")

import torch

from benchmarks import adapt_speed as recipe
from benchmarks.adapt_speed import PlainSite, expected, main, ratios, stage, timm_style
from synthkit.data.images import ImageSet
from synthkit.engines.student import frozen_layers as frozen_onnx
from synthkit.learning.fit import Examples
from synthkit.recipes.adaptation.strategies import LAST, Site, Start
from synthkit.recipes.settings import AdaptSettings, TrainSettings
from tests.tiny_students import colour_folders, lively_student

COLOURS = ("blue", "green", "red")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("sets")
    colour_folders(root / "pool", COLOURS, each=3, seed=1)
    colour_folders(root / "test", COLOURS, each=2, seed=2)
    lively_student(0, COLOURS).save(root / "weights")
    return root


@pytest.fixture
def parts(folders: Path) -> tuple[Any, ...]:
    student = lively_student(0, COLOURS)
    photos = ImageSet.scan(folders / "pool")
    settings = AdaptSettings(adapt_steps=3, views=2, path="last-1")
    return Start(student, False, None), Examples(photos, student.preprocessing), settings, TrainSettings()


def test_the_command_times_every_way(folders: Path) -> None:
    words = "--student test_resnet --size 32 --classes 2 --shots 2 --steps 3 --views 2 --runs 2".split()
    for name, folder in (("--real-dir", "pool"), ("--test-dir", "test"), ("--weights", "weights")):
        words += [name, str(folders / folder)]
    result = CliRunner().invoke(main, [*words, "--out", str(folders / "out.json")], catch_exceptions=False)
    assert result.exit_code == 0
    found = json.loads((folders / "out.json").read_text("utf-8"))
    ways = {"stage cached", "stage plain", "stage timm", "whole cached", "whole plain"}
    assert set(found["measured"]) == ways and found["n_test"] == 4, "two classes"
    assert all(len(one["all_seconds"]) == 2 and 0 <= one["top1"] <= 1 for one in found["measured"].values())
    assert set(found["ratios"]) == {"stage plain", "stage timm", "whole plain"}
    assert found["settings"]["photos"] == 4


def test_what_is_expected_counts_images(parts: tuple[Any, ...]) -> None:
    assert expected(Site(*parts), LAST[0]) == {
        "cached": 9 * 3,
        "plain_stage": 3 * 32,
        "plain_whole": (1 + 3 * 3) * 3 * 32,
        "stage_ratio": round(96 / 27, 2),
        "whole_ratio": round(960 / 27, 2),
    }


def test_the_plain_way_sends_every_image_through_the_whole_student(
    parts: tuple[Any, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(frozen_onnx, "in_onnxruntime", lambda layers, _images: layers)  # which no hook sees

    def passes(way: Any, site: Site) -> int:
        """Images that the first layer sees in training and before it."""
        seen: list[int] = []
        first = next(one for one in site.start.student.model.modules() if isinstance(one, torch.nn.Conv2d))
        hook = first.register_forward_pre_hook(lambda _module, inputs: seen.append(len(inputs[0])))
        way(site, LAST[0])
        hook.remove()
        return sum(seen)

    check = 2 * 2  # images that `split` verifies its cut on, through the parts and the whole
    assert passes(stage, Site(*parts)) == 9 * 3 + check
    assert passes(stage, PlainSite(*parts)) == 3 * 32 + check


def test_the_timm_script_takes_as_many_steps(
    parts: tuple[Any, ...], folders: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[int] = []
    real = torch.optim.AdamW.step
    monkeypatch.setattr(
        torch.optim.AdamW, "step", lambda self, *rest: (steps.append(1), real(self, *rest))[1]
    )
    start, examples, settings, training = parts
    site = PlainSite(start, examples, replace(settings, adapt_steps=7), training)
    before = {name: one.clone() for name, one in start.student.model.state_dict().items()}
    student = timm_style(ImageSet.scan(folders / "pool"), site, LAST[0])
    after = student.model.state_dict()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert len(steps) == 7 and moved == {"fc.weight", "fc.bias"}


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


def test_every_run_starts_with_nothing_kept(parts: tuple[Any, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    sites: list[Site] = []
    monkeypatch.setattr(recipe, "_top1", lambda *_arguments: 0.5)

    def way(site: Site, _path: Any) -> Any:
        assert "seen" not in site.__dict__
        sites.append(site)
        return site.seen

    recipe.measure({"a": (way, Site(*parts)), "b": (way, PlainSite(*parts))}, LAST[0], None, 2)  # type: ignore[arg-type]
    assert [type(one) for one in sites] == [Site, PlainSite, Site, PlainSite]
