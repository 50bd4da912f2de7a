"""`probe`: layer groups freeze as said, results are kept, shares nest, and the advice follows the figures."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

pytest.importorskip("timm")

import torch

from synthkit.cli import main
from synthkit.data.images import ImageSet
from synthkit.errors import ConfigError, DataError
from synthkit.recipes.diagnostics import probe as recipe
from synthkit.recipes.diagnostics.probe import (
    INPUTS,
    REAL,
    SYNTHETIC,
    CurvePoint,
    Gap,
    Probe,
    ProbeResult,
    ProbeSettings,
    copy_layer_groups,
    curve_points,
    held_out,
    mixed_student,
    probe_markdown,
    recovered,
    share,
)
from synthkit.recipes.settings import TrainSettings
from tests.stages import given
from tests.tiny_students import colour_folders, lively_student, noise

COLOURS = ("blue", "green", "red")
TRAINING = TrainSettings(student="test_resnet", epochs=1, batch_size=6)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("sets")
    for name, each, seed in (("synthetic", 4, 1), ("real", 4, 2), ("test", 2, 3), ("captions", 4, 4)):
        colour_folders(root / name, COLOURS, each=each, seed=seed)
    return root


def scan(folder: Path) -> ImageSet:
    return ImageSet.scan(folder)


@pytest.fixture
def probe(folders: Path, tmp_path: Path) -> Probe:
    sets = [scan(folders / name) for name in ("synthetic", "real", "test")]
    return Probe(*sets, TRAINING, tmp_path / "probe")


def call(workspace: Path, folders: Path, *words: str | Path) -> Any:
    command = ["probe", "--synth-dir", folders / "synthetic", "--real-dir", folders / "real", *words]
    quick = ["--student", "test_resnet", "--epochs", "1"]
    quick += given("train.batch_size=6", "adapt.adapt_steps=2")
    return CliRunner().invoke(main, ["--workspace", str(workspace), *map(str, command), *quick])


@pytest.mark.slow
def test_the_command_measures_everything_once(
    folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = f"captions={folders / 'captions'}"
    words = ("--test-dir", folders / "test", "--prompts", prompts, "--points", "2", "--json")
    result = call(tmp_path / "w", folders, *words)
    assert result.exit_code == 0, result.stderr
    found = json.loads(result.stdout)
    groups = len(found["layer_groups"])
    assert {(row["first"], row["k"]) for row in found["curve"]} >= {
        (domain, k) for domain in (SYNTHETIC, REAL) for k in (0, groups - 1, groups)
    }
    assert all(0 <= row["top1"] <= 1 for row in found["curve"] + found["efficiency"])
    assert {row["strategy"] for row in found["efficiency"]} == {"last-1", "last-2", "last-4", "real only"}
    assert [row["photos"] for row in found["efficiency"] if row["strategy"] == "last-1"] == [3, 3, 3, 6, 12]
    names = [row["change"] for row in found["ablations"]]
    assert names[0] == "BatchNorm statistics of real photos" and names[-1] == "prompts captions"
    assert {"augmentation none", "inputs edges", "inputs patches"} < set(names)
    assert found["n_test"] == 6 and found["advice"] in (tmp_path / "w" / "probe.md").read_text("utf-8")
    assert (tmp_path / "w" / "probe.png").stat().st_size > 10_000

    def refuse(*_arguments: Any, **_options: Any) -> None:
        raise AssertionError("trained again")

    monkeypatch.setattr("synthkit.learning.fit.fit", refuse)
    again = call(tmp_path / "w", folders, *words)
    assert again.exit_code == 0 and json.loads(again.stdout) == found


@pytest.mark.slow
def test_the_ends_of_the_curve_are_the_students_of_one_domain(probe: Probe) -> None:
    top1 = {(point.first, point.k): point.top1 for point in recipe.curve(probe, 2)}
    groups = len(probe.initial.layer_groups())
    assert top1[SYNTHETIC, 0] == top1[REAL, groups] == probe.score(probe.student(REAL))
    assert top1[REAL, 0] == top1[SYNTHETIC, groups] == probe.score(probe.student(SYNTHETIC))


@pytest.mark.slow
@pytest.mark.parametrize("k", [1, 3])
def test_the_first_units_stay_and_the_others_never_saw_the_first_domain(
    probe: Probe, folders: Path, k: int
) -> None:
    first, mixed = probe.student(SYNTHETIC), mixed_student(probe, SYNTHETIC, k)
    units = first.layer_groups()
    state, own = first.model.state_dict(), mixed.model.state_dict()
    kept = {name for unit in units[:k] for name in unit}
    assert all(torch.equal(state[name], own[name]) for name in kept)
    start = probe.initial.model.state_dict()
    learned = [name for unit in units[k:] for name in unit]
    assert sum(not torch.equal(own[name], start[name]) for name in learned) > len(learned) / 2
    # The second domain is all they see: other synthetic images with the same first units change nothing.
    others = scan(folders / "captions")
    other = replace(probe, synthetic=others, students={SYNTHETIC: first}, root=probe.root / "other")
    again = mixed_student(other, SYNTHETIC, k).model.state_dict()
    assert all(torch.equal(own[name], again[name]) for name in own)


def test_statistics_go_with_their_units() -> None:
    source, target = lively_student(1), lively_student(2)
    before = {key: value.clone() for key, value in target.model.state_dict().items()}
    copy_layer_groups(source, target, 2)
    names = {name for unit in source.layer_groups()[:2] for name in unit}
    owners = {name.rpartition(".")[0] for name in names}
    for key, value in target.model.state_dict().items():
        taken = key.rpartition(".")[0] in owners
        assert torch.equal(value, (source.model.state_dict() if taken else before)[key]), key
    assert any("running_mean" in key and key.rpartition(".")[0] in owners for key in before)


def test_statistics_of_real_photos_change_the_student_and_not_its_weights(
    probe: Probe, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    monkeypatch.setattr(Probe, "score", lambda self, student, inputs="photos": seen.append(student) or 0.5)
    probe.students[SYNTHETIC] = lively_student(0, COLOURS)
    before = probe.student(SYNTHETIC).model.state_dict()
    list(recipe.ablations(probe, ["statistics"]))
    after = seen[-1].model.state_dict()
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    assert changed and all(
        key.endswith(("running_mean", "running_var", "num_batches_tracked")) for key in changed
    )


def test_points_hold_the_last_units_and_stay_inside() -> None:
    assert curve_points(18, 4) == [1, 6, 12, 14, 16, 17]
    assert curve_points(6, 2) == [1, 2, 4, 5]
    assert curve_points(3, 6) == [1, 2]


def test_shares_are_nested_and_leave_no_class_out(folders: Path) -> None:
    real = scan(folders / "real")
    shares = [{item.sha256 for item in share(real, fraction, 5).items} for fraction in (1 / 16, 1 / 2, 1)]
    assert [len(one) for one in shares] == [3, 6, 12]
    assert shares[0] < shares[1] < shares[2]


def test_a_quarter_measures_where_there_are_no_test_images(folders: Path, tmp_path: Path) -> None:
    learned, measured = held_out(scan(folders / "real"), None, 0)
    assert set(measured.counts().values()) == {1} and set(learned.counts().values()) == {3}
    assert not {item.sha256 for item in learned.items} & {item.sha256 for item in measured.items}
    with pytest.raises(DataError, match="shares 12 image"):
        held_out(scan(folders / "real"), scan(folders / "real"), 0)
    with pytest.raises(DataError, match="blue has one photo, so none can be held out"):
        held_out(scan(colour_folders(tmp_path / "one", COLOURS, each=1)), None, 0)


def test_the_inputs_leave_what_they_say() -> None:
    pixels = noise(2, 18)
    grey, edges, patches = (INPUTS[name](pixels) for name in ("grey", "edges", "patches"))
    assert all(one.shape == pixels.shape and one.dtype == np.uint8 for one in (grey, edges, patches))
    assert np.ptp(grey, axis=-1).max() == 0 and grey.std() > 0
    flat = np.full_like(pixels, 90)
    assert not INPUTS["edges"](flat).any() and edges.any()
    assert not np.array_equal(patches, pixels)
    inner = np.s_[:, :16, :16]
    assert np.array_equal(np.sort(patches[inner], axis=None), np.sort(pixels[inner], axis=None)), "only moved"
    assert np.array_equal(patches[:, 16:], pixels[:, 16:])


def result_of(*top1: float, n_test: int = 400) -> ProbeResult:
    points = [CurvePoint(SYNTHETIC, k, value) for k, value in enumerate(top1)]
    gap, shares = recovered(points)
    both = [*points, *(replace(point, first=REAL) for point in points)]
    groups = [f"block{k}" for k in range(len(top1))]
    return ProbeResult(groups, both, gap, shares, [], [], n_test, n_classes=10, settings={}, versions={})


def test_the_shares_of_the_gap_and_the_advice() -> None:
    late = result_of(0.9, 0.9, 0.85, 0.8, 0.8, 0.7, 0.5)
    assert late.gap == Gap(0.5, 0.9, 40.0)
    assert late.recovered == {"1": 0.5, "2": 0.75, "4": 0.875}
    expected = "last 1 layer group(s) recover 50% of the gap of 40.0 points: adapt with --strategy last-1"
    assert expected in late.advice
    early = result_of(0.9, 0.6, 0.55, 0.5, 0.5, 0.5, 0.5)
    assert early.recovered["4"] == 0.125
    assert "Even the last 4 layer groups recover only 12% of the gap" in early.advice
    none = result_of(0.5, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5)
    assert none.recovered == {"1": None, "2": None, "4": None}
    assert none.advice.startswith("No gap to see yet: 50.0% with synthetic images, 50.0% with")
    near = result_of(0.8, 0.8, 0.8, 0.8, 0.8, 0.7, n_test=40)
    assert near.advice.startswith("No gap to close") and "of the gap" not in probe_markdown(near)
    behind = result_of(0.6, 0.6, 0.6, 0.6, 0.6, 0.6, 0.7)
    assert behind.recovered == {"1": None, "2": None, "4": None} and behind.gap.points == -10
    assert "- last 2 layer group(s): 75% of the gap" in probe_markdown(late)
    assert late.to_json()["advice"] == late.advice


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["--ablations", "statistic"], "no ablation 'statistic'; did you mean statistics"),
        (["--prompts", "captions"], "--prompts takes NAME=DIR"),
    ],
)
def test_what_cannot_be_done_is_said_in_a_line(
    folders: Path, tmp_path: Path, words: list[str], text: str
) -> None:
    result = call(tmp_path / "w", folders, *words)
    assert result.exit_code == 1 and text in result.stderr and result.stderr.startswith("error: ")


def test_settings_are_checked() -> None:
    with pytest.raises(ConfigError, match="there are statistics, augmentation, inputs"):
        ProbeSettings(ablations=("prompts",))
