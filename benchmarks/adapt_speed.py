"""Seconds of last-layer adaptation with cached features, without them, and as a timm script.

    python -m benchmarks.adapt_speed --real-dir DIR --test-dir DIR --weights FILE --out FILE

    one training, same photos, student, optimiser, learning rates and steps
        cached    frozen layers once per augmented view, then steps over the last layer groups
        plain     the same loop, the whole student in every step
        timm      timm's transforms, DataLoader, optimiser and schedule
    `adapt` as a whole
        cached    cross-validation of every strategy, then training with the one chosen
        plain     the same with the whole student in every step

Variants take turns, and medians are compared, with the top-1 of each beside them. The expected ratio follows
from the number of images that pass the frozen layers: photos * (views + 1) with the cache, steps * batch for
each training without. It is printed first, so that a deviation asks for a reason.
"""

from __future__ import annotations

import functools
import json
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import numpy as np

from synthkit.artifacts import versions, write_json
from synthkit.data.images import ImageSet
from synthkit.data.splits import check_disjoint, k_shot
from synthkit.metrics.classification import top1
from synthkit.one_line import OneLineErrors
from synthkit.recipes.adaptation.selection import select_strategy
from synthkit.recipes.adaptation.strategies import (
    LAST,
    AdaptationTask,
    StartingStudent,
    Strategy,
    fit_settings,
    prepare,
    train_strategy,
)
from synthkit.recipes.settings import AdaptSettings, TrainSettings

if TYPE_CHECKING:
    from synthkit.learning.feature_cache import CachedFeatures
    from synthkit.learning.students import Student

Variant = Callable[[AdaptationTask, Strategy], "Student"]


class UncachedTask(AdaptationTask):
    """A task without cached features."""

    @property
    def features(self) -> Mapping[int, CachedFeatures]:  # type: ignore[override]
        """No features."""
        return {}


def stage(task: AdaptationTask, strategy: Strategy) -> Student:
    """Train with the given strategy."""
    trainable = prepare(strategy, task)
    train_strategy(strategy, task, trainable)
    return trainable.student


def whole(task: AdaptationTask, strategy: Strategy) -> Student:
    """Choose the strategy by cross-validation, then train with it."""
    return stage(task, select_strategy(task).strategy)


