"""`train`: a student from synthetic images and photos, by one of several training methods.

The default is bridged transfer++ (Li et al. 2024, arXiv 2403.19866):

timm student ──all layers on synthetic, Mixup──► student/synthetic/ ──new head, all layers on real──► student/

Without synthetic images the second phase alone remains, which is vanilla transfer; without photos the first.
All methods train every layer:

    vanilla          photos
    vanilla-matched  photos, for as many gradient steps as both phases of bridged transfer
    vanilla-mixup    the same, with Mixup
    synthetic        synthetic images (Mixup)
    mixed            both in one set
    joint            both, half a batch each; loss 0.8 photos + 0.2 synthetic
    mixed-auxbn      both, half a batch each; synthetic images have BatchNorms of their own
    bridged          synthetic images ──head kept──► photos
    bridged++        synthetic images (Mixup) ──new head──► photos

Vanilla, mixed and bridged transfer are compared by Li et al. 2024. The joint loss and its weights are those
of DISEF (arXiv 2312.03046) and DataDream (arXiv 2407.10910). The auxiliary BatchNorm is that of AdvProp
(arXiv 1911.09665), used for synthetic images by Yu et al. (arXiv 2312.02253).
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from enum import Enum
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Final

import numpy as np

from synthkit.artifacts import Key, fingerprint
from synthkit.data.images import ImageSet
from synthkit.data.splits import k_shot
from synthkit.errors import ConfigError, DataError
from synthkit.learning.curves import CURVES
from synthkit.metrics.classification import top1
from synthkit.recipes.settings import TrainSettings

if TYPE_CHECKING:
    from synthkit.learning.fit import BatchSource, FitSettings
    from synthkit.learning.students import Student

log = logging.getLogger(__name__)


# Input side of a student that starts from random weights and real photos alone.
_SMALL = 64
_LARGEST = 224

# Images per step on photos alone: photos are few, and a larger batch would only repeat them.
_REAL_BATCH = 32

BRIDGED: Final = "bridged++"


class Domain(Enum):
    """The images that a training phase learns from."""

    SYNTHETIC = "synthetic"
    REAL = "real"
    MIXED = "mixed"

    @property
    def steps_metric(self) -> str:
        """Name of the metric that counts the gradient steps on these images."""
        return f"{self.value}_steps"


@dataclass(frozen=True)
class Phase:
    """One run of `fit` over all layers.

    Attributes:
        domain: the images.
        all_steps: take the gradient steps of both phases of bridged transfer instead of the domain's own.
        mixup: use Mixup.
        new_head: begin with a freshly initialised head.
        real_share: default share of photos in a mixed batch; None: their share of all images.
        weighted_loss: add up the mean losses of photos and synthetic images with the weights of the settings.
        auxiliary_norm: pass synthetic images through BatchNorms of their own.
    """

    domain: Domain
    all_steps: bool = False
    mixup: bool = False
    new_head: bool = False
    real_share: float | None = None
    weighted_loss: bool = False
    auxiliary_norm: bool = False


@dataclass(frozen=True)
class TrainingMethod:
    """A sequence of training phases.

    Attributes:
        title: short description for tables.
        phases: in order; of two, the one without images is left out.
    """

    title: str
    phases: tuple[Phase, ...]


#: Name -> training method, as `--method` takes it.
METHODS = {
    "vanilla": TrainingMethod("photos alone", (Phase(Domain.REAL, new_head=True),)),
    "vanilla-matched": TrainingMethod(
        "photos alone, same number of steps", (Phase(Domain.REAL, all_steps=True, new_head=True),)
    ),
    "vanilla-mixup": TrainingMethod(
        "photos alone with Mixup", (Phase(Domain.REAL, all_steps=True, mixup=True, new_head=True),)
    ),
    "synthetic": TrainingMethod("synthetic only", (Phase(Domain.SYNTHETIC, mixup=True),)),
    "mixed": TrainingMethod("both in one set", (Phase(Domain.MIXED, all_steps=True),)),
    "joint": TrainingMethod(
        "joint loss", (Phase(Domain.MIXED, all_steps=True, real_share=0.5, weighted_loss=True),)
    ),
    "mixed-auxbn": TrainingMethod(
        "both, auxiliary BatchNorm",
        (Phase(Domain.MIXED, all_steps=True, real_share=0.5, auxiliary_norm=True),),
    ),
    "bridged": TrainingMethod("bridged", (Phase(Domain.SYNTHETIC), Phase(Domain.REAL))),
    BRIDGED: TrainingMethod(
        "bridged++", (Phase(Domain.SYNTHETIC, mixup=True), Phase(Domain.REAL, new_head=True))
    ),
}


@dataclass(frozen=True)
class TrainingData:
    """The images that a student learns from; one of the two sets may be absent.

    Attributes:
        synthetic: class folders of generated images.
        photos: the real few shots.
    """

    synthetic: ImageSet | None
    photos: ImageSet | None

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names in the order of the logits.

        Raises:
            DataError: photos and synthetic images are of different classes.
            ConfigError: there is nothing to learn from.
        """
        if self.synthetic and self.photos and self.synthetic.classes != self.photos.classes:
            differing = sorted(set(self.synthetic.classes) ^ set(self.photos.classes))
            raise DataError(
                f"synthetic images and photos differ in the classes {', '.join(differing)}; "
                "run `synthkit generate --real-dir` on these photos"
            )
        images = self.photos or self.synthetic
        if images is None:
            raise ConfigError("nothing to train on; give --synth-dir, --real-dir or both")
        return images.classes


