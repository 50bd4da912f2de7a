"""A trained student becomes a verified bundle: ONNX files, golden outputs, facts, a predictor."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, Protocol

import numpy as np

import synthkit
from synthkit.artifacts import Key, fingerprint
from synthkit.data.images import ImageSet, Preprocessing
from synthkit.data.splits import check_disjoint
from synthkit.engines.bundle import format as bundle
from synthkit.engines.bundle.head import fill_replay_buffer
from synthkit.errors import BundleError, ModelError
from synthkit.recipes.exporting.precisions import (
    TestSet,
    chosen_precisions,
    make_precisions,
    measure,
    settle_default,
)
from synthkit.recipes.settings import ExportSettings

_NOISE_IMAGES = 8
_SEEN_AT_MOST = 256  # of the photos and of the synthetic images: enough for ranges and for what is held out


class ExportableStudent(Protocol):
    """What a bundle needs of a student."""

    @property
    def model(self) -> Any:
        """Torch module that gives logits from normalised float NCHW images."""

    @property
    def preprocessing(self) -> Preprocessing:
        """How an image becomes its input."""

    @property
    def classes(self) -> Sequence[str]:
        """Class names in the order of the logits."""


@dataclass(frozen=True)
class Images:
    """The images that an export may look at.

    Attributes:
        photos: what the student was trained on. They serve for the parity check, as golden inputs and for
            int8's ranges, and are refused as test images. Without them, parity is checked on noise.
        synthetic: synthetic images; they give int8 its ranges as well.
        test: measures every precision.
    """

    photos: ImageSet | None = None
    synthetic: ImageSet | None = None
    test: ImageSet | None = None

    def given(self) -> dict[str, ImageSet]:
        """Name -> image set, of those that were given."""
        sets = {"photos": self.photos, "synthetic": self.synthetic, "test": self.test}
        return {name: images for name, images in sets.items() if images is not None}


@dataclass(frozen=True)
class Export:
    """The stage `export`: timm folder -> bundle.

    Attributes:
        settings: precisions and target.
        student_dir: the student's timm folder, which the stages before may have yet to write.
        out: the bundle's folder.
        images: what may be looked at.
    """

    name: ClassVar[str] = "export"
    version: ClassVar[int] = 1

    settings: ExportSettings
    student_dir: Path
    out: Path
    images: Images = field(default_factory=Images)

    def check(self, *, fetch: bool) -> None:
        """Refuse settings that contradict each other, and test images that were learned.

        Args:
            fetch: has no part in this stage.

        Raises:
            ConfigError: a setting contradicts another.
            DataError: the test images share one with what the student saw.
        """
        chosen_precisions(self.settings.precision)
        _refuse_shared(self.images)

    def key(self) -> Key:
        """Student and images by content.

        Raises:
            ModelError: there is no student's folder.
        """
        if not self.student_dir.is_dir():
            raise ModelError(
                f"no student in {self.student_dir}; give a timm folder, or run `synthkit train` first"
            )
        inputs = {
            "student": fingerprint(self.student_dir),
            **{name: one.digest for name, one in self.images.given().items()},
        }
        return Key(inputs, {self.name: self.settings}, {"bundle_schema": bundle.SCHEMA})

    def run(self, work: Path, previous: Path | None) -> dict[str, Any]:
        """Write the bundle and verify it.

        Returns:
            parity, cost and size of every precision.

        Raises:
            ConfigError: int8 has no images to find its ranges with, or the default is not exported.
            DataError: the test images hold an unknown class.
            ParityError: an exported model does not compute what the student computes.
        """
        from synthkit.learning.students import load_student

        photos = self.images.photos
        student = load_student(self.student_dir)
        inputs = _noise(student.preprocessing) if photos is None else photos.load(student.preprocessing)
        trained_on = [] if photos is None else sorted({item.sha256 for item in photos.items})
        provenance = {"student": fingerprint(self.student_dir), "trained_on": trained_on}
        found = export_student_bundle(student, inputs, provenance, None, work, self.settings, self.images)
        if photos is not None:
            fill_replay_buffer(work, photos.with_classes(student.classes))
        return found


def _refuse_shared(images: Images) -> None:
    if images.test is not None:
        for name, seen in images.given().items():
            if name != "test":
                check_disjoint(seen, images.test, (f"the {name} given to export", "the test set"))


def _noise(preprocessing: Preprocessing) -> np.ndarray:
    _, height, width = preprocessing.input_size
    shape = (_NOISE_IMAGES, height, width, 3)
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def export_student_bundle(
    student: ExportableStudent,
    images: np.ndarray,
    provenance: Mapping[str, Any],
    accuracy: bundle.Accuracy | None,
    work_dir: Path,
    settings: ExportSettings | None = None,
    sets: Images | None = None,
) -> dict[str, Any]:
    """Write a student as a bundle into a folder, and verify it.

    Args:
        student: the torch student.
        images: real images as uint8 [N, height, width, 3]; parity is verified on them, a few become golden.
        provenance: how the student came about; "trained_on" lists the SHA-256 of every real photo.
        accuracy: on a test set, where it is known; `sets.test` is measured here.
        work_dir: where to write.
        settings: precisions and target.
        sets: the image sets that `images` come from, synthetic and test images.

    Returns:
        Parity, cost and size of every precision, for the stage's manifest.

    Raises:
        ParityError: an exported model does not compute what the student computes.
        BundleError: the written bundle fails its own check.
        ConfigError: int8 has no images to find its ranges with, or the default is not exported.
    """
    from synthkit.engines.bundle.targets import TARGETS, BundleContents, write_target
    from synthkit.engines.student.onnx_export import export_student

    settings, sets = settings or ExportSettings(), sets or Images()
    target, preprocessing = TARGETS[settings.target], student.preprocessing
    metadata = _onnx_metadata(student, provenance)
    path = work_dir / bundle.MODEL
    fp32, logits = export_student(student.model, preprocessing, images, path, metadata, target.opset)
    int8_target = target.int8 if settings.int8_target == "auto" else settings.int8_target
    fp32 = replace(fp32, accuracy=accuracy)
    made = make_precisions(work_dir, fp32, images, _seen(sets, preprocessing), settings, int8_target)
    facts = measure(work_dir, made.facts, images[:1], _test_set(student, sets.test))
    default, refused = settle_default(settings, facts)
    bundle.write_bundle(
        work_dir,
        labels=student.classes,
        preprocessing=preprocessing,
        models=facts,
        golden=bundle.Golden(images, logits, made.golden),
        provenance=provenance,
        default_precision=default,
    )
    contents = BundleContents(work_dir, list(facts), default, student.classes, preprocessing, images[:4])
    write_target(settings.target, contents)
    bundle.seal(work_dir, replace(bundle.read_facts(work_dir), target=settings.target))
    failures = bundle.verify(work_dir)
    if failures:
        raise BundleError(f"the bundle fails its own check: {'; '.join(failures)}; report this student")
    return _summary(work_dir, facts, default, refused, made.int8.to_json() if made.int8 else None)


def _seen(sets: Images, preprocessing: Preprocessing) -> np.ndarray:
    """The photos and as many synthetic images of every class, one after the other."""
    given = [one for name, one in sets.given().items() if name != "test"]
    loaded = [_few(one).load(preprocessing) for one in given]
    _, height, width = preprocessing.input_size
    return np.concatenate(loaded) if loaded else np.empty((0, height, width, 3), np.uint8)


def _few(images: ImageSet) -> ImageSet:
    count = min(_SEEN_AT_MOST, len(images))
    return images.subset(np.linspace(0, len(images) - 1, count).astype(int))


def _test_set(student: ExportableStudent, images: ImageSet | None) -> TestSet | None:
    from synthkit.engines.student.onnx_export import Uint8Student, torch_logits

    if images is None:
        return None
    known = images.with_classes(student.classes)
    inputs = known.load(student.preprocessing)
    torch_answers = torch_logits(Uint8Student(student.model, student.preprocessing), inputs).argmax(1)
    return TestSet(inputs, known.labels, torch_answers)


def _summary(
    folder: Path,
    facts: Mapping[str, bundle.ModelFacts],
    default: str,
    refused: str,
    int8: Mapping[str, Any] | None,
) -> dict[str, Any]:
    fp32 = facts[bundle.FP32]
    rows = {
        name: {
            "bytes": (folder / bundle.FILES[name]).stat().st_size,
            "latency_ms": one.latency_ms,
            "parity": one.parity.to_json(),
            "accuracy": one.accuracy.to_json() if one.accuracy else None,
            "target": one.target,
        }
        for name, one in facts.items()
    }
    return {
        "parity": fp32.parity.to_json(),
        "exporter": fp32.exporter,
        "opset": fp32.opset,
        "model_bytes": rows[bundle.FP32]["bytes"],
        "precisions": rows,
        "default_precision": default,
        "refused_default": refused,
        "int8": int8,
    }


def _onnx_metadata(student: ExportableStudent, provenance: Mapping[str, Any]) -> dict[str, str]:
    """The bundle's facts inside the model, under the keys that other tools read (names, imgsz, task)."""
    preprocessing = student.preprocessing.to_json()
    facts = {
        "names": dict(enumerate(student.classes)),
        "imgsz": preprocessing["input_size"][1:],
        "preprocess": preprocessing,
        "provenance": dict(provenance),
    }
    texts = {name: json.dumps(value, ensure_ascii=False, default=str) for name, value in facts.items()}
    return {"task": "classify", "producer": f"synthkit {synthkit.__version__}", **texts}