def timm_style(photos: ImageSet, task: AdaptationTask, strategy: Strategy) -> Student:
    """Fine-tune as a timm user would: a data set of files, its transforms, its schedule."""
    import torch
    from timm.data import create_transform
    from timm.loss import LabelSmoothingCrossEntropy
    from timm.optim import create_optimizer_v2
    from timm.scheduler import CosineLRScheduler

    student, settings = task.start.student.clone(), fit_settings(strategy, task)
    student.train_only_last(strategy.layer_groups or 0)
    config = student.preprocessing
    transform = create_transform(
        config.input_size,
        is_training=True,
        hflip=0.0,
        interpolation=config.interpolation,
        mean=config.mean,
        std=config.std,
    )
    batch = min(settings.batch_size, len(photos))
    loader = torch.utils.data.DataLoader(_Photos(photos, transform), batch, shuffle=True, drop_last=True)
    trainable = [one for one in student.model.parameters() if one.requires_grad]
    optimizer = create_optimizer_v2(
        torch.nn.ParameterList(trainable), opt="adamw", lr=settings.lr, weight_decay=0.0
    )
    scheduler = CosineLRScheduler(optimizer, t_initial=settings.steps, lr_min=settings.lr / 100)
    loss_of, step = LabelSmoothingCrossEntropy(settings.smoothing), 0
    # BatchNorm statistics stay, as in the other variants.
    student.model.eval()
    while step < settings.steps:
        for images, labels in loader:
            loss = loss_of(student.model(images), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            step += 1
            scheduler.step(step)
            if step == settings.steps:
                break
    return student


class _Photos:
    """Torch data set that decodes and augments one photo at a time."""

    def __init__(self, images: ImageSet, transform: Callable[[Any], Any]) -> None:
        self._images, self._transform = images, transform

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        from synthkit.standalone import open_image

        item = self._images.items[index]
        return self._transform(open_image(item.path)), item.label


def expected(task: AdaptationTask, strategy: Strategy) -> dict[str, Any]:
    """Number of images through the frozen layers, and the ratio if nothing else took time.

    Full fine-tuning, which cross-validation tries too, has no frozen layers and takes as long either way.
    """
    photos, steps = len(task.examples), fit_settings(strategy, task).steps
    batch = fit_settings(strategy, task).batch_size
    kept = photos * (task.settings.views + 1)
    trainings = 1 + task.folds * len(LAST)
    return {
        "cached": kept,
        "plain_stage": steps * batch,
        "plain_whole": trainings * steps * batch,
        "stage_ratio": round(steps * batch / kept, 2),
        "whole_ratio": round(trainings * steps * batch / kept, 2),
    }


def measure(
    variants: Mapping[str, tuple[Variant, AdaptationTask]], strategy: Strategy, test: ImageSet, runs: int
) -> Any:
    """Seconds and top-1 of every variant, run in turns.

    Args:
        variants: name -> function to run, and its task.
        strategy: of those that take one.
        test: real test images.
        runs: of every variant.

    Returns:
        Name -> `seconds` (the median), `all_seconds` and `top1`.
    """
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    scores: dict[str, float] = {}
    for _ in range(runs):
        for name, (variant, task) in variants.items():
            fresh = type(task)(task.start, task.examples, task.settings, task.training)  # nothing kept
            begun = time.perf_counter()
            student = variant(fresh, strategy)
            seconds[name].append(round(time.perf_counter() - begun, 3))
            scores[name] = _top1(student, test)
    return {
        name: {"seconds": statistics.median(found), "all_seconds": found, "top1": round(scores[name], 4)}
        for name, found in seconds.items()
    }


def _top1(student: Student, test: ImageSet) -> float:
    predicted = student.logits(test.load(student.preprocessing)).argmax(1).numpy()
    return top1(np.asarray(predicted), test.labels)


def _first_classes(images: ImageSet, count: int) -> ImageSet:
    """The images of the first classes."""
    kept = tuple(item for item in images.items if item.label < count)
    return ImageSet(images.root, images.classes[:count], kept)


@click.command(cls=OneLineErrors)
@click.option("--real-dir", type=click.Path(path_type=Path), required=True, help="Photos to choose from.")
@click.option("--test-dir", type=click.Path(path_type=Path), required=True, help="Real test images.")
@click.option("--weights", type=click.Path(path_type=Path), required=True, help="The student's weights.")
@click.option("--student", default="mobilenetv2_100", show_default=True)
@click.option("--size", default=224, show_default=True, help="Input side in pixels.")
@click.option("--classes", default=10, show_default=True)
@click.option("--shots", default=16, show_default=True, help="Photos per class.")
@click.option(
    "--strategy", default="last-1", type=click.Choice(["last-1", "last-2", "last-4"]), show_default=True
)
@click.option("--steps", type=int, help="Gradient steps.  [default: those of `adapt`]")
@click.option("--views", default=AdaptSettings.views, show_default=True, help="Views of a photo.")
@click.option("--whole/--no-whole", "with_whole", default=True, help="Time cross-validation too.")
@click.option("--runs", default=3, show_default=True)
@click.option("--out", type=click.Path(path_type=Path), required=True, help="JSON file to write.")
def main(
    real_dir: Path,
    test_dir: Path,
    weights: Path,
    student: str,
    size: int,
    classes: int,
    shots: int,
    strategy: str,
    steps: int | None,
    views: int,
    with_whole: bool,
    runs: int,
    out: Path,
) -> None:
    """Time adaptation with cached features, without, and as a timm script; writes OUT and prints it."""
    from synthkit.learning.fit import Examples
    from synthkit.learning.students import new_student

    pool = _first_classes(ImageSet.scan(real_dir), classes)
    test = _first_classes(ImageSet.scan(test_dir), classes).with_classes(pool.classes)
    check_disjoint(pool, test, (str(real_dir), str(test_dir)))
    photos = pool.subset(k_shot(pool, shots, 0))
    start = StartingStudent(new_student(student, pool.classes, weights=weights, image_size=size), False, None)
    settings = AdaptSettings(adapt_steps=steps, views=views, strategy=strategy)
    parts = (start, Examples(photos, start.student.preprocessing), settings, TrainSettings())
    predicted = expected(AdaptationTask(*parts), Strategy(strategy))
    click.echo(f"images through the frozen layers: {json.dumps(predicted)}", err=True)
    variants: dict[str, tuple[Variant, AdaptationTask]] = {
        "stage cached": (stage, AdaptationTask(*parts)),
        "stage plain": (stage, UncachedTask(*parts)),
        "stage timm": (functools.partial(timm_style, photos), UncachedTask(*parts)),
    }
    if with_whole:
        parts = (*parts[:2], replace(settings, strategy="auto"), parts[3])
        variants["whole cached"] = whole, AdaptationTask(*parts)
        variants["whole plain"] = whole, UncachedTask(*parts)
    measured = measure(variants, Strategy(strategy), test, runs)
    asked = {
        "student": student,
        "size": size,
        "photos": len(photos),
        **asdict(settings),
        "strategy": strategy,
    }
    result = {"expected": predicted, "measured": measured, "n_test": len(test), "settings": asked}
    write_json(out, {**result, "ratios": ratios(measured), "versions": versions()})
    click.echo(out.read_text(encoding="utf-8"))


def ratios(measured: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """Seconds of each other variant as a multiple of the cached one of its kind."""
    return {
        name: round(one["seconds"] / measured[f"{name.partition(' ')[0]} cached"]["seconds"], 2)
        for name, one in measured.items()
        if not name.endswith("cached")
    }


if __name__ == "__main__":
    main()
