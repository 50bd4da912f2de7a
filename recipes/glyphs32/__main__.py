"""Train glyphs-32 from nothing: `python -m synthkit.recipes.glyphs32 --out DIR`.

render ──► VAE ──► latents, once ──► UNet + text encoder ──► DIR

Every step resumes where an interrupted run stopped; the work folder beside DIR holds what that takes.
"""

from __future__ import annotations

import logging
import os
import shutil
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import click
import numpy as np
import torch
from diffusers import AutoencoderKL

from synthkit.config import override, setting
from synthkit.diffusion.parts import encode_images
from synthkit.one_line import OneLineErrors
from synthkit.recipes.glyphs32.autoencoder import train_autoencoder
from synthkit.recipes.glyphs32.card import write_model
from synthkit.recipes.glyphs32.dataset import SHARD, render_dataset
from synthkit.recipes.glyphs32.denoiser import train_denoiser
from synthkit.recipes.glyphs32.tokenizer import train_tokenizer


@dataclass(frozen=True)
class GlyphSettings:
    """What the recipe costs and what comes out."""

    images: int = setting(100_000, f"rendered images, a multiple of {SHARD}", minimum=SHARD)
    vae_steps: int = setting(2600, "gradient steps of the VAE, 16 images each", minimum=1)
    unet_steps: int = setting(10_000, "gradient steps of UNet and text encoder, 64 latents each", minimum=1)


def train_glyphs(settings: GlyphSettings, out: Path, remarks: str = "") -> None:
    """Train the generator; goes on where an interrupted run stopped.

    Args:
        settings: images and steps.
        out: the model's folder.
        remarks: for the card, how these weights differ from the recipe's.
    """
    work = out.with_name(f".{out.name}.partial")
    data = render_dataset(work / "data", settings.images, os.cpu_count() or 1)
    tokenizer = train_tokenizer(data.captions, work / "tokenizer")
    vae = train_autoencoder(data.images, work, settings.vae_steps)
    latents = _latents(vae, data.images, work / "latents.npy")
    parts = train_denoiser(latents, data.captions, data.symbols, tokenizer, work, settings.unet_steps)
    write_model(parts, vae, work / "tokenizer", out, {**asdict(settings), "remarks": remarks})
    shutil.rmtree(work)


def _latents(vae: AutoencoderKL, images: np.ndarray, path: Path) -> torch.Tensor:
    if not path.exists():
        temporary = path.with_suffix(".tmp.npy")
        np.save(temporary, encode_images(vae, images).numpy())
        temporary.replace(path)
    return torch.from_numpy(np.load(path))


@click.command(cls=OneLineErrors, help=__doc__.splitlines()[0] if __doc__ else None)
@click.option("--out", type=click.Path(path_type=Path), required=True, help="The model's folder.")
@click.option("--images", type=int, help=f"{GlyphSettings.images} when not given.")
@click.option("--vae-steps", type=int, help=f"{GlyphSettings.vae_steps} when not given.")
@click.option("--unet-steps", type=int, help=f"{GlyphSettings.unet_steps} when not given.")
@click.option("--remarks", default="", help="How these weights differ from the recipe's, for the card.")
def main(out: Path, remarks: str, **values: int | None) -> None:
    """Read the flags and train."""
    logging.basicConfig(level=logging.INFO)
    given = {field.name: values[field.name] for field in fields(GlyphSettings)}
    train_glyphs(override(GlyphSettings(), given), out, remarks)


if __name__ == "__main__":
    main()
