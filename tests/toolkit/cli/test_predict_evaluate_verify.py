"""The commands that run on the device: what they answer, what they refuse, and that torch stays out."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result
from PIL import Image

from synthkit.artifacts import write_json
from synthkit.cli import main
from synthkit.data.images import ImageSet
from synthkit.engines.bundle.format import read_facts, seal
from synthkit.recipes.device import bench as bench_bundle
from tests.tiny_students import CLASSES, class_folders, noise, tiny_bundle
from tests.torch_free import WITHOUT_TORCH


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Holds few_shots/ and a bundle/ that was trained on them."""
    home = tmp_path_factory.mktemp("workspace")
    photos = ImageSet.scan(class_folders(home / "few_shots", seed=7))
    tiny_bundle(home / "bundle", trained_on=[item.sha256 for item in photos.items])
    return home


def call(workspace: Path, *arguments: str | Path) -> Result:
    return CliRunner().invoke(main, ["--workspace", str(workspace), *map(str, arguments)])


def answer(workspace: Path, *arguments: str | Path) -> dict[str, object]:
    result = call(workspace, *arguments, "--json")
    assert result.exit_code == 0, result.output
    return dict(json.loads(result.stdout))


def refusal(workspace: Path, *arguments: str | Path) -> str:
    result = call(workspace, *arguments)
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
    return result.stderr


def test_predict_answers_as_the_contract_says(workspace: Path, tmp_path: Path) -> None:
    paths = sorted(class_folders(tmp_path / "photos").rglob("*.png"))
    (first, *rest) = answer(workspace, "predict", *paths, "--top", "2")["predictions"]  # type: ignore[misc]
    assert len(rest) == 5 and first["path"] == str(paths[0])
    assert [first["label"], first["score"]] == first["top"][0] and len(first["top"]) == 2
    assert first["label"] in CLASSES and 0 < first["score"] <= 1
    text = call(workspace, "predict", paths[0]).stdout
    assert text.startswith(f"{paths[0]}: {first['label']} {first['score']:.3f}, ")


def test_predict_lists_every_bad_file_in_one_line(workspace: Path, tmp_path: Path) -> None:
    (tmp_path / "text.jpg").write_text("x")
    line = refusal(workspace, "predict", tmp_path / "text.jpg", tmp_path / "absent.png")
    assert "2 file(s)" in line and "text.jpg (not an image)" in line and "absent.png (no such file)" in line
    assert "--skip-bad" not in line, "advice that this command does not take"
    assert call(workspace, "predict").exit_code == 2


