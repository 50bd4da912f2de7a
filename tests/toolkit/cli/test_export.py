"""`synthkit export`: a timm folder becomes a bundle, once, and never a wrong one."""

import json
import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
from click.testing import CliRunner, Result

from synthkit.calibration.ranges import METHODS
from synthkit.cli import main
from synthkit.engines.bundle import targets
from synthkit.engines.bundle.format import Bundle, read_facts, seal, verify
from synthkit.engines.student import onnx_export as student_onnx
from synthkit.learning.students import Student, load_student
from synthkit.recipes.exporting import precisions
from tests.tiny_students import CLASSES, class_folders, noise, tiny_student

TRITON = "model_repository/classifier_fp32"


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
    assert json.loads(plan.stdout) == {"stage": "export", "state": "absent", "out": str(workspace / "bundle")}
    assert not (workspace / "bundle").exists()
    assert json.loads(call(workspace, "export", "--json").stdout)["skipped"] is False
    assert "(unchanged, skipped)" in call(workspace, "export").stdout
    assert json.loads(call(workspace, "export", "--force", "--json").stdout)["skipped"] is False
    assert call(workspace, "verify").exit_code == 0


def test_a_failed_parity_check_leaves_no_bundle(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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


@pytest.mark.slow
def test_all_precisions_are_measured_and_verified(workspace: Path) -> None:
    class_folders(workspace / "synthetic", each=3, seed=7)
    class_folders(workspace / "test", each=3, seed=9)
    sets = ["--real-dir", "few_shots", "--synth-dir", "synthetic", "--test-dir", "test"]
    places = [one if one.startswith("--") else workspace / one for one in sets]
    wanted = ["--precision", "int8,fp16", "--set", "export.weight_bits=8"]
    result = call(workspace, "export", *places, *wanted, "--json")
    assert result.exit_code == 0, result.output
    data = json.loads(result.stdout)
    assert list(data["precisions"]) == ["fp32", "fp16", "int8"] and data["default_precision"] == "fp32"
    for row in data["precisions"].values():
        assert row["accuracy"]["n_test"] == 9 and row["latency_ms"] > 0 and row["bytes"] > 0
    assert data["precisions"]["fp32"]["accuracy"]["agreement_with_torch"] == 1
    assert data["precisions"]["int8"]["target"] == "cpu"
    assert {"layer", "operator", "error"} == set(data["int8"]["drift"][0])
    errors = [row["error"] for row in data["int8"]["drift"]]
    assert errors == sorted(errors, reverse=True) and {one["method"] for one in data["int8"]["tried"]} == {
        *METHODS
    }
    bundle = workspace / "bundle"
    assert verify(bundle) == []
    inputs = noise()
    fp32 = Bundle.open(bundle).logits(inputs)
    for precision, most in (("fp16", 0.02), ("int8", 0.5)):
        found = Bundle.open(bundle, precision).logits(inputs)
        assert 0 < np.abs(found - fp32).max() < most * np.abs(fp32).max()
    for name in ("model.fp16.onnx", "model.int8.onnx"):
        spoil(bundle / name)
        facts = read_facts(bundle)
        seal(bundle, facts)
    assert [failure.split(" by ")[0] for failure in verify(bundle)] == [
        "model.fp16.onnx differs from golden.npz",
        "model.int8.onnx differs from golden.npz",
    ]


def spoil(path: Path) -> None:
    """Turn the sign of the head's biases, as someone who can seal a bundle might."""
    model = onnx.load(path)
    tensor = next(one for one in model.graph.initializer if list(one.dims) == [len(CLASSES)])
    values = onnx.numpy_helper.to_array(tensor)
    tensor.CopyFrom(onnx.numpy_helper.from_array(-3 * values, tensor.name))
    onnx.save(model, path)


@pytest.mark.slow
def test_a_precision_that_costs_too_much_is_no_default(
    workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(precisions, "_cost", lambda fp32, other: (2.5, "measured"))
    arguments = ["export", "--precision", "fp16", "--default-precision", "fp16"]
    result = call(workspace, *arguments, "--json")
    assert result.exit_code == 1
    data = json.loads(result.stdout)
    assert data["default_precision"] == "fp32" and "fp16 costs 2.5 points" in data["refused_default"]
    assert (
        verify(workspace / "bundle") == [] and Bundle.open(workspace / "bundle", "fp16").precision == "fp16"
    )
    result = call(workspace, *arguments, "--set", "export.max_drop=3", "--json")
    assert result.exit_code == 0 and json.loads(result.stdout)["default_precision"] == "fp16"
    assert Bundle.open(workspace / "bundle").precision == "fp16"


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--precision", "fp61"], "--precision: unknown 'fp61' (did you mean 'fp16'?)"),
        (["--precision", "int8"], "int8 needs images to find its ranges; give --real-dir or --synth-dir"),
        (["--default-precision", "int8"], "--default-precision int8 is not exported; add it"),
        (["--real-dir", "few_shots", "--test-dir", "few_shots"], "the test set shares 6 image(s)"),
    ],
)
def test_what_cannot_be_is_said_in_one_line(workspace: Path, arguments: list[str], text: str) -> None:
    places = [str(workspace / one) if one == "few_shots" else one for one in arguments]
    result = call(workspace, "export", *places)
    assert (result.exit_code, result.stderr.count("\n")) == (1, 1), result.stderr
    assert text.split(" (")[0] in result.stderr and not (workspace / "bundle").exists()


