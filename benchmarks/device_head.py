"""Benchmark of `adapt --bundle` against torch on the same photos, `python -m benchmarks.device_head`

    a few photos per class ──pretrained student, logistic regression as its head──► the bundle to start from
    more photos of each class ─┬─ synthkit adapt --bundle, in a process of its own: seconds, top-1
                               ├─ `adapt --path last-1` in torch, from the same student: top-1
                               └─ scikit-learn's logistic regression on torch features, from nothing: top-1
    photos of a class more ────── synthkit adapt --bundle --new-class: top-1 of it and of the old ones

The test images choose nothing: scikit-learn's C is fixed, as are all defaults of the others.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import numpy as np

from synthkit.artifacts import versions, write_json
from synthkit.data.images import ImageSet
from synthkit.data.splits import k_shot
from synthkit.one_line import OneLineErrors

if TYPE_CHECKING:
    from synthkit.learning.students import Student

_C = 100.0  # of scikit-learn's regression, on features of root mean square norm 1
_ADDED = (1, 4, 16)


@dataclass(frozen=True)
class Place:
    """Where one draw keeps its folders of links to photos, its student and its bundles."""

    root: Path

    def linked(self, name: str, photos: ImageSet, positions: Sequence[int]) -> Path:
        """A class folder tree that holds some of the photos."""
        for position in positions:
            item = photos.items[int(position)]
            folder = self.root / name / photos.classes[item.label]
            folder.mkdir(parents=True, exist_ok=True)
            (folder / item.path.name).symlink_to(item.path.resolve())
        return self.root / name


def features(student: Student, photos: ImageSet) -> np.ndarray:
    """What enters the student's head, float32 [N, width]."""
    import torch

    from synthkit.learning.students import to_unit_range

    images = photos.load(student.preprocessing)
    found = []
    with torch.no_grad():
        for start in range(0, len(images), 32):
            batch = student.normalise(to_unit_range(images[start : start + 32]))
            body = student.model.forward_features(batch)
            found.append(student.model.forward_head(body, pre_logits=True).numpy())
    return np.concatenate(found)


def regress(student: Student, photos: ImageSet) -> Any:
    """scikit-learn's logistic regression as the student's head, in place; gives weight and bias."""
    import torch
    from sklearn.linear_model import LogisticRegression

    seen = features(student, photos)
    scale = float(np.sqrt((seen**2).sum(axis=1).mean()))
    fitted = LogisticRegression(C=_C, max_iter=5000).fit(seen / scale, photos.labels)
    with torch.no_grad():
        student.model.get_classifier().weight.copy_(torch.from_numpy(fitted.coef_ / scale))
        student.model.get_classifier().bias.copy_(torch.from_numpy(fitted.intercept_))


def torch_top1(student: Student, test: ImageSet) -> float:
    """Share of the test images that a student gets right."""
    images = test.load(student.preprocessing)
    return float(np.mean(student.logits(images).argmax(dim=1).numpy() == test.labels))


def make_start(name: str, weights: Path, photos: ImageSet, place: Place, precision: str) -> Student:
    """The student and the bundle that every method starts from."""
    from synthkit.learning.students import new_student
    from synthkit.recipes.device.device_write import remember
    from synthkit.recipes.exporting.export import export_student_bundle
    from synthkit.recipes.settings import ExportSettings

    student = new_student(name, photos.classes, pretrained=False, weights=weights, image_size=None, seed=0)
    student.model.eval()
    regress(student, photos)
    (place.root / "student").mkdir()
    student.save(place.root / "student")
    work = place.root / "bundle"
    work.mkdir()
    lineage = {"trained_on": sorted({item.sha256 for item in photos.items})}
    settings = ExportSettings(precision=precision)
    export_student_bundle(student, photos.load(student.preprocessing), lineage, None, work, settings)
    remember(work, photos)
    return student


