"""The photo table: every method learns from the same photos, and what the table says of them is sound."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

pytest.importorskip("timm")
pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")

from benchmarks.photo_table import FIXED, main, markdown, paired, standing, summary
from tests.tiny_students import photo_sets

COLOURS = ("blue", "green", "red")
METHODS = {*FIXED, "last-4 means", "means", "adapt"}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return photo_sets(tmp_path_factory.mktemp("sets"), COLOURS, pool=4, test=3)


def call(folders: Path, *words: str, test: str = "test") -> Result:
    command = [
        *("--set", f"colours={folders / 'pool'}:{folders / test}"),
        *("--weights", f"test_resnet={folders / 'weights'}"),
        *("--shots", "2", "--shots", "1", "--seeds", "1", "--size", "32", "--test-images", "7"),
        *("--adapt-steps", "4", "--full-steps", "2"),
        *("--work", str(folders / "cells"), "--out", str(folders / "table.json")),
    ]
    return CliRunner().invoke(main, [*command, *words], catch_exceptions=False)


@pytest.mark.slow
def test_every_method_is_measured_and_cells_join_another_table(folders: Path) -> None:
    result = call(folders)
    assert result.exit_code == 0, result.stderr
    table = json.loads((folders / "table.json").read_text("utf-8"))
    assert result.stdout.strip() == (folders / "table.md").read_text("utf-8").strip()
    assert (folders / "table.png").stat().st_size > 5000
    assert [(cell["shots"], cell["seed"]) for cell in table["cells"]] == [(1, 0), (2, 0)]
    assert table["settings"]["n_test"] == {"colours": 7}
    for cell in table["cells"]:
        taken = "last-4 means" if cell["shots"] == 1 else cell["strategy"]
        assert set(cell["top1"]) == METHODS and cell["top1"]["adapt"] == cell["top1"][taken]
    joined = call(folders, "--add", str(folders / "table.json"), "--work", str(folders / "unused"))
    assert joined.exit_code == 0 and not (folders / "unused").exists()
    other = call(folders, "--add", str(folders / "table.json"), "--full-lr", "0.1")
    assert other.exit_code == 1 and "full = {'steps': 2, 'lr': 0.0005}, not" in other.stderr


def test_a_shared_image_is_refused(folders: Path) -> None:
    result = call(folders, test="pool")
    assert result.exit_code == 1 and "shares 12 image(s)" in result.stderr


def cell(set_name: str, seed: int, student: str = "s", **top1: float) -> dict[str, Any]:
    scores = {name: top1.get(name.replace("-", "_"), 0.5) for name in (*FIXED, "adapt")}
    return {"set": set_name, "student": student, "shots": 4, "seed": seed, "top1": scores}


def test_students_that_share_photos_count_once() -> None:
    from scipy.stats import ttest_rel

    gains = {("a", 0): (0.1, 0.3), ("a", 1): (0.2, 0.1), ("b", 0): (0.0, 0.1)}
    cells = [
        cell(name, seed, student, adapt=0.5 + gain)
        for (name, seed), both in gains.items()
        for student, gain in zip("st", both, strict=True)
    ]
    cells.append(cell("b", 1, adapt=0.9))  # one student alone
    row = {row["method"]: row for row in paired(cells)}["adapt"]
    assert row["pairs"] == 3 and row["difference"] == pytest.approx((0.2 + 0.15 + 0.05) / 3, abs=1e-4)
    assert row["p_value"] == pytest.approx(ttest_rel([0.7, 0.65, 0.55], [0.5] * 3).pvalue, abs=1e-4)
    assert row["p_holm"] == row["p_value"], "the other methods do not differ from the first: no test"


def test_the_table_compares_adapt_with_the_best_and_the_worst() -> None:
    cells = [
        *(cell("near", seed, last_4=0.7 + 0.1 * seed, logistic=0.4, adapt=0.68) for seed in (0, 1, 2)),
        *(cell("far", seed, full=0.9, adapt=0.6) for seed in (0, 1, 2)),
    ]
    found = summary(cells, {})
    # near: the best has mean .8 and deviation .1; far: deviation 0
    assert found["adapt"] == {
        "cells": 2,
        "within": 0,
        "to_best": pytest.approx((-0.12 - 0.3) / 2),
        "to_worst": pytest.approx((0.28 + 0.1) / 2),
        "best": {"full": 1, "last-4": 1},
        "best_fixed": {"full": 1, "last-1": 0, "last-2": 0, "last-4": 1, "logistic": 0},
    }
    close = [{**one, "top1": {**one["top1"], "adapt": 0.71}} for one in cells]
    assert summary(close, {})["adapt"]["within"] == 1
    text = markdown(found)
    assert "s, mean over 2 sets" in text and "in 0 of 2 cells" in text and "| 4 | 0.700 ± 0.000 |" in text


def test_an_unfinished_table_counts_only_seeds_that_have_every_set() -> None:
    found = summary([cell("a", 0, full=0.4), cell("b", 0, full=0.6), cell("a", 1, full=1.0)], {})
    overall = next(row for row in found["overall"] if row["method"] == "full")
    assert overall["top1_mean"] == 0.5 and overall["seeds"] == 1
    assert standing(summary([cell("a", 0)], {})["rows"]) == {"cells": 0}, "one seed has no deviation"
