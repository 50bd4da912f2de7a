"""Distance of synthetic sets from real photos, beside the top-1 of the students trained on them.

    python -m benchmarks.style_sets WORKSPACE --test-dir DIR --weights FILE --architecture TIMM_NAME

WORKSPACE is that of `synthkit compare`. All sets are measured on the features of one network that has learned
from none of them, against real photos held out from every split.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import numpy as np

from synthkit.artifacts import versions, write_json
from synthkit.data.images import ImageSet
from synthkit.errors import DataError
from synthkit.metrics.classification import mean_and_std
from synthkit.metrics.distributions import density_and_coverage, frechet_distance
from synthkit.one_line import OneLineErrors
from synthkit.recipes.studies.methods import METHODS, SYNTHETIC_ONLY, VARIANTS

if TYPE_CHECKING:
    from synthkit.learning.students import Student

_MEASURES = ("top1", "frechet", "coverage", "density")
#: A photo and its five neighbours.
_FEWEST = 6


def set_folders(workspace: Path) -> dict[str, Path]:
    """Method that learns from synthetic images alone -> its set, of those in a split's workspace."""
    folders = {name: variant.folder + "/synthetic" for name, variant in VARIANTS.items()}
    folders[SYNTHETIC_ONLY] = "synthetic"
    return {
        name: workspace / folders[name]
        for name in METHODS
        if name in folders and (workspace / folders[name]).is_dir()
    }


def measure_set(
    student: Student, synthetic: ImageSet, real: np.ndarray, labels: np.ndarray
) -> dict[str, float]:
    """Fréchet distance of whole sets; density and coverage as means over the classes.

    Args:
        student: the network.
        synthetic: the set.
        real: features of the real photos, float32 [N, D].
        labels: class indices of the real photos [N].
    """
    if (fewest := int(np.bincount(labels).min())) < _FEWEST:
        raise DataError(
            f"a class has {fewest} real photos to compare with; density and coverage need {_FEWEST} of each"
        )
    features = student.features(synthetic.load(student.preprocessing))
    of_classes = [
        density_and_coverage(real[labels == label], features[synthetic.labels == label])
        for label in range(len(synthetic.classes))
    ]
    density, coverage = np.mean(of_classes, axis=0)
    return {
        "frechet": frechet_distance(real, features),
        "coverage": float(coverage),
        "density": float(density),
    }


def measure_sets(
    student: Student, workspace: Path, compared: Mapping[str, Any], test: ImageSet
) -> list[dict[str, Any]]:
    """A row for each number of shots and method: mean and sample deviation of each measure over the seeds.

    Args:
        student: the network whose features are used.
        workspace: of `synthkit compare`.
        compared: its compare.json.
        test: the real photos.
    """
    test = test.with_classes(tuple(compared["classes"]))
    real = student.features(test.load(student.preprocessing))
    found: dict[tuple[int, str], list[dict[str, float]]] = {}
    for split in compared["splits"]:
        folders = set_folders(workspace / f"{split['shots']}-shot-{split['seed']}")
        for method in folders.keys() & split["top1"].keys():
            synthetic = ImageSet.scan(folders[method])
            measured = {"top1": split["top1"][method], **measure_set(student, synthetic, real, test.labels)}
            found.setdefault((split["shots"], method), []).append(measured)
    order = list(METHODS)
    keys = sorted(found, key=lambda key: (key[0], order.index(key[1])))
    return [{"shots": shots, "method": method, **_row(found[shots, method])} for shots, method in keys]


def _row(seeds: Sequence[Mapping[str, float]]) -> dict[str, Any]:
    row: dict[str, Any] = {"seeds": len(seeds)}
    for name in _MEASURES:
        row |= mean_and_std(name, [measured[name] for measured in seeds])
    return row


def markdown(table: Sequence[Mapping[str, Any]]) -> str:
    """The table as Markdown."""
    lines = [
        "| photos per class | images from | top-1 | Fréchet | coverage | density |",
        "|---:|---|---:|---:|---:|---:|",
    ]
    for row in table:
        title = METHODS[row["method"]].title.removeprefix("synthetic only, ")
        cells = [f"{row[f'{name}_mean']:.3f} ± {row[f'{name}_std']:.3f}" for name in _MEASURES]
        lines.append(f"| {row['shots']} | {title} | {' | '.join(cells)} |")
    return "\n".join(lines)


@click.command(cls=OneLineErrors)
@click.argument("workspace", type=click.Path(path_type=Path))
@click.option(
    "--test-dir", type=click.Path(path_type=Path), required=True, help="Real photos to compare with."
)
@click.option("--weights", type=click.Path(path_type=Path), required=True, help="Weights of the network.")
@click.option("--architecture", required=True, help="timm name of the network.")
@click.option(
    "--image-size", type=click.IntRange(16), default=96, show_default=True, help="Its input, pixels."
)
def main(workspace: Path, test_dir: Path, weights: Path, architecture: str, image_size: int) -> None:
    """Measure the sets of WORKSPACE, print the table, write style_sets.json there."""
    from synthkit.learning.students import new_student

    path = workspace / "compare.json"
    if not path.is_file():
        raise DataError(f"no {path}; make it with `synthkit --workspace {workspace} compare`")
    compared = json.loads(path.read_text(encoding="utf-8"))
    student = new_student(architecture, compared["classes"], weights=weights, image_size=image_size)
    table = measure_sets(student, workspace, compared, ImageSet.scan(test_dir))
    features = {"architecture": architecture, "image_size": image_size}
    result = {"rows": table, "features": features, "n_test": compared["n_test"], "versions": versions()}
    write_json(workspace / "style_sets.json", result)
    click.echo(markdown(table))


if __name__ == "__main__":
    main()
