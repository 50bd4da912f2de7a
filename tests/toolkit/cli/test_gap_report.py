"""`synthkit gap` and `synthkit report` through the real command line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner

pytest.importorskip("timm")
pytest.importorskip("sklearn")
pytest.importorskip("jinja2")

from synthkit.artifacts import Manifest, write_json
from synthkit.cli import main
from synthkit.data.images import ImageSet
from tests.tiny_students import class_folders, colour_folders, lively_student

CLASSES = ("blue", "green", "red")


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("student") / "student"
    lively_student(2, CLASSES).save(folder)
    return folder


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    return colour_folders(tmp_path / "few_shots", CLASSES, each=4)


@pytest.fixture
def workspace(tmp_path: Path, student: Path) -> Path:
    shutil.copytree(student, tmp_path / "w" / "student")
    colour_folders(tmp_path / "w" / "synthetic", CLASSES, each=6)
    return tmp_path / "w"


def call(workspace: Path, *words: str | Path) -> tuple[int, str, str]:
    result = CliRunner().invoke(main, ["--quiet", "--workspace", str(workspace), *map(str, words)])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.stdout, result.stderr


def test_gap_looks_through_a_student_that_has_not_learned_the_photos(workspace: Path, photos: Path) -> None:
    learned = workspace / "student"
    shutil.copytree(learned, learned / "synthetic")
    inputs = {"photos": ImageSet.scan(photos).digest}
    write_json(learned / "manifest.json", vars(Manifest("train", 1, "", inputs, {}, {}, {}, {}, {}, 0.0)))
    code, out, text = call(workspace, "gap", "--real-dir", photos)
    assert code == 0, text
    assert out.splitlines()[0].endswith(str(learned / "synthetic"))


def test_gap_tells_both_gaps_and_what_to_do(workspace: Path, photos: Path) -> None:
    code, out, text = call(workspace, "gap", "--real-dir", photos)
    assert code == 0, text
    assert out.startswith("18 synthetic images against 12 photos, on 96 features of test_resnet of ")
    for shown in (
        "red contrast",
        "sharpness",
        "dB at high frequencies",
        "\nblue ",
        "\nall ",
        "Fréchet distance",
    ):
        assert shown in out
    assert "Synthetic images alone:" in out and "Synthetic images added to the photos:" in out
    kept = json.loads((workspace / "gap.json").read_text(encoding="utf-8"))
    code, out, _ = call(workspace, "gap", "--real-dir", photos, "--json")
    assert json.loads(out) == kept
    assert set(kept["per_class"]) == set(CLASSES) and kept["n_synthetic"] == 18


def test_the_gap_of_other_weights(workspace: Path, photos: Path, student: Path) -> None:
    other = ["--weights", student, "--architecture", "test_resnet"]
    code, out, text = call(workspace, "gap", "--real-dir", photos, *other, "--json")
    assert code == 0, text
    mine = json.loads(call(workspace, "gap", "--real-dir", photos, "--json")[1])
    assert json.loads(out)["content"]["frechet"] == pytest.approx(mine["content"]["frechet"])
    assert json.loads(out)["features"]["source"] == f"test_resnet of {student}"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["--weights", "x"],
            "give either --student DIR, or --weights FILE together with --architecture NAME",
        ),
        (["--student", "absent"], "no student absent; train one with `synthkit train`"),
        (["--synth-dir", "absent"], "no folder absent"),
        (["--weights", "absent", "--architecture", "resnet10t"], "cannot read weights from absent"),
        (["--weights", "absent", "--architecture", "resnet10z"], "timm knows no student 'resnet10z'"),
    ],
)
def test_bad_input_of_gap_is_one_line(workspace: Path, photos: Path, words: list[str], message: str) -> None:
    code, out, text = call(workspace, "gap", "--real-dir", photos, *words)
    assert (code, out) == (1, "") and text.count("\n") == 1 and message in text
    assert not (workspace / "gap.json").exists()


def test_folders_of_other_classes_are_one_line(workspace: Path, tmp_path: Path) -> None:
    other = class_folders(tmp_path / "other", ("blue", "green"))
    code, out, text = call(workspace, "gap", "--real-dir", other)
    assert (code, out) == (1, "") and text.count("\n") == 1
    assert "has no class 'red', which" in text


def test_a_workspace_without_synthetic_images_is_one_line(tmp_path: Path, photos: Path) -> None:
    code, _, text = call(tmp_path / "none", "gap", "--real-dir", photos)
    assert code == 1 and "make one with `synthkit generate`, or give --synth-dir DIR" in text


def test_report_after_gap(workspace: Path, photos: Path) -> None:
    assert call(workspace, "gap", "--real-dir", photos)[0] == 0
    code, out, text = call(workspace, "report", "--real-dir", photos)
    assert code == 0, text
    assert out.startswith(f"{workspace / 'report.html'}: ") and "gap" in out and "sheets" in out
    code, out, _ = call(workspace, "report", "-o", workspace / "other.html", "--json")
    assert json.loads(out)["sections"] and (workspace / "other.html").is_file()


def test_report_of_an_empty_workspace_is_one_line(tmp_path: Path) -> None:
    code, out, text = call(tmp_path / "none", "report")
    assert (code, out) == (1, "") and text.count("\n") == 1
    assert "holds nothing to report; run `synthkit adapt --real-dir DIR` first" in text
    assert not (tmp_path / "none").exists()
