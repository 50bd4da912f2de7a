"""Few photos, no generator: which way of learning wins where, `python -m benchmarks.photo_table`

    pool ──k photos per class──► cell ─┬─ all layers ("full")
    (set, student, shots, seed)        ├─ the last 1, 2, 4 units; the last 4 from class means
                                       ├─ class means alone, logistic regression on frozen features
                                       └─ `adapt`: one of these paths, by cross-validation on the k photos

Every method gets the same photos; at one seed a draw of more photos contains the smaller ones. Test images
only measure. A cell that is done is skipped, and the result is written anew after each; cells of another
machine join the table with `--add`. Students run at a small input size, and at most so many test images
count, chosen by their content's hash.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import numpy as np
from tqdm import tqdm

from benchmarks.photo_summary import ADAPT, markdown, plot, summary
from synthkit.artifacts import Request, run_stage, write_bytes, write_json
from synthkit.data.images import ImageSet
from synthkit.data.splits import check_disjoint, k_shot
from synthkit.errors import ConfigError
from synthkit.metrics.classification import top1
from synthkit.one_line import OneLineErrors
from synthkit.recipes.adaptation.selection import Choice, choose_path
from synthkit.recipes.adaptation.strategies import FULL, LAST, Site, Start, course, follow, seen_by_last
from synthkit.recipes.settings import AdaptSettings, TrainSettings
from synthkit.recipes.train import weights_fingerprint

if TYPE_CHECKING:
    from synthkit.learning.feature_cache import Views
    from synthkit.learning.fit import Examples
    from synthkit.learning.students import Student

log = logging.getLogger(__name__)

MEANS, LAST_MEANS, LOGISTIC = "means", "last-4 means", "logistic"
_PREDICTIONS = "predictions.json"
_FIRST_SHOTS = (1, 4, 16)  # of the first seed, measured before all else

Answers = dict[str, dict[int, list[int]]]  # method -> gradient steps -> class index of every test image


@dataclass(frozen=True)
class Subject:
    """A set and a student, which share what the frozen layers say of the test images.

    Attributes:
        pool: real photos to draw from.
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
    def seen(self) -> dict[int, Views]:
        """Units -> the test images as the last so many units see them."""
        return seen_by_last(self.student, self.examples, [path.units or 0 for path in LAST], views=0, seed=0)


@dataclass(frozen=True)
class Cell:
    """One draw of photos: the set's name, the student's, photos per class and the seed."""

    set: str
    student: str
    shots: int
    seed: int

    @property
    def name(self) -> str:
        """Of its folder."""
        return f"{self.set}-{self.student}-{self.shots}-shot-{self.seed}"


def trained(path: Any, site: Site, subject: Subject) -> dict[int, list[int]]:
    """Train along a path on all photos; steps -> answers on the test images, before the first, at the end."""
    begun, found = course(path, site), {}
    lesson = subject.examples if path is FULL else subject.seen[path.units]

    def look(steps: int) -> None:
        found[steps] = lesson.logits(begun.trained, np.arange(len(lesson))).argmax(1).tolist()

    follow(path, site, begun, look=look)
    return found


def logistic(site: Site, subject: Subject, c: float) -> list[int]:
    """scikit-learn's logistic regression on what enters the head, of the photos as they are.

    Features are divided by their root mean square norm, so that C means the same for every student.
    """
    from sklearn.linear_model import LogisticRegression

    photos, test = (views[1].clean[0].flatten(1).numpy() for views in (site.seen, subject.seen))
    scale = float(np.sqrt((photos**2).sum(axis=1).mean()))
    fitted = LogisticRegression(C=c, max_iter=5000).fit(photos / scale, site.labels)
    return [int(one) for one in fitted.predict(test / scale)]


def measure(site: Site, subject: Subject, c: float) -> tuple[Answers, Choice, list[dict[str, Any]]]:
    """Every method on one draw: answers, `adapt`'s choice, and what cross-validation said of each path."""
    choice = choose_path(site)
    zero, means = (replace(site, settings=replace(site.settings, head=head)) for head in ("keep", "means"))
    answers = {path.name: trained(path, zero, subject) for path in LAST}
    answers[LAST_MEANS] = trained(LAST[-1], means, subject)
    answers[MEANS] = {0: answers[LAST_MEANS][0]}
    answers[LOGISTIC] = {0: logistic(site, subject, c)}
    answers[FULL.name] = trained(FULL, site, subject)
    taken = answers[LAST_MEANS if site.head == "means" else choice.path.name]
    steps = site.steps(choice.path)
    answers[ADAPT] = {steps: taken[steps]}
    return answers, choice, [one.figures() for one in choice.verdicts]


