"""`probe`: where in the student the synthetic-to-real gap sits (Hennicke et al. 2024, arXiv 2405.03243).

    units 1..k learn one domain, stay as they are, the rest learns the other; and the swap ──► curve over k
    all learn synthetic, the last 1, 2, 4 learn 1/16 .. 1 of the real photos ────────────────► data efficiency
    other causes in turn: BatchNorm statistics, augmentation, texture and shape, prompts ────► switches

Every student takes the same number of gradient steps from the same initial weights, and is measured on real
photos that none of them learned. Each cell is a stage's folder: what was measured is not measured again.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from synthkit.artifacts import FunctionStage, Key, run_stage, versions
from synthkit.data.images import ImageSet
from synthkit.data.splits import check_disjoint, draw, stratified_folds
from synthkit.errors import ConfigError, DataError, ModelError, nearest
from synthkit.metrics.classification import top1, wilson_interval
from synthkit.recipes.adaptation.strategies import LAST, AdaptPath, Site, Start, course, follow
from synthkit.recipes.settings import AdaptSettings, TrainSettings
from synthkit.recipes.train import (
    TrainingData,
    real_fit_settings,
    synthetic_steps,
    untrained_student,
    weights_fingerprint,
)

if TYPE_CHECKING:
    import torch

    from synthkit.learning.feature_cache import Layers
    from synthkit.learning.fit import Batches, Examples, FitSettings
    from synthkit.learning.students import Student

SYNTHETIC, REAL = "synthetic", "real"
FRACTIONS = (1 / 16, 1 / 8, 1 / 4, 1 / 2, 1.0)
SWITCHES = ("statistics", "augmentation", "inputs")
_AUGMENTATIONS = ("none", "default", "rand-m9-mstd0.5")
_MOST_OF_IT = 0.5  # share of the gap from which the last units are called the place to adapt
_HELD_OUT_PARTS = 4  # one of them measures where there are no test images


def _photos(pixels: np.ndarray) -> np.ndarray:
    return pixels


def _grey(pixels: np.ndarray) -> np.ndarray:
    """Brightness without colour."""
    weights = np.array([0.299, 0.587, 0.114])  # ITU-R BT.601
    return np.repeat((pixels @ weights).round().astype(np.uint8)[..., None], 3, axis=-1)


def _edges(pixels: np.ndarray) -> np.ndarray:
    """Shape without surface: how steep the brightness is, scaled to the image's steepest."""
    down, right = np.gradient(_grey(pixels)[..., 0].astype(np.float32), axis=(1, 2))
    steep = np.hypot(down, right)
    scaled = 255 * steep / np.maximum(steep.max(axis=(1, 2), keepdims=True), 1e-6)
    return np.repeat(scaled.astype(np.uint8)[..., None], 3, axis=-1)


def _patches(pixels: np.ndarray, parts: int = 4) -> np.ndarray:
    """Texture without shape: the tiles of a grid, shuffled, each image in its own way."""
    count, height, width, _ = pixels.shape
    high, wide = height // parts, width // parts
    tiles = pixels[:, : high * parts, : wide * parts].reshape(count, parts, high, parts, wide, 3)
    tiles = tiles.transpose(0, 1, 3, 2, 4, 5).reshape(count, parts * parts, high, wide, 3)
    shuffled = np.stack([one[np.random.default_rng(i).permutation(len(one))] for i, one in enumerate(tiles)])
    shuffled = shuffled.reshape(count, parts, parts, high, wide, 3).transpose(0, 1, 3, 2, 4, 5)
    found: np.ndarray = np.array(pixels)
    found[:, : high * parts, : wide * parts] = shuffled.reshape(count, high * parts, wide * parts, 3)
    return found


#: What a student is shown of an image: all of it, or what is left without colour, surface or shape.
INPUTS = {"photos": _photos, "grey": _grey, "edges": _edges, "patches": _patches}


