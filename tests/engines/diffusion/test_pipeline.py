from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from synthkit.diffusion import style_token as style_files
from synthkit.diffusion.style_token import StyleToken
from synthkit.engines.diffusion.pipeline import EnginePipeline, StartLatents
from synthkit.engines.runtime.session import open_session
from synthkit.errors import EngineError, ModelError
from tests.tiny_models import IMAGE, WIDTH, images_of, write_token

onnx = pytest.importorskip("onnx")
PROMPTS = ["A digit seven photo in the style of <tiny>", "a Photo, of b", "ünï"]
SEEDS = [7, 8, 2**48 - 1]


@pytest.fixture(scope="module")
def pipeline(tiny_engines: Path) -> EnginePipeline:
    return EnginePipeline.open(tiny_engines, "cpu")


def diffusers_pipeline(folder: Path, style: Path) -> Any:
    from diffusers import StableDiffusionPipeline
    from diffusers.utils import logging

    logging.disable_progress_bar()
    reference = StableDiffusionPipeline.from_pretrained(str(folder), safety_checker=None)
    reference.set_progress_bar_config(disable=True)
    reference.load_textual_inversion(str(style))
    return reference


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["tiny", "tiny_epsilon"])
def test_the_loop_is_that_of_diffusers(kind: str, tiny_style: Path, request: pytest.FixtureRequest) -> None:

    reference = diffusers_pipeline(request.getfixturevalue(f"{kind}_model"), tiny_style)
    ours = EnginePipeline.open(request.getfixturevalue(f"{kind}_engines"), "cpu")
    embeddings, noise = ours.embed(PROMPTS, style_files.load(tiny_style)), ours.initial_latents(SEEDS)
    for guidance, steps in ((1.0, 4), (3.0, 7)):
        wanted = images_of(reference, PROMPTS, noise, steps, guidance)
        got = ours.decode(ours.sample(embeddings, noise, steps, guidance, SEEDS)).transpose(0, 2, 3, 1)
        assert wanted.std() > 0.1, "an image of nothing shows nothing"
        assert np.abs(np.clip(got / 2 + 0.5, 0, 1) - wanted).max() < 1e-4


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # diffusers of NumPy
@pytest.mark.parametrize("name", ["EulerDiscreteScheduler", "DPMSolverMultistepScheduler"])
def test_the_loop_follows_other_schedulers(
    name: str, tiny_epsilon_model: Path, tiny_epsilon_engines: Path, tiny_style: Path, tmp_path: Path
) -> None:
    import diffusers
    import torch

    reference = diffusers_pipeline(tiny_epsilon_model, tiny_style)
    reference.scheduler = getattr(diffusers, name).from_config(reference.scheduler.config)
    shutil.copytree(tiny_epsilon_engines, tmp_path / "engines")
    reference.scheduler.save_pretrained(tmp_path / "engines" / "scheduler")
    ours = EnginePipeline.open(tmp_path / "engines", "cpu")
    noise = ours.initial_latents(SEEDS)
    wanted = reference(
        PROMPTS, latents=torch.from_numpy(noise), num_inference_steps=4, guidance_scale=2.0, output_type="np"
    ).images
    embeddings = ours.embed(PROMPTS, style_files.load(tiny_style))
    got = ours.decode(ours.sample(embeddings, noise, 4, 2.0, SEEDS)).transpose(0, 2, 3, 1)
    assert np.abs(np.clip(got / 2 + 0.5, 0, 1) - wanted).max() < 1e-4


@pytest.mark.slow
def test_a_negative_prompt_is_that_of_diffusers(
    tiny_model: Path, tiny_style: Path, pipeline: EnginePipeline
) -> None:
    import torch

    reference, noise = diffusers_pipeline(tiny_model, tiny_style), pipeline.initial_latents(SEEDS)
    wanted = reference(
        PROMPTS,
        negative_prompt=["of the <tiny>"] * 3,
        latents=torch.from_numpy(noise),
        num_inference_steps=4,
        guidance_scale=3.0,
        output_type="np",
    ).images
    embeddings = pipeline.embed(PROMPTS, style_files.load(tiny_style), negative="of the <tiny>")
    got = pipeline.decode(pipeline.sample(embeddings, noise, 4, 3.0, SEEDS)).transpose(0, 2, 3, 1)
    assert np.abs(np.clip(got / 2 + 0.5, 0, 1) - wanted).max() < 1e-4
    pipeline.embed(PROMPTS)
    plain = pipeline.decode(pipeline.sample(embeddings, noise, 4, 3.0, SEEDS)).transpose(0, 2, 3, 1)
    assert np.abs(plain - got).max() > 0.01, "without a negative prompt guidance leads away from no prompt"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # diffusers of NumPy