@dataclass(frozen=True)
class Train:
    """The stage `train`.

    Attributes:
        settings: of the stage.
        out: the student's folder.
        synthetic: generated images, or their folder, which the stages before may have yet to write; None: no
            synthetic images.
        photos: the real few shots; None: no photos.
    """

    name: ClassVar[str] = "train"
    version: ClassVar[int] = 1

    settings: TrainSettings
    out: Path
    synthetic: Path | ImageSet | None = None
    photos: ImageSet | None = None

    def check(self, *, fetch: bool) -> None:
        """Refuse settings that no method can use, and a student that timm does not know.

        Args:
            fetch: has no part in this stage; pretrained weights are fetched when it runs.

        Raises:
            ConfigError: see `check_settings`; or there are no weights.
            ModelError: timm knows no such student.
        """
        from synthkit.learning.students import check_architecture

        check_settings(self.settings)
        check_architecture(self.settings.student)
        if self.settings.weights:
            weights_fingerprint(Path(self.settings.weights))

    @cached_property
    def data(self) -> TrainingData:
        """The images that the student learns from."""
        given = self.synthetic
        return TrainingData(ImageSet.scan(given) if isinstance(given, Path) else given, self.photos)

    def key(self) -> Key:
        """Images and weights by content.

        Raises:
            ConfigError, DataError: see `TrainingData.classes` and `phases`.
        """
        data, settings = self.data, self.settings
        inputs = {"classes": ",".join(data.classes)}
        learned = {phase.domain for phase in phases(settings, data)}
        # Without a phase of their own, synthetic images still determine the input size.
        if data.synthetic:
            inputs["synthetic"] = data.synthetic.digest
        if data.photos and learned != {Domain.SYNTHETIC}:
            inputs["photos"] = data.photos.digest
        if settings.weights:
            inputs["weights"] = weights_fingerprint(Path(settings.weights))
        return Key(inputs, {self.name: settings})

    def run(self, work: Path, previous: Path | None) -> dict[str, Any]:
        """Run the phases of the training method.

        Returns:
            The numbers of images and of gradient steps.

        Raises:
            ModelError: the student is unknown, or its weights are absent or do not fit.
            ConfigError: training came to nothing, see `synthkit.learning.fit.fit`.
        """
        steps = {Domain.SYNTHETIC.steps_metric: 0, Domain.REAL.steps_metric: 0}
        student, settings, data = None, self.settings, self.data
        for phase in phases(settings, data):
            if phase.domain is Domain.SYNTHETIC:
                student = synthetic_student(settings, data, work)
            else:
                student = student or untrained_student(settings, data)
                run_phase(student, phase, settings, data, work)
            steps[phase.domain.steps_metric] = _gradient_steps(phase, settings, data)
        assert student is not None
        student.save(work)
        return {"n_synthetic": len(data.synthetic or ()), "n_real": len(data.photos or ()), **steps}


