"""Which way of learning from a few photographs wins, without a generator.

    python -m benchmarks.photo_table --set NAME=POOL:TEST --weights TIMM_NAME=FOLDER --work DIR --out FILE

    pool --k photos per class--> cell = (set, student, shots, seed)
        full            all layers
        last-1, -2, -4  the last layer groups; `last-4 means` starts from class means
        means           class means alone
        logistic        logistic regression on frozen features
        adapt           one of these strategies, by cross-validation on the k photos

Every method learns from the same photos, and at one seed a split of more photos contains the smaller ones.
Test images only measure. A finished cell is kept, and the result is written again after each; `--add` takes
cells that another machine has measured. Students run at a small input size, and a limited number of test
images counts, chosen by the hash of their content.

Cells are not independent: both students learn from the same photos. A comparison therefore takes one value
per set and seed, the mean over the students, and its p-values are corrected for the number of comparisons.
They speak for these sets and not for others: seeds of one set share its pool and its test images.
"""

from __future__ import annotations

import json
import statistics
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import numpy as np
from tqdm import tqdm

from synthkit.artifacts import FunctionStage, Key, run_stage, versions, write_bytes, write_json
from synthkit.data.images import ImageSet
from synthkit.data.splits import check_disjoint, k_shot
from synthkit.errors import ConfigError
from synthkit.metrics.classification import (
    holm,
    mean_and_std,
    mean_interval,
    paired_test,
    top1,
)
from synthkit.one_line import OneLineErrors
from synthkit.recipes.adaptation.selection import Selection, select_strategy
from synthkit.recipes.adaptation.strategies import (
    LAST,
    AdaptationTask,
    StartingStudent,
    Strategy,
    cached_features,
    initialise_head,
    prepare,
    train_strategy,
)
from synthkit.recipes.settings import AdaptSettings, TrainSettings
from synthkit.recipes.studies.compare import accuracy_table, difference_line, plot_over_shots
from synthkit.recipes.train import weights_fingerprint

if TYPE_CHECKING:
    from synthkit.learning.feature_cache import CachedFeatures
    from synthkit.learning.fit import Examples
    from synthkit.learning.students import Student

MEANS, LAST_MEANS, LOGISTIC, ADAPT = "means", "last-4 means", "logistic", "adapt"
#: The methods that a user could settle on beforehand.
FIXED = ("full", "last-1", "last-2", "last-4", LOGISTIC)
_PREDICTIONS = "predictions.json"
_FIRST_SHOTS = (1, 4, 16)

#: Method -> gradient steps -> predicted class index of every test image.
Predictions = dict[str, dict[int, list[int]]]
Cells = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Experiment:
    """A data set and a pretrained student, with the student's cached features of the test images.

    Attributes:
        pool: real photos from which the few are taken.
        test: real test images.
        architecture: timm's name of the student.
        weights: its pretrained weights.
        size: input side in pixels.
    """

    pool: ImageSet
    test: ImageSet
    architecture: str
    weights: Path
    size: int

    @cached_property
    def student(self) -> Student:
        """The pretrained student with a head of zeros."""
        from synthkit.learning.students import new_student

        return new_student(self.architecture, self.pool.classes, weights=self.weights, image_size=self.size)

    @cached_property
    def examples(self) -> Examples:
        """The test images."""
        from synthkit.learning.fit import Examples

        return Examples(self.test, self.student.preprocessing)

    @cached_property
    def features(self) -> dict[int, CachedFeatures]:
        """Number of last layer groups -> the test images' features that enter them."""
        counts = [strategy.layer_groups or 0 for strategy in LAST]
        return cached_features(self.student, self.examples, counts, views=0, seed=0)


@dataclass(frozen=True)
class Cell:
    """A set and a student by name, photos per class, and the seed of the split."""

    set: str
    student: str
    shots: int
    seed: int

    @property
    def name(self) -> str:
        """Folder of the cell's stage."""
        return f"{self.set}-{self.student}-{self.shots}-shot-{self.seed}"