@dataclass(frozen=True)
class ProbeSettings:
    """What `probe` looks at.

    Attributes:
        points: values of k on the curve, at the most, beside those of the last 1, 2 and 4 units.
        switches: which of `SWITCHES`.
        efficiency: whether to draw the curve over the fraction of real photos.
    """

    points: int = 6
    switches: tuple[str, ...] = SWITCHES
    efficiency: bool = True

    def __post_init__(self) -> None:
        for name in self.switches:
            if name not in SWITCHES:
                raise ConfigError(
                    f"no switch {name!r}{nearest(name, SWITCHES)}; there are {', '.join(SWITCHES)}"
                )


@dataclass(frozen=True)
class Probe:
    """Two sets of images, and the photos that measure.

    Attributes:
        synthetic: class folders of generated images.
        real: photos to learn.
        test: photos to measure with.
        training: of `train`; its student, weights, learning rate, batch size and number of epochs.
        root: folder of the cells.
        like: the synthetic set that steps and input size follow from; None: `synthetic`.
    """

    synthetic: ImageSet
    real: ImageSet
    test: ImageSet
    training: TrainSettings
    root: Path
    like: ImageSet | None = None
    students: dict[str, Student] = field(default_factory=dict)

    @cached_property
    def initial(self) -> Student:
        """The student that every training begins with."""
        return untrained_student(self.training, TrainingData(self.like or self.synthetic, self.real))

    @cached_property
    def labels(self) -> np.ndarray:
        """Class index of every photo that measures."""
        return self.test.labels

    def images(self, domain: str) -> ImageSet:
        """The set of a domain."""
        return self.synthetic if domain == SYNTHETIC else self.real

    def fit_settings(self) -> FitSettings:
        """The same for every training: as many steps as `train` takes on the synthetic images.

        One learning rate for all layers: a student that was cut has no groups of them.
        """
        steps = synthetic_steps(self.training, TrainingData(self.like or self.synthetic, None))
        return real_fit_settings(replace(self.training, real_steps=steps, layer_decay=1.0))

    def cell(self, name: str, measure: Callable[[Path], float], **about: Any) -> float:
        """A cell's top-1, measured now or before; `about` is what else its result depends on."""
        inputs = {"synthetic": self.synthetic.digest, "real": self.real.digest, "test": self.test.digest}
        if self.like:
            inputs["like"] = self.like.digest
        if self.training.weights:
            inputs["weights"] = weights_fingerprint(Path(self.training.weights))
        key = Key(inputs, {"train": self.training}, about)
        stage = FunctionStage("probe", self.root / name, key, lambda work: {"top1": measure(work)})
        return float(run_stage(stage).manifest.metrics["top1"])

    def score(self, student: Student, inputs: str = "photos") -> float:
        """Top-1 on the photos that measure."""
        pixels = INPUTS[inputs](self.test.load(student.preprocessing))
        return top1(np.asarray(student.logits(pixels).argmax(1).numpy()), self.labels)

    def trained(self, domain: str, inputs: str = "photos", augment: str | None = None) -> float:
        """All layers on one domain; the top-1 of what comes out, which `student` then finds."""
        augment = augment or self.training.augment
        name = f"{domain}-{inputs}-{augment}"

        def measure(work: Path) -> float:
            from synthkit.learning.fit import fit

            student, images = self.initial.clone(), self.images(domain)
            student.model.requires_grad_(True)
            settings = replace(self.fit_settings(), augment=augment)
            fit(student, _examples(images, student, inputs), settings, label=f"all layers on {name}")
            student.save(work)
            return self.score(student, inputs)

        return self.cell(name, measure, domain=domain, inputs=inputs, augment=augment)

    def student(self, domain: str) -> Student:
        """The student that learned a domain with all layers."""
        from synthkit.learning.students import load_student

        if domain not in self.students:
            self.trained(domain)
            self.students[domain] = load_student(self.root / f"{domain}-photos-{self.training.augment}")
        return self.students[domain].clone()


