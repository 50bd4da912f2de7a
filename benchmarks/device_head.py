"""The update of a bundle on the device beside torch and scikit-learn, on the same photos.

    python -m benchmarks.device_head --data DIR --weights FILE --work DIR [--out FILE]

    a few photos per class -> pretrained student with a logistic regression as its head -> the first bundle
    more photos of each class
        `synthkit update` in a process of its own: seconds, top-1
        `adapt` in torch with the strategy last-1, from the same student: top-1
        scikit-learn's logistic regression on torch features, from scratch: top-1
    photos of one more class
        `synthkit update --new-class`: top-1 on it and on the known classes

Test images choose nothing: scikit-learn's C is fixed, as are all defaults of the others.
"""

from __future__ import annotations

import json
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import numpy as np

from synthkit.artifacts import run_stage, versions, write_json
from synthkit.data.images import ImageSet
from synthkit.data.splits import k_shot
from synthkit.one_line import OneLineErrors

if TYPE_CHECKING:
    from synthkit.learning.students import Student

#: C of scikit-learn's regression, on features of root mean square norm 1.
_C = 100.0
#: Photos of the new class.
_ADDED = (1, 4, 16)


@dataclass(frozen=True)
class Place:
    """Folder of one seed: links to photos, the student and the bundles."""

    root: Path

    def linked(self, name: str, photos: ImageSet, positions: Sequence[int]) -> Path:
        """Make a class folder tree of links to the photos at these positions."""
        for position in positions:
            item = photos.items[int(position)]
            folder = self.root / name / photos.classes[item.label]
            folder.mkdir(parents=True, exist_ok=True)
            (folder / item.path.name).symlink_to(item.path.resolve())
        return self.root / name


def features(student: Student, photos: ImageSet) -> np.ndarray:
    """Input of the student's head, float32 [N, width]."""
    import torch

    from synthkit.learning.students import to_unit_range

    images = photos.load(student.preprocessing)
    batches = []
    with torch.no_grad():
        for start in range(0, len(images), 32):
            batch = student.normalise(to_unit_range(images[start : start + 32]))
            body = student.model.forward_features(batch)
            batches.append(student.model.forward_head(body, pre_logits=True).numpy())
    return np.concatenate(batches)


def regress(student: Student, photos: ImageSet) -> None:
    """Set the student's head to scikit-learn's logistic regression on its features, in place."""
    import torch
    from sklearn.linear_model import LogisticRegression

    inputs = features(student, photos)
    scale = float(np.sqrt((inputs**2).sum(axis=1).mean()))
    fitted = LogisticRegression(C=_C, max_iter=5000).fit(inputs / scale, photos.labels)
    with torch.no_grad():
        student.model.get_classifier().weight.copy_(torch.from_numpy(fitted.coef_ / scale))
        student.model.get_classifier().bias.copy_(torch.from_numpy(fitted.intercept_))


def torch_top1(student: Student, test: ImageSet) -> float:
    """Top-1 of a student."""
    images = test.load(student.preprocessing)
    return float(np.mean(student.logits(images).argmax(dim=1).numpy() == test.labels))


def make_start(name: str, weights: Path, photos: ImageSet, place: Place, precision: str) -> Student:
    """Save the student and the bundle from which every method starts."""
    from synthkit.engines.bundle.head import fill_replay_buffer
    from synthkit.learning.students import new_student
    from synthkit.recipes.exporting.export import export_student_bundle
    from synthkit.recipes.settings import ExportSettings

    student = new_student(name, photos.classes, pretrained=False, weights=weights, image_size=None, seed=0)
    student.model.eval()
    regress(student, photos)
    (place.root / "student").mkdir()
    student.save(place.root / "student")
    work = place.root / "bundle"
    work.mkdir()
    provenance = {"trained_on": sorted({item.sha256 for item in photos.items})}
    settings = ExportSettings(precision=precision)
    export_student_bundle(student, photos.load(student.preprocessing), provenance, None, work, settings)
    fill_replay_buffer(work, photos)
    return student


