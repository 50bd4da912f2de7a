"""`compare`: methods x shots x seeds on one data set, each split a chain in a workspace of its own.

    real-dir ──k photos per class──► split ──chain, few-shot only──► predictions on test-dir ──► table

With one seed a split of more shots contains those of fewer, and all methods see the same photos, for as many
gradient steps as `synthkit.recipes.studies.methods` says. A finished split is skipped; an interrupted one is
continued.
"""

from __future__ import annotations

import contextlib
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

from synthkit.artifacts import FunctionStage, Key, digest, run_stage, versions, write_json
from synthkit.data.images import ImageSet
from synthkit.data.splits import check_disjoint, k_shot
from synthkit.metrics import classification as metrics
from synthkit.models.generator import model_fingerprint, resolve_model
from synthkit.progress import progress_bar
from synthkit.recipes.build_engines import BuildEngines
from synthkit.recipes.chain import ChainSettings, Workspace
from synthkit.recipes.studies.methods import ADAPTED, METHODS, Run, predict
from synthkit.recipes.train import BRIDGED, weights_fingerprint

_PREDICTIONS = "predictions.json"


@dataclass(frozen=True)
class Split:
    """The photos of one seed.

    Attributes:
        shots: photos per class.
        seed: of the photos, and of every stage.
    """

    shots: int
    seed: int


@dataclass(frozen=True)
class Predictions:
    """What the methods predict after learning one split.

    Attributes:
        split: the split.
        strategy: the fine-tuning strategy that `adapt` chose; None if the adapted bundle is not compared.
        classes: method -> predicted class index of every test image.
    """

    split: Split
    strategy: str | None
    classes: dict[str, list[int]]


@dataclass(frozen=True)
class ComparisonRow:
    """One method at one number of shots.

    Attributes:
        method: a key of `METHODS`.
        shots: photos per class.
        top1_mean: mean over the seeds, 0 to 1.
        top1_std: sample standard deviation (n - 1); 0 for one seed.
        top1_interval: 95 % confidence interval of the mean (Student's t); None for one seed.
        seeds: number of splits.
    """

    method: str
    shots: int
    top1_mean: float
    top1_std: float
    top1_interval: list[float] | None
    seeds: int


@dataclass(frozen=True)
class PairedRow:
    """One method against the first one of the table on the same splits.

    Attributes:
        method: a key of `METHODS`.
        shots: photos per class.
        baseline: the method that it is compared with.
        difference: mean difference of top-1.
        p_value: of the two-sided paired t-test, one value per seed; None where no test can be made.
        p_holm: the same corrected for all tests of the comparison (Holm 1979).
        pairs: number of seeds.
    """

    method: str
    shots: int
    baseline: str
    difference: float
    p_value: float | None
    p_holm: float | None
    pairs: int


@dataclass(frozen=True)
class SplitResult:
    """All methods on one split.

    Attributes:
        shots: photos per class.
        seed: of the split.
        strategy: the fine-tuning strategy that `adapt` chose, if it ran.
        top1: method -> top-1.
        confusion: method -> counts with a row per true class and a column per predicted class.
    """

    shots: int
    seed: int
    strategy: str | None
    top1: dict[str, float]
    confusion: dict[str, list[list[int]]]


@dataclass(frozen=True)
class Comparison:
    """A table of methods and what it is made of.

    Attributes:
        rows: one per number of shots and method.
        paired: every method but the first against the first.
        n_tests: paired tests that could be made, for which `p_holm` is corrected.
        splits: the results that the rows are means of.
        classes: class names in the order of the confusion matrices.
        n_test: real test images.
        settings: of the chain.
        versions: package -> version.
    """

    rows: list[ComparisonRow]
    paired: list[PairedRow]
    n_tests: int
    splits: list[SplitResult]
    classes: list[str]
    n_test: int
    settings: ChainSettings
    versions: dict[str, str]

    def to_json(self) -> dict[str, Any]:
        """Plain data for a JSON file."""
        return asdict(self)


def predict_with_methods(run: Run, test: ImageSet, methods: Sequence[str]) -> dict[str, np.ndarray]:
    """Train every method on the photos of a run, and classify the test images.

    Args:
        run: the photos and their workspace.
        test: real test images, used here only, and only to measure.
        methods: which of `METHODS`.

    Returns:
        Method -> predicted class index of every test image, in the order of the tables.
    """
    return {name: predict(METHODS[name].make(run), test) for name in METHODS if name in methods}


def with_seed(settings: ChainSettings, seed: int) -> ChainSettings:
    """The same settings with one seed for every stage; the chain's training method is bridged++."""
    return replace(
        settings,
        style=replace(settings.style, seed=seed),
        generate=replace(settings.generate, seed=seed),
        train=replace(settings.train, seed=seed, method=BRIDGED),
        adapt=replace(settings.adapt, seed=seed),
    )


