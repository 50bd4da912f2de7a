from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from synthkit.artifacts import read_manifest
from synthkit.engines.diffusion.engines_folder import base_model
from synthkit.engines.diffusion.export import export_pipeline
from synthkit.engines.diffusion.parity import component_parity
from synthkit.errors import ConfigError, ModelError, ParityError
from synthkit.recipes.build_engines import BuildEngines, engine_list
from synthkit.recipes.settings import EngineSettings
from tests.stages import build_engines, key
from tests.tiny_models import IMAGE

onnx = pytest.importorskip("onnx")


@pytest.mark.slow
def test_every_engine_computes_what_its_source_does(tiny_model: Path, tiny_engines: Path) -> None:
    parities = component_parity(tiny_model, tiny_engines)
    assert [one.component for one in parities] == ["text_encoder", "unet", "vae_decoder", "vae_encoder"]
    assert all(0 < one.max_abs_error < one.tolerance for one in parities)
    assert all(1e-4 < one.tolerance < 1e-3 for one in parities), "outputs near zero would show nothing"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("component", "shift", "problem"),
    [("unet", 0.01, "engine unet differs"), ("vae_decoder", np.nan, "engine vae_decoder answers with NaN")],
)
def test_a_planted_error_is_found(
    tiny_model: Path, tiny_engines: Path, tmp_path: Path, component: str, shift: float, problem: str
) -> None:
    shutil.copytree(tiny_engines, tmp_path / "engines")
    path = tmp_path / "engines" / component / "model.onnx"
    model = onnx.load(path)
    bias = next(one for one in model.graph.initializer if one.name.endswith("conv_in.bias"))
    values = onnx.numpy_helper.to_array(bias) + np.float32(shift)
    bias.CopyFrom(onnx.numpy_helper.from_array(values, bias.name))
    onnx.save(model, path)
    with pytest.raises(ParityError, match=problem):
        component_parity(tiny_model, tmp_path / "engines")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Accessing config attribute:FutureWarning")  # Optimum of diffusers
def test_optimum_opens_the_folder_and_draws_the_same(tiny_engines: Path) -> None:
    import torch
    from optimum.onnxruntime import ORTStableDiffusionPipeline

    from synthkit.engines.diffusion.pipeline import EnginePipeline

    ours = EnginePipeline.open(tiny_engines, "cpu")
    theirs = ORTStableDiffusionPipeline.from_pretrained(str(tiny_engines))
    theirs.set_progress_bar_config(disable=True)
    noise = ours.initial_latents([5, 6])
    wanted = theirs(
        ["a b", "c"],
        latents=torch.from_numpy(noise),
        num_inference_steps=3,
        guidance_scale=2.0,
        output_type="np",
    ).images
    got = ours.decode(ours.sample(ours.embed(["a b", "c"]), noise, 3, 2.0, [5, 6])).transpose(0, 2, 3, 1)
    assert np.abs(np.clip(got / 2 + 0.5, 0, 1) - wanted).max() < 1e-5


@pytest.mark.slow
def test_half_precision_lies_in_the_graph(tiny_model: Path, tmp_path: Path) -> None:
    from synthkit.engines.diffusion.pipeline import EnginePipeline

    model, out = tmp_path / "model", tmp_path / "engines"
    shutil.copytree(tiny_model, model)
    (model / "classes.toml").write_text('a = "letter a"\n')
    export_pipeline(model, out, "fp16", size=2 * IMAGE)
    component_parity(model, out, "fp16")
    kinds = {one.data_type for one in onnx.load(out / "unet" / "model.onnx").graph.initializer}
    assert kinds == {onnx.TensorProto.FLOAT16}
    assert (out / "classes.toml").is_file()
    sides = {
        one: json.loads((out / one / "config.json").read_text())["sample_size"]
        for one in ("unet", "vae_decoder", "vae_encoder")
    }
    assert sides == {"unet": IMAGE // 2, "vae_decoder": 2 * IMAGE, "vae_encoder": 2 * IMAGE}
    pipeline = EnginePipeline.open(out, "cpu")
    images = pipeline.generate(pipeline.embed(["a"]), [1], steps=2, guidance=2.0)
    assert images.shape == (1, 2 * IMAGE, 2 * IMAGE, 3) and images.std() > 10


def test_the_folder_names_no_path_of_this_machine(tiny_model: Path, tiny_engines: Path) -> None:
    for path in tiny_engines.glob("*/*.json"):
        assert str(tiny_model.parent) not in path.read_text(), path
    assert "_name_or_path" not in json.loads((tiny_engines / "model_index.json").read_text())


def test_weights_that_do_not_load_are_a_model_error(tiny_model: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_model, tmp_path / "model")
    next((tmp_path / "model" / "unet").glob("*.safetensors")).write_bytes(b"broken")
    with pytest.raises(ModelError, match="cannot load the pipeline") as caught:
        export_pipeline(tmp_path / "model", tmp_path / "out")
    assert "\n" not in str(caught.value)


def test_the_stage_is_skipped_when_nothing_changed(
    tiny_model: Path, tiny_engines: Path, tmp_path: Path
) -> None:
    model, out = tmp_path / tiny_model.name, tmp_path / "engines"
    shutil.copytree(tiny_model, model)
    shutil.copytree(tiny_engines, out)
    assert base_model(out) == str(tiny_model)
    first = read_manifest(out)
    assert first is not None and first.resolved["model_name"] == tiny_model.name
    assert [one["cached"] for one in first.metrics["engines"]] == [False] * 4
    settings = EngineSettings(model=str(model))
    again = build_engines(settings, out)
    assert again.skipped and all(one["cached"] for one in engine_list(again))
    keys = {"component", "path", "backend", "precision", "max_abs_error", "seconds", "cached"}
    assert keys <= engine_list(again)[0].keys()

    config = json.loads((model / "unet" / "config.json").read_text())
    (model / "unet" / "config.json").write_text(json.dumps({**config, "_note": 1}))
    usual = EngineSettings(model=str(tiny_model))
    assert len({key(BuildEngines(one, out)) for one in (usual, settings, replace(usual, opset=17))}) == 3


def test_settings_that_cannot_be_used(tiny_model: Path, tmp_path: Path) -> None:
    for changes in ({"batch": "8:1:2"}, {"size": IMAGE + 1}):
        with pytest.raises(ConfigError):
            build_engines(EngineSettings(model=str(tiny_model), **changes), tmp_path / "engines")
    assert not (tmp_path / "engines").exists()
