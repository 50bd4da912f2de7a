"""`probe`: the layers in which the synthetic-to-real gap sits (Hennicke et al. 2024, arXiv 2405.03243).

    layer groups 1..k learn one domain and freeze, the rest learns the other; and the swap ──► curve over k
    all learn synthetic, the last 1, 2, 4 learn 1/16 .. 1 of the real photos ────────────────► data efficiency
    one other cause at a time: BatchNorm statistics, augmentation, texture, prompts ─────────► ablations

Every student takes the same number of gradient steps from the same initial weights, and is measured on real
photos that none of them has learned. Every student is a stage, so that nothing is measured twice.
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
from synthkit.data.splits import check_disjoint, sample, stratified_folds
from synthkit.errors import ConfigError, DataError, ModelError, nearest
from synthkit.metrics.classification import top1, wilson_interval
from synthkit.recipes.adaptation.strategies import (
    LAST,
    AdaptationTask,
    StartingStudent,
    Strategy,
    prepare,
    train_strategy,
)
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
    from synthkit.learning.fit import BatchSource, Examples, FitSettings
    from synthkit.learning.students import Student

SYNTHETIC, REAL = "synthetic", "real"
FRACTIONS = (1 / 16, 1 / 8, 1 / 4, 1 / 2, 1.0)
ABLATIONS = ("statistics", "augmentation", "inputs")
_AUGMENTATIONS = ("none", "default", "rand-m9-mstd0.5")
_ENOUGH = 0.5  # share of the gap from which the last layer groups are called the place to adapt
_HELD_OUT_PARTS = 4  # one of them is the test set where no test images are given


def _unchanged(pixels: np.ndarray) -> np.ndarray:
    return pixels


def _grey(pixels: np.ndarray) -> np.ndarray:
    """Brightness without colour."""
    # ITU-R BT.601
    weights = np.array([0.299, 0.587, 0.114])
    return np.repeat((pixels @ weights).round().astype(np.uint8)[..., None], 3, axis=-1)


def _edges(pixels: np.ndarray) -> np.ndarray:
    """Shape without surface: the gradient of the brightness, scaled to the image's largest."""
    down, right = np.gradient(_grey(pixels)[..., 0].astype(np.float32), axis=(1, 2))
    slope = np.hypot(down, right)
    scaled = 255 * slope / np.maximum(slope.max(axis=(1, 2), keepdims=True), 1e-6)
    return np.repeat(scaled.astype(np.uint8)[..., None], 3, axis=-1)


def _patches(pixels: np.ndarray, parts: int = 4) -> np.ndarray:
    """Texture without shape: the tiles of a grid, shuffled, in another order for each image."""
    count, height, width, _ = pixels.shape
    high, wide = height // parts, width // parts
    tiles = pixels[:, : high * parts, : wide * parts].reshape(count, parts, high, parts, wide, 3)
    tiles = tiles.transpose(0, 1, 3, 2, 4, 5).reshape(count, parts * parts, high, wide, 3)
    orders = [np.random.default_rng(index).permutation(parts * parts) for index in range(count)]
    shuffled = np.stack([image[order] for image, order in zip(tiles, orders, strict=True)])
    shuffled = shuffled.reshape(count, parts, parts, high, wide, 3).transpose(0, 1, 3, 2, 4, 5)
    patched: np.ndarray = np.array(pixels)
    patched[:, : high * parts, : wide * parts] = shuffled.reshape(count, high * parts, wide * parts, 3)
    return patched


#: Input of the students: the whole image, or the image without colour, surface or shape. Each function takes
#: and returns uint8 pixels [N, height, width, 3].
INPUTS = {"photos": _unchanged, "grey": _grey, "edges": _edges, "patches": _patches}


@dataclass(frozen=True)
class ProbeSettings:
    """Settings of `probe`.

    Attributes:
        points: most values of k on the curve, beside those of the last 1, 2 and 4 layer groups.
        ablations: which of `ABLATIONS`.
    """

    points: int = 6
    ablations: tuple[str, ...] = ABLATIONS

    def __post_init__(self) -> None:
        for name in self.ablations:
            if name not in ABLATIONS:
                raise ConfigError(
                    f"no ablation {name!r}{nearest(name, ABLATIONS)}; there are {', '.join(ABLATIONS)}"
                )


