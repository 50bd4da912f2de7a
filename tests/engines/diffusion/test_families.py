"""Every supported family is exported, verified, and generates what diffusers generates."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from synthkit.diffusion import style_token as style_files
from synthkit.engines.diffusion.export import export_pipeline
from synthkit.engines.diffusion.parity import component_parity
from synthkit.engines.diffusion.pipeline import EnginePipeline
from synthkit.engines.runtime.component_spec import read_geometry
from synthkit.errors import ModelError
from synthkit.models.generator import model_fingerprint, resolve_model
from tests.tiny_models import IMAGE, WIDTH, images_of, tiny_sd2, tiny_sdxl, tiny_turbo

onnx = pytest.importorskip("onnx")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:Accessing config attribute:FutureWarning"),
]
PROMPTS, SEEDS = ["a b", "c of th"], [5, 6]


@pytest.fixture(scope="module")
def sdxl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_sdxl(tmp_path_factory.mktemp("models") / "tiny-xl")


@pytest.fixture(scope="module")
def sdxl_engines(sdxl: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("engines") / "tiny-xl"
    export_pipeline(sdxl, out, "fp32")
    return out


def ours(folder: Path, steps: int, guidance: float) -> tuple[np.ndarray, np.ndarray]:
    """Latents, and the images drawn of them as floats."""
    pipeline = EnginePipeline.open(folder, "cpu")
    noise = pipeline.initial_latents(SEEDS)
    clean = pipeline.sample(pipeline.embed(PROMPTS), noise, steps, guidance, SEEDS)
    return noise, np.clip(pipeline.decode(clean).transpose(0, 2, 3, 1) / 2 + 0.5, 0, 1)


def test_sdxl_passes_parity_and_draws_the_same(sdxl: Path, sdxl_engines: Path) -> None:
    from diffusers import StableDiffusionXLPipeline
    from optimum.onnxruntime import ORTStableDiffusionXLPipeline

    parities = {one.component: one for one in component_parity(sdxl, sdxl_engines)}
    assert list(parities) == ["text_encoder", "text_encoder_2", "unet", "vae_decoder", "vae_encoder"]
    for guidance in (1.0, 3.0):
        noise, got = ours(sdxl_engines, 3, guidance)
        wanted = images_of(StableDiffusionXLPipeline.from_pretrained(str(sdxl)), PROMPTS, noise, 3, guidance)
        assert wanted.std() > 0.1 and np.abs(got - wanted).max() < 1e-4
    theirs = images_of(
        ORTStableDiffusionXLPipeline.from_pretrained(str(sdxl_engines)), PROMPTS, noise, 3, 3.0
    )
    assert np.abs(got - theirs).max() < 1e-4


def test_an_empty_prompt_of_sdxl_is_zeros_where_the_pipeline_says_so(
    sdxl_engines: Path, tmp_path: Path
) -> None:
    assert not EnginePipeline.open(sdxl_engines, "cpu").unconditional().hidden.any()
    shutil.copytree(sdxl_engines, tmp_path / "engines")
    path = tmp_path / "engines" / "model_index.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "force_zeros_for_empty_prompt": False}))
    found = EnginePipeline.open(tmp_path / "engines", "cpu").unconditional()
    assert found.hidden.shape == (1, 77, 3 * WIDTH) and found.pooled.shape == (1, 2 * WIDTH)
    assert found.hidden.any() and found.pooled.any()


def test_a_style_token_does_not_fit_sdxl(sdxl_engines: Path, tiny_style: Path) -> None:
    with pytest.raises(ModelError, match=r"one text encoder, this generator \(SDXL\) has two"):
        EnginePipeline.open(sdxl_engines, "cpu").embed(["a <tiny>"], style_files.load(tiny_style))


def test_sdxl_in_half_precision_keeps_the_vae_in_fp32(sdxl: Path, tmp_path: Path) -> None:
    from synthkit.engines.runtime.graph_check import dtype_histogram

    assert read_geometry(sdxl).vae_force_upcast
    export_pipeline(sdxl, tmp_path / "half", "fp16")
    found = {
        name: dtype_histogram(onnx.load(tmp_path / "half" / name / "model.onnx")).most_common(1)[0][0]
        for name in ("text_encoder_2", "unet", "vae_decoder", "vae_encoder")
    }
    assert found == {
        "text_encoder_2": "FLOAT16",
        "unet": "FLOAT16",
        "vae_decoder": "FLOAT",
        "vae_encoder": "FLOAT",
    }
    tight = {one.component: one for one in component_parity(sdxl, tmp_path / "half", "fp16")}
    assert tight["vae_decoder"].max_abs_error < 1e-4 < tight["unet"].max_abs_error
    noise, got = ours(tmp_path / "half", 3, 3.0)
    assert np.abs(got - ours_of(sdxl, noise)).max() < 0.1 and got.std() > 0.1


def ours_of(model: Path, noise: np.ndarray) -> np.ndarray:
    from diffusers import StableDiffusionXLPipeline

    return images_of(StableDiffusionXLPipeline.from_pretrained(str(model)), PROMPTS, noise, 3, 3.0)


def test_stable_diffusion_2_in_half_precision(tmp_path: Path) -> None:
    from diffusers import StableDiffusionPipeline

    from tests.tiny_models import write_token

    model = tiny_sd2(tmp_path / "sd2")
    export_pipeline(model, tmp_path / "half", "fp16")
    assert read_geometry(tmp_path / "half").width == 1024
    for one in component_parity(model, tmp_path / "half", "fp16"):
        assert one.max_abs_error < one.tolerance
    # `upcast_attention` lies in the graph: the products of queries and keys are of float32.
    graph = onnx.shape_inference.infer_shapes(onnx.load(tmp_path / "half" / "unet" / "model.onnx")).graph
    kinds = {one.name: one.type.tensor_type.elem_type for one in graph.value_info}
    products = [node for node in graph.node if node.op_type == "Softmax"]
    assert products and all(kinds[one.input[0]] == onnx.TensorProto.FLOAT for one in products)
    noise, got = ours(tmp_path / "half", 3, 2.0)
    reference = StableDiffusionPipeline.from_pretrained(str(model), safety_checker=None)
    wanted = images_of(reference, PROMPTS, noise, 3, 2.0)
    assert wanted.std() > 0.1 and np.abs(got - wanted).max() < 0.1
    token = style_files.load(write_token(tmp_path / "token.safetensors"))
    with pytest.raises(ModelError, match=r"this generator is Stable Diffusion 2\.x of text width 1024"):
        EnginePipeline.open(tmp_path / "half", "cpu").embed(["a <tiny>"], token)


def test_a_unet_step_of_sdxl_is_timed(
    sdxl: Path, sdxl_engines: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from benchmarks import unet_step

    monkeypatch.setattr(unet_step, "base_model", lambda folder: str(sdxl))
    rows = unet_step.measure_step(sdxl_engines, batch=2, guidance=3.0, runs=1).rows
    assert len(rows) == 3 and rows[-1].max_difference > 0


def test_turbo_draws_in_one_step_without_guidance(tiny_engines: Path, tmp_path: Path) -> None:
    from diffusers import StableDiffusionPipeline

    model = tiny_turbo(tmp_path / "turbo")
    shutil.copytree(tiny_engines, tmp_path / "engines", ignore=shutil.ignore_patterns("scheduler"))
    shutil.copytree(model / "scheduler", tmp_path / "engines" / "scheduler")
    reference = StableDiffusionPipeline.from_pretrained(str(model), safety_checker=None)
    noise, got = ours(tmp_path / "engines", 1, 0.0)
    wanted = images_of(reference, PROMPTS, noise, 1, 0.0)
    assert wanted.std() > 0.1 and np.abs(got - wanted).max() < 1e-4


def test_sdxl_folders_must_be_whole(sdxl: Path, tmp_path: Path) -> None:
    assert resolve_model(str(sdxl)) == sdxl
    shutil.copytree(sdxl, tmp_path / "model")
    first = model_fingerprint(tmp_path / "model")
    config = tmp_path / "model" / "text_encoder_2" / "config.json"
    config.write_text(config.read_text().replace("{", "{ ", 1))
    assert model_fingerprint(tmp_path / "model") != first
    shutil.rmtree(tmp_path / "model" / "text_encoder_2")
    with pytest.raises(ModelError, match="lacks text_encoder_2/"):
        resolve_model(str(tmp_path / "model"))


def test_the_size_is_fixed_and_the_batch_is_open(sdxl_engines: Path) -> None:
    unet = onnx.load(sdxl_engines / "unet" / "model.onnx", load_external_data=False).graph
    shapes = {
        one.name: [dim.dim_param or dim.dim_value for dim in one.type.tensor_type.shape.dim]
        for one in unet.input
    }
    side = IMAGE // 4
    assert shapes["sample"] == ["batch", 4, side, side] and shapes["time_ids"] == ["batch", 6]
    assert shapes["encoder_hidden_states"] == ["batch", 77, 3 * WIDTH]
