"""`train`: a student by one of the procedures, by default bridged transfer++ (Li et al., arXiv 2403.19866).

timm student ──all layers on synthetic, Mixup──► student/synthetic/ ──new head, all layers on real──► student/

Without synthetic images the second stage alone remains, which is vanilla transfer; without photos the first.
What the other procedures do with the same images stands in `synthkit.recipes.procedures`.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from synthkit.artifacts import Key, fingerprint
from synthkit.data.images import ImageSet
from synthkit.data.splits import k_shot
from synthkit.errors import ConfigError, DataError
from synthkit.learning.curves import CURVES
from synthkit.metrics.classification import top1
from synthkit.recipes.procedures import PROCEDURES, Images, Stage
from synthkit.recipes.settings import TrainSettings

if TYPE_CHECKING:
    from synthkit.learning.fit import Batches, FitSettings
    from synthkit.learning.students import Student

log = logging.getLogger(__name__)


# Input side of a student that starts from random weights and real photos alone.
_SMALL = 64
_LARGEST = 224

# Images per step of the real stage: photos are few, and a larger batch would only repeat them.
_REAL_BATCH = 32


@dataclass(frozen=True)
class Material:
    """What a student learns from; one of the two may be absent.

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
        found = self.photos or self.synthetic
        if found is None:
            raise ConfigError("nothing to train on; give --synth-dir, --real-dir or both")
        return found.classes


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
        """Refuse settings that no procedure can use, and a student that timm does not know.

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
    def material(self) -> Material:
        """What the student learns from."""
        given = self.synthetic
        return Material(ImageSet.scan(given) if isinstance(given, Path) else given, self.photos)

    def key(self) -> Key:
        """Images and weights by content.

        Raises:
            ConfigError, DataError: see `Material.classes` and `stages_of`.
        """
        material, settings = self.material, self.settings
        inputs = {"classes": ",".join(material.classes)}
        learned = {stage.images for stage in stages_of(settings, material)}
        if material.synthetic:  # without a stage of their own they still say how large the input is
            inputs["synthetic"] = material.synthetic.digest
        if material.photos and learned != {Images.SYNTHETIC}:
            inputs["photos"] = material.photos.digest
        if settings.weights:
            inputs["weights"] = weights_fingerprint(Path(settings.weights))
        return Key(inputs, {self.name: settings})

    def run(self, work: Path, previous: Path | None) -> dict[str, Any]:
        """Run the stages of the procedure.

        Returns:
            the numbers of images and of gradient steps.

        Raises:
            ModelError: the student is unknown, or its weights are absent or do not fit.
            ConfigError: training came to nothing, see `synthkit.learning.fit.fit`.
        """
        steps = {Images.SYNTHETIC.value: 0, Images.REAL.value: 0}
        student, settings, material = None, self.settings, self.material
        for stage in stages_of(settings, material):
            if stage.images is Images.SYNTHETIC:
                student = synthetic_student(settings, material, work)
            else:
                student = student or untrained_student(settings, material)
                learn(student, stage, settings, material, work)
            steps[stage.images.value] = _steps(stage, settings, material)
        assert student is not None
        student.save(work)
        return {"n_synthetic": len(material.synthetic or ()), "n_real": len(material.photos or ()), **steps}


def check_settings(settings: TrainSettings) -> None:
    """Refuse values that no procedure can use.

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
            settings.procedure == "mixed-auxbn" and settings.batch_size % 2,
            f"[train] batch_size = {settings.batch_size}: mixed-auxbn takes half of each kind, so it must be "
            "even",
        ),
    ]
    if found := [text for wrong, text in problems if wrong]:
        raise ConfigError("; ".join(found))


def weights_fingerprint(path: Path) -> str:
    """Digest of the weights that training starts from.

    Raises:
        ConfigError: there are none.
    """
    if not path.exists():
        raise ConfigError(f"no weights {path}; give a timm folder or a .safetensors file with --weights")
    return fingerprint(path)


def stages_of(settings: TrainSettings, material: Material) -> list[Stage]:
    """The stages of the procedure for which there are images.

    Raises:
        ConfigError: there is none, or nothing says how many steps it takes.
    """
    present = {
        Images.SYNTHETIC: material.synthetic is not None,
        Images.REAL: material.photos is not None,
        Images.BOTH: material.synthetic is not None and material.photos is not None,
    }
    stages = PROCEDURES[settings.procedure].stages
    found = [stage for stage in stages if present[stage.images]]
    if found and (material.synthetic or not found[0].whole):
        return found
    options = {Images.SYNTHETIC: "--synth-dir", Images.REAL: "--real-dir"}
    needed = "--synth-dir and --real-dir" if stages[0].whole else options[stages[0].images]
    raise ConfigError(
        f"--procedure {settings.procedure} needs {needed}"
        + ("; how many steps it takes follows from the synthetic images" if stages[0].whole else "")
    )


def synthetic_student(settings: TrainSettings, material: Material, work: Path) -> Student:
    """The student after the stage of the synthetic images alone, which is the first of its procedure.

    The result is kept in `work/synthetic`, where an interrupted run finds it.
    """
    from synthkit.learning.students import CONFIG, SYNTHETIC, load_student

    if (work / SYNTHETIC / CONFIG).exists():
        return load_student(work / SYNTHETIC)
    student = untrained_student(settings, material)
    learn(student, PROCEDURES[settings.procedure].stages[0], settings, material, work)
    student.save(work / SYNTHETIC)
    return student