@dataclass(frozen=True)
class CurvePoint:
    """A student whose first layer groups learned one domain and whose others learned the other.

    Attributes:
        first: the domain of the first layer groups, "synthetic" or "real".
        k: number of layer groups that learned it.
        top1: on the test photos.
    """

    first: str
    k: int
    top1: float


@dataclass(frozen=True)
class EfficiencyPoint:
    """A student that learned a share of the real photos.

    Attributes:
        fraction: share of the photos.
        photos: their number.
        strategy: layers that learned them: "last-1", "last-2" or "last-4" of the synthetic student, or
            "real only", all layers from the initial weights.
        top1: on the test photos.
    """

    fraction: float
    photos: int
    strategy: str
    top1: float


@dataclass(frozen=True)
class Ablation:
    """The students of both domains with one other cause changed.

    Attributes:
        change: the cause.
        synthetic: top-1 of the synthetic student.
        real: top-1 of the real student; None where the change does not concern it.
    """

    change: str
    synthetic: float
    real: float | None = None


@dataclass(frozen=True)
class Gap:
    """The gap between the domains.

    Attributes:
        synthetic: top-1 of the student of synthetic images alone.
        real: top-1 of the student of real photos alone.
        points: the difference in percentage points.
    """

    synthetic: float
    real: float
    points: float


@dataclass(frozen=True)
class ProbeResult:
    """Everything that `probe` measured.

    Attributes:
        layer_groups: name of the first layer of each group, from input to head.
        curve: top-1 over k, for both orders of the domains.
        gap: its ends.
        recovered: number of last layer groups -> share of the gap that real photos recover in them; None
            where synthetic images are not behind.
        efficiency: top-1 over the number of real photos.
        ablations: other causes.
        n_test: test photos.
        n_classes: number of classes.
        settings: of `probe`, `train`, and the number of gradient steps.
        versions: package -> version.
    """

    layer_groups: list[str]
    curve: list[CurvePoint]
    gap: Gap
    recovered: dict[str, float | None]
    efficiency: list[EfficiencyPoint]
    ablations: list[Ablation]
    n_test: int
    n_classes: int
    settings: dict[str, Any]
    versions: dict[str, str]

    @property
    def advice(self) -> str:
        """One sentence: what to do about the gap."""
        return advice(self.gap, self.recovered, self.n_test, self.n_classes)

    def to_json(self) -> dict[str, Any]:
        """Plain data for a JSON file."""
        return {**asdict(self), "advice": self.advice}


