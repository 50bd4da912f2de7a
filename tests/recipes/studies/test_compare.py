"""`compare`: nested splits, the same photos for every method, and a table that says what was measured."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

pytest.importorskip("diffusers")
pytest.importorskip("onnxruntime")

from PIL import Image

from synthkit.cli import main
from synthkit.data.images import ImageSet
from synthkit.recipes.chain import Workspace
from synthkit.recipes.studies.compare import (
    ComparisonRow,
    PairedRow,
    Predictions,
    Split,
    comparison_markdown,
    comparison_rows,
    difference_line,
    paired_rows,
)
from synthkit.recipes.studies.digits import write_digits
from synthkit.recipes.studies.methods import ADAPTED, BRIDGED, FEW_SHOT, PLAIN, SYNTHETIC_ONLY
from tests.stages import given
from tests.tiny_students import colour_folders

pytestmark = pytest.mark.slow

COLOURS = ("blue", "green", "red")
TRAINED = ("mixed", "mixed-half", "joint", "mixed-auxbn", "bridged")
COMPARED = (  # in the order of the table
    *(FEW_SHOT, "vanilla", "vanilla-mixup", PLAIN, SYNTHETIC_ONLY),
    *(*TRAINED, BRIDGED, "last-1", "last-4", ADAPTED),
)
QUICK = [
    *"--per-class 2 --student test_resnet".split(),
    *given(
        *"learn-style.steps=2 learn-style.init_word=the learn-style.batch_size=4 generate.steps=1".split(),
        *"train.epochs=1 train.real_steps=2 train.batch_size=6 adapt.adapt_steps=2".split(),
    ),
    *"--shots 1,2 --seeds 1 --seed 3 --set train.method=vanilla --methods".split(),
    ",".join(reversed(COMPARED)),
]


def call(workspace: Path, *words: str | Path) -> Any:
    return CliRunner().invoke(main, ["--workspace", str(workspace), "compare", *map(str, words)])


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("sets")
    colour_folders(root / "pool", COLOURS, each=3, seed=1)
    colour_folders(root / "test", COLOURS, each=2, seed=2)
    return root


@pytest.fixture(scope="module")
def compared(folders: Path, tiny_model: Path) -> tuple[Path, dict[str, Any]]:
    arguments = ["--real-dir", folders / "pool", "--test-dir", folders / "test", "--model", tiny_model]
    result = call(folders / "w", *arguments, *QUICK, "--json")
    assert result.exit_code == 0, result.stderr
    return folders / "w", json.loads(result.stdout)


def test_every_method_predicts_for_every_split(compared: tuple[Path, dict[str, Any]]) -> None:
    workspace, answer = compared
    assert [(row["shots"], row["method"]) for row in answer["rows"]] == [
        (shots, method) for shots in (1, 2) for method in COMPARED
    ]
    assert all(row["seeds"] == 1 and row["top1_std"] == 0 for row in answer["rows"])
    assert [(split["shots"], split["seed"]) for split in answer["splits"]] == [(1, 3), (2, 3)]
    assert answer["n_test"] == 6 and answer["versions"]["synthkit"]
    for split in answer["splits"]:
        confusion = np.array(split["confusion"][ADAPTED])
        assert confusion.sum() == 6 and np.trace(confusion) / 6 == pytest.approx(
            split["top1"][ADAPTED], abs=1e-4
        )
    assert json.loads((workspace / "compare.json").read_text("utf-8")) == answer


def test_all_methods_saw_the_split_and_nothing_else(compared: tuple[Path, dict[str, Any]]) -> None:
    workspace, _ = compared
    for shots in (1, 2):
        place = Workspace(workspace / f"{shots}-shot-3")
        stages = [place.style, place.student, place.adapted, place.root / "methods" / "vanilla-matched"]
        manifests = [json.loads((stage / "manifest.json").read_text("utf-8")) for stage in stages]
        assert len({manifest["inputs"]["photos"] for manifest in manifests}) == 1
        alone, bridged = manifests[3]["metrics"], manifests[1]["metrics"]
        assert alone["real_steps"] == bridged["synthetic_steps"] + bridged["real_steps"]
        assert alone["synthetic_steps"] == 0 and alone["n_real"] == 3 * shots
        plain = json.loads((place.root / "plain_prompts/student/manifest.json").read_text("utf-8"))["metrics"]
        assert (plain["n_synthetic"], plain["n_real"]) == (bridged["n_synthetic"], 0)


def test_training_methods_take_the_bridge_s_steps_on_the_same_images(
    compared: tuple[Path, dict[str, Any]],
) -> None:
    place = compared[0] / "2-shot-3"
    made = {
        path.name: json.loads((path / "manifest.json").read_text("utf-8")) for path in place.glob("methods/*")
    }
    bridged = json.loads((place / "student" / "manifest.json").read_text("utf-8"))
    assert bridged["metrics"]["synthetic_steps"] > 0, "the chain's own method is bridged++ whatever is asked"
    total = bridged["metrics"]["synthetic_steps"] + bridged["metrics"]["real_steps"]
    for folder in ("vanilla-mixup", "mixed", "mixed-real_share=0.5", "joint", "mixed-auxbn", "bridged"):
        metrics = made[folder]["metrics"]
        assert made[folder]["inputs"] == bridged["inputs"], "the same photos and synthetic images"
        assert sum(value for key, value in metrics.items() if key.endswith("_steps")) == total, folder
    assert made["vanilla"]["metrics"]["real_steps"] == bridged["metrics"]["real_steps"]
    for count in (1, 4):
        adapted = json.loads((place / f"last-{count}" / "manifest.json").read_text("utf-8"))
        assert adapted["metrics"]["strategy"] == f"last-{count}"
        assert adapted["inputs"]["photos"] == bridged["inputs"]["photos"]


def test_what_was_measured_is_not_measured_again(
    compared: tuple[Path, dict[str, Any]], folders: Path, tiny_model: Path
) -> None:
    workspace, answer = compared
    assert [path.parent for path in workspace.rglob("model_index.json")] == [workspace / "engines"]
    before = {path: path.stat().st_mtime_ns for path in workspace.rglob("*.onnx")}
    arguments = ["--real-dir", folders / "pool", "--test-dir", folders / "test", "--model", tiny_model]
    environment = dict(os.environ)
    result = call(workspace, *arguments, *QUICK, "--jobs", "2")
    assert result.exit_code == 0, result.stderr
    assert dict(os.environ) == environment, "the processes' share of the cores is not the caller's"
    rows = [ComparisonRow(**row) for row in answer["rows"]]
    paired = [PairedRow(**row) for row in answer["paired"]]
    assert comparison_markdown(rows, paired) in result.stdout
    assert (workspace / "compare.md").read_text("utf-8").strip() in result.stdout
    assert Image.open(workspace / "compare.png").size == (900, 400)
    assert {path: path.stat().st_mtime_ns for path in workspace.rglob("*.onnx")} == before


def test_rows_are_means_and_sample_deviations_over_the_seeds() -> None:
    labels = np.array([0, 1, 0, 1])
    right, half = [0, 1, 0, 1], [0, 0, 0, 0]
    predictions = [
        Predictions(Split(2, 0), "last-1", dict.fromkeys(COMPARED, right)),
        Predictions(Split(2, 1), "last-1", dict.fromkeys(COMPARED, half)),
        Predictions(Split(1, 0), "last-1", dict.fromkeys(COMPARED, half)),
    ]
    table = comparison_rows(predictions, labels)
    assert table[0] == ComparisonRow(FEW_SHOT, 1, 0.5, 0.0, None, 1)
    two_seeds = table[len(COMPARED)]
    assert two_seeds.top1_mean == 0.75 and two_seeds.top1_std == pytest.approx(0.5**0.5 / 2, abs=1e-4)
    assert two_seeds.top1_interval
    low, high = two_seeds.top1_interval  # t of one degree of freedom is 12.706
    assert (low + high) / 2 == pytest.approx(0.75) and high - low == pytest.approx(12.706 * 0.5, abs=1e-2)


def test_a_method_is_paired_with_the_photos_alone_by_seed() -> None:
    labels = np.arange(10)

    def classes(right: int) -> list[int]:
        return [*range(right), *[-1] * (10 - right)]

    predictions = [
        Predictions(
            Split(shots, seed),
            "full",
            {**dict.fromkeys(COMPARED, classes(4 + seed)), ADAPTED: classes(ahead)},
        )
        for shots in (2, 4)
        for seed, ahead in ((1, 7), (0, 5), (2, 9))
    ]
    rows = paired_rows(predictions, labels)
    table = {row.method: row for row in rows if row.shots == 2}
    assert table[ADAPTED].difference == pytest.approx(0.2) and table[BRIDGED].difference == 0
    # differences .1, .2, .3: t = .2 / (.1 / sqrt(3)) = 3.46 with two degrees of freedom
    assert table[ADAPTED].p_value == pytest.approx(0.0742, abs=1e-4) and table[BRIDGED].p_value is None
    assert table[ADAPTED].p_holm == pytest.approx(2 * 0.0742, abs=1e-4), "two tests could be made"
    text = comparison_markdown(comparison_rows(predictions, labels), rows)
    assert "| 2 | 0.500 ± 0.100 |" in text and "2 paired t-tests over the seeds" in text
    assert "- adapted, 2 per class: +20.0 (p = 0.074, Holm 0.148, 3 pairs)" in text
    certain = {**vars(table[ADAPTED]), "p_value": 0.0004, "p_holm": 0.0008}
    assert difference_line(certain) == "- adapted, 2 per class: +20.0 (p < 0.001, Holm 0.001, 3 pairs)"


@pytest.mark.parametrize(
    ("words", "code", "text"),
    [
        (["--shots", "1,x"], 2, "'1,x' must be numbers with commas"),
        (["--methods", "adaptd"], 2, "no method 'adaptd'; did you mean adapted"),
        (["--shots", "9"], 1, "9 images per class were asked for, but blue has 3"),
    ],
)
def test_what_cannot_be_drawn_is_refused(
    folders: Path, tmp_path: Path, words: list[str], code: int, text: str
) -> None:
    result = call(tmp_path / "w", "--real-dir", folders / "pool", "--test-dir", folders / "test", *words)
    assert result.exit_code == code and text in result.stderr


def test_a_test_folder_that_shares_an_image_is_refused(folders: Path, tmp_path: Path) -> None:
    result = call(tmp_path / "w", "--real-dir", folders / "pool", "--test-dir", folders / "pool")
    assert result.exit_code == 1 and "shares 9 image(s)" in result.stderr


def test_the_digits_are_split_without_loss(tmp_path: Path) -> None:
    photos, test = write_digits(tmp_path, 3, 1)
    assert set(photos.counts().values()) == {3} and len(photos) + len(test) == 1797
    again, _ = write_digits(tmp_path / "again", 3, 1)
    assert again.digest == photos.digest
    assert ImageSet.scan(tmp_path / "few_shots").digest == photos.digest
