"""`compare`: methods x shots x seeds on one data set, every cell a chain in a workspace of its own.

    real-dir ──k photos per class──► cell ──chain, few-shot only──► predictions on test-dir ──► table

At one seed a draw of more shots contains the smaller ones, and all methods see the same photos for the same
number of gradient steps. A cell that is done is skipped, one that was interrupted goes on.
"""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from synthkit import metrics
from synthkit.artifacts import Request, StageResult, run_stage, versions, write_json
from synthkit.engines.bundle import Bundle
from synthkit.images import ImageSet, check_disjoint, k_shot
from synthkit.recipes.chain import ChainSettings, Workspace, run_chain, words_for_prompts
from synthkit.recipes.evaluate import predict_labels
from synthkit.recipes.generate import generate
from synthkit.recipes.train import SYNTHETIC, Material, synthetic_steps, train, untrained_student

FEW_SHOT, PLAIN, SYNTHETIC_ONLY, BRIDGED, ADAPTED = "few-shot", "plain", "synthetic", "bridged++", "adapted"

#: Method -> what it is, in the order of the tables.
METHODS = {
    FEW_SHOT: "few-shot only, same number of steps",
    PLAIN: "synthetic only, plain prompts",
    SYNTHETIC_ONLY: "synthetic only, learned style",
    BRIDGED: "bridged++",
    ADAPTED: "adapted bundle",
}

_PREDICTIONS = "predictions.json"


@dataclass(frozen=True)
class Cell:
    """One draw of photos."""

    shots: int
    seed: int


@dataclass(frozen=True)
class Scores:
    """What the methods answer in a cell.

    Attributes:
        cell: the draw.
        path: what `adapt` chose.
        predicted: method -> predicted class index of every test image.
    """

    cell: Cell
    path: str
    predicted: dict[str, list[int]]


def measure(
    settings: ChainSettings,
    place: Workspace,
    photos: ImageSet,
    test: ImageSet,
    methods: Sequence[str],
    force: bool = False,
) -> tuple[list[StageResult], dict[str, np.ndarray]]:
    """Run the chain and the methods it is compared with on one draw of photos.

    Args:
        settings: of the chain.
        place: the draw's workspace.
        photos: real few shots.
        test: real test images, looked at only here and only to measure.
        methods: which of `METHODS`.
        force: adapt and export again even when nothing changed.

    Returns:
        The chain's stages, and method -> predicted class index of every test image.
    """
    stages = run_chain(settings, place, photos, force=force)
    answer: dict[str, Callable[[], np.ndarray]] = {
        FEW_SHOT: lambda: _answers(few_shot_only(settings, place, photos), test),
        PLAIN: lambda: _answers(plain_prompts(settings, place, photos) / SYNTHETIC, test),
        SYNTHETIC_ONLY: lambda: _answers(place.student / SYNTHETIC, test),
        BRIDGED: lambda: _answers(place.student, test),
        ADAPTED: lambda: predict_labels(Bundle.open(place.bundle), test),
    }
    return stages, {method: answer[method]() for method in METHODS if method in methods}


def few_shot_only(settings: ChainSettings, place: Workspace, photos: ImageSet) -> Path:
    """The student that sees the photos alone, for as many gradient steps as both stages of the bridge."""
    material = Material(ImageSet.scan(place.synthetic), photos)
    steps = synthetic_steps(settings.train, material) + settings.train.real_steps
    size = untrained_student(settings.train, material).preprocessing.input_size[1]
    alone = replace(settings.train, real_steps=steps, image_size=size)
    return train(alone, Material(None, photos), place.root / "few_shot_only").out


def plain_prompts(settings: ChainSettings, place: Workspace, photos: ImageSet) -> Path:
    """The student that sees as many synthetic images as the chain's, drawn without the learned style."""
    words = words_for_prompts(settings.engines, photos)
    folder = place.root / "plain_prompts"
    drawn = generate(settings.generate, place.engines, words, None, folder / "synthetic")
    return train(settings.train, Material(ImageSet.scan(drawn.out), None), folder / "student").out


def _answers(student_dir: Path, images: ImageSet) -> np.ndarray:
    from synthkit.students import load_student

    student = load_student(student_dir)
    pixels = images.with_classes(student.classes).load(student.preprocessing)
    return np.asarray(student.logits(pixels).argmax(1).numpy())


