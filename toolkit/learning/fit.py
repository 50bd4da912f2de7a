"""fit(): the one training loop, used by every stage that trains a student.

    uint8 images ──batch──► augment ──► Mixup ──► model ──► cross-entropy ──► optimiser and its schedule
                                                              │
          held-out photos choose the weights ◄── moving average ◄── curves.json, checkpoint

Counted in gradient steps, not epochs, so that compared methods get the same number of them.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, cast

import numpy as np
import torch
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import ModelEmaV3

from synthkit.data.images import ImageSet, Preprocessing
from synthkit.errors import ConfigError
from synthkit.learning.augmentation import DEFAULT, mix, random_views, smooth_targets
from synthkit.learning.checkpoints import load_checkpoint, save_checkpoint, step_generator
from synthkit.learning.curves import Curves
from synthkit.learning.gradients import Gradients
from synthkit.learning.students import Student
from synthkit.progress import progress

# Decoded sets below this many bytes stay in memory; larger ones are decoded batch by batch.
_IN_MEMORY = 2 << 30
_CHECKPOINT_EVERY = 200
_EVALUATIONS = 10  # on the held-out photos in a run
_WARM_UP = 0.05  # share of the steps that raise the learning rate


@dataclass(frozen=True)
class FitSettings:
    """Settings of `fit`.

    Attributes:
        steps: gradient steps.
        lr: peak learning rate.
        batch_size: images per step; a smaller set is repeated within a batch with other augmentations.
        weight_decay: the optimiser's.
        mixup: alpha of Mixup (Zhang et al. 2018); 0: off.
        smoothing: label smoothing.
        frozen_statistics: BatchNorm and dropout in eval mode, as last-layer adaptation needs.
        seed: of order, augmentation and Mixup.
        opt: timm's name of the optimiser.
        schedule: "one-cycle" (see `one_cycle`), or timm's name of a schedule.
        layer_decay: share of the learning rate that each layer group gets of the next one's; 1: all the same.
        ema: decay of the moving average of weights that is kept instead of the last ones; 0: off.
        augment: see `random_views`.
        amp: forward passes in bfloat16.
        accumulate: parts of a batch that go through the model one after another.
        device: "cpu", "cuda" or "auto".
    """

    steps: int
    lr: float
    batch_size: int = 64
    weight_decay: float = 0.02
    mixup: float = 0.0
    smoothing: float = 0.1
    frozen_statistics: bool = False
    seed: int = 0
    opt: str = "adamw"
    schedule: str = "one-cycle"
    layer_decay: float = 1.0
    ema: float = 0.0
    augment: str = DEFAULT
    amp: bool = False
    accumulate: int = 1
    device: str = "cpu"


class BatchSource(Protocol):
    """Source of the batches of `fit`."""

    def __len__(self) -> int:
        """Number of images."""
        ...

    def batch(
        self, student: Student, picked: np.ndarray, step: int, settings: FitSettings
    ) -> tuple[tuple[torch.Tensor, ...], torch.Tensor]:
        """Inputs of the student's model and soft targets [B, classes], weighted where they do not sum to 1.

        Args:
            student: what is trained.
            picked: positions of the images, int [B].
            step: number of the gradient step, the source of the batch's randomness together with the seed.
            settings: of `fit`.
        """
        ...


class LabelledData(BatchSource, Protocol):
    """Images that can be dealt into folds and classified."""

    def subset(self, indices: np.ndarray) -> LabelledData:
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
        images = student.normalise(random_views(self.pixels(picked), settings.augment, generator))
        targets = smooth_targets(self.labels[picked], len(student.classes), settings.smoothing)
        if settings.mixup:
            images, targets = mix(images, targets, settings.mixup, generator)
        return (images.contiguous(memory_format=_layout(student.model)),), targets

    def logits(self, student: Student, indices: np.ndarray) -> np.ndarray:
        """Logits [N, classes] of the images at the given positions, not augmented."""
        return np.asarray(student.logits(self.pixels(indices)).numpy())


def _layout(model: torch.nn.Module) -> torch.memory_format:
    """Channels last for depthwise convolutions, whose steps on a CPU are up to a third shorter with it."""
    groups = (one.groups for one in model.modules() if isinstance(one, torch.nn.Conv2d))
    return torch.channels_last if any(count > 1 for count in groups) else torch.contiguous_format


def one_cycle(done: float, warm_up: float = _WARM_UP) -> float:
    """Share of the peak learning rate: linear warm-up, then cosine decay to a hundredth.

    Args:
        done: share of the steps that are done, 0..1.
        warm_up: share of the steps that raise the rate.
    """
    if done < warm_up:
        return max(done / warm_up, 0.01)
    return 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * (done - warm_up) / (1 - warm_up)))


def fit(
    student: Student,
    data: BatchSource,
    settings: FitSettings,
    *,
    label: str = "train",
    checkpoint: Path | None = None,
    watch: tuple[int, Callable[[int], None]] | None = None,
    curves: Path | None = None,
    held_out: Callable[[], float] | None = None,
) -> None:
    """Train the parameters of a student that require gradients, in place.

    Args:
        student: what is trained.
        data: what it learns from.
        settings: how.
        label: what the progress bar says.
        checkpoint: file that lets an interrupted run go on.
        watch: (n, call) calls with the number of steps done after every n steps, before the first and after
            the last.
        curves: file for losses, learning rates and evaluations on the held-out photos.
        held_out: top-1 of the student, as it is when called, on photos that it does not learn from; the
            weights are kept that did best, the last of equal ones.

    Raises:
        ConfigError: the loss or the weights stopped being finite, or the memory is too small.
    """
    if watch:
        watch[1](0)
    if not any(parameter.requires_grad for parameter in student.model.parameters()):
        return
    run = _Run(student, settings, label, checkpoint, curves, held_out)
    order = _order(len(data), settings)
    interval = max(1, settings.steps // _EVALUATIONS)
    for step in progress(range(settings.steps), label):
        picked = next(order)
        if step < run.start:
            continue
        run.learn(step, *data.batch(student, picked, step, settings))
        if (step + 1) % interval == 0 or step + 1 == settings.steps:
            run.evaluate(step + 1)
        if (step + 1) % _CHECKPOINT_EVERY == 0:
            run.keep(step + 1)
        if watch and ((step + 1) % watch[0] == 0 or step + 1 == settings.steps):
            with run.averaged():
                watch[1](step + 1)
    run.finish(settings.steps)


class _Run:
    """State of a run of `fit` from one gradient step to the next; the arguments are those of `fit`."""

    def __init__(
        self,
        student: Student,
        settings: FitSettings,
        label: str,
        checkpoint: Path | None,
        curves: Path | None,
        held_out: Callable[[], float] | None,
    ) -> None:
        self._model, self._settings, self._label = student.model, settings, label
        self._checkpoint, self._curves_file, self._held_out = checkpoint, curves, held_out
        self._gradients = Gradients(student.model, settings.device, settings.amp, settings.accumulate)
        self._optimizer = _optimizer(student.model, settings)
        self._set_rates = _schedule(self._optimizer, settings)
        self._modules = {"student": student.model}
        self._ema = ModelEmaV3(student.model, settings.ema, use_warmup=True) if settings.ema else None
        if self._ema:
            self._modules["ema"] = self._ema.module
        if held_out:
            self._modules["best"] = copy.deepcopy(student.model)
        self.start = load_checkpoint(checkpoint, self._modules, self._optimizer) if checkpoint else 0
        self._kept = self.start
        self._curves = Curves.resume(curves, self.start)

    def learn(self, step: int, inputs: tuple[torch.Tensor, ...], targets: torch.Tensor) -> None:
        """One gradient step."""
        self._model.train(not self._settings.frozen_statistics)
        self._set_rates(step)
        loss = self._gradients.add(inputs, targets)
        if not math.isfinite(loss):
            raise self._diverged(step, f"the loss is {loss}")
        self._optimizer.step()
        if self._ema:
            self._ema.update(self._model, step)
        self._curves.add_step(loss, max(group["lr"] for group in self._optimizer.param_groups))

    def evaluate(self, steps: int) -> None:
        """Classify the held-out photos, if any, and remember the weights that did best."""
        if not self._held_out:
            return
        with self.averaged():
            if self._curves.add_evaluation(steps, self._held_out()):
                self._modules["best"].load_state_dict(self._model.state_dict())

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """The moving average of the weights in place of the last ones, where one is kept."""
        if not self._ema:
            yield
            return
        last = {key: value.clone() for key, value in self._model.state_dict().items()}
        self._model.load_state_dict(self._ema.module.state_dict())
        try:
            yield
        finally:
            self._model.load_state_dict(last)

    def keep(self, steps: int) -> None:
        """Write checkpoint and curves, where they are wanted."""
        if not all(bool(torch.isfinite(one).all()) for one in self._model.parameters()):
            raise self._diverged(steps - 1, "the weights are not finite any more")
        if self._curves_file:  # first: curves that are ahead of the checkpoint are cut, others have a gap
            self._curves.save(self._curves_file)
        if self._checkpoint:
            save_checkpoint(self._checkpoint, steps, self._modules, self._optimizer)
            self._kept = steps

    def finish(self, steps: int) -> None:
        """Leave the chosen weights in the student, on the CPU and in eval mode."""
        self.keep(steps)
        chosen = self._modules.get("best", self._modules.get("ema", self._model))
        self._model.load_state_dict(chosen.state_dict())
        self._model.cpu().eval()

    def _diverged(self, step: int, what: str) -> ConfigError:
        rate, steps = self._settings.lr, self._settings.steps
        kept = f"; the weights after step {self._kept} stay in {self._checkpoint}" if self._kept else ""
        return ConfigError(
            f"{self._label}: {what} at step {step + 1} of {steps} with a peak learning rate of {rate:g}; "
            f"lower it, for example to {rate / 10:g}{kept}"
        )


def _optimizer(model: torch.nn.Module, settings: FitSettings) -> torch.optim.Optimizer:
    """timm's optimiser of the parameters that require gradients."""
    common = {"opt": settings.opt, "lr": settings.lr, "weight_decay": settings.weight_decay}
    if settings.layer_decay == 1:
        trained = torch.nn.ParameterList(one for one in model.parameters() if one.requires_grad)
        return create_optimizer_v2(trained, **common)
    return create_optimizer_v2(model, **common, layer_decay=settings.layer_decay)


