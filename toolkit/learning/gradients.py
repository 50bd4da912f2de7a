"""The gradients of a batch, whole or in parts that are added up.

    batch ──► every n-th image, n parts ──► model ──► cross-entropy ──► gradients, added up

A batch that does not fit the GPU's memory is split into twice as many parts; the gradient step is
still one of the whole batch.
"""

from __future__ import annotations

import logging

import torch
import torch.nn.functional as F

from synthkit.errors import ConfigError

log = logging.getLogger(__name__)


def best_device(asked: str) -> torch.device:
    """The device to train on.

    Args:
        asked: "cpu", "cuda", or "auto" for the GPU that torch finds.

    Raises:
        ConfigError: a GPU was asked for and torch finds none.
    """
    if asked == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device = cuda, but torch finds no GPU (see `synthkit doctor`); take cpu")
    return torch.device("cuda" if asked != "cpu" and torch.cuda.is_available() else "cpu")


class Gradients:
    """Forward and backward passes of batches.

    Args:
        model: is moved to the device, in place.
        device: see `best_device`.
        amp: forward passes in bfloat16 where torch holds it safe.
        parts: how many parts of a batch go through the model one after another.
    """

    def __init__(self, model: torch.nn.Module, device: str, amp: bool, parts: int) -> None:
        self.device = best_device(device)
        self._model = model.to(self.device)
        self._amp, self.parts = amp, parts

    def add(self, inputs: tuple[torch.Tensor, ...], targets: torch.Tensor) -> float:
        """Add a batch's gradients to those of the model's parameters.

        Args:
            inputs: of the model, each [B, ...].
            targets: soft targets [B, classes].

        Returns:
            The loss, averaged over the batch.

        Raises:
            ConfigError: not even two images at once fit the device's memory.
        """
        while True:
            try:
                return self._add(inputs, targets)
            except torch.OutOfMemoryError:
                # Leave the handler first: the exception holds on to the memory of the failed pass.
                pass
            self._halve(len(targets))

    def _add(self, inputs: tuple[torch.Tensor, ...], targets: torch.Tensor) -> float:
        self._model.zero_grad()
        total = torch.zeros((), device=self.device)
        for first in range(self.parts):
            part = slice(first, None, self.parts)
            soft = targets[part].to(self.device)
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self._amp):
                logits = self._model(*(one[part].to(self.device) for one in inputs))
            loss = F.cross_entropy(logits.float(), soft) * (len(soft) / len(targets))
            loss.backward()
            total += loss.detach()
        return float(total)

    def _halve(self, batch: int) -> None:
        at_once = batch // self.parts
        if batch % (2 * self.parts) or batch < 4 * self.parts:  # even parts, of two images for BatchNorm
            raise ConfigError(_out_of_memory(at_once))
        self._model.zero_grad()
        torch.cuda.empty_cache()
        self.parts *= 2
        log.warning(
            "out of memory with %d images at once: going on with %d, whose gradients are added up",
            at_once,
            batch // self.parts,
        )


def _out_of_memory(images: int) -> str:
    return (
        f"out of memory with {images} images at once; lower --image-size or train.batch_size, raise "
        "train.accumulate, or take a smaller student"
    )
