"""fit(): the one training loop, used by every stage that trains a student.

    uint8 images ──batch──► augment ──► Mixup ──► model ──► cross-entropy ──► AdamW, one-cycle schedule

Counted in gradient steps, not epochs, so that compared methods get the same number of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from timm.optim import create_optimizer_v2
from tqdm import tqdm

from synthkit.checkpoints import load_checkpoint, save_checkpoint, step_generator
from synthkit.images import ImageSet, Preprocessing
from synthkit.students import Student, to_unit_range

# Decoded sets below this many bytes stay in memory; larger ones are decoded batch by batch.
_IN_MEMORY = 2 << 30
_CHECKPOINT_EVERY = 200


@dataclass(frozen=True)
class FitSettings:
    """How `fit` trains.

    Attributes:
        steps: gradient steps.
        lr: peak learning rate.
        batch_size: images per step; a smaller set is repeated within a batch with other augmentations.
        weight_decay: AdamW's.
        mixup: alpha of Mixup (Zhang et al. 2018); 0: off.
        smoothing: label smoothing.
        frozen_statistics: BatchNorm and dropout in eval mode, as last-layer adaptation needs.
        seed: of order, augmentation and Mixup.
        stop: steps after which to stop on the schedule of all steps; None: all.
    """

    steps: int
    lr: float
    batch_size: int = 64
    weight_decay: float = 0.02
    mixup: float = 0.0
    smoothing: float = 0.1
    frozen_statistics: bool = False
    seed: int = 0
    stop: int | None = None


class Lesson(Protocol):
    """What `fit` draws its batches from."""

    def __len__(self) -> int:
        """Number of images."""
        ...

    def batch(
        self, student: Student, picked: np.ndarray, step: int, settings: FitSettings
    ) -> tuple[tuple[torch.Tensor, ...], torch.Tensor]:
        """Inputs of the student's model and soft targets [B, classes].

        Args:
            student: what is trained.
            picked: positions of the images, int [B].
            step: number of the gradient step, the source of the batch's randomness together with the seed.
            settings: of `fit`.
        """
        ...

    def subset(self, indices: np.ndarray) -> Lesson:
        """The images at the given positions."""
        ...

    def logits(self, student: Student, indices: np.ndarray) -> np.ndarray:
        """Logits [N, classes] of the images at the given positions, not augmented."""
        ...


class Examples:
    """Labelled images at a student's size, decoded once where memory allows.

    Args:
        images: the files.
        preprocessing: the student's.
        pixels: the decoded images, where they are there already.
    """

    def __init__(
        self, images: ImageSet, preprocessing: Preprocessing, pixels: np.ndarray | None = None
    ) -> None:
        self.labels = torch.from_numpy(images.labels)
        self._set, self._preprocessing = images, preprocessing
        decoded = len(images) * int(np.prod(preprocessing.input_size))
        self._pixels = images.load(preprocessing) if pixels is None and decoded <= _IN_MEMORY else pixels

    def __len__(self) -> int:
        return len(self.labels)

    def pixels(self, indices: np.ndarray) -> np.ndarray:
        """uint8 [N, H, W, 3] of the images at the given positions."""
        if self._pixels is not None:
            return np.asarray(self._pixels[indices])
        return self._set.subset(indices).load(self._preprocessing)

    def subset(self, indices: np.ndarray) -> Examples:
        """The examples at the given positions."""
        pixels = None if self._pixels is None else self._pixels[indices]
        return Examples(self._set.subset(indices), self._preprocessing, pixels)

    def batch(
        self, student: Student, picked: np.ndarray, step: int, settings: FitSettings
    ) -> tuple[tuple[torch.Tensor, ...], torch.Tensor]:
        """Freshly augmented, normalised images [B, 3, H, W], and soft targets [B, classes]."""
        generator = step_generator(settings.seed, step)
        images = student.normalise(augment(to_unit_range(self.pixels(picked)), generator))
        targets = smooth_targets(self.labels[picked], len(student.classes), settings.smoothing)
        if settings.mixup:
            images, targets = mix(images, targets, settings.mixup, generator)
        return (images,), targets

    def logits(self, student: Student, indices: np.ndarray) -> np.ndarray:
        """Logits [N, classes] of the images at the given positions, not augmented."""
        return np.asarray(student.logits(self.pixels(indices)).numpy())


def one_cycle(progress: float, warm_up: float = 0.05) -> float:
    """Share of the peak learning rate: linear warm-up, then cosine decay to a hundredth.

    Args:
        progress: share of the steps that are done, 0..1.
        warm_up: share of the steps that raise the rate.
    """
    if progress < warm_up:
        return max(progress / warm_up, 0.01)
    return 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * (progress - warm_up) / (1 - warm_up)))


def fit(
    student: Student,
    lesson: Lesson,
    settings: FitSettings,
    *,
    label: str = "train",
    checkpoint: Path | None = None,
    watch: tuple[int, Callable[[int], None]] | None = None,
) -> None:
    """Train the parameters of a student that require gradients, in place.

    Args:
        student: what is trained.
        lesson: what it learns from.
        settings: how.
        label: what the progress bar says.
        checkpoint: file that lets an interrupted run go on.
        watch: (n, call) calls with the number of steps done after every n steps, and before the first.
    """
    if watch:
        watch[1](0)
    parameters = [parameter for parameter in student.model.parameters() if parameter.requires_grad]
    if not parameters:
        return
    optimizer = create_optimizer_v2(
        torch.nn.ParameterList(parameters), opt="adamw", lr=settings.lr, weight_decay=settings.weight_decay
    )
    modules = {"student": student.model}
    start = load_checkpoint(checkpoint, modules, optimizer) if checkpoint else 0
    order = _order(len(lesson), settings)
    stop = settings.steps if settings.stop is None else settings.stop
    for step in tqdm(range(stop), label, disable=None, leave=False):
        picked = next(order)
        if step < start:
            continue
        student.model.train(not settings.frozen_statistics)
        inputs, targets = lesson.batch(student, picked, step, settings)
        loss = F.cross_entropy(student.model(*inputs), targets)
        for group in optimizer.param_groups:
            group["lr"] = settings.lr * one_cycle(step / settings.steps)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if checkpoint and (step + 1) % _CHECKPOINT_EVERY == 0:
            save_checkpoint(checkpoint, step + 1, modules, optimizer)
        if watch and (step + 1) % watch[0] == 0:
            watch[1](step + 1)
    student.model.eval()


def _order(count: int, settings: FitSettings) -> Iterator[np.ndarray]:
    """Batches of positions: every image once before any image twice."""
    rng = np.random.default_rng(settings.seed)
    queue = np.empty(0, np.int64)
    while True:
        while len(queue) < settings.batch_size:
            queue = np.concatenate([queue, rng.permutation(count)])
        yield queue[: settings.batch_size]
        queue = queue[settings.batch_size :]


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
    images = (images - grey) * uniform(0.6, 1.4, 1, 1, 1) + grey + uniform(-0.15, 0.15, 1, 1, 1)
    images = images * uniform(0.85, 1.15, 3, 1, 1)
    noise = torch.randn(images.shape, generator=generator) * uniform(0.0, 0.06, 1, 1, 1)
    return (images + noise).clamp(0, 1)