def trained(strategy: Strategy, task: AdaptationTask, experiment: Experiment) -> dict[int, list[int]]:
    """Train by a strategy on all photos.

    Returns:
        Gradient steps -> predictions on the test images, before the first step and after the last.
    """
    trainable = prepare(strategy, task)
    data = experiment.features[strategy.layer_groups] if strategy.layer_groups else experiment.examples

    def predictions() -> list[int]:
        return [int(one) for one in data.logits(trainable.trained, np.arange(len(data))).argmax(1)]

    initialise_head(strategy, task, trainable)
    before = predictions()
    train_strategy(strategy, task, trainable)
    return {0: before, task.steps(strategy): predictions()}


def logistic(task: AdaptationTask, experiment: Experiment, c: float) -> list[int]:
    """scikit-learn's logistic regression on the features of the photos, without augmentation.

    Features are divided by their root mean square norm, so that C means the same for every student.
    """
    from sklearn.linear_model import LogisticRegression

    photos, test = (views[1].clean[0].flatten(1).numpy() for views in (task.features, experiment.features))
    scale = float(np.sqrt((photos**2).sum(axis=1).mean()))
    fitted = LogisticRegression(C=c, max_iter=5000).fit(photos / scale, task.labels)
    return [int(one) for one in fitted.predict(test / scale)]


def measure(
    task: AdaptationTask, experiment: Experiment, c: float
) -> tuple[Predictions, Selection, list[dict[str, Any]]]:
    """Predictions of all methods on one split, `adapt`'s selection, and the cross-validation."""
    selection = select_strategy(task)
    zero, means = (replace(task, settings=replace(task.settings, head=head)) for head in ("keep", "means"))
    predictions = {one.value: trained(one, zero, experiment) for one in LAST}
    predictions[LAST_MEANS] = trained(LAST[-1], means, experiment)
    predictions[MEANS] = {0: predictions[LAST_MEANS][0]}
    predictions[LOGISTIC] = {0: logistic(task, experiment, c)}
    predictions[Strategy.FULL.value] = trained(Strategy.FULL, task, experiment)
    taken = predictions[LAST_MEANS if task.head == "means" else selection.strategy.value]
    steps = task.steps(selection.strategy)
    predictions[ADAPT] = {steps: taken[steps]}
    return predictions, selection, [one.to_json() for one in selection.cross_validation]


def run_cell(
    experiment: Experiment, cell: Cell, settings: AdaptSettings, training: TrainSettings, c: float, work: Path
) -> dict[str, Any]:
    """Measure a cell, or read it where it has been measured.

    Returns:
        The cell, every method's `top1` after all its steps, `adapt`'s `strategy` and `steps`,
        `cross_validation` and `seconds`.
    """
    photos = experiment.pool.subset(k_shot(experiment.pool, cell.shots, cell.seed))
    settings, training = replace(settings, seed=cell.seed), replace(training, seed=cell.seed)
    inputs = {"photos": photos.digest, "test": experiment.test.digest}
    inputs["weights"] = weights_fingerprint(experiment.weights)
    about = {"c": c, "student": [cell.student, experiment.size]}
    key = Key(inputs, {"adapt": settings, "train": training}, about)

    def produce(out: Path) -> dict[str, Any]:
        from synthkit.learning.fit import Examples

        start = StartingStudent(experiment.student, False, None)
        task = AdaptationTask(start, Examples(photos, experiment.student.preprocessing), settings, training)
        predictions, selection, results = measure(task, experiment, c)
        write_json(out / _PREDICTIONS, predictions)
        strategy = selection.strategy
        return {
            "strategy": strategy.value,
            "steps": task.steps(strategy),
            "cross_validation": results,
        }

    done = run_stage(FunctionStage("photo-table", work / cell.name, key, produce))
    predictions = json.loads((done.out / _PREDICTIONS).read_text(encoding="utf-8"))
    last = {method: of_steps[max(of_steps, key=int)] for method, of_steps in predictions.items()}
    right = {method: round(top1(np.array(one), experiment.test.labels), 4) for method, one in last.items()}
    return {**asdict(cell), "top1": right, "seconds": done.manifest.seconds, **done.manifest.metrics}


def order(cells: Sequence[Cell]) -> list[Cell]:
    """Cells in the order of measurement: first 1, 4 and 16 photos per class of the first seed."""
    first = min(cell.seed for cell in cells)

    def late(cell: Cell) -> tuple[bool, int, int]:
        return cell.seed > first or cell.shots not in _FIRST_SHOTS, cell.seed, cell.shots

    return sorted(cells, key=late)


