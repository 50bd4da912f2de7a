"""The photo table: every method meets the same photos, cells are kept, and the summary counts right."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

pytest.importorskip("timm")
pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")

from PIL import Image

from benchmarks import photo_table as recipe
from benchmarks.photo_summary import FIXED, markdown, plot, standing, summary
from benchmarks.photo_table import Cell, few, main, order
from synthkit.data.images import ImageSet
from synthkit.recipes.settings import AdaptSettings
from tests.tiny_students import colour_folders, lively_student

COLOURS = ("blue", "green", "red")
METHODS = {*FIXED, "last-4 means", "means", "adapt"}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("sets")
    colour_folders(root / "pool", COLOURS, each=4, seed=1)
    colour_folders(root / "test", COLOURS, each=3, seed=2)
    lively_student(0, COLOURS).save(root / "weights")
    return root


def call(folders: Path, *words: str) -> Any:
    command = [
        *("--set", f"colours={folders / 'pool'}:{folders / 'test'}"),
        *("--weights", f"test_resnet={folders / 'weights'}"),
        *("--shots", "2", "--shots", "1", "--seeds", "2", "--size", "32", "--test-images", "7"),
        *("--adapt-steps", "4", "--full-steps", "2"),
        *("--work", str(folders / "cells"), "--out", str(folders / "table.json")),
    ]
    return CliRunner().invoke(main, [*command, *words], catch_exceptions=False)


@pytest.fixture(scope="module")
def table(folders: Path) -> dict[str, Any]:
    result = call(folders)
    assert result.exit_code == 0, result.stderr
    assert result.stdout.strip() == (folders / "table.md").read_text("utf-8").strip()
    return dict(json.loads((folders / "table.json").read_text("utf-8")))


def test_every_method_answers_for_every_draw(table: dict[str, Any]) -> None:
    assert [(cell["shots"], cell["seed"]) for cell in table["cells"]] == [(1, 0), (2, 0), (1, 1), (2, 1)]
    assert all(set(cell["top1"]) == METHODS for cell in table["cells"])
    assert table["settings"]["n_test"] == {"colours": 7} and table["versions"]["torch"]
    assert {(row["shots"], row["method"]) for row in table["rows"]} == {
        (shots, method) for shots in (1, 2) for method in METHODS
    }
    assert all(row["seeds"] == 2 and len(row["top1_interval"]) == 2 for row in table["rows"])


def size(path: Path) -> tuple[int, int]:
    with Image.open(path) as image:
        return image.size


def test_the_plot_has_a_panel_per_student(table: dict[str, Any], folders: Path, tmp_path: Path) -> None:
    assert size(folders / "table.png") == (650, 400)
    other = [{**row, "student": "another"} for row in table["overall"]]
    plot({"overall": [*table["overall"], *other]}, tmp_path / "two.png")
    assert size(tmp_path / "two.png") == (1100, 400)
    plot({"overall": []}, tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()


def test_adapt_answers_as_the_path_that_it_chose(table: dict[str, Any]) -> None:
    for cell in table["cells"]:
        taken = "last-4 means" if cell["shots"] == 1 else cell["path"]
        assert cell["top1"]["adapt"] == cell["top1"][taken]
        judged = [one["path"] for one in cell["cross_validation"]]
        assert judged == ([] if cell["shots"] == 1 else ["last-1", "last-2", "last-4", "full"])


def test_cells_are_kept(folders: Path, table: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_arguments: Any) -> None:
        raise AssertionError("measured again")

    monkeypatch.setattr(recipe, "measure", refuse)
    assert call(folders).exit_code == 0
    assert json.loads((folders / "table.json").read_text("utf-8")) == table
    with pytest.raises(AssertionError, match="measured again"):
        call(folders, "--full-lr", "0.1")


def test_cells_of_another_machine_join_the_table(
    folders: Path, table: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "half.json").write_text(json.dumps({**table, "cells": table["cells"][:2]}), "utf-8")
    measured: list[Cell] = []

    def spy(_subject: Any, cell: Cell, *_rest: Any) -> dict[str, Any]:
        measured.append(cell)
        return dict(table["cells"][len(measured) + 1])

    monkeypatch.setattr(recipe, "run_cell", spy)
    assert (
        call(folders, "--add", str(tmp_path / "half.json"), "--out", str(tmp_path / "t.json")).exit_code == 0
    )
    assert [(cell.shots, cell.seed) for cell in measured] == [(1, 1), (2, 1)]
    assert json.loads((tmp_path / "t.json").read_text("utf-8")) == table
    result = call(folders, "--add", str(tmp_path / "half.json"), "--full-lr", "0.1")
    assert result.exit_code == 1 and "full = {'steps': 2, 'lr': 0.0005}, not" in result.stderr
    (tmp_path / "half.json").write_text("[]", "utf-8")
    result = call(folders, "--add", str(tmp_path / "half.json"))
    assert result.exit_code == 1 and "is no result of this program" in result.stderr


def test_methods_get_the_same_photos_and_no_test_image(
    folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pool, test = ImageSet.scan(folders / "pool"), ImageSet.scan(folders / "test")
    drawn: list[set[str]] = []

    def spy(site: Any, subject: Any, c: float) -> Any:
        drawn.append({item.sha256 for item in site.examples._set.items})
        return {}, recipe.Choice(recipe.FULL, "", []), []

    monkeypatch.setattr(recipe, "measure", spy)
    subject = recipe.Subject(pool, test, "test_resnet", folders / "weights", 32)
    training = recipe.TrainSettings(real_steps=1)
    for shots in (1, 3):
        cell = Cell("colours", "test_resnet", shots, 5)
        recipe.run_cell(subject, cell, AdaptSettings(), training, 1.0, tmp_path)
    assert len(drawn[0]) == 3 and len(drawn[1]) == 9 and drawn[0] < drawn[1]
    assert not drawn[1] & {item.sha256 for item in test.items}


def test_a_shared_image_is_refused(folders: Path) -> None:
    result = CliRunner().invoke(
        main,
        [
            *("--set", f"colours={folders / 'pool'}:{folders / 'pool'}", "--weights", "test_resnet=x"),
            *("--work", "w", "--out", "t.json"),
        ],
    )
    assert result.exit_code == 1 and "shares 12 image(s)" in result.stderr


def test_a_balanced_part_comes_first() -> None:
    cells = [
        Cell(name, "s", shots, seed) for seed in (0, 1) for shots in (1, 2, 4, 8, 16) for name in ("a", "b")
    ]
    found = order(cells)
    assert [(one.set, one.shots, one.seed) for one in found[:7]] == [
        *(("a", 1, 0), ("b", 1, 0), ("a", 4, 0), ("b", 4, 0), ("a", 16, 0), ("b", 16, 0)),
        ("a", 2, 0),
    ]
    assert sorted(found, key=repr) == sorted(cells, key=repr)


def test_few_images_are_chosen_by_content(folders: Path) -> None:
    test = ImageSet.scan(folders / "test")
    kept = few(test, 4)
    assert {item.sha256 for item in kept.items} == set(sorted(item.sha256 for item in test.items)[:4])
    assert few(test, 99).digest == test.digest


def cell(set_name: str, seed: int, **top1: float) -> dict[str, Any]:
    scores = {name: top1.get(name.replace("-", "_"), 0.5) for name in (*FIXED, "adapt")}
    return {"set": set_name, "student": "s", "shots": 4, "seed": seed, "top1": scores}


def test_the_summary_compares_adapt_with_the_best_and_the_worst() -> None:
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
    paired = {row["method"]: row for row in found["paired"]}
    assert paired["last-4"]["ahead"] == pytest.approx((0.2 + 0.3 + 0.4 - 1.2) / 6, abs=1e-4)
    assert paired["last-4"]["draws"] == 6 and paired["last-4"]["p_value"] is not None
    text = markdown(found)
    assert "s, mean over 2 sets" in text and "in 0 of 2 cells" in text and "| 4 | 0.700 ± 0.000 |" in text


def test_one_seed_tells_no_deviation() -> None:
    found = summary([cell("a", 0), cell("b", 0)], {})
    assert found["adapt"] == {"cells": 0} and standing(found["rows"]) == {"cells": 0}
    assert "standard deviation of the best" not in markdown(found)
    assert "| 4 | 0.500 | 0.500 |" in markdown(found)


def test_an_unfinished_table_counts_only_seeds_that_have_every_set() -> None:
    found = summary([cell("a", 0, full=0.4), cell("b", 0, full=0.6), cell("a", 1, full=1.0)], {})
    overall = next(row for row in found["overall"] if row["method"] == "full")
    assert overall["top1_mean"] == 0.5 and overall["seeds"] == 1
    more = [{**cell("a", 0), "shots": 8}, cell("a", 0), cell("b", 0)]
    assert {row["shots"] for row in summary(more, {})["overall"]} == {4}, "8 photos: one set of two"