def run_cell(
    subject: Subject, cell: Cell, settings: AdaptSettings, training: TrainSettings, c: float, work: Path
) -> dict[str, Any]:
    """Measure a cell, or find it measured.

    Returns:
        The cell, every method's `top1` after all its steps, `adapt`'s `path` and `steps`, `cross_validation`
        and `seconds`.
    """
    photos = subject.pool.subset(k_shot(subject.pool, cell.shots, cell.seed))
    settings, training = replace(settings, seed=cell.seed), replace(training, seed=cell.seed)
    inputs = {"photos": photos.digest, "test": subject.test.digest}
    inputs["weights"] = weights_fingerprint(subject.weights)
    config = {
        "adapt": asdict(settings),
        "train": asdict(training),
        "c": c,
        "student": [cell.student, subject.size],
    }

    def produce(out: Path) -> dict[str, Any]:
        from synthkit.learning.fit import Examples

        start = Start(subject.student, False, None)
        site = Site(start, Examples(photos, subject.student.preprocessing), settings, training)
        answers, choice, verdicts = measure(site, subject, c)
        write_json(out / _PREDICTIONS, answers)
        return {"path": choice.path.name, "steps": site.steps(choice.path), "cross_validation": verdicts}

    done = run_stage(Request("photo-table", work / cell.name, inputs, config), produce)
    answers = json.loads((done.out / _PREDICTIONS).read_text(encoding="utf-8"))
    last = {method: of_steps[max(of_steps, key=int)] for method, of_steps in answers.items()}
    right = {method: round(top1(np.array(one), subject.test.labels), 4) for method, one in last.items()}
    return {**asdict(cell), "top1": right, "seconds": done.manifest.seconds, **done.manifest.metrics}


def order(cells: Sequence[Cell]) -> list[Cell]:
    """A balanced part of the table first: 1, 4 and 16 photos per class of the first seed."""
    first = min(cell.seed for cell in cells)

    def late(cell: Cell) -> tuple[bool, int, int]:
        return cell.seed > first or cell.shots not in _FIRST_SHOTS, cell.seed, cell.shots

    return sorted(cells, key=late)


def few(images: ImageSet, most: int) -> ImageSet:
    """At most so many images, chosen by the hash of their content."""
    by_hash = sorted(range(len(images)), key=lambda position: images.items[position].sha256)
    return images.subset(sorted(by_hash[:most]))


def added(files: Sequence[Path], asked: dict[str, Any]) -> list[dict[str, Any]]:
    """The cells of results that were written before, or elsewhere.

    Args:
        files: results of this program.
        asked: the settings that they must have been measured with.

    Raises:
        ConfigError: a file is no such result, or has other settings.
    """
    cells: list[dict[str, Any]] = []
    for file in files:
        try:
            result = json.loads(file.read_text(encoding="utf-8"))
            measured_with, of_file = result["settings"], result["cells"]
        except (ValueError, KeyError, TypeError):
            raise ConfigError(f"--add {file} is no result of this program") from None
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


def _pairs(_context: click.Context, _option: click.Parameter, texts: Sequence[str]) -> dict[str, str]:
    found = dict(text.partition("=")[::2] for text in texts)
    if not all(name and value for name, value in found.items()):
        raise click.BadParameter("must be NAME=..., for example scenes=./pool:./test")
    return found


def _subjects(
    sets: dict[str, str], weights: dict[str, str], size: int, most: int
) -> Iterator[tuple[tuple[str, str], Subject]]:
    for name, folders in sets.items():
        pool_dir, _, test_dir = folders.partition(":")
        pool, test = ImageSet.scan(Path(pool_dir)), ImageSet.scan(Path(test_dir))
        check_disjoint(pool, test, (pool_dir, test_dir))
        test = few(test.with_classes(pool.classes), most)
        for student, folder in weights.items():
            yield (name, student), Subject(pool, test, student, Path(folder), size)


@click.command(cls=OneLineErrors)
@click.option("--set", "sets", multiple=True, required=True, callback=_pairs, help="NAME=POOL:TEST folders.")
@click.option("--weights", multiple=True, required=True, callback=_pairs, help="TIMM_NAME=weights.")
@click.option("--shots", multiple=True, type=int, default=(1, 2, 4, 8, 16), show_default=True)
@click.option("--seeds", default=3, show_default=True, help="Draws per number of shots.")
@click.option("--size", default=96, show_default=True, help="Input side of the students in pixels.")
@click.option("--test-images", default=300, show_default=True, help="Test images of a set at the most.")
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
    """Measure every method on every draw of every set with every student; OUT, Markdown and a plot tell."""
    subjects = dict(_subjects(sets, weights, size, test_images))
    cells = [Cell(*pair, count, seed) for seed in range(seeds) for count in shots for pair in subjects]
    for cell in cells:
        k_shot(subjects[cell.set, cell.student].pool, cell.shots, cell.seed)  # refused before any work
    settings = AdaptSettings(adapt_steps=adapt_steps)
    training = TrainSettings(lr=full_lr, real_steps=full_steps)
    asked = {"size": size, "c": c, "adapt": asdict(settings), "full": {"steps": full_steps, "lr": full_lr}}
    asked["n_test"] = {name: len(subject.test) for (name, _), subject in subjects.items()}
    measured = added(add, asked)
    known = {Cell(*(one[field.name] for field in fields(Cell))) for one in measured}
    text = _write(out, measured, asked)
    for cell in tqdm([one for one in order(cells) if one not in known], unit="cell"):
        subject = subjects[cell.set, cell.student]
        measured.append(run_cell(subject, cell, settings, training, c, work))
        text = _write(out, measured, asked)
    click.echo(text)


if __name__ == "__main__":
    main()
