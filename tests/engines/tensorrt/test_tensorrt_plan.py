"""What is decided of a TensorRT build before there is a TensorRT."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner

from synthkit.cli import main
from synthkit.engines.runtime.component_spec import BatchRange, EngineSpec, read_geometry
from synthkit.engines.runtime.tensor_spec import TensorSpec
from synthkit.engines.tensorrt.build_plan import (
    BuildOptions,
    Profile,
    decide_plan,
    default_opset,
    describe,
    planned_specs,
    release,
    trtexec_line,
)
from synthkit.errors import EngineError
from tests.tensorrt_fakes import API

UNET = EngineSpec(
    "unet",
    "unet/model.onnx",
    (
        TensorSpec("sample", "float32", ("batch", 4, 64, 64)),
        TensorSpec("timestep", "float32", ()),
        TensorSpec("encoder_hidden_states", "float32", ("batch", 77, 768)),
    ),
    (TensorSpec("out_sample", "float32", ("batch", 4, 64, 64)),),
)
DECODER = replace(UNET, component="vae_decoder", inputs=UNET.inputs[:1])
BATCH = BatchRange(1, 8, 16)


@pytest.mark.parametrize(
    ("version", "precision", "network_flag", "flags"),
    [
        ("8.5.2.2", "fp16", "EXPLICIT_BATCH", ("FP16",)),
        ("8.6.1", "fp16", "EXPLICIT_BATCH", ("FP16",)),
        ("8.6.1", "fp32", "EXPLICIT_BATCH", ()),
        ("10.3.0", "fp16", "STRONGLY_TYPED", ()),
        ("10.16.1.11", "fp32", "STRONGLY_TYPED", ()),
        ("11.4.0.106", "fp16", "STRONGLY_TYPED", ()),
    ],
)
def test_typing_by_version(version: str, precision: str, network_flag: str, flags: tuple[str, ...]) -> None:
    plan = decide_plan(UNET, BATCH, precision, BuildOptions(), version)
    assert (plan.network_flag, plan.flags, plan.precision) == (network_flag, flags, precision)


@pytest.mark.parametrize("flavour", ["10", "11"])
def test_every_name_of_a_plan_is_a_member_of_that_version(flavour: str) -> None:
    api = API[flavour]
    options = BuildOptions(64, 5, "ampere+", version_compatible=True, refit=True)
    plan = decide_plan(UNET, BATCH, "fp16", options, api["version"])
    assert set(plan.flags) == {"VERSION_COMPATIBLE", "REFIT"} <= set(api["classes"]["BuilderFlag"]["members"])
    assert plan.network_flag in api["classes"]["NetworkDefinitionCreationFlag"]["members"]
    assert plan.hardware in api["classes"]["HardwareCompatibilityLevel"]["members"]


def test_the_batch_is_stated_in_images_and_doubled_for_guidance_in_the_unet_alone() -> None:
    unet = decide_plan(UNET, BATCH, "fp16", BuildOptions(), "10.3.0")
    assert unet.profiles == (
        Profile("sample", (1, 4, 64, 64), (16, 4, 64, 64), (32, 4, 64, 64)),
        Profile("encoder_hidden_states", (1, 77, 768), (16, 77, 768), (32, 77, 768)),
    )
    decoder = decide_plan(DECODER, BATCH, "fp16", BuildOptions(), "10.3.0")
    assert decoder.profiles == (Profile("sample", (1, 4, 64, 64), (8, 4, 64, 64), (16, 4, 64, 64)),)


def test_a_text_encoder_never_becomes_a_plan(tiny_model: Path) -> None:
    specs = planned_specs(read_geometry(tiny_model))
    assert [spec.component for spec in specs] == ["unet", "vae_decoder", "vae_encoder"]


@pytest.mark.parametrize(
    ("version", "options", "problem"),
    [
        ("8.4.1", BuildOptions(), "TensorRT 8.4.1 is older than 8.5"),
        ("8.5.2", BuildOptions(hardware="ampere+"), "leave out build-engines.trt_hardware"),
        ("8.5.2", BuildOptions(version_compatible=True), "trt_hardware and trt_version_compatible"),
        ("11.0", BuildOptions(level=6), "trt_level = 6: TensorRT's builder has the levels 0 to 5"),
        ("unknown", BuildOptions(), "calls its version 'unknown'"),
    ],
)
def test_what_a_version_cannot_do_is_refused(version: str, options: BuildOptions, problem: str) -> None:
    with pytest.raises(EngineError, match=problem):
        decide_plan(UNET, BATCH, "fp16", options, version)


def test_old_versions_go_without_a_level() -> None:
    assert decide_plan(UNET, BATCH, "fp16", BuildOptions(), "8.5.2").level is None
    assert decide_plan(UNET, BATCH, "fp16", BuildOptions(level=1), "8.6.1").level == 1


def test_opset_by_version() -> None:
    assert [default_opset(one) for one in ("8.5.2", "8.6.1", "10.3.0", "11.4.0.106")] == [16, 17, 17, 17]
    assert release("11.4.0.106") == (11, 4)


def test_trtexec_lines() -> None:
    options = BuildOptions(2048, 4, "ampere+", version_compatible=True, refit=True)
    plan = decide_plan(DECODER, BATCH, "fp16", options, "10.3.0")
    shapes = (
        "--minShapes=sample:1x4x64x64 --optShapes=sample:8x4x64x64 --maxShapes=sample:16x4x64x64 "
        "--memPoolSize=workspace:2048 --builderOptimizationLevel=4 --hardwareCompatibilityLevel=ampere+ "
        "--versionCompatible --refit --skipInference"
    )
    start = "trtexec --onnx=vae_decoder/model.onnx --saveEngine=vae_decoder/model.plan"
    assert trtexec_line(plan, 10) == f"{start} --stronglyTyped {shapes}"
    assert trtexec_line(plan, 11) == f"{start} {shapes}"
    assert trtexec_line(plan, 8) == f"{start} --fp16 {shapes}"
    plain = decide_plan(DECODER, BATCH, "fp32", BuildOptions(), "8.6.1")
    assert "--fp16" not in trtexec_line(plain, 8) and "memPoolSize" not in trtexec_line(plain, 8)


def test_a_plan_in_words() -> None:
    plan = decide_plan(UNET, BATCH, "fp16", BuildOptions(512, refit=True), "10.3.0")
    assert describe(plan) == "unet: fp16, rows 1:16:32, STRONGLY_TYPED, REFIT, level 3, workspace 512 MiB"


def test_dry_run_plans_without_tensorrt(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    words = ["--workspace", str(tmp_path / "w"), "build-engines", "--model", str(tiny_model), "--dry-run"]
    words += ["--backend", "tensorrt", "--batch", "1:2:4", "--set", "build-engines.trt_level=2"]
    result = CliRunner().invoke(main, [*words, "--json"])
    assert result.exit_code == 0, result.stderr
    answer = json.loads(result.stdout)
    assert "the tensorrt package is not installed" in answer["state"]
    assert [plan["component"] for plan in answer["plans"]] == ["unet", "vae_decoder", "vae_encoder"]
    unet = answer["plans"][0]
    assert (unet["level"], unet["precision"], unet["tensorrt"]) == (2, "fp16", "10.3.0")
    assert unet["profiles"][0] == {
        "name": "sample",
        "minimum": [1, 4, 4, 4],
        "usual": [4, 4, 4, 4],
        "maximum": [8, 4, 4, 4],
    }
    text = CliRunner().invoke(main, words).stdout
    assert text.count("  TensorRT <= 10: trtexec") == 3 and text.count("  TensorRT >= 11: trtexec") == 3
    assert text.count("--stronglyTyped") == 3
    assert not (tmp_path / "w").exists()