@pytest.mark.parametrize("target", ["jetson-inference", "deepstream"])
def test_a_rearranged_model_is_verified_or_not_written(
    workspace: Path, monkeypatch: pytest.MonkeyPatch, target: str
) -> None:
    monkeypatch.setattr(targets, "TOLERANCE", -1.0)
    result = call(workspace, "export", "--target", target)
    assert result.exit_code == 1 and "in a probability" in result.stderr
    assert not (workspace / "bundle").exists()


def test_a_label_that_deepstream_cannot_write_is_refused(workspace: Path) -> None:
    tiny = tiny_student(classes=["a;b", "c", "d"])
    Student(tiny.model, "test_resnet", {}, ("a;b", "c", "d"), tiny.preprocessing).save(workspace / "odd")
    result = call(workspace, "export", "--student", workspace / "odd", "--target", "deepstream")
    assert (result.exit_code, result.stderr.count("\n")) == (1, 1) and "'a;b'" in result.stderr


@pytest.mark.parametrize(
    ("target", "opset", "files"),
    [
        ("jetpack5", 16, ["README.md", "build_engine.sh"]),
        ("jetpack6", 17, ["README.md", "build_engine.sh"]),
        ("jetson-inference", 16, ["README.md", "labels.txt", "model.onnx"]),
        ("deepstream", 16, ["README.md", "config_infer_primary.txt", "labels.txt", "model.onnx"]),
        (
            "triton",
            17,
            ["README.md", *(f"{TRITON}/{name}" for name in ("1/model.onnx", "config.pbtxt", "labels.txt"))],
        ),
    ],
)  # fmt: skip
def test_a_target_gets_its_files(workspace: Path, target: str, opset: int, files: list[str]) -> None:
    result = call(workspace, "export", "--target", target)
    assert result.exit_code == 0, result.output
    folder = workspace / "bundle" / "target" / target
    assert sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()) == files
    facts = read_facts(workspace / "bundle")
    assert facts.precisions["fp32"]["opset"] == opset and facts.target == target
    text = (folder / "README.md").read_text(encoding="utf-8")
    assert "not run on its hardware" in text and "{" not in text.replace('{"crop_mode"', "")
    assert verify(workspace / "bundle") == []
    if target == "deepstream":
        assert (folder / "labels.txt").read_text(encoding="utf-8") == ";".join(CLASSES) + "\n"
        config = (folder / "config_infer_primary.txt").read_text()
        stated = ("infer-dims=3;32;32", "model-color-format=0", "net-scale-factor=1", "offsets=0;0;0")
        assert set(stated) < set(config.splitlines()) and "network-type=1" in config
    if target == "triton":
        config = (folder / "model_repository/classifier_fp32/config.pbtxt").read_text()
        assert "dims: [ 32, 32, 3 ]" in config and "dims: [ 3 ]" in config
    (folder / files[-1]).write_text("edited")
    assert verify(workspace / "bundle") == [f"target/{target}/{files[-1]} was altered"]