def limited(images: ImageSet, most: int) -> ImageSet:
    """Up to `most` images, chosen by the hash of their content."""
    by_hash = sorted(range(len(images)), key=lambda position: images.items[position].sha256)
    return images.subset(sorted(by_hash[:most]))


def added(files: Sequence[Path], asked: dict[str, Any]) -> list[dict[str, Any]]:
    """Cells of results that were written earlier or on another machine.

    Args:
        files: results of this program.
        asked: the settings that they must have been measured with.

    Raises:
        ConfigError: a file is not such a result, or its settings differ.
    """
    cells: list[dict[str, Any]] = []
    for file in files:
        try:
            result = json.loads(file.read_text(encoding="utf-8"))
            measured_with, of_file = result["settings"], result["cells"]
        except (ValueError, KeyError, TypeError):
            raise ConfigError(f"--add {file} is not a result of this program") from None
        for name, value in json.loads(json.dumps(asked)).items():
            if (found := measured_with.get(name)) != value:
                raise ConfigError(
                    f"--add {file} was measured with {name} = {found}, not {value}; leave it out"
                )
        cells += of_file
    return cells


def _write(out: Path, cells: Sequence[dict[str, Any]], asked: dict[str, Any]) -> str:
    """The result as JSON, a plot and Markdown, which is returned."""
    result = summary(cells, asked)
    write_json(out, result)
    write_bytes(out.with_suffix(".md"), (markdown(result) + "\n").encode())
    plot(result, out.with_suffix(".png"))
    return markdown(result)


def summary(cells: Cells, settings: Mapping[str, Any]) -> dict[str, Any]:
    """The table's statistics.

    Args:
        cells: with `set`, `student`, `shots`, `seed`, and `top1` of every method.
        settings: of the measurement.

    Returns:
        `rows` per set, student, shots and method; `overall` per student, shots and method; `paired`, each
        method against full fine-tuning; `adapt` (see `standing`); `cells`, `settings` and `versions`.
    """
    rows = [row for group in _groups(cells, "set", "student", "shots") for row in _rows(group)]
    return {
        "rows": rows,
        "overall": [
            row
            for of_student in _groups(cells, "student")
            for group in _groups(of_student, "shots")
            for row in _overall(group, len(_groups(of_student, "set")))
        ],
        "paired": paired(cells),
        "adapt": standing(rows),
        "cells": list(cells),
        "settings": dict(settings),
        "versions": versions(),
    }


def _groups(cells: Cells, *keys: str) -> list[Cells]:
    """The cells that agree in these fields, in the order of the fields."""
    names = sorted({tuple(cell[key] for key in keys) for cell in cells})
    return [[cell for cell in cells if tuple(cell[key] for key in keys) == name] for name in names]


def _top1(cells: Cells, method: str) -> np.ndarray:
    return np.array([cell["top1"][method] for cell in cells])


def _rows(cells: Cells) -> list[dict[str, Any]]:
    """Mean, sample deviation and Student's interval over the seeds of a set, a student, a number of shots."""
    about = {key: cells[0][key] for key in ("set", "student", "shots")}
    return [{**about, "method": method, **_spread(_top1(cells, method))} for method in cells[0]["top1"]]


def _overall(cells: Cells, sets: int) -> list[dict[str, Any]]:
    """Mean over the sets for one student and number of shots, and its spread over the seeds.

    Seeds that lack a set are left out.
    """
    seeds = [seed for seed in _groups(cells, "seed") if len(seed) == sets]
    if not seeds:
        return []
    about = {"student": cells[0]["student"], "shots": cells[0]["shots"], "sets": sets}
    return [
        {**about, "method": method, **_spread(np.array([_top1(seed, method).mean() for seed in seeds]))}
        for method in cells[0]["top1"]
    ]


def _spread(values: np.ndarray) -> dict[str, Any]:
    return {**mean_and_std("top1", values), "top1_interval": mean_interval(values), "seeds": len(values)}


