"""Stable Diffusion's parts in torch, and the noise-prediction loss that both training and inversion use.

Knows diffusers' folder layout and nothing of engines, style tokens or images on disk.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler, DDPMScheduler, UNet2DConditionModel
from transformers import CLIPTextModel, CLIPTokenizer

from synthkit.errors import ModelError, first_line
from synthkit.models.generator import refuse_two_encoders


@dataclass(frozen=True)
class DiffusionParts:
    """The parts of a Stable Diffusion pipeline that training needs, all frozen, float32, in eval mode.

    Attributes:
        tokenizer: words -> token ids.
        text_encoder: ids [N, L] -> embeddings [N, L, width].
        unet: latents [N, C, h, w], timesteps [N], embeddings -> noise or velocity [N, C, h, w].
        vae: pixels in -1..1 [N, 3, H, W] <-> latents [N, C, h, w].
        scheduler: the forward process q(z_t | z_0).
    """

    tokenizer: CLIPTokenizer
    text_encoder: CLIPTextModel
    unet: UNet2DConditionModel
    vae: AutoencoderKL
    scheduler: DDPMScheduler


def load_parts(model_dir: Path, device: str = "cpu") -> DiffusionParts:
    """Load a diffusers folder.

    Args:
        model_dir: the folder.
        device: of the networks, as torch names it.

    Raises:
        ModelError: a part is missing or is of another architecture, as SDXL's are.
    """
    refuse_two_encoders(model_dir)
    try:
        parts = DiffusionParts(
            CLIPTokenizer.from_pretrained(model_dir / "tokenizer"),
            CLIPTextModel.from_pretrained(model_dir / "text_encoder", torch_dtype=torch.float32),
            UNet2DConditionModel.from_pretrained(model_dir / "unet", torch_dtype=torch.float32),
            AutoencoderKL.from_pretrained(model_dir / "vae", torch_dtype=torch.float32),
            DDPMScheduler.from_pretrained(model_dir / "scheduler"),
        )
    except (OSError, ValueError, TypeError) as error:
        raise ModelError(
            f"{model_dir} does not load as a Stable Diffusion folder: {first_line(error)}; "
            "it needs tokenizer, text_encoder, unet, vae and scheduler in safetensors"
        ) from None
    for module in (parts.text_encoder, parts.unet, parts.vae):
        module.requires_grad_(False).eval().to(device)
    return parts


def image_size(parts: DiffusionParts) -> int:
    """Side in pixels of the model's images."""
    return int(parts.unet.config.sample_size) << (len(parts.vae.config.block_out_channels) - 1)


def to_pixels(images: np.ndarray) -> torch.Tensor:
    """uint8 images [N, H, W, 3] -> float32 [N, 3, H, W] in -1..1."""
    return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1


@torch.no_grad()
def encode_images(vae: AutoencoderKL, images: np.ndarray, batch_size: int = 64) -> torch.Tensor:
    """Scaled latents [N, C, h, w] of uint8 images [N, H, W, 3]: the mean of the posterior."""
    latents = [
        vae.encode(to_pixels(images[start : start + batch_size]).to(vae.device)).latent_dist.mean
        for start in range(0, len(images), batch_size)
    ]
    return torch.cat(latents) * vae.config.scaling_factor


def token_ids(tokenizer: CLIPTokenizer, prompts: Sequence[str]) -> torch.Tensor:
    """Padded ids int64 [N, L]; what is longer than the model's context is cut."""
    batch = tokenizer(
        list(prompts),
        padding="max_length",
        max_length=tokenizer.model_max_length,
        truncation=True,
        return_tensors="pt",
    )
    return batch.input_ids


def noise_prediction_loss(
    parts: DiffusionParts, latents: torch.Tensor, embeddings: torch.Tensor, generator: torch.Generator
) -> torch.Tensor:
    """|| target - unet(z_t, t, c) ||^2, averaged; the target is the noise, or the velocity where the model's
    scheduler says so (Salimans & Ho 2022).

    Args:
        parts: the pipeline.
        latents: scaled latents z_0 [N, C, h, w].
        embeddings: text embeddings c [N, L, width].
        generator: source of the noise and the timesteps.
    """
    scheduler = parts.scheduler
    noise = torch.randn(latents.shape, generator=generator).to(latents.device)  # the same on every device
    steps = torch.randint(scheduler.config.num_train_timesteps, (len(latents),), generator=generator)
    steps = steps.to(latents.device)
    noisy = scheduler.add_noise(latents, noise, steps)
    predicted = parts.unet(noisy, steps, embeddings).sample.float()
    if scheduler.config.prediction_type == "v_prediction":
        return F.mse_loss(predicted, scheduler.get_velocity(latents, noise, steps))
    return F.mse_loss(predicted, noise)


@torch.no_grad()
def sample_images(
    parts: DiffusionParts,
    embeddings: torch.Tensor,
    plain: torch.Tensor,
    steps: int,
    guidance: float,
    seed: int,
) -> np.ndarray:
    """Sample a few images in torch by DDIM (Song et al. 2021), classifier-free guidance (Ho & Salimans 2022).

    Meant for previews of a style; `synthkit.engines.diffusion.pipeline` generates sets of images.

    Args:
        parts: the pipeline.
        embeddings: text embeddings [N, L, width].
        plain: text embedding of the empty prompt [1, L, width].
        steps: denoising steps.
        guidance: guidance scale.
        seed: of the initial noise; image i starts from the same noise whatever N is.

    Returns:
        uint8 images [N, H, W, 3].
    """
    scheduler = DDIMScheduler.from_config(parts.scheduler.config)
    scheduler.set_timesteps(steps, device=embeddings.device)
    side = parts.unet.config.sample_size
    shape = (parts.unet.config.in_channels, side, side)
    generator = torch.Generator().manual_seed(seed)
    noise = torch.stack([torch.randn(shape, generator=generator) for _ in embeddings])
    latents = noise.to(embeddings.device) * scheduler.init_noise_sigma
    both = torch.cat([plain.expand_as(embeddings), embeddings])
    for step in scheduler.timesteps:
        without, guided = parts.unet(torch.cat([latents, latents]), step, both).sample.float().chunk(2)
        latents = scheduler.step(without + guidance * (guided - without), step, latents).prev_sample
    pixels = parts.vae.decode(latents / parts.vae.config.scaling_factor).sample
    scaled = ((pixels.clamp(-1, 1) + 1) * 127.5).round().byte()
    return np.asarray(scaled.permute(0, 2, 3, 1).cpu().numpy())
