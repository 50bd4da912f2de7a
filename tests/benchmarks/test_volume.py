"""Top-1 over the volume of synthetic images: nested sets, equal gradient steps, one table."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("diffusers")
pytest.importorskip("onnxruntime")

from benchmarks.volume import first_of_each, markdown, plot, rows, top1_over_volume
from synthkit.data.images import ImageSet
from synthkit.recipes.chain import ChainSettings
from synthkit.recipes.settings import (
    EngineSettings,
    GenerateSettings,
    StyleSettings,
    TrainSettings,
)
from synthkit.recipes.studies.compare import Split, split_run
from tests.tiny_students import colour_folders

COLOURS = ("blue", "green", "red")


@pytest.mark.slow
def test_the_smaller_sets_lie_within_the_larger_and_all_get_as_many_steps(
    tmp_path: Path, tiny_model: Path
) -> None:
    photos = ImageSet.scan(colour_folders(tmp_path / "pool", COLOURS, each=1, seed=1))
    test = ImageSet.scan(colour_folders(tmp_path / "test", COLOURS, each=2, seed=2))
    settings = ChainSettings(
        EngineSettings(model=str(tiny_model)),
        StyleSettings(steps=1, init_word="the", batch_size=2),
        GenerateSettings(steps=1),
        train=TrainSettings(student="test_resnet", batch_size=3),
    )
    run = split_run(settings, tmp_path / "w", photos, Split(1, 0))
    found = top1_over_volume(run, test, [1, 2, 4])
    assert list(found) == [1, 2, 4] and all(0 <= top1 <= 1 for top1 in found.values())

    folder = run.workspace.root / "volume"
    largest = ImageSet.scan(folder / "synthetic")
    assert set(largest.counts().values()) == {4}
    for volume in (1, 2, 4):
        manifest = json.loads((folder / f"student-{volume}/manifest.json").read_text("utf-8"))
        assert manifest["metrics"]["n_synthetic"] == 3 * volume
        assert manifest["metrics"]["synthetic_steps"] == 12  # three epochs over twelve images in threes
        assert manifest["inputs"]["synthetic"] == first_of_each(largest, volume).digest


def test_the_first_images_are_first_by_name(tmp_path: Path) -> None:
    images = ImageSet.scan(colour_folders(tmp_path, COLOURS, each=9, seed=1))
    expected = [path for name in COLOURS for path in sorted((tmp_path / name).iterdir())[:4]]
    assert sorted(item.path for item in first_of_each(images, 4).items) == expected


def test_the_table_has_means_and_sample_deviations(tmp_path: Path) -> None:
    table = rows([{50: 0.5, 100: 0.75}, {50: 0.7, 100: 0.75}])
    assert table[0] == {"per_class": 50, "top1_mean": 0.6, "top1_std": pytest.approx(0.1414), "seeds": 2}
    assert "| 50 | 0.600 ± 0.141 |" in markdown(table) and rows([{50: 0.5}])[0]["top1_std"] == 0
    plot(table, tmp_path / "volume.png")
    assert (tmp_path / "volume.png").stat().st_size > 5000
