"""The benchmarks of precisions and of the device's head: what they measure is what they write down."""

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from synthkit.engines.bundle import read_facts, verify
from synthkit.recipes import bench_head, bench_precisions
from tests.tiny_students import class_folders, lively_student


def test_the_table_holds_what_export_measured(tmp_path: Path) -> None:
    lively_student().save(tmp_path / "test_resnet")
    class_folders(tmp_path / "colours" / "train", each=4, seed=1)
    class_folders(tmp_path / "colours" / "test", each=3, seed=2)
    places = {"--data": "colours", "--weights": "test_resnet", "--out": "out"}
    given = [part for option, name in places.items() for part in (option, str(tmp_path / name))]
    settings = ["--shots", "3", "--image-size", "32", "--form", "cpu"]
    result = CliRunner().invoke(bench_precisions.main, [*given, *settings])
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


def test_a_finished_draw_is_kept_when_the_next_one_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def draw(data: Path, student: str, weights: Path, classes: int, shots: Any, seed: int, *rest: Any) -> Any:
        if seed == 1:
            raise KeyboardInterrupt
        return {"seed": seed, "shots": shots, "classes": classes}

    monkeypatch.setattr(bench_head, "run_draw", draw)
    arguments = ["--data", "colours", "--weights", "w", "--out", str(tmp_path), "--classes", "3"]
    assert CliRunner().invoke(bench_head.main, arguments).exit_code == 1
    written = json.loads((tmp_path / "result.json").read_text(encoding="utf-8"))
    assert written["draws"] == [{"seed": 0, "shots": [4, 16], "classes": 3}]
    assert written["settings"]["set"] == "colours"
