"""The table of precisions holds the figures that export wrote into the bundle."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from benchmarks.precisions import main
from synthkit.engines.bundle.format import read_facts
from tests.tiny_students import class_folders, lively_student


@pytest.mark.slow
def test_the_table_holds_the_measurements_of_export(tmp_path: Path) -> None:
    lively_student().save(tmp_path / "test_resnet")
    class_folders(tmp_path / "colours" / "train", each=4, seed=1)
    class_folders(tmp_path / "colours" / "test", each=3, seed=2)
    folders = {"--data": "colours", "--weights": "test_resnet", "--work": "work", "--out": "table.json"}
    given = [part for option, name in folders.items() for part in (option, str(tmp_path / name))]
    words = "--shots 3 --image-size 32 --int8-target cpu".split()
    result = CliRunner().invoke(main, [*given, *words])
    assert result.exit_code == 0, result.output
    (row,) = json.loads((tmp_path / "table.json").read_text(encoding="utf-8"))["rows"]
    assert (row["set"], row["student"], row["photos"], row["n_test"]) == ("colours", "test_resnet", 9, 9)
    assert list(row["top1"]) == ["torch", "fp32", "fp16", "int8"]
    facts = read_facts(tmp_path / "work" / "colours-test_resnet" / "bundle-cpu").precisions
    for name in ("fp32", "fp16", "int8"):
        assert row["top1"][name] == facts[name]["accuracy"]["top1"]
    assert f"{row['top1']['int8']:.3f}" in result.output.splitlines()[-1]