def _examples(images: ImageSet, student: Student, inputs: str = "photos") -> Examples:
    from synthkit.learning.fit import Examples

    pixels = INPUTS[inputs](images.load(student.preprocessing))
    return Examples(images, student.preprocessing, pixels)


class Through:
    """Examples as the layers behind the frozen ones see them, with a fresh view in every step."""

    def __init__(self, examples: Examples, whole: Student, frozen: Layers) -> None:
        self._examples, self._whole, self._frozen = examples, whole, frozen

    def __len__(self) -> int:
        return len(self._examples)

    def batch(
        self, student: Student, picked: np.ndarray, step: int, settings: FitSettings
    ) -> tuple[tuple[torch.Tensor, ...], torch.Tensor]:
        """What crosses into the trained layers, and soft targets [B, classes]."""
        import torch

        (images,), targets = self._examples.batch(self._whole, picked, step, settings)
        with torch.no_grad():
            return self._frozen(images), targets


def mixed_student(probe: Probe, first: str, count: int) -> Student:
    """Units 1..count as they learned one domain, the others on the other domain from their initial weights.

    Args:
        probe: the sets.
        first: the domain of the first units.
        count: how many, at least one and not all.

    Raises:
        ModelError: the student's layers cannot be cut apart.
    """
    from synthkit.learning.feature_cache import split
    from synthkit.learning.fit import fit

    student, learned = probe.initial.clone(), probe.student(first)
    copy_units(learned, student, count)
    student.train_only_last(len(student.units()) - count)
    try:
        cut = split(student)
    except NotImplementedError as error:
        raise ModelError(f"`probe` cannot look into this student: {error}; use another --student") from None
    other = _examples(probe.images(REAL if first == SYNTHETIC else SYNTHETIC), student)
    lesson: Batches = Through(other, student, cut.frozen)
    fit(cut.trained, lesson, probe.fit_settings(), label=f"{count} units of {first}")
    student.model.eval()
    return student


def copy_units(source: Student, target: Student, count: int) -> None:
    """Give the first units of one student the weights and statistics of another's, in place."""
    names = {name for unit in source.units()[:count] for name in unit}
    owners = {name.rpartition(".")[0] for name in names}
    state, own = source.model.state_dict(), target.model.state_dict()
    taken = {key: value for key, value in state.items() if key in names or key.rpartition(".")[0] in owners}
    target.model.load_state_dict({**own, **taken})


def points(units: int, most: int) -> list[int]:
    """The values of k that are measured: some evenly, and those that leave the last 1, 2 and 4 units.

    Args:
        units: of the student.
        most: evenly spaced values at the most.
    """
    even = np.linspace(1, units - 1, max(2, most)).round().astype(int).tolist()
    return sorted({k for k in (*even, units - 1, units - 2, units - 4) if 0 < k < units})


def curve(probe: Probe, most: int) -> Iterator[dict[str, Any]]:
    """Top-1 for every k and both orders; k = 0 and k = all units are the students of one domain alone."""
    units = len(probe.initial.units())
    for first, second in ((SYNTHETIC, REAL), (REAL, SYNTHETIC)):
        yield {"first": first, "k": 0, "top1": probe.trained(second)}
        for k in points(units, most):

            def measure(_work: Path, first: str = first, k: int = k) -> float:
                return probe.score(mixed_student(probe, first, k))

            yield {"first": first, "k": k, "top1": probe.cell(f"{first}-to-{k}", measure, first=first, k=k)}
        yield {"first": first, "k": units, "top1": probe.trained(first)}


def share(images: ImageSet, fraction: float, seed: int) -> ImageSet:
    """A share of every class, at least one image; a larger share of the same seed contains the smaller."""
    numbers = [max(1, math.floor(fraction * number)) for number in images.counts().values()]
    return images.subset(draw(images, numbers, seed))