def learn(student: Student, stage: Stage, settings: TrainSettings, material: Material, work: Path) -> None:
    """Run one stage on a student, in place.

    Args:
        student: what is trained.
        stage: how.
        settings: of the command.
        material: what there is to learn from.
        work: folder for the stage's checkpoint and curves.
    """
    from synthkit.learning.auxiliary_norm import auxiliary_norms
    from synthkit.learning.fit import fit
    from synthkit.learning.students import SYNTHETIC

    if stage.new_head:
        student.new_head(settings.seed)
    student.model.requires_grad_(True)
    kept, look = _held_out(student, stage, settings, material)
    kind = stage.images.name.lower()
    checkpoint = work / f".{kind}.safetensors"
    norms = auxiliary_norms(student.model, student.architecture) if stage.auxiliary_norm else nullcontext()
    with norms:
        fit(
            student,
            _lesson(student, stage, settings, kept),
            _fit_settings(settings, _steps(stage, settings, material), stage),
            label=f"train on {kind}",
            checkpoint=checkpoint,
            curves=(work / SYNTHETIC if stage.images is Images.SYNTHETIC else work) / CURVES,
            held_out=look,
        )
    checkpoint.unlink(missing_ok=True)


def _held_out(
    student: Student, stage: Stage, settings: TrainSettings, material: Material
) -> tuple[Material, Callable[[], float] | None]:
    """What is left to learn from, and what looks at the photos held out of a stage that learns photos."""
    from synthkit.learning.fit import Examples

    count = settings.held_out
    if not count or material.photos is None or stage.images is Images.SYNTHETIC:
        return material, None
    photos = material.photos.distinct()  # a copy of a photo held out must not be learned
    fewest, name = min((number, name) for name, number in photos.counts().items())
    if fewest < 2 * count:
        log.warning(
            "train: no photos are held out and the last weights are kept, since %s has %d photos; "
            "train.held_out = %d takes %d of each class",
            *(name, fewest, count, 2 * count),
        )
        return material, None
    positions = k_shot(photos, count, settings.seed)
    others = np.setdiff1d(np.arange(len(photos)), positions)
    examples = Examples(photos.subset(positions), student.preprocessing)
    labels = examples.labels.numpy()

    def look() -> float:
        return top1(examples.logits(student, np.arange(len(examples))).argmax(1), labels)

    return replace(material, photos=photos.subset(others)), look


def _lesson(student: Student, stage: Stage, settings: TrainSettings, material: Material) -> Batches:
    """What a stage draws its batches from."""
    from synthkit.learning.fit import Examples
    from synthkit.learning.mixed_batches import Blend

    real, synthetic = (
        Examples(images, student.preprocessing) if images and stage.images is not absent else None
        for images, absent in ((material.photos, Images.SYNTHETIC), (material.synthetic, Images.REAL))
    )
    if real is None or synthetic is None:
        lesson = real or synthetic
        assert lesson is not None
        return lesson
    asked_for = None if stage.auxiliary_norm else settings.real_share  # its norms take halves
    share = asked_for or stage.share or len(real) / (len(real) + len(synthetic))
    return Blend(real, synthetic, share, settings.real_weight if stage.weighted else None)


def untrained_student(settings: TrainSettings, material: Material) -> Student:
    """The student before any stage, from random or pretrained weights."""
    from synthkit.learning.students import new_student

    weights = Path(settings.weights) if settings.weights else None
    size = settings.image_size
    if size is None and not weights and not settings.pretrained:
        size = _natural_size(material)
    return new_student(
        settings.student,
        material.classes,
        pretrained=settings.pretrained,
        weights=weights,
        image_size=size,
        seed=settings.seed,
    )


def _natural_size(material: Material) -> int:
    """Input side that loses nothing of the synthetic images and wastes nothing on them."""
    if material.synthetic is None:
        return _SMALL
    from PIL import Image

    with Image.open(material.synthetic.items[0].path) as image:
        width, height = image.size
    return int(min(max(width, height), _LARGEST))


def synthetic_steps(settings: TrainSettings, material: Material) -> int:
    """Gradient steps of the synthetic stage."""
    if material.synthetic is None:
        return 0
    return settings.epochs * math.ceil(len(material.synthetic) / settings.batch_size)


def _steps(stage: Stage, settings: TrainSettings, material: Material) -> int:
    """Gradient steps of a stage."""
    if stage.whole:
        return synthetic_steps(settings, material) + settings.real_steps
    if stage.images is Images.SYNTHETIC:
        return synthetic_steps(settings, material)
    return settings.real_steps


def real_fit_settings(settings: TrainSettings) -> FitSettings:
    """How all layers learn the real photos after the synthetic images."""
    return _fit_settings(settings, settings.real_steps, Stage(Images.REAL))


def _fit_settings(settings: TrainSettings, steps: int, stage: Stage) -> FitSettings:
    from synthkit.learning.fit import FitSettings

    real = stage.images is Images.REAL
    return FitSettings(
        steps,
        settings.lr,
        min(settings.batch_size, _REAL_BATCH) if real else settings.batch_size,
        mixup=settings.mixup if stage.mixup else 0.0,
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