@dataclass(frozen=True)
class Probe:
    """The two domains, and the photos to test on.

    Attributes:
        synthetic: class folders of generated images.
        real: photos to learn.
        test: photos to test on.
        training: of `train`; its student, weights, learning rate, batch size and number of epochs.
        root: holds a folder per student.
        reference_set: the synthetic set that steps and input size follow from; None: `synthetic`.
        students: domain -> its student, once it is trained.
    """

    synthetic: ImageSet
    real: ImageSet
    test: ImageSet
    training: TrainSettings
    root: Path
    reference_set: ImageSet | None = None
    students: dict[str, Student] = field(default_factory=dict)

    @cached_property
    def initial(self) -> Student:
        """The student that every training begins with."""
        return untrained_student(self.training, TrainingData(self.reference_set or self.synthetic, self.real))

    @cached_property
    def labels(self) -> np.ndarray:
        """Class index of every test photo."""
        return self.test.labels

    def images(self, domain: str) -> ImageSet:
        """The set of a domain."""
        return self.synthetic if domain == SYNTHETIC else self.real

    def fit_settings(self) -> FitSettings:
        """Settings of every training: as many steps as `train` takes on the synthetic images.

        All layers have one learning rate, because a student that was split has no layer groups.
        """
        steps = synthetic_steps(self.training, TrainingData(self.reference_set or self.synthetic, None))
        return real_fit_settings(replace(self.training, real_steps=steps, layer_decay=1.0))

    def measured(self, name: str, measure: Callable[[Path], float], **about: Any) -> float:
        """The top-1 that `measure` returns, now or in an earlier run.

        Args:
            name: of the folder.
            measure: trains and tests a student; takes the folder to write into.
            about: whatever else decides the result.
        """
        inputs = {"synthetic": self.synthetic.digest, "real": self.real.digest, "test": self.test.digest}
        if self.reference_set:
            inputs["reference_set"] = self.reference_set.digest
        if self.training.weights:
            inputs["weights"] = weights_fingerprint(Path(self.training.weights))
        key = Key(inputs, {"train": self.training}, about)
        stage = FunctionStage("probe", self.root / name, key, lambda work: {"top1": measure(work)})
        return float(run_stage(stage).manifest.metrics["top1"])

    def score(self, student: Student, inputs: str = "photos") -> float:
        """Top-1 on the test photos."""
        pixels = INPUTS[inputs](self.test.load(student.preprocessing))
        return top1(np.asarray(student.logits(pixels).argmax(1).numpy()), self.labels)

    def train(self, domain: str, inputs: str = "photos", augment: str | None = None) -> float:
        """Train all layers on one domain; returns the top-1 of the student, which `student` then loads."""
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

        return self.measured(name, measure, domain=domain, inputs=inputs, augment=augment)

    def student(self, domain: str) -> Student:
        """The student that learned a domain with all layers."""
        from synthkit.learning.students import load_student

        if domain not in self.students:
            self.train(domain)
            self.students[domain] = load_student(self.root / f"{domain}-photos-{self.training.augment}")
        return self.students[domain].clone()


def _examples(images: ImageSet, student: Student, inputs: str = "photos") -> Examples:
    from synthkit.learning.fit import Examples

    pixels = INPUTS[inputs](images.load(student.preprocessing))
    return Examples(images, student.preprocessing, pixels)


class FrozenThenTrainable:
    """Batches for the layers behind the frozen ones: features of a fresh augmented view in every step."""

    def __init__(self, examples: Examples, whole: Student, frozen: Layers) -> None:
        self._examples, self._whole, self._frozen = examples, whole, frozen

    def __len__(self) -> int:
        return len(self._examples)

    def batch(
        self, student: Student, picked: np.ndarray, step: int, settings: FitSettings
    ) -> tuple[tuple[torch.Tensor, ...], torch.Tensor]:
        """Inputs of the trainable layers, and soft targets [B, classes]."""
        import torch

        (images,), targets = self._examples.batch(self._whole, picked, step, settings)
        with torch.no_grad():
            return self._frozen(images), targets


def mixed_student(probe: Probe, first: str, count: int) -> Student:
    """Layer groups 1..count from the student of one domain; the others learn the other domain from the start.

    Args:
        probe: the sets.
        first: the domain of the first layer groups.
        count: number of them, at least one and not all.

    Raises:
        ModelError: the student cannot be split into layer groups.
    """
    from synthkit.learning.feature_cache import split
    from synthkit.learning.fit import fit

    student, learned = probe.initial.clone(), probe.student(first)
    copy_layer_groups(learned, student, count)
    student.train_only_last(len(student.layer_groups()) - count)
    try:
        cut = split(student)
    except NotImplementedError as error:
        raise ModelError(f"`probe` cannot split this student: {error}; use another --student") from None
    other = _examples(probe.images(REAL if first == SYNTHETIC else SYNTHETIC), student)
    batches: BatchSource = FrozenThenTrainable(other, student, cut.frozen)
    fit(cut.trained, batches, probe.fit_settings(), label=f"{count} layer groups of {first}")
    student.model.eval()
    return student


def copy_layer_groups(source: Student, target: Student, count: int) -> None:
    """Copy weights and statistics of the first layer groups of one student into another, in place."""
    names = {name for group in source.layer_groups()[:count] for name in group}
    owners = {name.rpartition(".")[0] for name in names}
    state, own = source.model.state_dict(), target.model.state_dict()
    taken = {key: value for key, value in state.items() if key in names or key.rpartition(".")[0] in owners}
    target.model.load_state_dict({**own, **taken})