def check_settings(settings: TrainSettings) -> None:
    """Refuse values that no method can use.

    Raises:
        ConfigError: names every such option with its value and range.
    """
    share, parts = settings.real_share, settings.accumulate
    batches = {settings.batch_size, min(settings.batch_size, _REAL_BATCH)}
    problems = [
        (share is not None and not 0 < share < 1, f"[train] real_share = {share}: must lie between 0 and 1"),
        (settings.real_weight > 1, f"[train] real_weight = {settings.real_weight}: must be at most 1"),
        (
            not 0 < settings.layer_decay <= 1,
            f"[train] layer_decay = {settings.layer_decay}: must be above 0 and at most 1",
        ),
        (settings.ema >= 1, f"[train] ema = {settings.ema}: must be below 1, for example 0.99"),
        (
            parts > 1 and any(size % (2 * parts) for size in batches),
            f"[train] accumulate = {parts}: batches of {' and '.join(map(str, sorted(batches)))} images "
            "cannot be cut into so many equal parts of two images or more",
        ),
        (
            settings.method == "mixed-auxbn" and settings.batch_size % 2,
            f"[train] batch_size = {settings.batch_size}: mixed-auxbn takes half of each kind, so it must be "
            "even",
        ),
    ]
    if messages := [text for wrong, text in problems if wrong]:
        raise ConfigError("; ".join(messages))


def weights_fingerprint(path: Path) -> str:
    """Digest of the weights that training starts from.

    Raises:
        ConfigError: there are none.
    """
    if not path.exists():
        raise ConfigError(f"no weights {path}; give a timm folder or a .safetensors file with --weights")
    return fingerprint(path)


def phases(settings: TrainSettings, data: TrainingData) -> list[Phase]:
    """The phases of the training method for which there are images.

    Raises:
        ConfigError: there is none, or nothing determines its number of steps.
    """
    present = {
        Domain.SYNTHETIC: data.synthetic is not None,
        Domain.REAL: data.photos is not None,
        Domain.MIXED: data.synthetic is not None and data.photos is not None,
    }
    wanted = METHODS[settings.method].phases
    possible = [phase for phase in wanted if present[phase.domain]]
    if possible and (data.synthetic or not possible[0].all_steps):
        return possible
    options = {Domain.SYNTHETIC: "--synth-dir", Domain.REAL: "--real-dir"}
    needed = "--synth-dir and --real-dir" if wanted[0].all_steps else options[wanted[0].domain]
    raise ConfigError(
        f"--method {settings.method} needs {needed}"
        + ("; its number of steps follows from the synthetic images" if wanted[0].all_steps else "")
    )


def synthetic_student(settings: TrainSettings, data: TrainingData, work: Path) -> Student:
    """The student after the phase on synthetic images alone, the first of its method.

    The result is kept in `work/synthetic`, where an interrupted run finds it.
    """
    from synthkit.learning.students import CONFIG, SYNTHETIC, load_student

    if (work / SYNTHETIC / CONFIG).exists():
        return load_student(work / SYNTHETIC)
    student = untrained_student(settings, data)
    run_phase(student, METHODS[settings.method].phases[0], settings, data, work)
    student.save(work / SYNTHETIC)
    return student


def run_phase(
    student: Student, phase: Phase, settings: TrainSettings, data: TrainingData, work: Path
) -> None:
    """Train a student through one phase, in place.

    Args:
        student: the student.
        phase: one phase of the settings' method.
        settings: of `train`.
        data: the images to learn from.
        work: folder for the phase's checkpoint and curves.
    """
    from synthkit.learning.auxiliary_norm import auxiliary_norms
    from synthkit.learning.fit import fit
    from synthkit.learning.students import SYNTHETIC

    if phase.new_head:
        student.reset_head(settings.seed)
    student.model.requires_grad_(True)
    remaining, validate = _hold_out(student, phase, settings, data)
    name = phase.domain.value
    checkpoint = work / f".{name}.safetensors"
    norms = auxiliary_norms(student.model, student.architecture) if phase.auxiliary_norm else nullcontext()
    with norms:
        fit(
            student,
            _batches(student, phase, settings, remaining),
            _fit_settings(settings, _gradient_steps(phase, settings, data), phase),
            label=f"train on {name}",
            checkpoint=checkpoint,
            curves=(work / SYNTHETIC if phase.domain is Domain.SYNTHETIC else work) / CURVES,
            held_out=validate,
        )
    checkpoint.unlink(missing_ok=True)


