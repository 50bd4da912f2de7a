"""`synthkit export`: a timm folder becomes a bundle, once, and never a wrong one."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result

from synthkit.cli import main
from synthkit.engines import student_onnx
from synthkit.engines.bundle import Bundle
from synthkit.students import Student, load_student
from tests.tiny_students import CLASSES, class_folders, noise, tiny_student


def call(workspace: Path, *arguments: str | Path) -> Result:
    return CliRunner().invoke(main, ["--workspace", str(workspace), *map(str, arguments)])


@pytest.fixture
def workspace(tmp_path: Path) -> Path:
    tiny = tiny_student()
    Student(tiny.model, "test_resnet", {}, CLASSES, tiny.preprocessing).save(tmp_path / "adapted")
    class_folders(tmp_path / "few_shots")
    return tmp_path


def test_the_bundle_computes_what_the_folder_holds(workspace: Path) -> None:
    result = call(workspace, "export", "--real-dir", workspace / "few_shots", "--json")
    assert result.exit_code == 0, result.output
    data = json.loads(result.stdout)
    assert (data["skipped"], data["exporter"], data["parity"]["images"]) == (False, "torchscript", 6)
    expected = load_student(workspace / "adapted").logits(noise()).numpy()
    found = Bundle.open(workspace / "bundle").logits(noise())
    assert np.abs(found - expected).max() < 1e-4 * np.abs(expected).max()
    refused = call(workspace, "evaluate", "--test-dir", workspace / "few_shots")
    assert refused.exit_code == 1 and "shares 6 image(s) with the training photos" in refused.stderr


def test_unchanged_inputs_are_skipped_and_a_plan_does_nothing(workspace: Path) -> None:
    plan = call(workspace, "export", "--dry-run", "--json")
    assert json.loads(plan.stdout) == {"stage": "export", "state": "absent"}
    assert not (workspace / "bundle").exists()
    assert json.loads(call(workspace, "export", "--json").stdout)["skipped"] is False
    assert "(unchanged, skipped)" in call(workspace, "export").stdout
    assert json.loads(call(workspace, "export", "--force", "--json").stdout)["skipped"] is False
    assert call(workspace, "verify").exit_code == 0


def test_a_failed_proof_leaves_no_bundle(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(student_onnx, "TOLERANCE", 0.0)
    result = call(workspace, "export")
    assert result.exit_code == 1 and "differs from the torch student" in result.stderr
    assert not (workspace / "bundle").exists()
    assert not list(workspace.rglob("*.onnx*"))


def test_what_is_no_student_is_refused_in_one_line(workspace: Path) -> None:
    shutil.rmtree(workspace / "adapted")
    for arguments in (["--student", workspace / "absent"], ["--student", workspace / "few_shots"], []):
        result = call(workspace, "export", *arguments)
        assert (result.exit_code, result.stderr.count("\n")) == (1, 1)
        assert result.stderr.startswith("error: ") and "student" in result.stderr
