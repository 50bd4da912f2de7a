"""A Stable Diffusion pipeline with random weights, small enough to export and run in seconds."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

IMAGE = 16
"""Pixels of a side; latents are a quarter of it."""

WIDTH = 32
"""Width of the text embeddings."""

SCHEDULERS: dict[str, tuple[str, dict[str, Any]]] = {
    "epsilon": ("PNDMScheduler", {"skip_prk_steps": True, "set_alpha_to_one": False, "steps_offset": 1}),
    "v_prediction": (
        "DDIMScheduler",
        {
            "rescale_betas_zero_snr": True,
            "timestep_spacing": "trailing",
            "clip_sample": False,
            "steps_offset": 1,
        },
    ),
}
"""Prediction type -> scheduler class and settings, as Stable Diffusion 1.5 and as glyphs-32 have them."""


def tiny_pipeline(
    folder: Path, prediction_type: str = "v_prediction", seed: int = 0, width: int = WIDTH, **of_unet: Any
) -> Path:
    """Save a pipeline with random weights as a diffusers folder and return the folder."""
    import diffusers
    import torch
    from diffusers import StableDiffusionPipeline
    from transformers import CLIPTextModel

    torch.manual_seed(seed)
    scheduler, settings = SCHEDULERS[prediction_type]
    StableDiffusionPipeline(
        vae=_lively(_vae()),
        text_encoder=_lively(CLIPTextModel(_text_config(width))),
        tokenizer=tiny_tokenizer(folder.parent / f"{folder.name}-vocabulary"),
        unet=_lively(_unet(cross_attention_dim=width, **of_unet)),
        scheduler=getattr(diffusers, scheduler)(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            prediction_type=prediction_type,
            **settings,
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)
    return folder


def tiny_sd2(folder: Path) -> Path:
    """The same shaped as Stable Diffusion 2.1: v-prediction, texts 1024 wide, attention in fp32."""
    return tiny_pipeline(folder, width=1024, use_linear_projection=True, upcast_attention=True)


def tiny_turbo(folder: Path, seed: int = 0) -> Path:
    """The same networks with SD-Turbo's scheduler, which is drawn with in one step and without guidance."""
    import diffusers

    tiny_pipeline(folder, "epsilon", seed)
    diffusers.EulerDiscreteScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        timestep_spacing="trailing",
        steps_offset=1,
    ).save_pretrained(folder / "scheduler")
    index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    index["scheduler"][1] = "EulerDiscreteScheduler"
    (folder / "model_index.json").write_text(json.dumps(index), encoding="utf-8")
    return folder


def tiny_sdxl(folder: Path, seed: int = 0) -> Path:
    """Save a pipeline shaped as SDXL, with two text encoders, pooled text and sizes; return its folder."""
    import diffusers
    import torch
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    torch.manual_seed(seed)
    tokenizers = [tiny_tokenizer(folder.parent / f"{folder.name}-vocabulary") for _ in range(2)]
    tokenizers[1].pad_token = "!"  # as SDXL's second
    diffusers.StableDiffusionXLPipeline(
        vae=_lively(_vae()),
        text_encoder=_lively(CLIPTextModel(_text_config())),
        text_encoder_2=_lively(CLIPTextModelWithProjection(_text_config(width=2 * WIDTH))),
        tokenizer=tokenizers[0],
        tokenizer_2=tokenizers[1],
        unet=_lively(
            _unet(
                cross_attention_dim=3 * WIDTH,
                addition_embed_type="text_time",
                addition_time_embed_dim=8,
                projection_class_embeddings_input_dim=2 * WIDTH + 6 * 8,
                use_linear_projection=True,
            )
        ),
        scheduler=diffusers.EulerDiscreteScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1
        ),
        force_zeros_for_empty_prompt=True,
        add_watermarker=False,
    ).save_pretrained(folder)
    return folder


def tiny_tokenizer(folder: Path) -> Any:
    """A CLIPTokenizer of single bytes, a few merged pairs and the two special tokens."""
    from transformers import CLIPTokenizer
    from transformers.models.clip.tokenization_clip import bytes_to_unicode

    symbols = list(bytes_to_unicode().values())
    merges = ["p h", "s t", "o f</w>", "i n</w>", "t h", "th e</w>"]
    words = [*symbols, *(f"{one}</w>" for one in symbols), *(merge.replace(" ", "") for merge in merges)]
    vocabulary = {word: index for index, word in enumerate([*words, "<|startoftext|>", "<|endoftext|>"])}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps(vocabulary), encoding="utf-8")
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]), encoding="utf-8")
    return CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=77)


def write_token(path: Path, token: str = "<tiny>", vectors: int = 2, seed: int = 0) -> Path:
    """Write a style token with random vectors of the tiny pipeline's width."""
    from synthkit.diffusion.style_token import StyleToken

    values = np.random.default_rng(seed).standard_normal((vectors, WIDTH)).astype(np.float32)
    StyleToken(token, values).save(path, "tiny")
    return path


def _text_config(width: int = WIDTH) -> Any:
    from transformers import CLIPTextConfig

    return CLIPTextConfig(
        vocab_size=520,
        hidden_size=width,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=77,
        bos_token_id=518,
        eos_token_id=519,
        pad_token_id=519,
        projection_dim=width,
    )


def _unet(**further: Any) -> Any:
    from diffusers import UNet2DConditionModel

    settings = {
        "sample_size": IMAGE // 4,
        "block_out_channels": (16, 32),
        "layers_per_block": 1,
        "norm_num_groups": 8,
        "cross_attention_dim": WIDTH,
        "attention_head_dim": 8,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    }
    return UNet2DConditionModel(**{**settings, **further})


def _vae() -> Any:
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        sample_size=IMAGE,
        block_out_channels=(8, 8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        latent_channels=4,
        scaling_factor=0.5,
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
    )


def _lively(model: Any) -> Any:
    """The model with every parameter drawn anew: outputs near zero, as of fresh networks, show nothing."""
    import torch

    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                fan_in = parameter[0].numel()
                parameter.normal_(0, 0.5 if "embedding" in name else 1.2 / fan_in**0.5)
            elif name.endswith("bias"):
                parameter.normal_(0, 0.1)
            else:
                parameter.normal_(1, 0.1)
    return model.eval()


def images_of(
    pipeline: Any, prompts: Sequence[str], noise: np.ndarray, steps: int, guidance: float
) -> np.ndarray:
    """What diffusers' own loop makes of given noise, float [N, height, width, 3] in 0..1."""
    import torch

    pipeline.set_progress_bar_config(disable=True)
    images: np.ndarray = pipeline(
        list(prompts),
        latents=torch.from_numpy(noise),
        num_inference_steps=steps,
        guidance_scale=guidance,
        output_type="np",
    ).images
    return images