def curve_points(groups: int, count: int) -> list[int]:
    """The values of k to measure: some evenly spaced, and those that leave the last 1, 2 and 4 layer groups.

    Args:
        groups: layer groups of the student.
        count: most evenly spaced values.
    """
    even = np.linspace(1, groups - 1, max(2, count)).round().astype(int).tolist()
    return sorted({k for k in (*even, groups - 1, groups - 2, groups - 4) if 0 < k < groups})


def curve(probe: Probe, count: int) -> Iterator[CurvePoint]:
    """Top-1 for every k and both orders; k = 0 and k = all are the students of one domain alone."""
    groups = len(probe.initial.layer_groups())
    for first, second in ((SYNTHETIC, REAL), (REAL, SYNTHETIC)):
        yield CurvePoint(first, 0, probe.train(second))
        for k in curve_points(groups, count):

            def measure(_work: Path, first: str = first, k: int = k) -> float:
                return probe.score(mixed_student(probe, first, k))

            yield CurvePoint(first, k, probe.measured(f"{first}-to-{k}", measure, first=first, k=k))
        yield CurvePoint(first, groups, probe.train(first))


def share(images: ImageSet, fraction: float, seed: int) -> ImageSet:
    """A share of every class, at least one image; a larger share of the same seed contains the smaller."""
    numbers = [max(1, math.floor(fraction * number)) for number in images.counts().values()]
    return images.subset(sample(images, numbers, seed))


def efficiency(probe: Probe, settings: AdaptSettings) -> Iterator[EfficiencyPoint]:
    """Top-1 after the last 1, 2, 4 layer groups of the synthetic student learned a share of the real photos.

    Beside them all layers from the initial weights on the same share, in as many steps as all others.
    """
    for fraction in FRACTIONS:
        photos = share(probe.real, fraction, probe.training.seed)
        for strategy in LAST:
            top = _last_layer_groups(probe, settings, strategy, photos)
            yield EfficiencyPoint(fraction, len(photos), strategy.value, top)
        yield EfficiencyPoint(fraction, len(photos), "real only", _real_only(probe, photos))


def _last_layer_groups(probe: Probe, settings: AdaptSettings, strategy: Strategy, photos: ImageSet) -> float:
    asked = replace(settings, strategy=strategy.value)

    def measure(_work: Path) -> float:
        student = probe.student(SYNTHETIC)
        start = StartingStudent(student, True, None)
        task = AdaptationTask(start, _examples(photos, student), asked, probe.training)
        trainable = prepare(strategy, task)
        train_strategy(strategy, task, trainable)
        return probe.score(trainable.student)

    name = f"{strategy.value}-{len(photos)}-photos"
    return probe.measured(name, measure, photos=photos.digest, adapt=asdict(asked))


def _real_only(probe: Probe, photos: ImageSet) -> float:
    def measure(_work: Path) -> float:
        from synthkit.learning.fit import fit

        student = probe.initial.clone()
        student.model.requires_grad_(True)
        fit(student, _examples(photos, student), probe.fit_settings(), label=f"{len(photos)} photos")
        return probe.score(student)

    return probe.measured(f"real-{len(photos)}-photos", measure, photos=photos.digest)


def ablations(probe: Probe, names: Sequence[str]) -> Iterator[Ablation]:
    """Top-1 of the synthetic student, and of the real one, with one other cause changed."""
    if "statistics" in names:
        yield Ablation("BatchNorm statistics of real photos", _with_real_statistics(probe))
    if "augmentation" in names:
        for augment in _AUGMENTATIONS:
            both = {domain: probe.train(domain, augment=augment) for domain in (SYNTHETIC, REAL)}
            yield Ablation(f"augmentation {augment}", **both)
    if "inputs" in names:
        for inputs in INPUTS:
            if inputs != "photos":
                both = {domain: probe.train(domain, inputs) for domain in (SYNTHETIC, REAL)}
                yield Ablation(f"inputs {inputs}", **both)


