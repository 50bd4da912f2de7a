"""Changes of images and labels before a gradient step: random views, Mixup, soft targets."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from timm.data import create_transform

from synthkit.errors import ConfigError
from synthkit.learning.students import to_unit_range

DEFAULT, NONE = "default", "none"

# Smallest share of an image that a crop for timm's augmentation keeps; timm's own 0.08 leaves no digit whole.
_SMALLEST_CROP = 0.5


def random_views(pixels: np.ndarray, recipe: str, generator: torch.Generator) -> torch.Tensor:
    """One random view of each image, float32 [N, 3, H, W] in 0..1.

    Args:
        pixels: uint8 [N, H, W, 3].
        recipe: "default" (see `augment`), "none", or what timm's `auto_augment` takes, for example
            "rand-m9-mstd0.5" (RandAugment, Cubuk et al. 2020), after a random crop.
        generator: source of the randomness.
    """
    if recipe == NONE:
        return to_unit_range(pixels)
    if recipe == DEFAULT:
        return augment(to_unit_range(pixels), generator)
    transform = timm_transform(recipe, (pixels.shape[1], pixels.shape[2]))
    with _global_randomness(int(torch.randint(1 << 31, (), generator=generator))):
        views = torch.stack([transform(Image.fromarray(one)) for one in pixels])
    return views.float() / 255


def timm_transform(recipe: str, size: tuple[int, int]) -> Callable[[Image.Image], torch.Tensor]:
    """timm's training transform to uint8 [3, H, W], without mirroring.

    Args:
        recipe: what timm's `auto_augment` takes.
        size: (height, width).

    Raises:
        ConfigError: timm does not understand the recipe.
    """
    try:
        transform: Callable[[Image.Image], torch.Tensor] = create_transform(
            size,
            is_training=True,
            scale=(_SMALLEST_CROP, 1.0),
            hflip=0.0,
            color_jitter=0.0,
            auto_augment=recipe,
            interpolation="bicubic",
            normalize=False,
        )
    except (AssertionError, KeyError, ValueError):
        raise ConfigError(
            f"timm knows no augmentation {recipe!r}; train.augment takes {DEFAULT}, {NONE} or timm's names, "
            "for example rand-m9-mstd0.5 or augmix-m3"
        ) from None
    return transform


@contextmanager
def _global_randomness(seed: int) -> Iterator[None]:
    """Seed the random numbers that timm's and torchvision's transforms share with everybody else."""
    states: tuple[Any, Any] = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[]):
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)
        try:
            yield
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])


def smooth_targets(labels: torch.Tensor, classes: int, smoothing: float) -> torch.Tensor:
    """Soft targets float32 [N, classes] of class indices [N], with label smoothing."""
    return F.one_hot(labels, classes).float() * (1 - smoothing) + smoothing / classes


def mix(
    images: torch.Tensor, targets: torch.Tensor, alpha: float, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mixup: each image and its target fade into another's of the batch, all by the same share.

    timm's own draws from NumPy's global state and takes even batches only.

    Args:
        images: float32 [B, 3, H, W].
        targets: soft targets [B, classes].
        alpha: of the Beta(alpha, alpha) that the share is drawn from.
        generator: source of the randomness.
    """
    seed = int(torch.randint(1 << 62, (), generator=generator))
    share = float(np.random.default_rng(seed).beta(alpha, alpha))
    return images.lerp(images.flip(0), 1 - share), targets.lerp(targets.flip(0), 1 - share)


def augment(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Random geometry and light, each image its own, on the whole batch at once.

    No mirroring: digits, letters and arrows change their meaning.

    Args:
        images: float32 [N, 3, H, W] in 0..1.
        generator: source of the randomness.
    """
    count = len(images)

    def uniform(low: float, high: float, *shape: int) -> torch.Tensor:
        return low + (high - low) * torch.rand((count, *shape), generator=generator)

    angle, shear = uniform(-0.2, 0.2), uniform(-0.15, 0.15)
    scale = torch.exp(uniform(-0.22, 0.22, 2))
    rotation = torch.stack([angle.cos(), -angle.sin() + shear, angle.sin(), angle.cos()], 1).view(-1, 2, 2)
    theta = torch.cat([rotation * scale[:, None, :], uniform(-0.15, 0.15, 2, 1)], 2)
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    images = F.grid_sample(images, grid, padding_mode="reflection", align_corners=False)
    grey = images.mean((1, 2, 3), keepdim=True)
    # In place: new memory for every step takes longer than the step.
    images.sub_(grey).mul_(uniform(0.6, 1.4, 1, 1, 1)).add_(grey).add_(uniform(-0.15, 0.15, 1, 1, 1))
    images.mul_(uniform(0.85, 1.15, 3, 1, 1))
    noise = torch.randn(images.shape, generator=generator).mul_(uniform(0.0, 0.06, 1, 1, 1))
    return images.add_(noise).clamp_(0, 1)