def test_bad_files_stop_nothing_and_are_listed_at_the_end(
    workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("synthkit.cli.predict._CHUNK", 2)
    photos = class_folders(tmp_path / "photos")
    whole = answer(workspace, "predict", photos)
    (photos / "pointer.jpg").write_text("version https://git-lfs.github.com/spec/v1\n")
    (photos / "list.csv").write_text("bookkeeping")
    result = call(workspace, "predict", photos, tmp_path / "absent.png", "--json")
    assert result.exit_code == 1
    data = json.loads(result.stdout)
    assert data["predictions"] == whole["predictions"] and len(data["predictions"]) == 6
    assert [Path(one["path"]).name for one in data["failures"]] == ["pointer.jpg", "absent.png"]
    text = call(workspace, "predict", photos, tmp_path / "absent.png").stdout.splitlines()
    assert len(text) == 7 and text[-1].startswith("2 file(s) cannot be used as images: ")


def test_evaluate_measures_each_class(workspace: Path, tmp_path: Path) -> None:
    found: Sequence[dict[str, str]]
    test = class_folders(tmp_path / "test", each=4)
    found = answer(workspace, "predict", *sorted(test.rglob("*.png")))["predictions"]  # type: ignore[assignment]
    right = [one["label"] == Path(one["path"]).parent.name for one in found]
    measured = answer(workspace, "evaluate", "--test-dir", test)
    assert measured["top1"] == pytest.approx(np.mean(right)) and measured["n_test"] == 12
    expected = {
        name: np.mean([ok for ok, one in zip(right, found, strict=True) if f"/{name}/" in one["path"]])
        for name in CLASSES
    }
    assert measured["per_class"] == pytest.approx(expected)
    assert measured["seconds"] >= 0  # type: ignore[operator]
    text = call(workspace, "evaluate", "--test-dir", test).stdout
    assert f"all         {np.mean(right):5.3f}  (95 %: " in text and "Ærø brücke  " in text


def with_limits(bundle: Path, **limits: float) -> None:
    """Give a bundle a threshold or a set minimum."""
    write_json(bundle / "confidence.json", limits)
    seal(bundle, read_facts(bundle))


def test_evaluate_measures_unknown_answers_and_sets(workspace: Path, tmp_path: Path) -> None:
    test = class_folders(tmp_path / "test", each=8, seed=3)
    plain = answer(workspace, "evaluate", "--test-dir", test)
    assert 0 <= plain["calibration_error"] <= 1 and not {"answers", "sets"} & set(plain)  # type: ignore[operator]
    own = tmp_path / "own"
    shutil.copytree(workspace / "bundle", own / "bundle")
    paths = sorted(test.rglob("*.png"))
    found: Any = answer(own, "predict", "--top", 3, *paths)["predictions"]
    threshold = sorted(one["score"] for one in found)[10]
    minimum = 0.2
    with_limits(own / "bundle", threshold=threshold, conformal_threshold=minimum)
    found = answer(own, "predict", "--top", 3, *paths)["predictions"]
    measured: Any = answer(own, "evaluate", "--test-dir", test)
    truth = [Path(one["path"]).parent.name for one in found]
    answered = [
        one["label"] == true for one, true in zip(found, truth, strict=True) if one["label"] != "unknown"
    ]
    assert 0 < len(answered) < 24 and measured["top1"] == plain["top1"]
    assert measured["answers"]["unknown"] == 24 - len(answered) == 10
    assert measured["answers"]["coverage"] == pytest.approx(14 / 24)
    assert measured["answers"]["accuracy"] == pytest.approx(np.mean(answered))
    low, high = measured["answers"]["interval"]
    assert low < np.mean(answered) < high or np.mean(answered) in (0, 1)
    sets = measured["sets"]
    assert sets["mean_size"] == pytest.approx(np.mean([len(one["set"]) for one in found]))
    hits = [true in one["set"] for one, true in zip(found, truth, strict=True)]
    assert sets["coverage"] == pytest.approx(np.mean(hits)) and sets["threshold"] == minimum
    assert sets["empty"] == sum(not one["set"] for one in found)
    text = call(own, "evaluate", "--test-dir", test).stdout
    assert '(10 "unknown")' in text and "labels hold the right one in" in text


def test_evaluate_of_a_bundle_that_answers_nothing(workspace: Path, tmp_path: Path) -> None:
    shutil.copytree(workspace / "bundle", tmp_path / "bundle")
    with_limits(tmp_path / "bundle", threshold=1.1)
    measured: Any = answer(tmp_path, "evaluate", "--test-dir", class_folders(tmp_path / "test"))
    assert measured["answers"] | {"threshold": 0} == {
        "threshold": 0,
        "coverage": 0,
        "unknown": 6,
        "accuracy": None,
        "interval": None,
    }


def test_evaluate_takes_fewer_classes_in_another_order(workspace: Path, tmp_path: Path) -> None:
    test = class_folders(tmp_path / "test", ["Ω", "a dog"], each=3)
    measured = answer(workspace, "evaluate", "--test-dir", test)
    assert measured["n_test"] == 6 and set(measured["per_class"]) == {"Ω", "a dog"}  # type: ignore[call-overload]
    line = refusal(workspace, "evaluate", "--test-dir", class_folders(tmp_path / "other", ["Ω", "a dof"]))
    assert "'a dof'" in line and "did you mean a dog" in line


def test_evaluate_refuses_a_photo_that_was_trained_on(workspace: Path, tmp_path: Path) -> None:
    test = class_folders(tmp_path / "test")
    shutil.copy(workspace / "few_shots" / "Ω" / "1.png", test / "Ω" / "new name.png")
    line = refusal(workspace, "evaluate", "--test-dir", test)
    assert "shares 1 image(s) with the training photos" in line and "new name.png" in line


def test_evaluate_goes_on_without_bad_files_when_told(workspace: Path, tmp_path: Path) -> None:
    test = class_folders(tmp_path / "test")
    (test / "Ω" / "empty.png").touch()
    assert "Ω/empty.png (empty file)" in refusal(workspace, "evaluate", "--test-dir", test)
    assert answer(workspace, "evaluate", "--test-dir", test, "--skip-bad")["n_test"] == 6
    assert "no folder" in refusal(workspace, "evaluate", "--test-dir", tmp_path / "absent")


def test_verify_ends_with_one_when_a_file_was_altered(workspace: Path, tmp_path: Path) -> None:
    assert answer(workspace, "verify") == {"ok": True, "failures": []}
    spoiled = shutil.copytree(workspace / "bundle", tmp_path / "bundle")
    (spoiled / "labels.txt").write_text("x\n")
    result = call(workspace, "verify", "--bundle", spoiled, "--json")
    assert result.exit_code == 1
    assert json.loads(result.stdout) == {"ok": False, "failures": ["labels.txt was altered"]}
    assert "labels.txt was altered" in refusal(workspace, "predict", "--bundle", spoiled, "x.png")
    assert "labels.txt was altered" in refusal(
        workspace, "evaluate", "--bundle", spoiled, "--test-dir", workspace / "few_shots"
    )
    assert call(tmp_path, "verify", "--bundle", tmp_path / "absent").exit_code == 1


@pytest.mark.parametrize("name", ["predict", "evaluate", "verify"])
def test_the_device_commands_never_import_torch(workspace: Path, tmp_path: Path, name: str) -> None:
    test = class_folders(tmp_path / "test")
    Image.fromarray(noise(1)[0]).save(tmp_path / "a.png")
    arguments = {"predict": [tmp_path / "a.png"], "evaluate": ["--test-dir", test], "verify": []}[name]
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", WITHOUT_TORCH, "--workspace", workspace, name, *arguments],
        capture_output=True, text=True, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout and "Assertion" not in done.stderr


@pytest.mark.parametrize("name", ["predict", "evaluate", "verify", "bench"])
def test_a_bundle_that_a_killed_run_left_between_two_names_is_found(
    workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(bench_bundle, "_timed", lambda plan, threads: [])
    shutil.copytree(workspace / "bundle", tmp_path / ".bundle.swap")
    photos = class_folders(tmp_path / "test", seed=5)
    arguments = {"predict": [next(photos.rglob("*.png"))], "evaluate": ["--test-dir", photos]}
    call(tmp_path, name, *arguments.get(name, []))
    assert (tmp_path / "bundle" / "bundle.json").is_file() and not (tmp_path / ".bundle.swap").exists()
