"""`compare`: methods x shots x seeds on one data set, every cell a chain in a workspace of its own.

    real-dir ──k photos per class──► cell ──chain, few-shot only──► predictions on test-dir ──► table

At one seed a draw of more shots contains the smaller ones, and all methods see the same photos, for as many
gradient steps as `synthkit.recipes.studies.methods` says. A cell that is done is skipped, an interrupted one
goes on.
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

from synthkit.artifacts import FunctionStage, Key, digest, run_stage, versions, write_json
from synthkit.data.images import ImageSet
from synthkit.data.splits import check_disjoint, k_shot
from synthkit.metrics import classification as metrics
from synthkit.models.generator import model_fingerprint, resolve_model
from synthkit.recipes.build_engines import BuildEngines
from synthkit.recipes.chain import ChainSettings, Workspace
from synthkit.recipes.studies.methods import ADAPTED, METHODS, Draw, answers
from synthkit.recipes.train import BRIDGED, weights_fingerprint

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
        path: what `adapt` chose; None where it was not asked for.
        predicted: method -> predicted class index of every test image.
    """

    cell: Cell
    path: str | None
    predicted: dict[str, list[int]]


def measure(draw: Draw, test: ImageSet, methods: Sequence[str]) -> dict[str, np.ndarray]:
    """Run methods on one draw of photos.

    Args:
        draw: the photos.
        test: real test images, looked at only here and only to measure.
        methods: which of `METHODS`.

    Returns:
        Method -> predicted class index of every test image, in the order of the tables.
    """
    return {name: answers(METHODS[name].make(draw), test) for name in METHODS if name in methods}


def seeded(settings: ChainSettings, seed: int) -> ChainSettings:
    """The same settings with one seed for every stage; the chain's training method is bridged++."""
    return replace(
        settings,
        style=replace(settings.style, seed=seed),
        generate=replace(settings.generate, seed=seed),
        train=replace(settings.train, seed=seed, method=BRIDGED),
        adapt=replace(settings.adapt, seed=seed),
    )


def cell_draw(
    settings: ChainSettings, root: Path, photos: ImageSet, cell: Cell, test: ImageSet | None = None
) -> Draw:
    """A cell's photos with its seed in every stage, and its workspace below `root`."""
    place = Workspace(root / f"{cell.shots}-shot-{cell.seed}", shared_engines=Workspace(root).engines)
    return Draw(seeded(settings, cell.seed), place, photos, test=test)


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
    draw = cell_draw(settings, root, photos, cell, test)
    model = resolve_model(settings.engines.model)
    inputs = {"photos": photos.digest, "test": test.digest, "model": model_fingerprint(model)}
    inputs["words"] = digest(draw.chain.generate.words)
    if settings.train.weights:
        inputs["weights"] = weights_fingerprint(Path(settings.train.weights))
    key = Key(inputs, draw.settings.sections(), {"methods": list(methods)})

    def produce(work: Path) -> dict[str, Any]:
        predicted = measure(draw, test, methods)
        write_json(work / _PREDICTIONS, {method: one.tolist() for method, one in predicted.items()})
        return {"path": draw.path if ADAPTED in methods else None}

    done = run_stage(FunctionStage("compare", draw.place.root / "scores", key, produce))
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
    run_stage(BuildEngines(settings.engines, Workspace(root).engines))  # once, for all cells
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
        try:
            for task in tqdm(
                as_completed(tasks), total=len(tasks), desc="compare", unit="cell", disable=False
            ):
                yield task.result()
        finally:
            processes.shutdown(cancel_futures=True)  # after an error the cells not begun would take hours


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
            **metrics.mean_and_std("top1", of_draws),
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
        method, shots, against and what `paired_test` says of top-1.
    """
    first, *others = _methods(scores)
    return [
        {
            "method": method,
            "shots": shots,
            "against": first,
            **metrics.paired_test(
                _of_draws(scores, shots, method, labels), _of_draws(scores, shots, first, labels)
            ),
        }
        for shots in sorted({one.cell.shots for one in scores})
        for method in others
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
    """The table as Markdown, and how far each method is ahead of the first."""
    lines = shots_table(result["rows"])
    if result["paired"]:
        lines += [
            "",
            f"Ahead of {result['rows'][0]['method']} on the same draws, in points (p of a paired t-test):",
            "",
        ]
    return "\n".join([*lines, *(ahead_line(row) for row in result["paired"])])


def ahead_line(row: Mapping[str, Any]) -> str:
    """A row of `paired` as an item of a Markdown list."""
    line = f"- {row['method']}, {row['shots']} per class: {100 * row['difference']:+.1f}"
    if (p := row["p_value"]) is None:
        return line
    return f"{line} (p {'< 0.001' if p < 0.001 else f'= {p:.3f}'}, {row['pairs']} pairs)"


def shots_table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Lines of Markdown: one per number of shots, with a column per method."""
    found = {(row["shots"], row["method"]): row for row in rows}
    methods = list(dict.fromkeys(row["method"] for row in rows))
    lines = [f"| photos per class | {' | '.join(methods)} |", "|---:" * (1 + len(methods)) + "|"]
    for shots in sorted({shots for shots, _ in found}):
        cells = [_cell(found[shots, method]) for method in methods]
        lines.append(f"| {shots} | {' | '.join(cells)} |")
    return lines


def _cell(row: Mapping[str, Any]) -> str:
    return f"{row['top1_mean']:.3f}" + (f" ± {row['top1_std']:.3f}" if row["seeds"] > 1 else "")


def plot(table: Sequence[dict[str, Any]], path: Path) -> None:
    """Top-1 over shots, one line per method, with the standard deviation over the draws as error bars."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4), layout="constrained")
    axes = figure.subplots()
    lines_over_shots(axes, [{**row, "method": METHODS[row["method"]].title} for row in table])
    axes.set_ylabel("top-1 on real test images")
    figure.legend(loc="outside right upper")  # beside the lines: ten methods would hide them
    figure.savefig(path, dpi=100)


def lines_over_shots(axes: Any, rows: Sequence[Mapping[str, Any]]) -> None:
    """Draw a line per method, with the standard deviation over the draws as error bars."""
    for method in dict.fromkeys(row["method"] for row in rows):
        of_method = [row for row in rows if row["method"] == method]
        shots, means, deviations = (
            [row[key] for row in of_method] for key in ("shots", "top1_mean", "top1_std")
        )
        axes.errorbar(shots, means, deviations, label=method, marker="o", capsize=3)
    axes.set_xscale("log", base=2)
    axes.set_xticks(sorted({row["shots"] for row in rows}))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set_xlabel("photos per class")
    axes.grid(alpha=0.3)