def device_update(bundle: Path, *arguments: str | Path) -> dict[str, Any]:
    """Run `synthkit update` in a process of its own, and time it from start to end."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    command = [sys.executable, "-m", "synthkit", "update", bundle, *arguments, "--json"]
    started = time.perf_counter()
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=True)
    seconds = time.perf_counter() - started
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {**json.loads(done.stdout), "process_seconds": seconds, "cpu_seconds": used}


def torch_last_layer(place: Place, photos: ImageSet, test: ImageSet) -> float:
    """Top-1 after `adapt` in torch with the strategy last-1, from the starting student."""
    from synthkit.learning.students import load_student
    from synthkit.recipes.adaptation.adapt import Adapt
    from synthkit.recipes.settings import AdaptSettings, TrainSettings

    settings = AdaptSettings(strategy="last-1")
    stage = Adapt(settings, TrainSettings(), place.root / "student", photos, place.root / "last-1")
    return torch_top1(load_student(run_stage(stage).out), test)


def update(place: Place, student: Student, new: ImageSet, test_dir: Path) -> dict[str, Any]:
    """More photos of the known classes: seconds and top-1 of every method."""
    new_dir = place.linked("new", new, range(len(new)))
    bundle = shutil.copytree(place.root / "bundle", place.root / "updated")
    timed = device_update(bundle, "--real-dir", new_dir)
    bundle = shutil.copytree(place.root / "bundle", place.root / "measured")
    # A head that is worse on held-out photos would be left out, and its figures with it.
    measured = device_update(bundle, "--real-dir", new_dir, "--test-dir", test_dir, "--force")
    test = ImageSet.scan(test_dir).with_classes(student.classes)
    regression = student.clone()
    regress(regression, new)
    return {
        "photos": len(new),
        "process_seconds": timed["process_seconds"],
        "cpu_seconds": timed["cpu_seconds"],
        "n_test": measured["n_test"],
        "before": measured["top1_before"],
        "device": measured["top1"],
        "device_by_precision": measured["precisions"],
        "torch_last_1": torch_last_layer(place, new, test),
        "scikit_learn": torch_top1(regression, test),
        "confidence": measured["confidence"],
    }


def add_class(place: Place, added: ImageSet, shots: int, name: str, test_dir: Path) -> dict[str, Any]:
    """One more class from its photos alone, on a bundle with a replay buffer of the known ones."""
    shown = place.linked(f"add-{shots}", added, range(shots))
    bundle = shutil.copytree(place.root / "bundle", place.root / f"bundle-{shots}")
    options = ("--real-dir", shown, "--new-class", name, "--test-dir", test_dir, "--force")
    measured = device_update(bundle, *options)
    old = measured["old_classes_tested"]
    return {
        "shots": shots,
        "new_class": measured["per_class"][name],
        "old_before": old["before"],
        "old_after": old["after"],
        "replayed": measured["replayed"],
        "process_seconds": measured["process_seconds"],
    }


def run_seed(
    data: Path,
    student: str,
    weights: Path,
    classes: int,
    shots: tuple[int, int],
    seed: int,
    work: Path,
    precision: str,
) -> dict[str, Any]:
    """Both tasks on the split of one seed.

    Args:
        data: holds train/ and test/.
        student: timm's name.
        weights: pretrained weights.
        classes: number of known classes; the next one is added.
        shots: photos per class of the first bundle, and of the update.
        seed: of the split.
        work: folder, emptied first.
        precision: precisions of the bundle, with commas between them.
    """
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    place, train, test = Place(work), ImageSet.scan(data / "train"), ImageSet.scan(data / "test")
    known, added_name = range(classes), train.classes[classes]
    # Positions of each class in the order of the split.
    of_class: dict[int, list[int]] = {label: [] for label in range(classes + 1)}
    for position in map(int, k_shot(train, sum(shots), seed)):
        of_class.get(train.items[position].label, []).append(position)
    tested: dict[int, list[int]] = {label: [] for label in of_class}
    for position, item in enumerate(test.items):
        tested.get(item.label, []).append(position)

    start_dir = place.linked("start", train, [i for label in known for i in of_class[label][: shots[0]]])
    new_dir = place.linked("pool", train, [i for label in known for i in of_class[label][shots[0] :]])
    old_test = place.linked("test", test, [i for label in known for i in tested[label]])
    all_test = place.linked("test-all", test, [i for label in tested for i in tested[label]])
    first = make_start(student, weights, ImageSet.scan(start_dir), place, precision)
    added = train.subset(of_class[classes])
    return {
        "seed": seed,
        "update": update(place, first, ImageSet.scan(new_dir), old_test),
        "added": [
            add_class(place, added, count, added_name, all_test) for count in _ADDED if count <= len(added)
        ],
    }


@click.command(cls=OneLineErrors)
@click.option("--data", type=click.Path(path_type=Path), required=True, help="Holds train/ and test/.")
@click.option("--weights", type=click.Path(path_type=Path), required=True, help="The student's weights.")
@click.option("--student", default="mobilenetv2_100", show_default=True)
@click.option(
    "--classes",
    default=10,
    # scikit-learn fits a single row to two classes.
    type=click.IntRange(min=3),
    show_default=True,
    help="Known classes; the next one is added.",
)
@click.option("--start", default=4, show_default=True, help="Photos per class of the first bundle.")
@click.option("--shots", default=16, show_default=True, help="New photos per class.")
@click.option("--seeds", default=3, show_default=True, help="Splits of the photos.")
@click.option("--precision", default="fp32", show_default=True, help="Precisions of the bundle.")
@click.option("--work", type=click.Path(path_type=Path), required=True, help="Folder for bundles.")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="JSON file to write.")
def main(
    data: Path,
    weights: Path,
    student: str,
    classes: int,
    start: int,
    shots: int,
    seeds: int,
    precision: str,
    work: Path,
    out: Path,
) -> None:
    """Compare the update on the device with torch on the same photos; writes OUT and prints it."""
    settings = {"set": data.name, "student": student, "classes": classes, "start": start, "shots": shots}
    result: dict[str, Any] = {"settings": settings, "versions": versions(), "seeds": []}
    for seed in range(seeds):
        place = work / f"seed-{seed}"
        result["seeds"].append(
            run_seed(data, student, weights, classes, (start, shots), seed, place, precision)
        )
        # Written after every seed: the next one takes minutes.
        write_json(out, result)
    click.echo(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