def seeded(settings: ChainSettings, seed: int) -> ChainSettings:
    """The same settings with one seed for every stage that draws."""
    return replace(
        settings,
        style=replace(settings.style, seed=seed),
        generate=replace(settings.generate, seed=seed),
        train=replace(settings.train, seed=seed),
        adapt=replace(settings.adapt, seed=seed),
    )


def run_cell(
    settings: ChainSettings,
    root: Path,
    pool: ImageSet,
    test: ImageSet,
    methods: Sequence[str],
    cell: Cell,
) -> Scores:
    """Draw a cell's photos and measure every method on them, or find them measured.

    Args:
        settings: of the chain; the cell's seed takes the place of theirs.
        root: holds the cells' workspaces.
        pool: real photos to draw from.
        test: real test images.
        methods: which of `METHODS`.
        cell: which draw.
    """
    photos = pool.subset(k_shot(pool, cell.shots, cell.seed))
    place = Workspace(root / f"{cell.shots}-shot-{cell.seed}")
    own = seeded(settings, cell.seed)
    inputs = {"photos": photos.digest, "test": test.digest}
    request = Request("compare", place.root / "scores", inputs, {**asdict(own), "methods": list(methods)})

    def produce(work: Path) -> dict[str, Any]:
        stages, predicted = measure(own, place, photos, test, methods)
        write_json(work / _PREDICTIONS, {method: one.tolist() for method, one in predicted.items()})
        return {"path": stages[-2].manifest.metrics["path"]}

    done = run_stage(request, produce)
    predicted = json.loads((done.out / _PREDICTIONS).read_text(encoding="utf-8"))
    return Scores(cell, done.manifest.metrics["path"], predicted)


def compare(
    settings: ChainSettings,
    root: Path,
    pool: ImageSet,
    test: ImageSet,
    methods: Sequence[str],
    cells: Sequence[Cell],
    jobs: int = 1,
) -> dict[str, Any]:
    """Measure all cells.

    Args:
        settings: of the chain.
        root: the workspace.
        pool: real photos to draw from.
        test: real test images, of the same classes.
        methods: which of `METHODS`.
        cells: the draws.
        jobs: processes, each with its share of the processor's cores.

    Returns:
        `rows` (see `rows`), `paired` (see `paired`), `cells` with every top-1, path and confusion matrix,
        `classes`, `n_test`, `settings` and `versions`; a confusion matrix has a row per true class.

    Raises:
        DataError: the test folder shares an image with the pool, or a class has too few photos.
    """
    check_disjoint(pool, test, (str(pool.root), str(test.root)))
    for cell in cells:
        k_shot(pool, cell.shots, cell.seed)  # refuses what cannot be drawn before any work
    test = test.with_classes(pool.classes)
    measure_cell = functools.partial(run_cell, settings, root, pool, test, methods)
    scores = list(_measured(measure_cell, cells, jobs))
    scores.sort(key=lambda one: (one.cell.shots, one.cell.seed))
    return {
        "rows": rows(scores, test.labels),
        "paired": paired(scores, test.labels),
        "cells": [_described(one, test) for one in scores],
        "classes": list(test.classes),
        "n_test": len(test),
        "settings": asdict(settings),
        "versions": versions(),
    }