def _hold_out(
    student: Student, phase: Phase, settings: TrainSettings, data: TrainingData
) -> tuple[TrainingData, Callable[[], float] | None]:
    """The data that is left to learn from, and the top-1 on the photos held out, if any are."""
    from synthkit.learning.fit import Examples

    count = settings.held_out
    if not count or data.photos is None or phase.domain is Domain.SYNTHETIC:
        return data, None
    # A copy of a photo that is held out must not be learned.
    photos = data.photos.distinct()
    fewest, name = min((number, name) for name, number in photos.counts().items())
    if fewest < 2 * count:
        log.warning(
            "train: no photos are held out and the last weights are kept, since %s has %d photos; "
            "train.held_out = %d takes %d of each class",
            *(name, fewest, count, 2 * count),
        )
        return data, None
    positions = k_shot(photos, count, settings.seed)
    others = np.setdiff1d(np.arange(len(photos)), positions)
    examples = Examples(photos.subset(positions), student.preprocessing)
    labels = examples.labels.numpy()

    def validate() -> float:
        return top1(examples.logits(student, np.arange(len(examples))).argmax(1), labels)

    return replace(data, photos=photos.subset(others)), validate


def _batches(student: Student, phase: Phase, settings: TrainSettings, data: TrainingData) -> BatchSource:
    """The source of a phase's batches."""
    from synthkit.learning.fit import Examples
    from synthkit.learning.mixed_batches import MixedBatches

    needs_real, needs_synthetic = phase.domain is not Domain.SYNTHETIC, phase.domain is not Domain.REAL
    real = Examples(data.photos, student.preprocessing) if data.photos and needs_real else None
    synthetic = (
        Examples(data.synthetic, student.preprocessing) if data.synthetic and needs_synthetic else None
    )
    if real is None or synthetic is None:
        examples = real or synthetic
        assert examples is not None
        return examples
    # The auxiliary norms take exactly half of each kind.
    chosen = None if phase.auxiliary_norm else settings.real_share
    share = chosen or phase.real_share or len(real) / (len(real) + len(synthetic))
    return MixedBatches(real, synthetic, share, settings.real_weight if phase.weighted_loss else None)


def untrained_student(settings: TrainSettings, data: TrainingData) -> Student:
    """The student before training, with random or pretrained weights."""
    from synthkit.learning.students import new_student

    weights = Path(settings.weights) if settings.weights else None
    size = settings.image_size
    if size is None and not weights and not settings.pretrained:
        size = _native_size(data)
    return new_student(
        settings.student,
        data.classes,
        pretrained=settings.pretrained,
        weights=weights,
        image_size=size,
        seed=settings.seed,
    )


def _native_size(data: TrainingData) -> int:
    """Input side that loses nothing of the synthetic images and wastes nothing on them."""
    if data.synthetic is None:
        return _SMALL
    from PIL import Image

    with Image.open(data.synthetic.items[0].path) as image:
        width, height = image.size
    return int(min(max(width, height), _LARGEST))


def synthetic_steps(settings: TrainSettings, data: TrainingData) -> int:
    """Gradient steps of the phase on synthetic images."""
    if data.synthetic is None:
        return 0
    return settings.epochs * math.ceil(len(data.synthetic) / settings.batch_size)


def _gradient_steps(phase: Phase, settings: TrainSettings, data: TrainingData) -> int:
    if phase.all_steps:
        return synthetic_steps(settings, data) + settings.real_steps
    if phase.domain is Domain.SYNTHETIC:
        return synthetic_steps(settings, data)
    return settings.real_steps


def real_fit_settings(settings: TrainSettings) -> FitSettings:
    """Settings of `fit` for all layers on the photos after the synthetic images."""
    return _fit_settings(settings, settings.real_steps, Phase(Domain.REAL))


def _fit_settings(settings: TrainSettings, steps: int, phase: Phase) -> FitSettings:
    from synthkit.learning.fit import FitSettings

    real = phase.domain is Domain.REAL
    return FitSettings(
        steps,
        settings.lr,
        min(settings.batch_size, _REAL_BATCH) if real else settings.batch_size,
        mixup=settings.mixup if phase.mixup else 0.0,
        seed=settings.seed,
        opt=settings.opt,
        schedule=settings.schedule,
        layer_decay=settings.layer_decay,
        ema=settings.ema,
        augment=settings.augment,
        amp=settings.amp,
        accumulate=settings.accumulate,
        device=settings.device,
    )
