"""The gradients of a batch on the machine at hand: whole, in parts that are added up, or on several GPUs.

    batch ──► every n-th image, n parts ──► model ──► cross-entropy ──► gradients, added up

A batch that does not fit the GPU's memory is cut into twice as many parts, so that the gradient step stays
one of the whole batch. Accelerate deals the parts out where `accelerate launch` started several processes.
"""

from __future__ import annotations

import logging
import os
from typing import Any

import torch
import torch.nn.functional as F

from synthkit.errors import ConfigError

log = logging.getLogger(__name__)


def accelerator() -> Any:
    """Accelerate's `Accelerator` where its launcher (or torchrun) started this process, otherwise None."""
    if not {"ACCELERATE_MIXED_PRECISION", "LOCAL_RANK"} & os.environ.keys():
        return None
    from accelerate import Accelerator

    return Accelerator(mixed_precision="no")  # --amp alone decides, as it does on one device


def first_process() -> bool:
    """Whether this process is the only one, or the one of several that writes files."""
    found = accelerator()
    return found is None or bool(found.is_main_process)


def wait_for_all() -> None:
    """Let the processes that the launcher started come to the same place; nothing where there is one."""
    if found := accelerator():
        found.wait_for_everyone()


def best_device(asked: str) -> torch.device:
    """The device to train on.

    Args:
        asked: "cpu", "cuda", or "auto" for the GPU that torch finds.

    Raises:
        ConfigError: a GPU was asked for and torch finds none.
    """
    if asked == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device cuda, but torch finds no GPU (see `synthkit doctor`); take --device cpu")
    return torch.device("cuda" if asked != "cpu" and torch.cuda.is_available() else "cpu")


class Gradients:
    """Forward and backward passes of batches.

    Args:
        model: is moved to the device, in place.
        device: see `best_device`; Accelerate's own where it takes part.
        amp: forward passes in bfloat16 where torch holds it safe.
        parts: how many parts of a batch go through the model one after another.
    """

    def __init__(self, model: torch.nn.Module, device: str, amp: bool, parts: int) -> None:
        self._accelerator = accelerator()
        self.device = self._accelerator.device if self._accelerator else best_device(device)
        model.to(self.device)
        self._model = self._accelerator.prepare_model(model) if self._accelerator else model
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
                if self._accelerator and self._accelerator.num_processes > 1:
                    raise ConfigError(_out_of_memory(len(targets) // self.parts)) from None
            self._halve(len(targets))

    def _add(self, inputs: tuple[torch.Tensor, ...], targets: torch.Tensor) -> float:
        self._model.zero_grad()
        rank, processes = self._place()
        total = torch.zeros((), device=self.device)
        for first in range(rank, self.parts * processes, processes):
            part = slice(first, None, self.parts * processes)
            soft = targets[part].to(self.device)
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self._amp):
                logits = self._model(*(one[part].to(self.device) for one in inputs))
            # Several processes' gradients are averaged, not added.
            loss = F.cross_entropy(logits.float(), soft) * (len(soft) * processes / len(targets))
            loss.backward()
            total += loss.detach()
        return float(self._accelerator.reduce(total, "mean") if processes > 1 else total)

    def _place(self) -> tuple[int, int]:
        """Number of this process and of all."""
        if self._accelerator is None:
            return 0, 1
        return self._accelerator.process_index, self._accelerator.num_processes

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
        f"out of memory with {images} images at once; lower --image-size or --batch-size, raise "
        "--accumulate, or take a smaller student"
    )
