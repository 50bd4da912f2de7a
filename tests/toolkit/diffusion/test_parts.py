"""Stable Diffusion's parts: the loss of both kinds of target, token ids, sizes, folders that do not load."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

pytest.importorskip("diffusers")

import torch

from synthkit.diffusion.parts import (
    DiffusionParts,
    encode_images,
    image_size,
    load_parts,
    noise_prediction_loss,
    to_pixels,
    token_ids,
)
from synthkit.errors import ModelError
from tests.tiny_models import IMAGE, WIDTH
from tests.tiny_students import noise


@pytest.fixture(scope="module")
def parts(tiny_model: Path) -> DiffusionParts:
    return load_parts(tiny_model)


@pytest.fixture(scope="module")
def epsilon(tiny_epsilon_model: Path) -> DiffusionParts:
    return load_parts(tiny_epsilon_model)


LATENTS = torch.randn((3, 4, 4, 4), generator=torch.Generator().manual_seed(0))
TEXT = torch.zeros((3, 77, WIDTH))


def loss_of(parts: DiffusionParts, answer: Any) -> float:
    """The loss of a network that answers with a function of the noised latents and the timesteps."""

    def unet(noisy: torch.Tensor, steps: torch.Tensor, text: torch.Tensor) -> SimpleNamespace:
        return SimpleNamespace(sample=answer(noisy, steps))

    with_answer: Any = replace(parts, unet=unet)
    return float(noise_prediction_loss(with_answer, LATENTS, TEXT, torch.Generator().manual_seed(5)))


def shares(parts: DiffusionParts, steps: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """sqrt(alpha) and sqrt(1 - alpha) of z_t = sqrt(alpha) z_0 + sqrt(1 - alpha) noise."""
    alphas = parts.scheduler.alphas_cumprod[steps].view(-1, 1, 1, 1)
    return alphas.sqrt(), (1 - alphas).sqrt()


def test_the_exact_noise_costs_nothing(epsilon: DiffusionParts) -> None:
    def exact(noisy: torch.Tensor, steps: torch.Tensor) -> torch.Tensor:
        signal, sigma = shares(epsilon, steps)
        return (noisy - signal * LATENTS) / sigma

    assert loss_of(epsilon, exact) < 1e-8
    assert loss_of(epsilon, lambda noisy, steps: torch.zeros_like(noisy)) == pytest.approx(1, abs=0.3)


def test_the_exact_velocity_costs_nothing(parts: DiffusionParts) -> None:
    def exact(noisy: torch.Tensor, steps: torch.Tensor) -> torch.Tensor:
        signal, sigma = shares(parts, steps)
        noise = (noisy - signal * LATENTS) / sigma
        return signal * noise - sigma * LATENTS

    def exact_noise(noisy: torch.Tensor, steps: torch.Tensor) -> torch.Tensor:
        signal, sigma = shares(parts, steps)
        return (noisy - signal * LATENTS) / sigma

    assert loss_of(parts, exact) < 1e-8
    assert loss_of(parts, exact_noise) > 0.1, "the noise is not this model's target"


def test_the_generator_decides_noise_and_timesteps(parts: DiffusionParts) -> None:
    def loss(seed: int) -> float:
        return float(noise_prediction_loss(parts, LATENTS, TEXT, torch.Generator().manual_seed(seed)))

    assert loss(1) == loss(1) != loss(2)


def test_every_part_is_frozen_and_in_eval_mode(parts: DiffusionParts) -> None:
    for module in (parts.text_encoder, parts.unet, parts.vae):
        assert not module.training and not any(one.requires_grad for one in module.parameters())
        assert {one.dtype for one in module.parameters()} == {torch.float32}


def test_ids_are_padded_and_cut(parts: DiffusionParts) -> None:
    ids = token_ids(parts.tokenizer, ["", "the", "x" * 200])
    begin, end = parts.tokenizer.bos_token_id, parts.tokenizer.eos_token_id
    assert ids.shape == (3, 77) and ids.dtype == torch.int64
    assert (ids[:, 0] == begin).all() and (ids[0, 1:] == end).all()
    assert ids[1, 1] not in (begin, end) and (ids[1, 2:] == end).all()
    assert ids[2, -1] == end and (ids[2, 1:-1] != end).all()


def test_sizes_and_ranges(parts: DiffusionParts) -> None:
    assert image_size(parts) == IMAGE
    pixels = to_pixels(np.array([[[[0, 255, 51]]]], np.uint8))
    assert pixels.flatten().tolist() == pytest.approx([-1, 1, -0.6])


def test_latents_do_not_depend_on_the_batch(parts: DiffusionParts) -> None:
    images = noise(5, IMAGE)
    latents = encode_images(parts.vae, images)
    assert latents.shape == (5, 4, IMAGE // 4, IMAGE // 4)
    assert torch.allclose(latents, encode_images(parts.vae, images, batch_size=2), atol=1e-5)
    mean = parts.vae.encode(to_pixels(images[:1])).latent_dist.mean
    assert torch.allclose(latents[:1], mean * parts.vae.config.scaling_factor, atol=1e-5)


def test_a_folder_that_lacks_a_part_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_model, tmp_path / "model", ignore=shutil.ignore_patterns("unet"))
    with pytest.raises(ModelError, match="does not load as a Stable Diffusion folder"):
        load_parts(tmp_path / "model")