def _schedule(optimizer: torch.optim.Optimizer, settings: FitSettings) -> Callable[[int], None]:
    """Setter of the learning rates before a gradient step, from the number of those done."""
    if settings.schedule != "one-cycle":
        scheduler, _ = create_scheduler_v2(
            optimizer,
            settings.schedule,
            num_epochs=settings.steps,  # timm's epochs are gradient steps here
            warmup_epochs=round(_WARM_UP * settings.steps),
            warmup_lr=settings.lr / 100,
            min_lr=settings.lr / 100,
            decay_epochs=max(1, settings.steps // 3),
        )
        return cast(Callable[[int], None], scheduler.step)

    def set_rates(step: int) -> None:
        rate = settings.lr * one_cycle(step / settings.steps)
        for group in optimizer.param_groups:
            group["lr"] = rate * group.get("lr_scale", 1.0)

    return set_rates


def _order(count: int, settings: FitSettings) -> Iterator[np.ndarray]:
    """BatchSource of positions: every image once before any image twice."""
    rng = np.random.default_rng(settings.seed)
    queue = np.empty(0, np.int64)
    while True:
        while len(queue) < settings.batch_size:
            queue = np.concatenate([queue, rng.permutation(count)])
        yield queue[: settings.batch_size]
        queue = queue[settings.batch_size :]
