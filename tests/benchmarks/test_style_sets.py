"""Synthetic sets of a comparison beside real photos: which folders, which numbers, which table."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

pytest.importorskip("timm")
pytest.importorskip("onnxruntime")

from benchmarks.style_sets import main, markdown, measure_sets, set_folders
from synthkit.artifacts import write_json
from synthkit.data.images import ImageSet
from synthkit.learning.students import new_student
from synthkit.recipes.studies.methods import PLAIN, SYNTHETIC_ONLY
from tests.tiny_students import colour_folders

COLOURS = ("blue", "green", "red")
EACH = 7  # photos of a class: more than the neighbours that coverage asks


@pytest.fixture
def workspace(tmp_path: Path) -> Path:
    for seed in (0, 1):
        cell = tmp_path / f"2-shot-{seed}"
        colour_folders(cell / "synthetic", COLOURS, each=EACH, seed=10 + seed)
        colour_folders(cell / "plain_prompts/synthetic", COLOURS[::-1], each=EACH, seed=20 + seed)
        for name in COLOURS:  # every set of plain prompts shows one colour alone
            for path in (cell / "plain_prompts/synthetic" / name).iterdir():
                path.write_bytes((cell / "synthetic/blue" / f"{path.name}").read_bytes() + name.encode())
    cells = [
        {"shots": 2, "seed": seed, "top1": {SYNTHETIC_ONLY: 0.8 + seed / 10, PLAIN: 0.5, "adapted": 1.0}}
        for seed in (0, 1)
    ]
    write_json(tmp_path / "compare.json", {"splits": cells, "classes": COLOURS, "n_test": 3 * EACH})
    colour_folders(tmp_path / "test", COLOURS, each=EACH, seed=3)
    return tmp_path


def test_the_set_that_looks_like_the_photos_is_nearer(workspace: Path) -> None:
    compared = json.loads((workspace / "compare.json").read_text("utf-8"))
    student = new_student("test_resnet", COLOURS, image_size=32)
    test = ImageSet.scan(workspace / "test")
    plain, learned = measure_sets(student, workspace, compared, test)
    assert (plain["method"], learned["method"]) == (PLAIN, SYNTHETIC_ONLY)
    assert learned["top1_mean"] == 0.85 and learned["top1_std"] == pytest.approx(0.0707)
    assert learned["frechet_mean"] < plain["frechet_mean"] / 2
    assert learned["coverage_mean"] > plain["coverage_mean"] and learned["seeds"] == 2
    assert "| 2 | learned style | 0.850 ± 0.071 |" in markdown([plain, learned])


def test_only_sets_that_lie_there_are_measured(workspace: Path) -> None:
    cell = workspace / "2-shot-0"
    assert set_folders(cell) == {
        PLAIN: cell / "plain_prompts/synthetic",
        SYNTHETIC_ONLY: cell / "synthetic",
    }


def test_a_workspace_without_a_comparison_is_named(tmp_path: Path) -> None:
    words = [str(tmp_path), "--test-dir", str(tmp_path), "--weights", "w", "--architecture", "test_resnet"]
    result = CliRunner().invoke(main, words)
    assert result.exit_code == 1 and f"no {tmp_path / 'compare.json'}; make it with" in str(result.output)
