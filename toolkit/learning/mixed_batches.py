"""BatchSource of two kinds of images at once: real photos first, then synthetic images."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch

from synthkit.learning.fit import Examples, FitSettings
from synthkit.learning.students import Student

_SYNTHETIC_STREAM = 1 << 40  # keeps the synthetic images' random numbers apart from the photos'


@dataclass(frozen=True)
class MixedBatches:
    """Source of batches of both kinds for `fit`.

    Attributes:
        real: the photos.
        synthetic: the synthetic images, of the same classes.
        share: of real photos in a batch; where it is no whole number of photos, batches differ by one.
        weight: of the photos' mean loss, to which the synthetic images' is added with the rest of 1; None:
            every image counts alike.
    """

    real: Examples
    synthetic: Examples
    share: float
    weight: float | None = None

    def __len__(self) -> int:
        return len(self.real) + len(self.synthetic)

    def batch(
        self, student: Student, picked: np.ndarray, step: int, settings: FitSettings
    ) -> tuple[tuple[torch.Tensor, ...], torch.Tensor]:
        """Images [B, 3, H, W] and soft targets [B, classes]; of `picked` the length alone counts."""
        size = len(picked)
        before, after = (int(round(done * size * self.share, 6)) for done in (step, step + 1))
        number, first = after - before, step * size - before
        weight = number / size if self.weight is None else self.weight
        other = replace(settings, seed=settings.seed + _SYNTHETIC_STREAM)
        parts = [
            _Part(self.real, before, number, weight, settings),
            _Part(self.synthetic, first, size - number, 1 - weight, other),
        ]
        batches = [part.batch(student, step, size) for part in parts if part.number]
        images, targets = (torch.cat(of_parts) for of_parts in zip(*batches, strict=True))
        return (images,), targets


@dataclass(frozen=True)
class _Part:
    """The images of one kind in a batch: `number` of them from place `first` of their stream on."""

    examples: Examples
    first: int
    number: int
    weight: float
    settings: FitSettings

    def batch(self, student: Student, step: int, size: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Images, and soft targets that carry the part's weight in a batch of so many images."""
        picked = dealt(len(self.examples), self.first, self.number, self.settings.seed)
        (images,), targets = self.examples.batch(student, picked, step, self.settings)
        return images, targets * (self.weight * size / self.number)  # the loss is linear in the targets


def dealt(count: int, first: int, number: int, seed: int) -> np.ndarray:
    """Part of a stream of positions in which every image comes once before any comes twice.

    Args:
        count: number of images.
        first: place in the stream to begin at.
        number: positions to give, int64 [number].
        seed: of the order.
    """
    places = np.arange(first, first + number)
    order = {
        one: np.random.default_rng((seed, int(one))).permutation(count) for one in np.unique(places // count)
    }
    return np.array([order[place // count][place % count] for place in places], np.int64)