def split_run(
    settings: ChainSettings, root: Path, photos: ImageSet, split: Split, test: ImageSet | None = None
) -> Run:
    """The run of a split: its seed in every stage, its workspace below `root`."""
    workspace = Workspace(root / f"{split.shots}-shot-{split.seed}", shared_engines=Workspace(root).engines)
    return Run(with_seed(settings, split.seed), workspace, photos, test=test)


def run_split(
    settings: ChainSettings,
    root: Path,
    pool: ImageSet,
    test: ImageSet,
    methods: Sequence[str],
    split: Split,
) -> Predictions:
    """Train and measure every method on a split, or find that done.

    Args:
        settings: of the chain; the split's seed takes the place of theirs.
        root: holds the splits' workspaces.
        pool: real photos to take the few shots from.
        test: real test images.
        methods: which of `METHODS`.
        split: which photos.
    """
    photos = pool.subset(k_shot(pool, split.shots, split.seed))
    run = split_run(settings, root, photos, split, test)
    model = resolve_model(settings.engines.model)
    inputs = {"photos": photos.digest, "test": test.digest, "model": model_fingerprint(model)}
    inputs["words"] = digest(run.chain.generate.words)
    if settings.train.weights:
        inputs["weights"] = weights_fingerprint(Path(settings.train.weights))
    key = Key(inputs, run.settings.sections(), {"methods": list(methods)})

    def measure(work: Path) -> dict[str, Any]:
        predicted = predict_with_methods(run, test, methods)
        write_json(work / _PREDICTIONS, {method: classes.tolist() for method, classes in predicted.items()})
        return {"strategy": run.strategy() if ADAPTED in methods else None}

    done = run_stage(FunctionStage("compare", run.workspace.root / "scores", key, measure))
    classes = json.loads((done.out / _PREDICTIONS).read_text(encoding="utf-8"))
    return Predictions(split, done.manifest.metrics["strategy"], classes)


def compare(
    settings: ChainSettings,
    root: Path,
    pool: ImageSet,
    test: ImageSet,
    methods: Sequence[str],
    splits: Sequence[Split],
    jobs: int = 1,
) -> Comparison:
    """Measure all methods on all splits.

    Args:
        settings: of the chain.
        root: the workspace.
        pool: real photos to take the few shots from.
        test: real test images, of the same classes.
        methods: which of `METHODS`.
        splits: numbers of shots and seeds.
        jobs: processes, each with its share of the processor's cores.

    Raises:
        DataError: the test folder shares an image with the pool, or a class has too few photos.
    """
    check_disjoint(pool, test, (str(pool.root), str(test.root)))
    # Splits that the pool is too small for are refused before any work.
    for split in splits:
        k_shot(pool, split.shots, split.seed)
    test = test.with_classes(pool.classes)
    # Once, for all splits.
    run_stage(BuildEngines(settings.engines, Workspace(root).engines))
    one_split = functools.partial(run_split, settings, root, pool, test, methods)
    predictions = sorted(
        _run_all(one_split, splits, jobs), key=lambda done: (done.split.shots, done.split.seed)
    )
    paired = paired_rows(predictions, test.labels)
    return Comparison(
        rows=comparison_rows(predictions, test.labels),
        paired=paired,
        n_tests=sum(row.p_value is not None for row in paired),
        splits=[_split_result(done, test) for done in predictions],
        classes=list(test.classes),
        n_test=len(test),
        settings=settings,
        versions=versions(),
    )


