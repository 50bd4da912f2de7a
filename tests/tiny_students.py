"""Small timm students with lively weights, and class folders of small images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from synthkit.data.images import Preprocessing

if TYPE_CHECKING:
    from synthkit.learning.students import Student

CLASSES = ("Ærø brücke", "a dog", "Ω")
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
PREPROCESSING = Preprocessing((3, 32, 32), "bicubic", 0.9, "center", MEAN, STD)


@dataclass(frozen=True)
class TinyStudent:
    model: Any
    preprocessing: Preprocessing
    classes: Sequence[str]


def lively_student(seed: int = 0, classes: Sequence[str] = CLASSES, name: str = "test_resnet") -> Student:
    """A synthkit student with random BatchNorm statistics and head: its logits show something."""
    from synthkit.learning.students import Student

    tiny = tiny_student(seed, classes, name)
    return Student(tiny.model, name, {}, tuple(classes), PREPROCESSING)


def tiny_student(seed: int = 0, classes: Sequence[str] = CLASSES, name: str = "test_resnet") -> TinyStudent:
    import timm
    import torch

    torch.manual_seed(seed)
    model = timm.create_model(name, num_classes=len(classes))
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.running_mean.normal_(0, 0.2)
                module.running_var.uniform_(0.5, 2)
                module.weight.uniform_(0.5, 1.5)
                module.bias.normal_(0, 0.2)
        model.get_classifier().weight.normal_(0, 0.5)
        model.get_classifier().bias.normal_(0, 0.5)
    return TinyStudent(model, PREPROCESSING, tuple(classes))


def noise(count: int = 6, side: int = 32, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, side, side, 3), dtype=np.uint8)


def class_folders(root: Path, classes: Sequence[str] = CLASSES, each: int = 2, seed: int = 0) -> Path:
    for index, name in enumerate(classes):
        (root / name).mkdir(parents=True)
        for number, pixels in enumerate(noise(each, 40, seed * 100 + index)):
            Image.fromarray(pixels).save(root / name / f"{number}.png")
    return root


def colour_folders(root: Path, classes: Sequence[str], each: int = 4, seed: int = 0, side: int = 32) -> Path:
    """Noisy images, class i bright in channel i: a small student tells them apart after a few steps."""
    rng = np.random.default_rng(seed)
    for index, name in enumerate(classes):
        (root / name).mkdir(parents=True)
        for number in range(each):
            pixels = rng.integers(0, 90, (side, side, 3), dtype=np.uint8)
            pixels[..., index] += 140
            Image.fromarray(pixels).save(root / name / f"{number}.png")
    return root


def tiny_bundle(folder: Path, trained_on: Sequence[str] = (), seed: int = 0) -> Path:
    from synthkit.engines.bundle.format import Accuracy
    from synthkit.recipes.exporting.export import export_student_bundle

    folder.mkdir(parents=True)
    provenance = {"trained_on": list(trained_on), "path": "last layer"}
    export_student_bundle(tiny_student(seed), noise(), provenance, Accuracy(0.5, 6), folder)
    return folder


def photo_sets(root: Path, classes: Sequence[str], pool: int, test: int) -> Path:
    """`pool` and `test` with so many photos of a class, and the `weights` of a student."""
    colour_folders(root / "pool", classes, each=pool, seed=1)
    colour_folders(root / "test", classes, each=test, seed=2)
    lively_student(0, classes).save(root / "weights")
    return root