def _with_real_statistics(probe: Probe) -> float:
    """Top-1 of the synthetic student with the BatchNorm statistics of the real photos."""

    def measure(_work: Path) -> float:
        import torch

        from synthkit.learning.students import to_unit_range

        student = probe.student(SYNTHETIC)
        kind = torch.nn.modules.batchnorm._BatchNorm
        for norm in (module for module in student.model.modules() if isinstance(module, kind)):
            norm.reset_running_stats()
            # The mean over all batches.
            norm.momentum = None
            norm.train()
        pixels = probe.real.load(student.preprocessing)
        with torch.no_grad():
            for batch in np.array_split(np.arange(len(pixels)), math.ceil(len(pixels) / 128)):
                student.model(student.normalise(to_unit_range(pixels[batch])))
        return probe.score(student)

    return probe.measured("real-statistics", measure, ablation="statistics")


def other_prompts(probe: Probe, others: Mapping[str, ImageSet]) -> Iterator[Ablation]:
    """Top-1 of students of other synthetic sets, such as one from captions of the real photos."""
    for name, images in others.items():
        other = replace(
            probe,
            synthetic=images.with_classes(probe.real.classes),
            students={},
            root=probe.root / f"prompts-{name}",
            reference_set=probe.synthetic,
        )
        yield Ablation(f"prompts {name}", other.train(SYNTHETIC))