def _run_all(
    one_split: Callable[[Split], Predictions], splits: Sequence[Split], jobs: int
) -> Iterator[Predictions]:
    """Run every split, in this process or in several."""
    if jobs == 1:
        yield from (one_split(split) for split in splits)
        return
    threads = max(1, (os.cpu_count() or 1) // jobs)
    with (
        progress_bar(len(splits), "compare") as bar,  # before the children's bars are silenced
        _environment({"OMP_NUM_THREADS": str(threads), "TQDM_DISABLE": "1"}),
        ProcessPoolExecutor(jobs, get_context("spawn")) as processes,
    ):
        tasks = [processes.submit(one_split, split) for split in splits]
        try:
            for task in as_completed(tasks):
                yield task.result()
                bar.update()
        finally:
            # After an error the splits that have not begun would take hours.
            processes.shutdown(cancel_futures=True)


@contextlib.contextmanager
def _environment(variables: Mapping[str, str]) -> Iterator[None]:
    """Set environment variables for the child processes that are started meanwhile."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def comparison_rows(predictions: Sequence[Predictions], labels: np.ndarray) -> list[ComparisonRow]:
    """The table: one row per number of shots and method.

    Args:
        predictions: of every split.
        labels: true class indices of the test images.
    """
    return [
        ComparisonRow(
            method,
            shots,
            **metrics.mean_and_std("top1", values),
            top1_interval=metrics.mean_interval(values),
            seeds=len(values),
        )
        for shots in _shots(predictions)
        for method in _methods(predictions)
        for values in [_top1_by_seed(predictions, shots, method, labels)]
    ]


def paired_rows(predictions: Sequence[Predictions], labels: np.ndarray) -> list[PairedRow]:
    """Every method against the first one of the table on the same splits, one value per seed."""
    baseline, *others = _methods(predictions)
    tests: list[dict[str, Any]] = [
        {
            "method": method,
            "shots": shots,
            "baseline": baseline,
            **metrics.paired_test(
                _top1_by_seed(predictions, shots, method, labels),
                _top1_by_seed(predictions, shots, baseline, labels),
            ),
        }
        for shots in _shots(predictions)
        for method in others
    ]
    corrected = metrics.holm([test["p_value"] for test in tests])
    return [PairedRow(**test, p_holm=p) for test, p in zip(tests, corrected, strict=True)]


def _shots(predictions: Sequence[Predictions]) -> list[int]:
    return sorted({done.split.shots for done in predictions})


def _methods(predictions: Sequence[Predictions]) -> list[str]:
    """The methods that were measured, in the order of the tables."""
    return [method for method in METHODS if method in predictions[0].classes]


def _top1_by_seed(
    predictions: Sequence[Predictions], shots: int, method: str, labels: np.ndarray
) -> np.ndarray:
    """Top-1 of a method on every split of a number of shots, in the order of the seeds."""
    chosen = [done for done in predictions if done.split.shots == shots]
    chosen.sort(key=lambda done: done.split.seed)
    return np.array([metrics.top1(np.array(done.classes[method]), labels) for done in chosen])


def _split_result(predictions: Predictions, test: ImageSet) -> SplitResult:
    classes = {method: np.array(predicted) for method, predicted in predictions.classes.items()}
    return SplitResult(
        predictions.split.shots,
        predictions.split.seed,
        predictions.strategy,
        {name: round(metrics.top1(predicted, test.labels), 4) for name, predicted in classes.items()},
        {
            name: metrics.confusion(predicted, test.labels, len(test.classes)).tolist()
            for name, predicted in classes.items()
        },
    )


def comparison_markdown(rows: Sequence[ComparisonRow], paired: Sequence[PairedRow]) -> str:
    """The table as Markdown, and the difference of each method to the first."""
    lines = accuracy_table([vars(row) for row in rows])
    if paired:
        tests = sum(row.p_value is not None for row in paired)
        title = (
            f"Difference to {paired[0].baseline} on the same splits, in points; "
            f"{tests} paired t-tests over the seeds, Holm's p is corrected for all of them:"
        )
        lines += ["", title, "", *(difference_line(vars(row)) for row in paired)]
    return "\n".join(lines)


def difference_line(row: Mapping[str, Any]) -> str:
    """A row of paired tests as an item of a Markdown list: the fields of `PairedRow`."""
    line = f"- {row['method']}, {row['shots']} per class: {100 * row['difference']:+.1f}"
    if (p := row["p_value"]) is None:
        return line
    p_value = "p < 0.001" if p < 0.001 else f"p = {p:.3f}"
    return f"{line} ({p_value}, Holm {row['p_holm']:.3f}, {row['pairs']} pairs)"


def accuracy_table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Lines of Markdown, one per number of shots with a column per method: the fields of `ComparisonRow`."""
    table = {(row["shots"], row["method"]): row for row in rows}
    methods = list(dict.fromkeys(row["method"] for row in rows))
    lines = [f"| photos per class | {' | '.join(methods)} |", "|---:" * (1 + len(methods)) + "|"]
    for shots in sorted({shots for shots, _ in table}):
        cells = [_mean_and_std(table[shots, method]) for method in methods]
        lines.append(f"| {shots} | {' | '.join(cells)} |")
    return lines


def _mean_and_std(row: Mapping[str, Any]) -> str:
    return f"{row['top1_mean']:.3f}" + (f" ± {row['top1_std']:.3f}" if row["seeds"] > 1 else "")


def plot_comparison(rows: Sequence[ComparisonRow], path: Path) -> None:
    """Top-1 over shots, one line per method, with the standard deviation over the seeds as error bars."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4), layout="constrained")
    axes = figure.subplots()
    plot_over_shots(axes, [{**vars(row), "method": METHODS[row.method].title} for row in rows])
    axes.set_ylabel("top-1 on real test images")
    # Beside the lines: ten methods would hide them.
    figure.legend(loc="outside right upper")
    figure.savefig(path, dpi=100)


def plot_over_shots(axes: Any, rows: Sequence[Mapping[str, Any]]) -> None:
    """Plot a line per method, with standard deviations as error bars: the fields of `ComparisonRow`."""
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