@pytest.mark.parametrize("name", ["own", "EulerDiscreteScheduler", "DPMSolverMultistepScheduler"])
@pytest.mark.parametrize("strength", [0.3, 0.75, 1.0])
def test_starting_from_images_is_that_of_diffusers(
    name: str,
    strength: float,
    tiny_epsilon_model: Path,
    tiny_epsilon_engines: Path,
    tiny_style: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import diffusers
    import torch
    from diffusers.pipelines.stable_diffusion import pipeline_stable_diffusion_img2img as module

    parts = diffusers_pipeline(tiny_epsilon_model, tiny_style).components
    reference = diffusers.StableDiffusionImg2ImgPipeline(**parts, requires_safety_checker=False)
    reference.set_progress_bar_config(disable=True)
    if name != "own":
        reference.scheduler = getattr(diffusers, name).from_config(reference.scheduler.config)
    shutil.copytree(tiny_epsilon_engines, tmp_path / "engines")
    reference.scheduler.save_pretrained(tmp_path / "engines" / "scheduler")
    ours = EnginePipeline.open(tmp_path / "engines", "cpu")
    noise = ours.initial_latents(SEEDS)
    monkeypatch.setattr(module, "randn_tensor", lambda *_, **__: torch.from_numpy(noise))
    pixels = np.random.default_rng(0).integers(0, 256, (3, IMAGE, IMAGE, 3), np.uint8)
    scaled = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1
    latents = reference.vae.encode(scaled).latent_dist.mode() * reference.vae.config.scaling_factor
    encoded = ours.encode(pixels)
    assert np.abs(encoded - latents.detach().numpy()).max() < 1e-4 * np.abs(encoded).max()
    wanted = reference(
        PROMPTS,
        image=latents.detach(),
        strength=strength,
        num_inference_steps=7,
        guidance_scale=2.0,
        output_type="np",
    ).images
    texts = ours.embed(PROMPTS, style_files.load(tiny_style))
    got = ours.decode(ours.sample(texts, noise, 7, 2.0, SEEDS, StartLatents(encoded, strength)))
    assert np.abs(np.clip(got.transpose(0, 2, 3, 1) / 2 + 0.5, 0, 1) - wanted).max() < 2e-4


@pytest.mark.parametrize("strength", [None, 0.5])
def test_images_of_one_batch_may_differ_in_guidance(strength: float | None, pipeline: EnginePipeline) -> None:
    texts, seeds, guidance = pipeline.embed(["a", "b", "c"]), [1, 2, 3], [1.5, 2.37, 7.1]
    pixels = np.random.default_rng(0).integers(0, 256, (3, IMAGE, IMAGE, 3), np.uint8)
    start = StartLatents(pipeline.encode(pixels), strength) if strength else None
    whole = pipeline.generate(texts, seeds, 4, guidance, start=start)
    for row, scale in enumerate(guidance):
        own = slice(row, row + 1)
        begun = start.take(own) if start else None
        alone = pipeline.generate(texts.take(own), seeds[own], 4, scale, start=begun)
        assert np.array_equal(alone[0], whole[row])
    same = pipeline.generate(texts, seeds, 4, 2.37, start=start)
    assert np.array_equal(same[1], whole[1]) and not np.array_equal(same[2], whole[2])


def test_several_tokens_share_a_vocabulary(tmp_path: Path, pipeline: EnginePipeline) -> None:
    names = ["<look>", "<look-2>", "sks", "sks2"]  # names of which one begins with another
    tokens = [
        style_files.load(write_token(tmp_path / f"{number}.safetensors", name, vectors=2, seed=number))
        for number, name in enumerate(names)
    ]
    together = pipeline.embed([f"a b in the style of {name}" for name in names], *tokens).hidden
    for row, (name, token) in enumerate(zip(names, tokens, strict=True)):
        alone = pipeline.embed([f"a b in the style of {name}"], token).hidden
        assert np.array_equal(alone[0], together[row])
    assert len({one.tobytes() for one in together}) == 4


@pytest.mark.parametrize("token", ["<tiny>", "<Site-Style>", "sks"])
def test_embeddings_with_a_token_are_those_of_diffusers(
    token: str, tiny_model: Path, tmp_path: Path, pipeline: EnginePipeline
) -> None:
    import torch

    path = write_token(tmp_path / "a.safetensors", token, vectors=3)
    reference = diffusers_pipeline(tiny_model, path)
    prompt = f"A b photo in the style of {token}"
    with torch.inference_mode():
        wanted, _ = reference.encode_prompt(prompt, "cpu", 1, False)
    got = pipeline.embed([prompt], style_files.load(path)).hidden
    assert np.abs(got - wanted.numpy()).max() < 1e-4
    assert np.abs(got - pipeline.embed([prompt]).hidden).max() > 0.1, "without the token it is another text"


@pytest.mark.slow
@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_an_image_does_not_depend_on_its_batch(
    guidance: float, tiny_style: Path, pipeline: EnginePipeline
) -> None:
    prompts = [f"A {name} photo in the style of <tiny>" for name in "abcdefgh"]
    embeddings, seeds = pipeline.embed(prompts, style_files.load(tiny_style)), list(range(8))
    whole = pipeline.generate(embeddings, seeds, 5, guidance)
    assert whole.dtype == np.uint8 and whole.shape == (8, IMAGE, IMAGE, 3)
    for size in (1, 3):
        parts = [
            pipeline.generate(
                embeddings.take(slice(start, start + size)), seeds[start : start + size], 5, guidance
            )
            for start in range(0, 8, size)
        ]
        assert np.array_equal(np.concatenate(parts), whole)
    turned = pipeline.generate(embeddings.take(slice(None, None, -1)), seeds[::-1], 5, guidance)
    assert np.array_equal(turned[::-1], whole)


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # diffusers of NumPy
def test_a_scheduler_that_adds_noise_takes_it_from_the_image_s_seed(
    tiny_engines: Path, tmp_path: Path
) -> None:
    shutil.copytree(tiny_engines, tmp_path / "engines")
    path = tmp_path / "engines" / "scheduler" / "scheduler_config.json"
    config = json.loads(path.read_text())
    config.update(_class_name="EulerAncestralDiscreteScheduler", rescale_betas_zero_snr=False)
    path.write_text(json.dumps(config))
    pipeline = EnginePipeline.open(tmp_path / "engines", "cpu")
    embeddings = pipeline.embed(["a", "b"])
    whole = pipeline.generate(embeddings, [1, 2], 4, 2.0)
    assert np.array_equal(pipeline.generate(embeddings.take([1]), [2], 4, 2.0)[0], whole[1])
    assert whole.std() > 10


def test_the_tokenizer_is_of_the_class_that_the_pipeline_names(
    tiny_engines: Path, tmp_path: Path, tiny_style: Path
) -> None:
    from transformers import CLIPTokenizerFast

    folder, token = tmp_path / "engines", style_files.load(tiny_style)
    shutil.copytree(tiny_engines, folder)
    CLIPTokenizerFast.from_pretrained(str(folder / "tokenizer")).save_pretrained(str(folder / "tokenizer"))
    index = json.loads((folder / "model_index.json").read_text())
    wanted = EnginePipeline.open(folder, "cpu").embed(PROMPTS, token).hidden
    index["tokenizer"][1] = "CLIPTokenizerFast"
    (folder / "model_index.json").write_text(json.dumps(index))
    assert np.array_equal(EnginePipeline.open(folder, "cpu").embed(PROMPTS, token).hidden, wanted)
    index["tokenizer"][1] = "T5Tokenizer"
    (folder / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(EngineError, match="cannot read the tokenizer"):
        EnginePipeline.open(folder, "cpu")


def test_external_weights_stay_where_they_are(tiny_engines: Path, tmp_path: Path, tiny_style: Path) -> None:
    folder = tmp_path / "engines"
    shutil.copytree(tiny_engines, folder)
    path = folder / "text_encoder" / "model.onnx"
    model = onnx.load(path)
    path.unlink()
    onnx.save_model(model, path, save_as_external_data=True, location="model.onnx_data", size_threshold=0)
    token = style_files.load(tiny_style)
    wanted = EnginePipeline.open(tiny_engines, "cpu").embed(PROMPTS, token).hidden
    assert np.array_equal(EnginePipeline.open(folder, "cpu").embed(PROMPTS, token).hidden, wanted)


@pytest.mark.slow
def test_broken_images_are_named(tiny_engines: Path) -> None:
    pipeline = EnginePipeline.open(tiny_engines, "cpu")
    embeddings = pipeline.embed(["a", "b"])
    embeddings.hidden[1] = np.nan
    with pytest.raises(EngineError, match=r"1 of 2 images came out as NaN or infinite: b/0\.png; rebuild"):
        pipeline.generate(embeddings, [1, 2], 2, 2.0, ["a/0.png", "b/0.png"])
    with pytest.raises(EngineError, match="infinite: of seed 2;"):
        pipeline.generate(embeddings, [1, 2], 2, 1.0)
    whole, broken = pipeline.generate(embeddings, [1, 2], 2, 2.0, allow_blank=True)
    assert not broken.any() and np.ptp(whole) > 0, "black, for the filter to find"


def test_images_of_one_colour_are_named(pipeline: EnginePipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    decode = pipeline.decode

    def black(latents: np.ndarray) -> np.ndarray:
        images = decode(latents)
        images[1] = -3.0  # far below black, and not quite even
        images[1, 0, 0, 0] = -2.0
        return images

    monkeypatch.setattr(pipeline, "decode", black)
    embeddings = pipeline.embed(["a", "b", "c"])
    with pytest.raises(EngineError, match=r"1 of 3 images came out black or of one colour: b; rebuild"):
        pipeline.generate(embeddings, [1, 2, 3], 2, 1.0, ["a", "b", "c"])
    assert np.ptp(pipeline.generate(embeddings, [1, 2, 3], 2, 1.0, allow_blank=True)[1].astype(int)) < 2


@pytest.mark.slow
def test_a_batch_drawn_by_several_workers_is_the_same(
    pipeline: EnginePipeline, tiny_engines: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    several = EnginePipeline.open(tiny_engines, "cpu")
    assert several.workers == 3 and pipeline.workers == 1
    embeddings, seeds = pipeline.embed(["a"]).take([0] * 7), list(range(7))
    wanted = pipeline.generate(embeddings, seeds, 3, 2.0)
    assert np.array_equal(several.generate(embeddings, seeds, 3, 2.0), wanted)
    embeddings.hidden[4] = np.nan
    with pytest.raises(EngineError, match="1 of 7 images came out as NaN or infinite: of seed 4;"):
        several.generate(embeddings, seeds, 3, 2.0)


def test_kept_embeddings_spare_the_text_encoder(
    tiny_engines: Path, tiny_style: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from synthkit.engines.diffusion import pipeline as module

    kept, token = tmp_path / "kept.npz", style_files.load(tiny_style)
    first = EnginePipeline.open(tiny_engines, "cpu")
    wanted, none = first.embed(PROMPTS, token, cache=kept), first.unconditional()

    def refuse(*_: object) -> None:
        raise AssertionError("the text encoder ran")

    with monkeypatch.context() as patched:
        patched.setattr(module, "embed", refuse)
        patched.setattr(module, "unconditional", refuse)
        again = EnginePipeline.open(tiny_engines, "cpu")
        assert np.array_equal(again.embed(PROMPTS, token, cache=kept).hidden, wanted.hidden)
        assert np.array_equal(again.unconditional().hidden, none.hidden)
        for prompts, styles, negative in (
            (PROMPTS[:2], [token], ""),
            (PROMPTS, [], ""),
            (PROMPTS, [token], "b"),
        ):
            with pytest.raises(AssertionError, match="ran"):
                again.embed(prompts, *styles, negative=negative, cache=kept)
    kept.write_bytes(kept.read_bytes()[:-100])
    assert np.array_equal(first.embed(PROMPTS, token, cache=kept).hidden, wanted.hidden)


def test_the_vae_encoder_opens_when_it_is_asked_for(pipeline: EnginePipeline) -> None:
    encoder = pipeline.vae_encoder()
    pixels = np.zeros((2, 3, pipeline.image_size, pipeline.image_size), np.float32)
    assert encoder.run({"sample": pixels})["latent_parameters"].shape == (2, 8, 4, 4)


def test_tokens_and_prompts_that_do_not_fit(pipeline: EnginePipeline) -> None:
    wide = StyleToken("<wide>", np.zeros((1, 768), np.float32))
    with pytest.raises(ModelError, match=r"belongs to Stable Diffusion 1\.x"):
        pipeline.embed(["a <wide>"], wide)
    known = StyleToken("a", np.zeros((1, WIDTH), np.float32))
    with pytest.raises(ModelError, match="'a' is already a word"):
        pipeline.embed(["a"], known)
    with pytest.raises(
        ModelError, match=r"has 102 tokens, the generator takes 77: it is 1 word\(s\) too long"
    ):
        pipeline.embed(["a" * 100])
    with pytest.raises(ModelError, match=r"takes 77: it is 5 word\(s\) too long; give shorter words"):
        pipeline.embed([" ".join("a" * 80)])
    with pytest.raises(ModelError, match=r"too long"):
        pipeline.embed(["a"], negative=" ".join("a" * 80))


def test_folders_that_are_no_engines(tiny_engines: Path, tmp_path: Path) -> None:
    with pytest.raises(EngineError, match=r"no engines folder .*build-engines"):
        EnginePipeline.open(tmp_path / "absent")
    folder = tmp_path / "engines"
    shutil.copytree(tiny_engines, folder)
    (folder / "scheduler" / "scheduler_config.json").write_text('{"_class_name": "NoSuchScheduler"}')
    with pytest.raises(EngineError, match="no scheduler 'NoSuchScheduler'"):
        EnginePipeline.open(folder)
    (folder / "scheduler" / "scheduler_config.json").unlink()
    with pytest.raises(EngineError, match=r"cannot read .*scheduler_config\.json"):
        EnginePipeline.open(folder)


class _Plan:
    """A session of another kind than ONNX Runtime's, as a TensorRT plan is."""

    def __init__(self, path: Path) -> None:
        self._session = open_session(path)
        self.inputs, self.outputs = self._session.inputs, self._session.outputs
        self.provider = "plan"
        self.runs = 0

    def run(self, feeds: Any) -> dict[str, np.ndarray]:
        self.runs += 1
        return self._session.run(feeds)

    def close(self) -> None:
        self._session.close()


def test_plans_draw_where_the_folder_has_them(
    pipeline: EnginePipeline, tiny_engines: Path, tiny_style: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: dict[str, _Plan] = {}

    def open_plan(folder: Path, component: str) -> _Plan:
        assert folder == tiny_engines
        return opened.setdefault(component, _Plan(folder / component / "model.onnx"))

    monkeypatch.setattr("synthkit.engines.diffusion.pipeline.has_plans", lambda folder: True)
    monkeypatch.setattr("synthkit.engines.diffusion.pipeline.open_plan", open_plan)
    planned, style = EnginePipeline.open(tiny_engines), style_files.load(tiny_style)
    images = planned.generate(planned.embed(PROMPTS, style), SEEDS, 3, 2.0)
    expected = pipeline.generate(pipeline.embed(PROMPTS, style), SEEDS, 3, 2.0)
    assert planned.provider == "plan" and images.std() > 10
    assert np.abs(images.astype(int) - expected).max() <= 1, "rounding of the specialised graph"
    assert opened["unet"].runs == 3 and opened["vae_decoder"].runs == 1
    planned.close()