def held_out(real: ImageSet, test: ImageSet | None, seed: int) -> tuple[ImageSet, ImageSet]:
    """Photos to learn and photos to test on: the test images, or a quarter of each class.

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
) -> ProbeResult:
    """Measure everything.

    Args:
        probe: the domains.
        settings: what to measure.
        adapt: how the last layer groups learn the real photos.
        others: name -> other synthetic set, see `other_prompts`.

    Raises:
        DataError: the sets are of different classes.
    """
    # Refuses different classes.
    _ = TrainingData(probe.synthetic, probe.real).classes
    points = list(curve(probe, settings.points))
    gap, shares = recovered(points)
    return ProbeResult(
        layer_groups=[group[0].rpartition(".")[0] for group in probe.initial.layer_groups()],
        curve=points,
        gap=gap,
        recovered=shares,
        efficiency=list(efficiency(probe, adapt)),
        ablations=[*ablations(probe, settings.ablations), *other_prompts(probe, others)],
        n_test=len(probe.test),
        n_classes=len(probe.test.classes),
        settings={
            **asdict(settings),
            "train": asdict(probe.training),
            "steps": probe.fit_settings().steps,
        },
        versions=versions(),
    )


def recovered(points: Sequence[CurvePoint]) -> tuple[Gap, dict[str, float | None]]:
    """The gap, and the share of it that real photos recover in the last 1, 2, 4 layer groups.

    Args:
        points: with k from 0 to all layer groups.
    """
    top = {point.k: point.top1 for point in points if point.first == SYNTHETIC}
    groups = max(top)
    synthetic, real = top[groups], top[0]
    shares = {
        str(count): round((top[groups - count] - synthetic) / (real - synthetic), 4)
        if real > synthetic
        else None
        for count in (1, 2, 4)
        if groups - count in top
    }
    return Gap(synthetic, real, round(100 * (real - synthetic), 2)), shares


def _significant(gap: Gap, n_test: int) -> bool:
    """True if the real student lies above the 95 % interval of the synthetic one."""
    return gap.real > _synthetic_interval(gap, n_test)[1]


def _synthetic_interval(gap: Gap, n_test: int) -> tuple[float, float]:
    return wilson_interval(round(gap.synthetic * n_test), n_test)


def advice(gap: Gap, shares: Mapping[str, float | None], n_test: int, n_classes: int) -> str:
    """One sentence: what to do about the gap.

    Args:
        gap: between the domains.
        shares: number of last layer groups -> share of the gap that they recover.
        n_test: test photos.
        n_classes: number of classes.
    """
    known = {count: share for count, share in shares.items() if share is not None}
    if not _significant(gap, n_test) or not known:
        return _no_gap(gap, n_test, n_classes)
    enough = [count for count, share in known.items() if share >= _ENOUGH]
    if enough:
        return (
            f"Real photos for the last {enough[0]} layer group(s) recover {known[enough[0]]:.0%} of the gap "
            f"of {gap.points:.1f} points: adapt with --strategy last-{enough[0]}."
        )
    best = max(known, key=lambda count: known[count])
    return (
        f"Even the last {best} layer groups recover only {known[best]:.0%} of the gap of {gap.points:.1f} "
        "points, so it begins before them: train all layers on the photos (--strategy full), or generate "
        "better images."
    )


def _no_gap(gap: Gap, n_test: int, n_classes: int) -> str:
    about = f"{gap.synthetic:.1%} with synthetic images, {gap.real:.1%} with real photos"
    halfway_from_chance = (1 + 1 / n_classes) / 2
    if max(gap.synthetic, gap.real) < halfway_from_chance:
        return f"No gap to see yet: {about}, so neither student has learned much; give more --epochs."
    low, high = _synthetic_interval(gap, n_test)
    return (
        f"No gap to close: {about}, and {n_test} photos show no difference below "
        f"{100 * (high - low) / 2:.1f} points."
    )


def probe_markdown(result: ProbeResult) -> str:
    """All tables, and the advice."""
    lines = [f"Top-1 on {result.n_test} real photos", "", *_curve_table(result)]
    if _significant(result.gap, result.n_test):
        shares = result.recovered.items()
        lines.append("")
        lines += [f"- last {n} layer group(s): {s:.0%} of the gap" for n, s in shares if s is not None]
    if result.efficiency:
        lines += ["", *_efficiency_table(result.efficiency)]
    if result.ablations:
        lines += ["", "| change | synthetic | real |", "|---|---:|---:|"]
        lines += [
            f"| {row.change} | {_cell(row.synthetic)} | {_cell(row.real)} |" for row in result.ablations
        ]
    return "\n".join([*lines, "", result.advice])


def _cell(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def _curve_table(result: ProbeResult) -> Iterator[str]:
    top = {(point.first, point.k): point.top1 for point in result.curve}
    yield "| layer groups 1..k | up to | first synthetic, then real | first real, then synthetic |"
    yield "|---:|---|---:|---:|"
    for k in sorted({k for _, k in top}):
        last = result.layer_groups[k - 1] if k else ""
        yield f"| {k} | {last} | {_cell(top[SYNTHETIC, k])} | {_cell(top[REAL, k])} |"


def _efficiency_table(points: Sequence[EfficiencyPoint]) -> Iterator[str]:
    strategies = list(dict.fromkeys(point.strategy for point in points))
    top = {(point.photos, point.strategy): point.top1 for point in points}
    yield f"| real photos | {' | '.join(strategies)} |"
    yield "|---:" * (1 + len(strategies)) + "|"
    for photos in sorted({photos for photos, _ in top}):
        yield f"| {photos} | {' | '.join(_cell(top[photos, strategy]) for strategy in strategies)} |"


def plot_probe(result: ProbeResult, path: Path) -> None:
    """The curve over k, and beside it the one over the number of real photos."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    over_groups, over_photos = figure.subplots(1, 2, sharey=True)
    for first, second in ((SYNTHETIC, REAL), (REAL, SYNTHETIC)):
        of_order = [(point.k, point.top1) for point in result.curve if point.first == first]
        over_groups.plot(*zip(*of_order, strict=True), marker="o", label=f"1..k {first}, rest {second}")
    over_groups.set(xlabel="k, layer groups that learned the first domain", ylabel="top-1 on real photos")
    for strategy in dict.fromkeys(point.strategy for point in result.efficiency):
        of_strategy = [
            (point.photos, point.top1) for point in result.efficiency if point.strategy == strategy
        ]
        over_photos.plot(*zip(*of_strategy, strict=True), marker="o", label=strategy)
    over_photos.set_xscale("log", base=2)
    over_photos.set_xticks(sorted({point.photos for point in result.efficiency}))
    over_photos.xaxis.set_major_formatter("{x:g}")
    over_photos.set(xlabel="real photos")
    for axes in (over_groups, over_photos):
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(path, dpi=100)