def efficiency(probe: Probe, settings: AdaptSettings) -> Iterator[dict[str, Any]]:
    """Top-1 after the last 1, 2, 4 units of the synthetic student learned a share of the real photos.

    Beside them all layers from the initial weights on the same share, in as many steps as all others.
    """
    for fraction in FRACTIONS:
        photos = share(probe.real, fraction, probe.training.seed)
        about = {"fraction": fraction, "photos": len(photos)}
        for path in LAST:
            yield {**about, "way": path.name, "top1": _last_units(probe, settings, path, photos)}
        yield {**about, "way": "real only", "top1": _real_only(probe, photos)}


def _last_units(probe: Probe, settings: AdaptSettings, path: AdaptPath, photos: ImageSet) -> float:
    asked = replace(settings, path=path.name, layers="auto")

    def measure(_work: Path) -> float:
        student = probe.student(SYNTHETIC)
        site = Site(Start(student, True, None), _examples(photos, student), asked, probe.training)
        begun = course(path, site)
        follow(path, site, begun)
        return probe.score(begun.whole)

    name = f"{path.name}-{len(photos)}-photos"
    return probe.cell(name, measure, photos=photos.digest, adapt=asdict(asked))


def _real_only(probe: Probe, photos: ImageSet) -> float:
    def measure(_work: Path) -> float:
        from synthkit.learning.fit import fit

        student = probe.initial.clone()
        student.model.requires_grad_(True)
        fit(student, _examples(photos, student), probe.fit_settings(), label=f"{len(photos)} photos")
        return probe.score(student)

    return probe.cell(f"real-{len(photos)}-photos", measure, photos=photos.digest)


