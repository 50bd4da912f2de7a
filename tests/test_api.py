"""The Python API: what README shows, names that exist where type checkers look, and light imports."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import json
import subprocess
import sys
from pathlib import Path

import pytest

import synthkit
from tests.project_files import ROOT

FUNCTIONS = ("adapt", "build_engines", "generate", "export", "evaluate", "compare")


def test_every_public_name_is_there_and_is_what_type_checkers_see() -> None:
    tree = ast.parse((ROOT / "toolkit" / "__init__.py").read_text(encoding="utf-8"))
    seen = {
        alias.name: node.module
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and str(node.module).startswith("synthkit.")
        for alias in node.names
    }
    assert seen == synthkit._WHERE
    for name in synthkit._WHERE:
        assert getattr(synthkit, name).__doc__, name
        assert name in dir(synthkit)
    with pytest.raises(AttributeError, match="has no attribute 'adpt'"):
        synthkit.adpt  # type: ignore[attr-defined]  # noqa: B018


def test_nothing_is_imported_before_it_is_used() -> None:
    code = "import sys, synthkit; print(json.dumps(sorted(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", f"import json; {code}"], capture_output=True, text=True, check=True
    )
    loaded = set(json.loads(done.stdout))
    assert not {"numpy", "torch", "PIL", "click", "synthkit.recipes"} & loaded


@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_argument_is_typed_and_documented(name: str) -> None:
    function = getattr(synthkit, name)
    signature = inspect.signature(function)
    arguments = inspect.getdoc(function) or ""
    for parameter in signature.parameters.values():
        assert parameter.annotation is not inspect.Parameter.empty, parameter.name
        assert f"    {parameter.name}: " in arguments, parameter.name
    assert signature.return_annotation.endswith(("Result", "Comparison", "Evaluation"))


@pytest.mark.slow
def test_from_a_folder_to_a_prediction(tiny_model: Path, tmp_path: Path) -> None:
    pytest.importorskip("timm")
    from tests.tiny_students import colour_folders

    photos = colour_folders(tmp_path / "few_shots", ("blue", "green", "red"), each=2, seed=1)
    test = colour_folders(tmp_path / "test", ("blue", "green", "red"), each=3, seed=2)
    settings = {
        "engines": synthkit.EngineSettings(model=str(tiny_model)),
        "style": synthkit.StyleSettings(steps=2, init_word="the", batch_size=4),
        "generate": synthkit.GenerateSettings(per_class=2, steps=2),
        "train": synthkit.TrainSettings(student="test_resnet", epochs=1, real_steps=2, batch_size=6),
        "adapt": synthkit.AdaptSettings(adapt_steps=2),
    }
    result = synthkit.adapt(photos, test_dir=test, workspace=tmp_path / "w", **settings)  # type: ignore[arg-type]
    assert set(result.stages.values()) == {"done"} and len(result.stages) == 6
    assert result.evaluation and 0 <= result.evaluation.top1 <= 1
    bundle = synthkit.Bundle.open(result.bundle)
    assert bundle.predict([test / "red" / "0.png"])[0].label in ("blue", "green", "red")
    assert bundle.verify().ok
    assert synthkit.evaluate(result.bundle, test).top1 == result.evaluation.top1
    assert json.loads(json.dumps(result.to_json()))["strategy"] == result.strategy
    del settings["engines"]  # the workspace's
    again = synthkit.adapt(str(photos), workspace=str(tmp_path / "w"), **settings)  # type: ignore[arg-type]
    assert set(again.stages.values()) == {"skipped"} and again.evaluation is None
    drawn = synthkit.generate(
        photos, workspace=tmp_path / "w", settings=synthkit.GenerateSettings(per_class=2, steps=2)
    )
    assert (drawn.written, drawn.skipped) == (0, 6)
    exported = synthkit.export(
        real_dir=photos,
        workspace=tmp_path / "w",
        out=tmp_path / "both",
        settings=synthkit.ExportSettings(precision="fp32,fp16"),
    )
    assert list(exported.precisions) == ["fp32", "fp16"] and not exported.skipped
    engines = synthkit.build_engines(synthkit.EngineSettings(model=str(tiny_model)), workspace=tmp_path / "w")
    assert engines.skipped
    assert all(dataclasses.is_dataclass(one) for one in (result, drawn, exported, engines))
