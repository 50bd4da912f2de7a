"""The update on the device beside torch: the result holds the top-1 of the bundles that it left."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from benchmarks.device_head import main
from synthkit.data.images import ImageSet
from synthkit.engines.bundle.format import Bundle
from tests.small_bundles import coloured_photos
from tests.tiny_students import lively_student


def top1(bundle: Path, photos: Path) -> float:
    opened = Bundle.open(bundle)
    test = ImageSet.scan(photos, fewest=1).with_classes(opened.labels)
    return float(np.mean(opened.logits(test.load(opened.preprocessing)).argmax(axis=1) == test.labels))


@pytest.fixture
def photos_with_a_stray(tmp_path: Path) -> Path:
    """Holds train/ and test/ of four classes; one test image of "a dog" has the colours of "new"."""
    names, data = ["a dog", "new", "other", "Ω"], tmp_path / "data"
    coloured_photos(data / "train", names, 6, noisy=150)
    coloured_photos(data / "test", names, 5, seed=1, noisy=150)
    stray = coloured_photos(tmp_path / "stray", ["new"], 1, seed=2, noisy=150) / "new" / "0.png"
    shutil.move(stray, data / "test" / "a dog" / "stray.png")
    return data


@pytest.mark.slow
def test_the_result_holds_the_top1_of_its_bundles(photos_with_a_stray: Path, tmp_path: Path) -> None:
    lively_student().save(tmp_path / "weights")
    folders = {"--data": photos_with_a_stray, "--weights": tmp_path / "weights", "--work": tmp_path / "w"}
    given = [str(part) for pair in folders.items() for part in pair]
    words = "--student test_resnet --classes 3 --start 1 --shots 5 --seeds 1".split()
    result = CliRunner().invoke(main, [*given, *words, "--out", str(tmp_path / "head.json")])
    assert result.exit_code == 0, result.output
    (seed,) = json.loads((tmp_path / "head.json").read_text(encoding="utf-8"))["seeds"]

    work, update = tmp_path / "w" / "seed-0", seed["update"]
    assert (update["photos"], update["n_test"]) == (3 * 5, 3 * 5 + 1)
    assert update["before"] == top1(work / "bundle", work / "test")
    assert update["device"] == update["device_by_precision"]["fp32"] == top1(work / "measured", work / "test")
    assert update["device"] == update["scikit_learn"] == 15 / 16, "right except for the stray"
    for row in seed["added"]:
        whole = (row["old_after"] * 16 + row["new_class"] * 5) / 21
        assert whole == pytest.approx(top1(work / f"bundle-{row['shots']}", work / "test-all"))
    assert [row["shots"] for row in seed["added"]] == [1, 4]