def switches(probe: Probe, names: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Top-1 of the synthetic student, and of the real one, with one other cause changed."""
    if "statistics" in names:
        yield {"switch": "BatchNorm statistics of real photos", SYNTHETIC: _with_real_statistics(probe)}
    if "augmentation" in names:
        for augment in _AUGMENTATIONS:
            both = {domain: probe.trained(domain, augment=augment) for domain in (SYNTHETIC, REAL)}
            yield {"switch": f"augmentation {augment}", **both}
    if "inputs" in names:
        for inputs in INPUTS:
            if inputs != "photos":
                both = {domain: probe.trained(domain, inputs) for domain in (SYNTHETIC, REAL)}
                yield {"switch": f"inputs {inputs}", **both}


def _with_real_statistics(probe: Probe) -> float:
    """The synthetic student after its BatchNorm layers saw the real photos, without their labels."""

    def measure(_work: Path) -> float:
        import torch

        from synthkit.learning.students import to_unit_range

        student = probe.student(SYNTHETIC)
        kind = torch.nn.modules.batchnorm._BatchNorm
        for norm in (one for one in student.model.modules() if isinstance(one, kind)):
            norm.reset_running_stats()
            norm.momentum = None  # the mean over all batches
            norm.train()
        pixels = probe.real.load(student.preprocessing)
        with torch.no_grad():
            for batch in np.array_split(np.arange(len(pixels)), math.ceil(len(pixels) / 128)):
                student.model(student.normalise(to_unit_range(pixels[batch])))
        return probe.score(student)

    return probe.cell("real-statistics", measure, switch="statistics")


def prompts(probe: Probe, others: Mapping[str, ImageSet]) -> Iterator[dict[str, Any]]:
    """Top-1 of students of other synthetic sets, such as one drawn from captions of the real photos."""
    for name, images in others.items():
        folder, drawn = probe.root / f"prompts-{name}", images.with_classes(probe.real.classes)
        other = replace(probe, synthetic=drawn, students={}, root=folder, like=probe.synthetic)
        top = other.trained(SYNTHETIC)
        yield {"switch": f"prompts {name}", SYNTHETIC: top}


def held_out(real: ImageSet, test: ImageSet | None, seed: int) -> tuple[ImageSet, ImageSet]:
    """Photos to learn and photos to measure with: the test images, or a quarter of each class.

    Raises:
        DataError: there are no test images and a class has one photo, or the two share an image.
    """
    if test is not None:
        test = test.with_classes(real.classes)
        check_disjoint(real, test, (str(real.root), str(test.root)))
        return real, test
    distinct = real.distinct()
    alone = [name for name, number in distinct.counts().items() if number < 2]
    if alone:
        raise DataError(f"{alone[0]} has one photo, so none can be held out; add photos or give --test-dir")
    learned, measured = stratified_folds(distinct.labels, _HELD_OUT_PARTS, seed)[0]
    return distinct.subset(learned), distinct.subset(measured)


def run_probe(
    probe: Probe, settings: ProbeSettings, adapt: AdaptSettings, others: Mapping[str, ImageSet]
) -> dict[str, Any]:
    """Measure everything.

    Args:
        probe: the sets.
        settings: what to look at.
        adapt: how last units learn the real photos.
        others: name -> other synthetic set, see `prompts`.

    Returns:
        `units`, `curve`, `gap` (`synthetic`, `real`, `points`), `recovered` (last units -> share of the gap),
        `efficiency`, `switches`, `n_test`, `classes` (their number), `advice`, `settings`, `versions`.

    Raises:
        DataError: the sets are of different classes.
    """
    _ = TrainingData(probe.synthetic, probe.real).classes  # refuses different classes
    on_curve = list(curve(probe, settings.points))
    found = {
        "units": [unit[0].rpartition(".")[0] for unit in probe.initial.units()],
        "curve": on_curve,
        **recovered(on_curve),
        "efficiency": list(efficiency(probe, adapt)) if settings.efficiency else [],
        "switches": [*switches(probe, settings.switches), *prompts(probe, others)],
        "n_test": len(probe.test),
        "classes": len(probe.test.classes),
    }
    asked = {**asdict(settings), "train": asdict(probe.training), "steps": probe.fit_settings().steps}
    return {**found, "advice": advice(found), "settings": asked, "versions": versions()}


def recovered(on_curve: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The gap, and the share of it that real photos for the last 1, 2, 4 units recover.

    Args:
        on_curve: rows with `first`, `k` and `top1`, k from 0 to all units.

    Returns:
        `gap` (top-1 of `synthetic` and `real` alone, and the difference in `points`) and `recovered` (number
        of last units -> share; None where synthetic images do not fall behind).
    """
    top = {row["k"]: row["top1"] for row in on_curve if row["first"] == "synthetic"}
    units = max(top)
    synthetic, real = top[units], top[0]
    shares = {
        str(count): round((top[units - count] - synthetic) / (real - synthetic), 4)
        if real > synthetic
        else None
        for count in (1, 2, 4)
        if units - count in top
    }
    gap = {"synthetic": synthetic, "real": real, "points": round(100 * (real - synthetic), 2)}
    return {"gap": gap, "recovered": shares}


def _synthetic_interval(found: Mapping[str, Any]) -> tuple[float, float]:
    total = found["n_test"]
    return wilson_interval(round(found["gap"]["synthetic"] * total), total)


def _tells_a_gap(found: Mapping[str, Any]) -> bool:
    return bool(found["gap"]["real"] > _synthetic_interval(found)[1])


def advice(found: Mapping[str, Any]) -> str:
    """One sentence: what to do about the gap that was found.

    Args:
        found: `gap`, `recovered`, `n_test` and `classes`, their number.
    """
    if not _tells_a_gap(found):
        return _no_gap(found)
    gap = found["gap"]
    shares = found["recovered"]
    enough = [count for count, share in shares.items() if share >= _MOST_OF_IT]
    if enough:
        return (
            f"Real photos for the last {enough[0]} unit(s) recover {shares[enough[0]]:.0%} of the gap of "
            f"{gap['points']:.1f} points: adapt with --layers {enough[0]}."
        )
    best = max(shares, key=lambda count: shares[count])
    return (
        f"Even the last {best} units recover only {shares[best]:.0%} of the gap of {gap['points']:.1f} "
        "points, so it begins before them: train all layers on the photos (--path full), or draw better "
        "images."
    )


def _no_gap(found: Mapping[str, Any]) -> str:
    synthetic, real = (found["gap"][side] for side in ("synthetic", "real"))
    about = f"{synthetic:.1%} with synthetic images, {real:.1%} with real photos"
    if max(synthetic, real) < (1 + 1 / found["classes"]) / 2:  # halfway from chance to no error
        return f"No gap to see yet: {about}, so neither student has learned much; give more --epochs."
    low, high = _synthetic_interval(found)
    return (
        f"No gap to close: {about}, and {found['n_test']} photos tell no difference below "
        f"{100 * (high - low) / 2:.1f} points."
    )


def markdown(found: Mapping[str, Any]) -> str:
    """All tables, and the advice."""
    lines = [f"Top-1 on {found['n_test']} real photos", "", *_curve_table(found)]
    if _tells_a_gap(found):
        lines += ["", *(f"- last {n} unit(s): {s:.0%} of the gap" for n, s in found["recovered"].items())]
    if found["efficiency"]:
        lines += ["", *_efficiency_table(found["efficiency"])]
    if found["switches"]:
        lines += ["", "| switch | synthetic | real |", "|---|---:|---:|"]
        lines += [
            f"| {row['switch']} | {_cell(row.get('synthetic'))} | {_cell(row.get('real'))} |"
            for row in found["switches"]
        ]
    return "\n".join([*lines, "", found["advice"]])


def _cell(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def _curve_table(found: Mapping[str, Any]) -> Iterator[str]:
    top = {(row["first"], row["k"]): row["top1"] for row in found["curve"]}
    yield "| units 1..k | up to | first synthetic, then real | first real, then synthetic |"
    yield "|---:|---|---:|---:|"
    for k in sorted({k for _, k in top}):
        last = found["units"][k - 1] if k else ""
        yield f"| {k} | {last} | {_cell(top['synthetic', k])} | {_cell(top['real', k])} |"


def _efficiency_table(rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    ways = list(dict.fromkeys(row["way"] for row in rows))
    top = {(row["photos"], row["way"]): row["top1"] for row in rows}
    yield f"| real photos | {' | '.join(ways)} |"
    yield "|---:" * (1 + len(ways)) + "|"
    for photos in sorted({photos for photos, _ in top}):
        yield f"| {photos} | {' | '.join(_cell(top[photos, way]) for way in ways)} |"


def plot(found: Mapping[str, Any], path: Path) -> None:
    """The curve over k, and beside it the one over the number of real photos."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    over_units, over_photos = figure.subplots(1, 2, sharey=True)
    for first, second in (("synthetic", "real"), ("real", "synthetic")):
        rows = [row for row in found["curve"] if row["first"] == first]
        label = f"1..k {first}, rest {second}"
        over_units.plot([row["k"] for row in rows], [row["top1"] for row in rows], marker="o", label=label)
    over_units.set(xlabel="k, units that learned the first domain", ylabel="top-1 on real photos")
    for way in dict.fromkeys(one["way"] for one in found["efficiency"]):
        rows = [row for row in found["efficiency"] if row["way"] == way]
        over_photos.plot(
            [row["photos"] for row in rows], [row["top1"] for row in rows], marker="o", label=way
        )
    over_photos.set_xscale("log", base=2)
    over_photos.set_xticks(sorted({row["photos"] for row in found["efficiency"]}))
    over_photos.xaxis.set_major_formatter("{x:g}")
    over_photos.set(xlabel="real photos")
    for axes in (over_units, over_photos):
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(path, dpi=100)
