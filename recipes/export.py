"""A trained student becomes a verified bundle: ONNX of proven parity, golden outputs, facts, a predictor."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

import synthkit
from synthkit.artifacts import Request, StageResult, fingerprint, run_stage
from synthkit.engines import bundle
from synthkit.errors import BundleError, ModelError
from synthkit.images import ImageSet, Preprocessing

_NOISE_IMAGES = 8


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


def export_request(student_dir: Path, out: Path, photos: ImageSet | None) -> Request:
    """What `run_export` is asked for; its key says whether the bundle is up to date.

    Raises:
        ModelError: there is no student's folder.
    """
    if not student_dir.is_dir():
        raise ModelError(f"no student in {student_dir}; give a timm folder, or run `synthkit train` first")
    inputs = {"student": fingerprint(student_dir)}
    if photos is not None:
        inputs["photos"] = photos.digest
    return Request("export", out, inputs, {"bundle_schema": bundle.SCHEMA})


def run_export(
    student_dir: Path, out: Path, photos: ImageSet | None = None, force: bool = False
) -> StageResult:
    """The `export` stage: timm folder -> bundle.

    Args:
        student_dir: the student's timm folder.
        out: the bundle's folder.
        photos: what the student was trained on: they prove parity, become the golden inputs and are refused
            as test images; without them, noise proves parity.
        force: redo it even when nothing changed.
    """
    request = export_request(student_dir, out, photos)

    def produce(work: Path) -> dict[str, Any]:
        from synthkit.students import load_student

        student = load_student(student_dir)
        images = _noise(student.preprocessing) if photos is None else photos.load(student.preprocessing)
        trained_on = [] if photos is None else sorted({item.sha256 for item in photos.items})
        lineage = {"student": request.inputs["student"], "trained_on": trained_on}
        return export_student_bundle(student, images, lineage, None, work)

    return run_stage(request, produce, force=force)


def _noise(preprocessing: Preprocessing) -> np.ndarray:
    _, height, width = preprocessing.input_size
    shape = (_NOISE_IMAGES, height, width, 3)
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def export_student_bundle(
    student: ExportableStudent,
    images: np.ndarray,
    lineage: Mapping[str, Any],
    accuracy: Mapping[str, Any] | None,
    work_dir: Path,
) -> dict[str, Any]:
    """Write a student as a bundle into a folder, and verify it.

    Args:
        student: the torch student.
        images: real images as uint8 [N, height, width, 3]; parity is proven on them, a few become golden.
        lineage: how the student came about; "trained_on" lists the SHA-256 of every real photo.
        accuracy: what was measured on a test set, if anything.
        work_dir: where to write.

    Returns:
        Parity, exporter, opset and size for the stage's manifest.

    Raises:
        ParityError: the exported model does not compute what the student computes.
        BundleError: the written bundle fails its own check.
    """
    from synthkit.engines.student_onnx import export_student

    preprocessing = student.preprocessing
    metadata = _onnx_metadata(student, lineage)
    facts, logits = export_student(student.model, preprocessing, images, work_dir / bundle.MODEL, metadata)
    bundle.write_bundle(
        work_dir,
        labels=student.classes,
        preprocessing=preprocessing,
        model=facts,
        golden=(images, logits),
        lineage=lineage,
        accuracy=accuracy,
    )
    failures = bundle.verify(work_dir)
    if failures:
        raise BundleError(f"the bundle fails its own check: {'; '.join(failures)}; report this student")
    size = (work_dir / bundle.MODEL).stat().st_size
    return {"parity": facts.parity, "exporter": facts.exporter, "opset": facts.opset, "model_bytes": size}


def _onnx_metadata(student: ExportableStudent, lineage: Mapping[str, Any]) -> dict[str, str]:
    """The bundle's facts inside the model, under the keys that other tools read (names, imgsz, task)."""
    preprocessing = student.preprocessing.to_json()
    facts = {
        "names": dict(enumerate(student.classes)),
        "imgsz": preprocessing["input_size"][1:],
        "preprocess": preprocessing,
        "lineage": dict(lineage),
    }
    texts = {name: json.dumps(value, ensure_ascii=False, default=str) for name, value in facts.items()}
    return {"task": "classify", "producer": f"synthkit {synthkit.__version__}", **texts}
