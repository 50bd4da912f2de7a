"""The benchmarks of precisions and of the device's head: what they measure is what they write down."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from benchmarks import device_head, precisions
from synthkit.data.images import ImageSet
from synthkit.engines.bundle.format import Bundle, read_facts, verify
from tests.small_bundles import coloured_photos
from tests.tiny_students import class_folders, lively_student


def test_the_table_holds_what_export_measured(tmp_path: Path) -> None:
    lively_student().save(tmp_path / "test_resnet")
    class_folders(tmp_path / "colours" / "train", each=4, seed=1)
    class_folders(tmp_path / "colours" / "test", each=3, seed=2)
    places = {"--data": "colours", "--weights": "test_resnet", "--out": "out"}
    given = [part for option, name in places.items() for part in (option, str(tmp_path / name))]
    settings = ["--shots", "3", "--image-size", "32", "--form", "cpu"]
    result = CliRunner().invoke(precisions.main, [*given, *settings])
    assert result.exit_code == 0, result.output
    written = json.loads((tmp_path / "out" / "precisions.json").read_text(encoding="utf-8"))
    (row,) = written["rows"]
    assert (row["set"], row["student"], row["photos"], row["n_test"]) == ("colours", "test_resnet", 9, 9)
    assert list(row["top1"]) == ["torch", "fp32", "fp16", "int8"] and row["int8_form"] == "cpu"
    assert row["agreement_with_torch"]["fp32"] == 1 and row["int8"]["tried"]
    bundle = tmp_path / "out" / "colours-test_resnet" / "bundle-cpu"
    assert verify(bundle) == []
    facts = read_facts(bundle)["precisions"]
    for name in ("fp32", "fp16", "int8"):
        assert row["top1"][name] == facts[name]["accuracy"]["top1"]
    line = result.output.splitlines()[-1]
    assert line.startswith("| colours | test_resnet | 9 | ") and f"{row['top1']['int8']:.3f}" in line
    assert line.endswith("refused |" if row["refused"] else "offered |")
    assert written["settings"]["shots"] == 3 and "onnxruntime" in written["versions"]


def top1(bundle: Path, photos: Path) -> float:
    opened = Bundle.open(bundle)
    test = ImageSet.scan(photos, fewest=1).with_classes(opened.labels)
    return float(np.mean(opened.logits(test.load(opened.preprocessing)).argmax(axis=1) == test.labels))


def photos_in(folder: Path) -> set[Path]:
    return {path.resolve() for path in folder.glob("*/*.png")}


@pytest.fixture
def photos_with_a_stray(tmp_path: Path) -> Path:
    """Holds train/ and test/ of four classes; an image of "a dog" that is tested has the colours of "new"."""
    names, data = ["a dog", "new", "other", "Ω"], tmp_path / "data"
    coloured_photos(data / "train", names, 6, noisy=150)
    coloured_photos(data / "test", names, 5, seed=1, noisy=150)
    stray = coloured_photos(tmp_path / "stray", ["new"], 1, seed=2, noisy=150) / "new" / "0.png"
    shutil.move(stray, data / "test" / "a dog" / "stray.png")
    return data


def test_a_draw_holds_what_its_bundles_do_on_the_test_images(
    photos_with_a_stray: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device_head, "_ADDED", (1, 4, 16))
    lively_student().save(tmp_path / "weights")
    work = tmp_path / "work"
    draw = device_head.run_draw(
        photos_with_a_stray, "test_resnet", tmp_path / "weights", 3, (1, 5), 0, work, "fp32"
    )
    assert json.loads(json.dumps(draw)) == draw

    refit = draw["refit"]
    assert (draw["seed"], refit["photos"], refit["n_test"]) == (0, 3 * 5, 3 * 5 + 1)
    assert refit["before"] == top1(work / "bundle", work / "test")
    assert refit["device"] == refit["device_by_precision"]["fp32"] == top1(work / "measured", work / "test")
    assert refit["device"] == refit["scikit_learn"] == 15 / 16, "right but for the stray"
    assert 0.8 < refit["torch_last_1"] < 1
    assert 0 < refit["process_seconds"] < 600 and 0 < refit["cpu_seconds"] < 600

    assert [one["shots"] for one in draw["added"]] == [1, 4]
    for one in draw["added"]:
        bundle = work / f"bundle-{one['shots']}"
        assert verify(bundle) == [] and Bundle.open(bundle).labels == ("a dog", "new", "other", "Ω")
        whole = (one["old_after"] * 16 + one["new_class"] * 5) / 21
        assert whole == pytest.approx(top1(bundle, work / "test-all"))
        assert one["old_before"] == refit["before"] and one["remembered"]["photos"] == 3
        assert len(photos_in(work / f"add-{one['shots']}")) == one["shots"]
    start, new = photos_in(work / "start"), photos_in(work / "pool")
    assert (len(start), len(new), len(start | new)) == (3, 15, 18), "no photo is both known and new"


def test_a_finished_draw_is_kept_when_the_next_one_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def draw(data: Path, student: str, weights: Path, classes: int, shots: Any, seed: int, *rest: Any) -> Any:
        if seed == 1:
            raise KeyboardInterrupt
        return {"seed": seed, "shots": shots, "classes": classes}

    monkeypatch.setattr(device_head, "run_draw", draw)
    arguments = ["--data", "colours", "--weights", "w", "--out", str(tmp_path), "--classes", "3"]
    assert CliRunner().invoke(device_head.main, arguments).exit_code == 1
    written = json.loads((tmp_path / "result.json").read_text(encoding="utf-8"))
    assert written["draws"] == [{"seed": 0, "shots": [4, 16], "classes": 3}]
    assert written["settings"]["set"] == "colours"
