"""`demo`: the whole chain on real images that need no download, scikit-learn's handwritten digits.

    digits ──2 per class──► few_shots/ ──chain──► bundle/ ──evaluate──┐
       └────the rest──────► test/ ────────────────────────────────────┴─► table, contact sheet

The table's other rows are trained for as many gradient steps in all as the bridged student was.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from synthkit.artifacts import StageResult, write_bytes
from synthkit.images import ImageSet, check_disjoint, contact_sheet
from synthkit.metrics import top1
from synthkit.recipes.chain import ChainSettings, Workspace, run_chain, words_for_prompts
from synthkit.recipes.generate import generate
from synthkit.recipes.train import SYNTHETIC, Material, synthetic_steps, train

if TYPE_CHECKING:
    from synthkit.students import Student

SHEET = "contact_sheet.png"
_PER_ROW = 16


@dataclass(frozen=True)
class DemoRow:
    """One method of the table and its top-1 on the real test images."""

    method: str
    top1: float


@dataclass(frozen=True)
class DemoResult:
    """What the demo made.

    Attributes:
        stages: of the chain, in order.
        rows: the table.
        n_test: real test images.
        sheet: the contact sheet's file.
    """

    stages: list[StageResult]
    rows: list[DemoRow]
    n_test: int
    sheet: Path


def write_digits(folder: Path, shots: int, seed: int) -> tuple[ImageSet, ImageSet]:
    """Write scikit-learn's digits (8x8 pixels, 17 greys) as class folders of PNG files.

    Args:
        folder: gets `few_shots/` and `test/`.
        shots: photos per class in `few_shots/`; all others go to `test/`.
        seed: which photos these are.

    Returns:
        The few shots and the test set, which share no image.
    """
    from sklearn.datasets import load_digits

    digits = load_digits()
    pixels = np.round(digits.images * (255 / 16)).astype(np.uint8)
    order = np.random.default_rng(seed).permutation(len(pixels))
    for label in range(10):
        members = [index for index in order if digits.target[index] == label]
        for position, index in enumerate(members):
            part = "few_shots" if position < shots else "test"
            _write_png(folder / part / str(label) / f"{index:04d}.png", pixels[index])
    photos, test = ImageSet.scan(folder / "few_shots"), ImageSet.scan(folder / "test")
    check_disjoint(photos, test, ("few_shots", "test"))
    return photos, test


def _write_png(path: Path, pixels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG")
    write_bytes(path, buffer.getvalue())


def run_demo(
    settings: ChainSettings, place: Workspace, photos: ImageSet, test: ImageSet, force: bool
) -> DemoResult:
    """Run the chain, the compared methods and the contact sheet.

    Args:
        settings: of the chain.
        place: the workspace.
        photos: real few shots.
        test: real test images, looked at only here and only to measure.
        force: adapt and export again even when nothing changed.
    """
    from synthkit.engines.bundle import Bundle
    from synthkit.recipes.evaluate import evaluate_bundle
    from synthkit.students import load_student

    stages = run_chain(settings, place, photos, force=force)
    baseline = few_shot_only(settings, place, photos)
    measured = evaluate_bundle(Bundle.open(place.bundle), test.root)
    rows = [
        DemoRow("few-shot only, same number of steps", accuracy(load_student(baseline), test)),
        DemoRow("synthetic only", accuracy(load_student(place.student / SYNTHETIC), test)),
        DemoRow("bridged++", accuracy(load_student(place.student), test)),
        DemoRow(f"adapted bundle ({stages[-2].manifest.metrics['path']})", measured["top1"]),
    ]
    return DemoResult(stages, rows, len(test), draw_sheet(settings, place, photos))


def few_shot_only(settings: ChainSettings, place: Workspace, photos: ImageSet) -> Path:
    """The student that sees the photos alone, for as many gradient steps as both stages of the bridge."""
    material = Material(ImageSet.scan(place.synthetic), photos)
    steps = synthetic_steps(settings.train, material) + settings.train.real_steps
    size = material_size(settings, material)
    alone = replace(settings.train, real_steps=steps, image_size=size)
    return train(alone, Material(None, photos), place.root / "few_shot_only").out


def material_size(settings: ChainSettings, material: Material) -> int:
    """Input side of the chain's student, so that the baseline gets the same."""
    from synthkit.recipes.train import untrained_student

    return untrained_student(settings.train, material).preprocessing.input_size[1]


def accuracy(student: Student, images: ImageSet) -> float:
    """Top-1 of a torch student."""
    pixels = images.with_classes(student.classes).load(student.preprocessing)
    return top1(student.logits(pixels).argmax(1).numpy(), images.labels)


def draw_sheet(settings: ChainSettings, place: Workspace, photos: ImageSet) -> Path:
    """Real few shots beside synthetic images in the learned style and without it."""
    words = words_for_prompts(settings.engines, photos)
    few = replace(settings.generate, per_class=max(1, _PER_ROW // len(photos.classes) + 1))
    plain = generate(few, place.engines, words, None, place.root / "plain")
    rows = [
        ("real few shots", _pictures(photos)),
        ("synthetic, learned style", _pictures(ImageSet.scan(place.synthetic))),
        ("synthetic, plain prompt", _pictures(ImageSet.scan(plain.out))),
    ]
    contact_sheet(rows, place.root / SHEET)
    return place.root / SHEET


def _pictures(images: ImageSet) -> Sequence[Image.Image]:
    """As many images as fit a row, from all classes in turn."""
    rank = np.concatenate([np.arange(count) for count in np.bincount(images.labels)])
    order = np.lexsort((images.labels, rank))[:_PER_ROW]
    return [Image.open(images.items[index].path).convert("RGB") for index in order]
