"""The stage `build-engines` with TensorRT plans, over stand-ins for TensorRT and CUDA."""

from __future__ import annotations

import json
import logging
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

import synthkit
from synthkit.cli import main
from synthkit.engines.diffusion import build
from synthkit.engines.tensorrt.build_plan import PLANNED
from synthkit.engines.tensorrt.plan_cache import find_plans, read_sidecar
from synthkit.engines.tensorrt.session import open_plan
from synthkit.errors import ConfigError, EngineError
from synthkit.recipes import build_engines as recipe
from synthkit.recipes.build_engines import BuildEngines, engine_list, preview_plans
from synthkit.recipes.settings import EngineSettings
from tests.stages import build_engines, given, key
from tests.tensorrt_behaviour import install

ONNX = ("text_encoder", *PLANNED)


@pytest.fixture
def exported(half_engines: Path, monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """The export's calls; it copies engines that were made before."""
    calls: list[tuple[Any, ...]] = []

    def copy(work: Path, *arguments: Any) -> dict[str, Any]:
        calls.append(arguments)
        ignore = shutil.ignore_patterns("manifest.json", ".*")
        shutil.copytree(half_engines, work, dirs_exist_ok=True, ignore=ignore)
        entry = {"backend": "onnxruntime", "max_abs_error": 0.0, "cached": False}
        return {"engines": [{"component": one, "path": f"{one}/model.onnx", **entry} for one in ONNX]}

    monkeypatch.setattr(recipe, "build_onnx", copy)
    return calls


def settings(model: Path, tmp_path: Path, **changes: Any) -> EngineSettings:
    base = EngineSettings(
        model=str(model), backend="tensorrt", batch="1:2:4", cache_dir=str(tmp_path / "cache")
    )
    return replace(base, **changes)


def cached(result: Any) -> list[bool]:
    return [one["cached"] for one in engine_list(result) if one["backend"] == "tensorrt"]


@pytest.mark.slow
def test_plans_stand_beside_the_onnx_files(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exported: list[tuple[Any, ...]]
) -> None:
    install(monkeypatch, "10")
    wanted, out = settings(tiny_model, tmp_path), tmp_path / "engines"
    result = build_engines(wanted, out)
    assert exported[0][1:] == ("fp16", 17, None, None), "half precision and opset 17 are TensorRT's defaults"
    engines = engine_list(result)
    assert [one["component"] for one in engines] == [*ONNX, *PLANNED]
    for entry in engines[len(ONNX) :]:
        (plan,) = find_plans(out / entry["component"])
        assert entry["path"] == f"{entry['component']}/{plan.name}" and plan.name.startswith(
            "stand-in-gpu_10.3.0_"
        )
        assert {"precision": "fp16", "backend": "tensorrt", "cached": False}.items() <= entry.items()
        assert read_sidecar(plan)["precision_check"] == entry["precision_check"]
        assert entry["path"] in result.manifest.outputs
        assert open_plan(out, entry["component"]).provider == "tensorrt"
    assert result.manifest.resolved["machine"]["tensorrt"] == "10.3.0"
    assert [path.name for path in (tmp_path / "cache").glob("*.timing")] == ["stand-in-gpu_10.3.0_8.7.timing"]
    again = build_engines(wanted, out)
    assert again.skipped and all(cached(again)) and len(exported) == 1


def test_what_changes_the_stage(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, "10")
    out = tmp_path / "engines"
    base = settings(tiny_model, tmp_path)
    usual = key(BuildEngines(base, out))
    for same in ({"low_memory": True}, {"cache_dir": None}):
        assert key(BuildEngines(replace(base, **same), out)) == usual, same
    changes: list[dict[str, Any]] = [
        {"batch": "1:2:5"},
        {"precision": "fp32"},
        {"vae_precision": "fp32"},
        {"opset": 18},
        {"size": 32},
        {"trt_level": 4},
        {"trt_workspace": 64},
        {"trt_refit": True},
        {"trt_hardware": "ampere+"},
        {"trt_version_compatible": True},
        {"backend": "onnxruntime"},
    ]
    keys = {key(BuildEngines(replace(base, **change), out)) for change in changes}
    install(monkeypatch, "11")
    keys.add(key(BuildEngines(base, out)))
    assert len(keys | {usual}) == len(changes) + 2
    without = BuildEngines(replace(base, backend="onnxruntime"), out)
    assert key(without) == key(BuildEngines(replace(base, backend="onnxruntime", trt_level=1), out))
    assert without.key().resolved["precision"] == "fp32"


@pytest.mark.slow
def test_plans_that_still_fit_are_taken_over(
    tiny_model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    exported: list[tuple[Any, ...]],
    caplog: pytest.LogCaptureFixture,
) -> None:
    install(monkeypatch, "11")
    wanted, out = settings(tiny_model, tmp_path), tmp_path / "engines"
    build_engines(wanted, out)
    monkeypatch.setattr(synthkit, "__version__", "next")
    fakes = install(monkeypatch, "11")
    assert cached(build_engines(wanted, out)) == [True] * 3
    assert "Builder.build_serialized_network" not in fakes.calls
    assert open_plan(out, "unet").inputs[0].name == "sample"

    (plan,) = find_plans(out / "vae_decoder")
    plan.write_bytes(plan.read_bytes()[:-1] + b"\x00")
    monkeypatch.setattr(synthkit, "__version__", "the one after")
    with caplog.at_level(logging.WARNING, "synthkit"):
        assert cached(build_engines(wanted, out)) == [True, False, True]
    assert "SHA-256 differs" in caplog.text
    assert cached(build_engines(wanted, out, force=True)) == [False] * 3
    assert cached(build_engines(replace(wanted, batch="1:2:3"), out)) == [False] * 3
    assert len(find_plans(out / "unet")) == 1, "plans of other settings do not pile up"


@pytest.mark.slow
def test_a_failed_build_keeps_what_was_there(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exported: list[tuple[Any, ...]]
) -> None:
    install(monkeypatch, "10")
    wanted, out = settings(tiny_model, tmp_path), tmp_path / "engines"
    build_engines(wanted, out)
    before = [path.name for path in find_plans(out / "unet")]
    install(monkeypatch, "10", {"Builder.build_serialized_network": None})
    with pytest.raises(EngineError, match="could not build unet"):
        build_engines(wanted, out, force=True)
    assert [path.name for path in find_plans(out / "unet")] == before


@pytest.mark.slow
def test_low_memory_builds_in_children(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exported: list[tuple[Any, ...]]
) -> None:
    install(monkeypatch, "10")
    components, here = [], build.make_plan

    def child(job: Any) -> Path:
        components.append(job.plan.component)
        return here(job)

    monkeypatch.setattr(build, "make_plan_in_child", child)
    monkeypatch.setattr(build, "make_plan", lambda job: pytest.fail("built in this process"))
    build_engines(settings(tiny_model, tmp_path, low_memory=True), tmp_path / "engines")
    assert components == list(PLANNED)


@pytest.mark.slow
def test_the_command(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exported: list[tuple[Any, ...]]
) -> None:
    install(monkeypatch, "10")
    words = [
        "--workspace",
        str(tmp_path / "w"),
        "build-engines",
        "--model",
        str(tiny_model),
        "--batch",
        "1:2:4",
    ]
    words += given(f"build-engines.cache_dir={tmp_path / 'cache'}", "build-engines.trt_refit=true")
    planned = json.loads(CliRunner().invoke(main, [*words, "--dry-run", "--json"]).stdout)
    assert planned["resolved"]["backend"] == "tensorrt", "auto: it works here"
    assert planned["plans"][0]["flags"] == ["REFIT"]
    result = CliRunner().invoke(main, [*words, "--json"])
    assert result.exit_code == 0, result.stderr
    engines = json.loads(result.stdout)["engines"]
    assert {one["backend"] for one in engines} == {"onnxruntime", "tensorrt"} and len(engines) == 7
    install(monkeypatch, "10", {"Builder.create_builder_config": None})
    result = CliRunner().invoke(main, [*words, "--force"])
    assert result.exit_code == 1 and result.stderr.splitlines()[-1].startswith(
        "error: TensorRT 10.3.0 could not"
    )


def test_settings_that_cannot_be_used(tiny_model: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="1 <= MIN <= OPT <= MAX"):
        preview_plans(settings(tiny_model, tmp_path, batch="4:2:1"))
    with pytest.raises(EngineError, match="trt_level = 9"):
        preview_plans(settings(tiny_model, tmp_path, trt_level=9))
