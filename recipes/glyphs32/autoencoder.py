"""The VAE of glyphs-32: 32x32 RGB <-> latents 8x8x6."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from tqdm import trange

from synthkit.diffusion.parts import encode_images, to_pixels
from synthkit.learning.checkpoints import load_checkpoint, save_checkpoint, step_generator
from synthkit.learning.fit import one_cycle

#: Four, as in SD, hold the strokes of a 32 px image but drop its colours.
LATENT_CHANNELS = 6

# Weight of the KL term: only keeps the latents from growing without bound, as in SD's own VAE.
_KL_WEIGHT = 1e-5
_CHECKPOINT_EVERY = 250


def new_autoencoder() -> AutoencoderKL:
    """An untrained VAE: 4x downsampling, 0.4 M parameters."""
    blocks = 3
    return AutoencoderKL(
        block_out_channels=(16, 32, 48),
        down_block_types=("DownEncoderBlock2D",) * blocks,
        up_block_types=("UpDecoderBlock2D",) * blocks,
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=4,
        sample_size=32,
        mid_block_add_attention=False,
    )


def train_autoencoder(
    images: np.ndarray, folder: Path, steps: int, lr: float = 2e-3, batch_size: int = 16
) -> AutoencoderKL:
    """Train to reconstruct, then fix the scale of the latents; resumes from the folder's checkpoint.

    Args:
        images: uint8 [N, 32, 32, 3].
        folder: where the checkpoint lies.
        steps: gradient steps.
        lr: peak learning rate of a one-cycle schedule.
        batch_size: images per step.

    Returns:
        The VAE, with `scaling_factor` set so that latents have unit standard deviation.
    """
    vae = new_autoencoder().train()
    optimizer = torch.optim.AdamW(vae.parameters(), lr=lr, weight_decay=0)
    checkpoint = folder / "autoencoder.safetensors"
    start = load_checkpoint(checkpoint, {"vae": vae}, optimizer)
    bar = trange(start, steps, initial=start, total=steps, desc="autoencoder", mininterval=2)
    for step in bar:
        generator = step_generator(1, step)
        optimizer.param_groups[0]["lr"] = lr * one_cycle(step / steps)
        picked = torch.randint(len(images), (batch_size,), generator=generator)
        loss = _loss(vae, to_pixels(images[picked.numpy()]), generator)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        bar.set_postfix(loss=f"{loss.item():.4f}", refresh=False)
        if (step + 1) % _CHECKPOINT_EVERY == 0 or step + 1 == steps:
            save_checkpoint(checkpoint, step + 1, {"vae": vae}, optimizer)
    vae.eval().requires_grad_(False)
    vae.register_to_config(scaling_factor=1.0)
    vae.register_to_config(scaling_factor=1 / encode_images(vae, images[:4000]).std().item())
    return vae


def _loss(vae: AutoencoderKL, pixels: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    posterior = vae.encode(pixels).latent_dist
    latents = posterior.mean + posterior.std * torch.randn(posterior.mean.shape, generator=generator)
    decoded = vae.decode(latents).sample
    # Squares first: under L1 alone the VAE settles for grey, the median of every colour. Differences between
    # neighbours keep strokes sharp; means over 4x4 patches hold colour, where noise has cancelled.
    edges = F.l1_loss(decoded.diff(dim=-1), pixels.diff(dim=-1)) + F.l1_loss(
        decoded.diff(dim=-2), pixels.diff(dim=-2)
    )
    colours = F.mse_loss(F.avg_pool2d(decoded, 4), F.avg_pool2d(pixels, 4))
    return F.mse_loss(decoded, pixels) + 0.5 * edges + 2 * colours + _KL_WEIGHT * posterior.kl().mean()
