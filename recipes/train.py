"""`train`: bridged transfer++ (Li et al. 2024, arXiv 2403.19866).

timm student ──all layers on synthetic, Mixup──► student/synthetic/ ──new head, all layers on real──► student/

Without synthetic images the second stage alone remains, which is vanilla transfer; without photos the first.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from synthkit.artifacts import Request, StageResult, fingerprint, run_stage
from synthkit.errors import ConfigError, DataError
from synthkit.images import ImageSet
from synthkit.recipes.settings import TrainSettings

if TYPE_CHECKING:
    from synthkit.students import Student
    from synthkit.training import FitSettings

SYNTHETIC = "synthetic"  # subfolder: the student before it has seen a real photo

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


def train_request(settings: TrainSettings, material: Material, out: Path) -> Request:
    """What `train` would make.

    Raises:
        ConfigError, DataError: see `Material.classes`.
    """
    inputs = {"classes": ",".join(material.classes)}
    if material.synthetic:
        inputs["synthetic"] = material.synthetic.digest
    if material.photos:
        inputs["photos"] = material.photos.digest
    if settings.weights:
        inputs["weights"] = weights_fingerprint(Path(settings.weights))
    config = {name: value for name, value in asdict(settings).items() if name != "weights"}
    return Request(stage="train", out=out, inputs=inputs, config=config)


def weights_fingerprint(path: Path) -> str:
    """Digest of the weights that training starts from.

    Raises:
        ConfigError: there are none.
    """
    if not path.exists():
        raise ConfigError(f"no weights {path}; give a timm folder or a .safetensors file with --weights")
    return fingerprint(path)


def train(settings: TrainSettings, material: Material, out: Path, force: bool = False) -> StageResult:
    """Make the student's folder, or find it made.

    Raises:
        ModelError: the student is unknown, or its weights are absent or do not fit.
    """

    def produce(work: Path) -> dict[str, Any]:
        steps = synthetic_steps(settings, material)
        student = synthetic_student(settings, material, work)
        if material.photos:
            real_stage(student, material.photos, settings)
        student.save(work)
        counts = {"n_synthetic": len(material.synthetic or ()), "n_real": len(material.photos or ())}
        return {
            **counts,
            "synthetic_steps": steps,
            "real_steps": settings.real_steps if material.photos else 0,
        }

    return run_stage(train_request(settings, material, out), produce, force=force)


def synthetic_student(settings: TrainSettings, material: Material, work: Path) -> Student:
    """Bridged transfer, step 1: all layers on the synthetic images alone, with Mixup.

    The result is kept in `work/synthetic`, where an interrupted run finds it.
    """
    from synthkit.students import CONFIG, load_student
    from synthkit.training import Examples, fit

    if material.synthetic is None:
        return untrained_student(settings, material)
    if (work / SYNTHETIC / CONFIG).exists():
        return load_student(work / SYNTHETIC)
    student = untrained_student(settings, material)
    examples = Examples(material.synthetic, student.preprocessing)
    fit_settings = _fit_settings(settings, synthetic_steps(settings, material), mixup=settings.mixup)
    checkpoint = work / ".synthetic.safetensors"
    fit(student, examples, fit_settings, label="train on synthetic", checkpoint=checkpoint)
    student.save(work / SYNTHETIC)
    checkpoint.unlink(missing_ok=True)
    return student


def untrained_student(settings: TrainSettings, material: Material) -> Student:
    """The student before any stage, from random or pretrained weights."""
    from synthkit.students import new_student

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


def real_stage(student: Student, photos: ImageSet, settings: TrainSettings) -> None:
    """Bridged transfer++, step 2: a new head, then all layers on the real photos alone, without Mixup."""
    from synthkit.training import Examples, fit

    student.new_head(settings.seed)
    student.model.requires_grad_(True)
    examples = Examples(photos, student.preprocessing)
    fit(student, examples, real_fit_settings(settings), label="train on real")


def real_fit_settings(settings: TrainSettings) -> FitSettings:
    """How all layers learn the real photos."""
    fitted = _fit_settings(settings, settings.real_steps)
    return replace(fitted, batch_size=min(fitted.batch_size, _REAL_BATCH))


def _fit_settings(settings: TrainSettings, steps: int, mixup: float = 0.0) -> FitSettings:
    from synthkit.training import FitSettings

    return FitSettings(steps, settings.lr, settings.batch_size, mixup=mixup, seed=settings.seed)