def _measured(measure_cell: Callable[[Cell], Scores], cells: Sequence[Cell], jobs: int) -> Iterator[Scores]:
    """Every cell's scores, measured in this process or in several."""
    if jobs == 1:
        yield from (measure_cell(cell) for cell in cells)
        return
    threads = max(1, (os.cpu_count() or 1) // jobs)
    os.environ |= {"OMP_NUM_THREADS": str(threads), "TQDM_DISABLE": "1"}  # read by the child processes
    with ProcessPoolExecutor(jobs, get_context("spawn")) as processes:
        tasks = [processes.submit(measure_cell, cell) for cell in cells]
        for task in tqdm(as_completed(tasks), total=len(tasks), desc="compare", unit="cell", disable=False):
            yield task.result()


def rows(scores: Sequence[Scores], labels: np.ndarray) -> list[dict[str, Any]]:
    """The table: one row per number of shots and method.

    Args:
        scores: of every cell.
        labels: true class indices of the test images.

    Returns:
        method, shots, top1_mean, top1_std (of a sample, n - 1), seeds, and top1_interval: where 95 % of such
        intervals hold the mean over all draws (Student's t); None for one draw.
    """
    return [
        {
            "method": method,
            "shots": shots,
            "top1_mean": round(float(of_draws.mean()), 4),
            "top1_std": round(float(of_draws.std(ddof=1)), 4) if len(of_draws) > 1 else 0.0,
            "top1_interval": metrics.mean_interval(of_draws),
            "seeds": len(of_draws),
        }
        for shots in sorted({one.cell.shots for one in scores})
        for method in _methods(scores)
        for of_draws in [_of_draws(scores, shots, method, labels)]
    ]


def paired(scores: Sequence[Scores], labels: np.ndarray) -> list[dict[str, Any]]:
    """How far each method is ahead of the first one of the table on the same draws.

    Returns:
        method, shots, against, ahead (mean difference in top-1) and p_value of the two-sided paired t-test;
        None where there is one draw or all differences are equal.
    """
    first, *others = _methods(scores)
    return [
        {
            "method": method,
            "shots": shots,
            "against": first,
            "ahead": round(float(differences.mean()), 4),
            "p_value": metrics.paired_p_value(differences),
        }
        for shots in sorted({one.cell.shots for one in scores})
        for method in others
        for differences in [
            _of_draws(scores, shots, method, labels) - _of_draws(scores, shots, first, labels)
        ]
    ]


def _methods(scores: Sequence[Scores]) -> list[str]:
    """The methods that were measured, in the order of the tables."""
    return [method for method in METHODS if method in scores[0].predicted]


def _of_draws(scores: Sequence[Scores], shots: int, method: str, labels: np.ndarray) -> np.ndarray:
    """Top-1 of a method in every draw of so many shots, in the order of the seeds."""
    chosen = sorted((one for one in scores if one.cell.shots == shots), key=lambda one: one.cell.seed)
    return np.array([metrics.top1(np.array(one.predicted[method]), labels) for one in chosen])


def _described(scores: Scores, test: ImageSet) -> dict[str, Any]:
    predicted = {method: np.array(one) for method, one in scores.predicted.items()}
    return {
        **asdict(scores.cell),
        "path": scores.path,
        "top1": {method: round(metrics.top1(one, test.labels), 4) for method, one in predicted.items()},
        "confusion": {
            method: metrics.confusion(one, test.labels, len(test.classes)).tolist()
            for method, one in predicted.items()
        },
    }


def markdown(result: Mapping[str, Any]) -> str:
    """The table as Markdown: a line per number of shots, a column per method, and how far each is ahead."""
    found = {(row["shots"], row["method"]): row for row in result["rows"]}
    methods = list(dict.fromkeys(row["method"] for row in result["rows"]))
    lines = [f"| photos per class | {' | '.join(methods)} |", "|---:" * (1 + len(methods)) + "|"]
    for shots in sorted({shots for shots, _ in found}):
        cells = [_cell(found[shots, method]) for method in methods]
        lines.append(f"| {shots} | {' | '.join(cells)} |")
    if result["paired"]:
        lines += ["", f"Ahead of {methods[0]} on the same draws, in points (p of a paired t-test):", ""]
    for row in result["paired"]:
        p = "" if row["p_value"] is None else f" (p = {row['p_value']:.3f})"
        lines.append(f"- {row['method']}, {row['shots']} per class: {100 * row['ahead']:+.1f}{p}")
    return "\n".join(lines)


def _cell(row: Mapping[str, Any]) -> str:
    return f"{row['top1_mean']:.3f}" + (f" ± {row['top1_std']:.3f}" if row["seeds"] > 1 else "")


def plot(table: Sequence[dict[str, Any]], path: Path) -> None:
    """Top-1 over shots, one line per method, with the standard deviation over the draws as error bars."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for method in dict.fromkeys(row["method"] for row in table):
        of_method = [row for row in table if row["method"] == method]
        shots, means, deviations = (
            [row[key] for row in of_method] for key in ("shots", "top1_mean", "top1_std")
        )
        axes.errorbar(shots, means, deviations, label=METHODS[method], marker="o", capsize=3)
    axes.set_xscale("log", base=2)
    axes.set_xticks(sorted({row["shots"] for row in table}))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set(xlabel="photos per class", ylabel="top-1 on real test images")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=100)
