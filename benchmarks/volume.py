"""Top-1 of a student over the number of synthetic images per class.

    python -m benchmarks.volume WORKSPACE --real-dir DIR --test-dir DIR --shots 4

    photos -> style -> the largest set, once -> its first n of each class -> student -> top-1

Image i of a class does not depend on the number of images, so that the smaller sets lie within the larger
ones. Every student gets the same number of gradient steps, up to a part of an epoch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import click
import numpy as np

from synthkit.artifacts import run_stage, versions, write_json
from synthkit.data.images import ImageSet
from synthkit.data.splits import check_disjoint, k_shot
from synthkit.metrics import classification as metrics
from synthkit.one_line import OneLineErrors
from synthkit.recipes.chain import ChainSettings
from synthkit.recipes.studies.compare import Split, split_run
from synthkit.recipes.studies.methods import Run, predict
from synthkit.recipes.train import Train, TrainingData, synthetic_steps

#: Epochs over the largest set; smaller ones are repeated more often.
_LARGEST_EPOCHS = 3


def first_of_each(images: ImageSet, count: int) -> ImageSet:
    """The first images of every class, in the order of their names."""
    names = np.array([item.path.name for item in images.items])
    members = [np.flatnonzero(images.labels == label) for label in range(len(images.classes))]
    return images.subset(np.concatenate([one[np.argsort(names[one])[:count]] for one in members]))


def top1_over_volume(run: Run, test: ImageSet, volumes: Sequence[int]) -> dict[int, float]:
    """Images per class -> top-1 of the student that learned from them.

    Args:
        run: the photos, whose style the images have.
        test: real test images of the same classes.
        volumes: images per class.
    """
    usual, folder = run.chain.generate, run.workspace.root / "volume"
    run.run_until("learn-style")
    largest = replace(usual.settings, per_class=max(volumes))
    generated = run_stage(replace(usual, settings=largest, out=folder / "synthetic"))
    everything = ImageSet.scan(generated.out)
    training = replace(run.settings.train, epochs=_LARGEST_EPOCHS)
    steps = synthetic_steps(training, TrainingData(everything, None))
    found = {}
    for volume in volumes:
        images = first_of_each(everything, volume)
        epoch = synthetic_steps(replace(run.settings.train, epochs=1), TrainingData(images, None))
        settings = replace(run.settings.train, epochs=round(steps / epoch))
        student = run_stage(Train(settings, folder / f"student-{volume}", images)).out
        found[volume] = metrics.top1(predict(student, test), test.labels)
    return found


def rows(seeds: Sequence[dict[int, float]]) -> list[dict[str, Any]]:
    """A row per volume: per_class, top1_mean, top1_std (of a sample; 0 for one seed), seeds."""
    return [
        {
            "per_class": volume,
            **metrics.mean_and_std("top1", values),
            "seeds": len(values),
        }
        for volume in seeds[0]
        for values in [[top1[volume] for top1 in seeds]]
    ]


def markdown(table: Sequence[dict[str, Any]]) -> str:
    """The table as Markdown."""
    lines = ["| images per class | top-1 |", "|---:|---:|"]
    lines += [f"| {row['per_class']} | {row['top1_mean']:.3f} ± {row['top1_std']:.3f} |" for row in table]
    return "\n".join(lines)


def plot(table: Sequence[dict[str, Any]], path: Path) -> None:
    """Top-1 over images per class, with the standard deviation over the seeds as error bars."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    volumes, means, deviations = (
        [row[key] for row in table] for key in ("per_class", "top1_mean", "top1_std")
    )
    axes.errorbar(volumes, means, deviations, marker="o", capsize=3)
    axes.set_xscale("log")
    axes.set_xticks(volumes, [str(volume) for volume in volumes], minor=False)
    axes.minorticks_off()
    axes.set(xlabel="synthetic images per class", ylabel="top-1 on real test images")
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=100)


@click.command(cls=OneLineErrors)
@click.argument("workspace", type=click.Path(path_type=Path))
@click.option("--real-dir", type=click.Path(path_type=Path), required=True, help="Photos to choose from.")
@click.option("--test-dir", type=click.Path(path_type=Path), required=True, help="Real test images.")
@click.option("--shots", type=click.IntRange(1), default=4, show_default=True, help="Photos per class.")
@click.option("--seeds", type=click.IntRange(1), default=3, show_default=True, help="Splits of the photos.")
@click.option(
    "--volume",
    "volumes",
    type=click.IntRange(1),
    multiple=True,
    default=(50, 100, 250, 500, 1000),
    show_default=True,
    help="Synthetic images per class; once for each volume.",
)
def main(
    workspace: Path, real_dir: Path, test_dir: Path, shots: int, seeds: int, volumes: tuple[int, ...]
) -> None:
    """Measure, print the table, write volume.json and volume.png into WORKSPACE."""
    settings = ChainSettings()
    pool = ImageSet.scan(real_dir)
    test = ImageSet.scan(test_dir).with_classes(pool.classes)
    check_disjoint(pool, test, (str(real_dir), str(test_dir)))
    measured: list[dict[int, float]] = []
    for seed in range(seeds):
        photos = pool.subset(k_shot(pool, shots, seed))
        run = split_run(settings, workspace, photos, Split(shots, seed))
        measured.append(top1_over_volume(run, test, volumes))
        table = rows(measured)
        result = {"rows": table, "seeds": measured, "shots": shots, "n_test": len(test)}
        described = {**result, "settings": asdict(settings), "versions": versions()}
        # After every seed: the next one takes minutes.
        write_json(workspace / "volume.json", described)
        plot(table, workspace / "volume.png")
    click.echo(markdown(rows(measured)))


if __name__ == "__main__":
    main()