def device_adapt(bundle: Path, *arguments: str | Path) -> dict[str, Any]:
    """Run `synthkit adapt --bundle` in a process of its own, and time it from start to end."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    command = [sys.executable, "-m", "synthkit", "adapt", "--bundle", bundle, *arguments, "--json"]
    timed = [sys.executable, "-c", _TIMED, *map(str, command)]
    done = subprocess.run(timed, capture_output=True, text=True, check=True, env=os.environ)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    seconds, _, answer = done.stdout.partition("\n")
    return {**json.loads(answer), "process_seconds": float(seconds), "cpu_seconds": used}


_TIMED = """
import subprocess, sys, time
started = time.perf_counter()
done = subprocess.run(sys.argv[1:], stdout=subprocess.PIPE, text=True, check=True)
print(time.perf_counter() - started)
print(done.stdout)
"""


def torch_last_layer(place: Place, photos: ImageSet, test: ImageSet) -> float:
    """Top-1 after `adapt --path last-1` in torch from the starting student."""
    from synthkit.learning.students import load_student
    from synthkit.recipes.adaptation.adapt import adapt
    from synthkit.recipes.settings import AdaptSettings, TrainSettings

    settings = AdaptSettings(path="last-1")
    adapted = adapt(settings, TrainSettings(), place.root / "student", photos, place.root / "last-1")
    return torch_top1(load_student(adapted.out), test)


def refit(place: Place, student: Student, old: ImageSet, new: ImageSet, test_dir: Path) -> dict[str, Any]:
    """The known classes with more photos: seconds and top-1 of every method."""
    new_dir = place.linked("new", new, range(len(new)))
    bundle = shutil.copytree(place.root / "bundle", place.root / "refit")
    timed = device_adapt(bundle, "--real-dir", new_dir)
    bundle = shutil.copytree(place.root / "bundle", place.root / "measured")
    # A head that is worse on held-out photos would stay out, and with it the figures.
    measured = device_adapt(bundle, "--real-dir", new_dir, "--test-dir", test_dir, "--force")
    test = ImageSet.scan(test_dir).with_classes(student.classes)
    scratch = student.clone()
    regress(scratch, new)
    return {
        "photos": len(new),
        "process_seconds": timed["process_seconds"],
        "cpu_seconds": timed["cpu_seconds"],
        "n_test": measured["n_test"],
        "before": measured["top1_before"],
        "device": measured["top1"],
        "device_by_precision": measured["precisions"],
        "torch_last_1": torch_last_layer(place, new, test),
        "scikit_learn": torch_top1(scratch, test),
        "confidence": measured["confidence"],
    }


def add_class(place: Place, added: ImageSet, shots: int, name: str, test_dir: Path) -> dict[str, Any]:
    """One class more from its photos alone, on a bundle that remembers the old ones."""
    shown = place.linked(f"add-{shots}", added, range(shots))
    bundle = shutil.copytree(place.root / "bundle", place.root / f"bundle-{shots}")
    found = device_adapt(bundle, "--real-dir", shown, "--new-class", name, "--test-dir", test_dir, "--force")
    old = found["old_classes_tested"]
    return {
        "shots": shots,
        "new_class": found["per_class"][name],
        "old_before": old["before"],
        "old_after": old["after"],
        "remembered": found["remembered"],
        "process_seconds": found["process_seconds"],
    }


def run_draw(
    data: Path,
    student: str,
    weights: Path,
    classes: int,
    shots: tuple[int, int],
    seed: int,
    work: Path,
    precision: str,
) -> dict[str, Any]:
    """One draw of photos: both tasks."""
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    place, train, test = Place(work), ImageSet.scan(data / "train"), ImageSet.scan(data / "test")
    names, name = train.classes[:classes], train.classes[classes]
    drawn = k_shot(train, sum(shots), seed)
    ranks = {
        label: [int(i) for i in drawn if train.items[int(i)].label == label] for label in range(classes + 1)
    }
    start_dir = place.linked(
        "start", train, [i for label in range(classes) for i in ranks[label][: shots[0]]]
    )
    new_dir = place.linked("pool", train, [i for label in range(classes) for i in ranks[label][shots[0] :]])
    tested = {label: [i for i, item in enumerate(test.items) if item.label == label] for label in ranks}
    old_test = place.linked("test", test, [i for label in range(classes) for i in tested[label]])
    all_test = place.linked("test-all", test, [i for one in tested.values() for i in one])
    start = ImageSet.scan(start_dir)
    assert start.classes == names
    made = make_start(student, weights, start, place, precision)
    added = train.subset(ranks[classes])
    return {
        "seed": seed,
        "refit": refit(place, made, start, ImageSet.scan(new_dir), old_test),
        "added": [add_class(place, added, count, name, all_test) for count in _ADDED if count <= len(added)],
    }


@click.command(cls=OneLineErrors)
@click.option("--data", type=click.Path(path_type=Path), required=True, help="Holds train/ and test/.")
@click.option("--weights", type=click.Path(path_type=Path), required=True, help="The student's weights.")
@click.option("--student", default="mobilenetv2_100", show_default=True)
@click.option(
    "--classes",
    default=10,
    type=click.IntRange(min=3),  # scikit-learn fits a single row to two classes
    show_default=True,
    help="Known classes; the next one is added.",
)
@click.option("--start", default=4, show_default=True, help="Photos per class of the bundle to start from.")
@click.option("--shots", default=16, show_default=True, help="New photos per class.")
@click.option("--seeds", default=3, show_default=True)
@click.option("--precision", default="fp32", show_default=True, help="Precisions of the bundle.")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Folder for bundles and result.")
def main(
    data: Path,
    weights: Path,
    student: str,
    classes: int,
    start: int,
    shots: int,
    seeds: int,
    precision: str,
    out: Path,
) -> None:
    """Compare `adapt --bundle` with torch on the same photos; writes OUT/result.json and prints it."""
    settings = {"set": data.name, "student": student, "classes": classes, "start": start, "shots": shots}
    result: dict[str, Any] = {"settings": settings, "versions": versions(), "draws": []}
    for seed in range(seeds):
        work = out / f"seed-{seed}"
        drawn = run_draw(data, student, weights, classes, (start, shots), seed, work, precision)
        result["draws"].append(drawn)
        write_json(out / "result.json", result)
    click.echo(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