def paired(cells: Cells) -> list[dict[str, Any]]:
    """Each method against full fine-tuning on the same photos, one value per set and seed.

    Splits that have not been measured with every student are left out.

    Returns:
        Rows with `method`, `shots`, `baseline`, the fields of the paired t-test, and `p_holm`, its p-value
        corrected for all tests of the table.
    """
    students, first = len(_groups(cells, "student")), FIXED[0]
    found: list[dict[str, Any]] = []
    for of_shots in _groups(cells, "shots"):
        splits = [split for split in _groups(of_shots, "set", "seed") if len(split) == students]
        for method in of_shots[0]["top1"] if splits else ():
            if method == first:
                continue
            ours, theirs = (
                np.array([_top1(split, name).mean() for split in splits]) for name in (method, first)
            )
            about = {"method": method, "shots": of_shots[0]["shots"], "baseline": first}
            found.append({**about, **paired_test(ours, theirs)})
    corrected = holm([row["p_value"] for row in found])
    return [{**row, "p_holm": p} for row, p in zip(found, corrected, strict=True)]


def standing(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """`adapt` beside the best and the worst fixed method of each set, student and number of shots.

    Only where several seeds give a deviation.

    Returns:
        `cells` that were compared; `within`, the number of them in which `adapt` is within one standard
        deviation of the best fixed method (that method's own over the seeds); `to_best` and `to_worst`, mean
        differences; `best`, how often each fixed method is the best; `best_fixed`, the number that `within`
        would be with each fixed method in the place of `adapt`.
    """
    tables = [group for group in _groups(rows, "set", "student", "shots") if group[0]["seeds"] > 1]
    if not tables:
        return {"cells": 0}
    scores = [{row["method"]: row for row in group} for group in tables]
    best = [max((table[name] for name in FIXED), key=_mean) for table in scores]
    worst = [min((table[name] for name in FIXED), key=_mean) for table in scores]
    close = {
        name: sum(
            _mean(table[name]) >= _mean(top) - top["top1_std"]
            for table, top in zip(scores, best, strict=True)
        )
        for name in (ADAPT, *FIXED)
    }
    return {
        "cells": len(tables),
        "within": close[ADAPT],
        "to_best": _mean_difference(scores, best),
        "to_worst": _mean_difference(scores, worst),
        "best": dict(Counter(str(row["method"]) for row in best)),
        "best_fixed": {name: close[name] for name in FIXED},
    }


def _mean(row: Mapping[str, Any]) -> float:
    return float(row["top1_mean"])


def _mean_difference(
    scores: Sequence[Mapping[str, Mapping[str, Any]]], others: Sequence[Mapping[str, Any]]
) -> float:
    found = (_mean(table[ADAPT]) - _mean(row) for table, row in zip(scores, others, strict=True))
    return round(statistics.fmean(found), 4)


def markdown(result: Mapping[str, Any]) -> str:
    """Means over the sets as Markdown, a table per student, and the standing of `adapt`."""
    lines: list[str] = []
    for student in dict.fromkeys(row["student"] for row in result["overall"]):
        of_student = [row for row in result["overall"] if row["student"] == student]
        lines += ["", f"{student}, mean over {of_student[0]['sets']} sets ± deviation over the seeds", ""]
        lines += accuracy_table(of_student)
    title = (
        f"Ahead of full fine-tuning, in points; paired t-tests, Holm's p over all {len(result['paired'])}:"
    )
    lines += ["", title, ""]
    lines += [difference_line(row) for row in result["paired"]]
    if result["adapt"]["cells"]:
        lines += ["", _sentence(result["adapt"])]
    return "\n".join(lines).strip()


def plot(result: Mapping[str, Any], path: Path) -> None:
    """Plot top-1 over shots, a panel per student; writes nothing without results on every set."""
    from matplotlib.figure import Figure

    students = list(dict.fromkeys(row["student"] for row in result["overall"]))
    if not students:
        return
    figure = Figure(figsize=(2 + 4.5 * len(students), 4), layout="constrained")
    panels = figure.subplots(1, len(students), sharey=True, squeeze=False)[0]
    for axes, student in zip(panels, students, strict=True):
        plot_over_shots(axes, [row for row in result["overall"] if row["student"] == student])
        axes.set_title(student)
    panels[0].set_ylabel("top-1, mean over the sets")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right upper")
    figure.savefig(path, dpi=100)


def _sentence(found: Mapping[str, Any]) -> str:
    best = ", ".join(f"{name} {count}" for name, count in found["best"].items())
    return (
        f"`adapt` is within one standard deviation of the best fixed method in {found['within']} of "
        f"{found['cells']} cells, {100 * found['to_best']:+.1f} points from it on average and "
        f"{100 * found['to_worst']:+.1f} from the worst. Best were: {best}."
    )


def _pairs(_context: click.Context, _option: click.Parameter, texts: Sequence[str]) -> dict[str, str]:
    found = dict(text.partition("=")[::2] for text in texts)
    if not all(name and value for name, value in found.items()):
        raise click.BadParameter("must be NAME=..., for example scenes=./pool:./test")
    return found


def _experiments(
    sets: dict[str, str], weights: dict[str, str], size: int, most: int
) -> Iterator[tuple[tuple[str, str], Experiment]]:
    for name, folders in sets.items():
        pool_dir, _, test_dir = folders.partition(":")
        pool, test = ImageSet.scan(Path(pool_dir)), ImageSet.scan(Path(test_dir))
        check_disjoint(pool, test, (pool_dir, test_dir))
        test = limited(test.with_classes(pool.classes), most)
        for student, folder in weights.items():
            yield (name, student), Experiment(pool, test, student, Path(folder), size)


@click.command(cls=OneLineErrors)
@click.option("--set", "sets", multiple=True, required=True, callback=_pairs, help="NAME=POOL:TEST folders.")
@click.option("--weights", multiple=True, required=True, callback=_pairs, help="TIMM_NAME=weights.")
@click.option("--shots", multiple=True, type=int, default=(1, 2, 4, 8, 16), show_default=True)
@click.option("--seeds", default=3, show_default=True, help="Splits per number of shots.")
@click.option("--size", default=96, show_default=True, help="Input side of the students in pixels.")
@click.option("--test-images", default=300, show_default=True, help="Most test images of a set.")
@click.option("--adapt-steps", type=int, help="Of `adapt`.  [default: its own]")
@click.option("--full-steps", default=30, show_default=True, help="Gradient steps over all layers.")
@click.option("--full-lr", default=0.0005, show_default=True, help="Peak learning rate of all layers.")
@click.option("--c", default=100.0, show_default=True, help="scikit-learn's C.")
@click.option(
    "--add",
    multiple=True,
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Result of the same settings, whose cells are not measured again.",
)
@click.option("--work", type=click.Path(path_type=Path), required=True, help="Folder of the cells.")
@click.option(
    "--out", type=click.Path(path_type=Path), required=True, help="JSON file; Markdown and a plot beside it."
)
def main(
    sets: dict[str, str],
    weights: dict[str, str],
    shots: Sequence[int],
    seeds: int,
    size: int,
    test_images: int,
    adapt_steps: int | None,
    full_steps: int,
    full_lr: float,
    c: float,
    add: Sequence[Path],
    work: Path,
    out: Path,
) -> None:
    """Measure every method on every split of every set with every student."""
    experiments = dict(_experiments(sets, weights, size, test_images))
    cells = [Cell(*pair, count, seed) for seed in range(seeds) for count in shots for pair in experiments]
    for cell in cells:
        k_shot(experiments[cell.set, cell.student].pool, cell.shots, cell.seed)  # refused before any work
    settings = AdaptSettings(adapt_steps=adapt_steps)
    training = TrainSettings(lr=full_lr, real_steps=full_steps)
    asked = {"size": size, "c": c, "adapt": asdict(settings), "full": {"steps": full_steps, "lr": full_lr}}
    asked["n_test"] = {name: len(experiment.test) for (name, _), experiment in experiments.items()}
    measured = added(add, asked)
    known = {Cell(*(one[field.name] for field in fields(Cell))) for one in measured}
    text = _write(out, measured, asked)
    for cell in tqdm([one for one in order(cells) if one not in known], unit="cell"):
        experiment = experiments[cell.set, cell.student]
        measured.append(run_cell(experiment, cell, settings, training, c, work))
        text = _write(out, measured, asked)
    click.echo(text)


if __name__ == "__main__":
    main()
