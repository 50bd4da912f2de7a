"""The bundle: a classifier as a folder that runs without synthkit, and the checks that it is whole.

    model.onnx        uint8 [batch, height, width, 3] -> logits float32, one file
    model.fp16.onnx   the same in half precision, and model.int8.onnx in 8 bits, where they were asked for
    labels.txt        class names, one per line, in the order of the logits
    preprocess.json   how an image becomes the input, in the words of timm's data config
    bundle.json       schema, every other file's hash, specs, provenance; head, parity, cost per precision
    replay_buffer.npz features of the photos it was trained on, for refitting its last layer on the device
    confidence.json   below which probability an answer is "unknown", where that was asked for
    golden.npz        a few inputs, the torch student's logits, and those of each smaller precision
    predict.py        `synthkit/standalone.py`: NumPy, Pillow and onnxruntime alone
    build_engine.sh   the trtexec line per TensorRT generation
    target/           the files that another system expects, where one was asked for

A bundle that fails a check is refused, not used; a file that somebody put beside it does no harm. This module
runs on the device: it never imports torch.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, TypeAlias, TypeVar
from zipfile import BadZipFile

import numpy as np
from PIL import Image

import synthkit
from synthkit import standalone
from synthkit.artifacts import MANIFEST, digest, list_outputs, write_bytes, write_json
from synthkit.data.images import Preprocessing
from synthkit.engines.bundle.build_script import write_build_script
from synthkit.engines.bundle.replay_buffer import replay_buffer_failures
from synthkit.engines.runtime.session import OrtSession, open_session
from synthkit.engines.runtime.tensor_spec import TensorSpec, spec_from_json
from synthkit.errors import BadImages, BundleError, DataError, EngineError

log = logging.getLogger(__name__)

SCHEMA = 2
FACTS = "bundle.json"
FP32, FP16, INT8 = "fp32", "fp16", "int8"
FILES = {FP32: "model.onnx", FP16: "model.fp16.onnx", INT8: "model.int8.onnx"}
MODEL = FILES[FP32]
INPUT, OUTPUT = "image", "logits"

_GOLDEN_AT_MOST = 8

ImageLike: TypeAlias = "str | Path | Image.Image | np.ndarray"
AnyBundle = TypeVar("AnyBundle", bound="Bundle")


@dataclass(frozen=True)
class Tolerance:
    """How far golden outputs may differ on another processor.

    Attributes:
        relative: largest error of a logit, as a part of the largest absolute golden logit.
        reason: why it is this much.
    """

    relative: float
    reason: str


TOLERANCES = {
    FP32: Tolerance(
        1e-3,
        "another order of sums and fused multiply-add change about 1e-6 of the largest logit; "
        "a wrong weight, label order or normalisation changes 1e-2 and more",
    ),
    FP16: Tolerance(
        2e-2,
        "processors without half-precision arithmetic compute between two layers in fp32, others in fp16, "
        "whose sums carry 11 bits",
    ),
    INT8: Tolerance(
        0.1,
        "integer sums are exact, but a value on the edge between two of 256 steps may round either way, and "
        "a runtime that cannot fuse a layer computes it in fp32",
    ),
}
_MADE_BY_USE = (".plan", ".engine", ".pyc")  # of build_engine.sh, and of importing predict.py


@dataclass(frozen=True)
class Parity:
    """Comparison of a model's logits with those of a reference on the same images.

    Attributes:
        max_abs_error: largest absolute difference of a logit.
        top1_agreement: fraction of the images with the same top-1.
        images: number of images.
        against: the reference, where it is not the torch student.
        tolerance: largest difference that was allowed.
        relative_error: `max_abs_error` as a fraction of the reference's largest absolute logit.
        finite: every logit is finite.
    """

    max_abs_error: float
    top1_agreement: float
    images: int
    against: str | None = None
    tolerance: float | None = None
    relative_error: float | None = None
    finite: bool = True

    def to_json(self) -> dict[str, Any]:
        """The comparison as JSON data, without what was not measured."""
        return _measured(self)


@dataclass(frozen=True)
class Accuracy:
    """Results of a model on a test set.

    Attributes:
        top1: fraction of right answers.
        n_test: number of images.
        interval: 95 % interval of `top1` (Wilson).
        torch_top1: the torch student's top-1 on the same images.
        agreement_with_fp32: fraction of the images with fp32's answer.
        agreement_with_torch: fraction of the images with the torch student's answer.
    """

    top1: float
    n_test: int
    interval: tuple[float, float] | None = None
    torch_top1: float | None = None
    agreement_with_fp32: float | None = None
    agreement_with_torch: float | None = None

    def to_json(self) -> dict[str, Any]:
        """The results as JSON data, without what was not measured."""
        return _measured(self)


def _measured(facts: Parity | Accuracy) -> dict[str, Any]:
    return {name: value for name, value in asdict(facts).items() if value is not None}


@dataclass(frozen=True)
class ModelFacts:
    """The model of one precision: how it was made and what was measured.

    Attributes:
        opset: ONNX opset of the graph.
        exporter: what wrote it.
        head: names of the last linear layer's "input", "weight" and "bias" tensors; None where there is none.
        parity: with the torch student, or with fp32.
        accuracy: on a test set; None where there was none.
        latency_ms: median time of one image on the machine that exported it, in milliseconds.
        target: which processors an int8 model was made for: "cpu" or "tensorrt".
    """

    opset: int
    exporter: str
    head: Mapping[str, str] | None
    parity: Parity
    accuracy: Accuracy | None = None
    latency_ms: float | None = None
    target: str | None = None

    def to_json(self) -> dict[str, Any]:
        """The facts as bundle.json holds them."""
        accuracy = self.accuracy.to_json() if self.accuracy else None
        return {**asdict(self), "parity": self.parity.to_json(), "accuracy": accuracy}


@dataclass(frozen=True)
class Prediction:
    """The answer for one image.

    Attributes:
        label: the most likely class, or "unknown" where the score is below the bundle's threshold.
        score: probability of the most likely class, 0..1.
        top: the most likely classes with their probabilities, best first.
        path: the image's file; None for an image that came from none.
        set: labels that are likely enough to be the right one; None where the bundle gives no sets.
    """

    label: str
    score: float
    top: tuple[tuple[str, float], ...]
    path: str | None = None
    set: tuple[str, ...] | None = None

    def to_json(self) -> dict[str, Any]:
        """One entry of "predictions" in the answer of `synthkit predict --json`."""
        data: dict[str, Any] = {"path": self.path, "label": self.label, "score": self.score}
        data["top"] = [list(pair) for pair in self.top]
        return data if self.set is None else {**data, "set": list(self.set)}


@dataclass(frozen=True)
class VerifyResult:
    """The answer of a check.

    Attributes:
        failures: each thing that is wrong with a bundle, as a phrase.
    """

    failures: tuple[str, ...]

    @property
    def ok(self) -> bool:
        """True if the bundle is whole and computes what it should."""
        return not self.failures

    def to_json(self) -> dict[str, Any]:
        """The JSON object of `synthkit verify --json`."""
        return {"ok": self.ok, "failures": list(self.failures)}


@dataclass(frozen=True)
class Bundle:
    """An opened bundle.

    Attributes:
        folder: where it lies.
        labels: class names in the order of the logits.
        preprocessing: how an image becomes its input.
        facts: the content of bundle.json.
        precision: which of the bundle's models is loaded.
        session: the loaded model.
    """

    folder: Path
    labels: tuple[str, ...]
    preprocessing: Preprocessing
    facts: BundleFacts
    precision: str
    session: OrtSession

    @classmethod
    def open(cls: type[AnyBundle], folder: str | Path, precision: str | None = None) -> AnyBundle:
        """Check a bundle and load one of its models.

        A file that does not belong to the bundle is told as a warning; `verify` fails on it.

        Args:
            folder: the bundle.
            precision: "fp32", "fp16" or "int8"; None takes the bundle's default.

        Raises:
            BundleError: names what is missing, altered or wrong, or the bundle holds no such precision.
            MissingExtra: onnxruntime is not installed.
        """
        folder = Path(folder)
        facts = read_facts(folder)
        chosen = precision or facts.default_precision
        if chosen not in facts.precisions:
            raise BundleError(
                f"{folder} holds no {chosen} model, but {', '.join(facts.precisions)}; "
                f"make one with `synthkit export --precision {chosen}`"
            )
        failures = _file_failures(folder, facts)
        if not failures:
            bundle = _load(cls, folder, facts, chosen)
            failures = _model_failures(bundle)
        if failures:
            raise BundleError(f"{folder} cannot be used: {'; '.join(failures)}; export or copy it again")
        if foreign := _foreign_files(folder, facts):
            log.warning("%s: %s", folder, "; ".join(foreign))
        return bundle

    def verify(self) -> VerifyResult:
        """Check that every file of the bundle is whole and every model computes what it should."""
        return VerifyResult(tuple(verify(self.folder)))

    def logits(self, inputs: np.ndarray) -> np.ndarray:
        """Logits, float32 [N, classes].

        Args:
            inputs: uint8 [N, height, width, 3], at least one.
        """
        return standalone.in_batches(lambda batch: self.session.run({INPUT: batch})[OUTPUT], inputs)

    def predict(self, images: ImageLike | Iterable[ImageLike], top: int = 3) -> list[Prediction]:
        """Classify images.

        Args:
            images: one or several; each a file, a Pillow image, or an array uint8 [height, width, 3] in RGB.
            top: number of labels in "top".

        Raises:
            BadImages: names every file that cannot be read.
            DataError: an array is no image.
        """
        given = [images] if isinstance(images, (str, Path, Image.Image, np.ndarray)) else list(images)
        inputs, failures = [], []
        for image in given:
            try:
                inputs.append(self.preprocessing(_picture(image)))
            except standalone.UnusableImage as error:
                failures.append((Path(str(image)), str(error)))
        if failures:
            raise BadImages(failures)
        if not inputs:
            return []
        confidence, count = standalone.read_confidence(self.folder), len(self.labels)
        predictions = []
        for image, logits in zip(given, self.logits(np.stack(inputs)), strict=True):
            ranked = standalone.prediction("", logits, self.labels, count)
            answer = standalone.decided(ranked, confidence, top)
            predictions.append(
                Prediction(
                    answer["label"],
                    answer["score"],
                    tuple((label, score) for label, score in answer["top"]),
                    str(image) if isinstance(image, (str, Path)) else None,
                    tuple(answer["set"]) if "set" in answer else None,
                )
            )
        return predictions


def _picture(image: ImageLike) -> Image.Image:
    if isinstance(image, (str, Path)):
        return standalone.open_image(image)
    if isinstance(image, Image.Image):
        return standalone.as_seen(image.copy())
    if not isinstance(image, np.ndarray) or image.dtype != np.uint8 or image.shape[2:] != (3,):
        kind = f"{image.dtype} {list(image.shape)}" if isinstance(image, np.ndarray) else type(image).__name__
        raise DataError(
            f"an image is a file, a Pillow image or an array uint8 [height, width, 3], not {kind}"
        )
    return Image.fromarray(image)


@dataclass(frozen=True)
class BundleFacts:
    """The content of bundle.json, without its digest.

    Attributes:
        schema: of the file.
        synthkit: version that made the bundle.
        version: 1 as exported, one more with every update.
        default_precision: what runs when none is named.
        input: name, dtype and shape of the models' input.
        output: the same of their output.
        precisions: precision -> file, opset, parity, accuracy, head and golden tolerance of its model.
        provenance: how the student came about; "trained_on" lists the SHA-256 of every real photo.
        confidence: what was fitted for "unknown" and sets of labels; None where nothing was.
        files: relative path -> {"sha256", "bytes"} of every file.
        target: system whose files are written too; None where none was asked for.
    """

    schema: int
    synthkit: str
    version: int
    default_precision: str
    input: Mapping[str, Any]
    output: Mapping[str, Any]
    precisions: Mapping[str, Mapping[str, Any]]
    provenance: Mapping[str, Any]
    confidence: Mapping[str, Any] | None
    files: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    target: str | None = None

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> BundleFacts:
        """Read them.

        Raises:
            BundleError: a fact is missing, or there is one that no bundle has.
        """
        try:
            return cls(**data)
        except TypeError as error:
            raise BundleError(f"{FACTS} does not state what a bundle's does: {error}") from None

    def to_json(self) -> dict[str, Any]:
        """The JSON object; the target only where there is one."""
        data = {entry.name: getattr(self, entry.name) for entry in fields(self)}
        if self.target is None:
            del data["target"]
        return data


@dataclass(frozen=True)
class Golden:
    """What a bundle's models gave when they were made.

    Attributes:
        inputs: uint8 [N, height, width, 3]; a few of them are kept.
        logits: the torch student's, float32 [N, classes].
        own: precision -> that model's own logits, of every precision that rounds more than fp32.
    """

    inputs: np.ndarray
    logits: np.ndarray
    own: Mapping[str, np.ndarray] = field(default_factory=dict)


def write_bundle(
    folder: Path,
    *,
    labels: Sequence[str],
    preprocessing: Preprocessing,
    models: Mapping[str, ModelFacts],
    golden: Golden,
    provenance: Mapping[str, Any],
    default_precision: str = FP32,
) -> None:
    """Complete a folder that already holds a model file for each precision.

    Args:
        folder: where to write.
        labels: class names in the order of the logits.
        preprocessing: how an image becomes the model's input.
        models: precision -> what is known of its model.
        golden: inputs and what the models gave for them.
        provenance: how the student came about; "trained_on" lists the SHA-256 of every real photo.
        default_precision: which model runs when none is named.
    """
    _, height, width = preprocessing.input_size
    write_bytes(folder / "labels.txt", "".join(f"{label}\n" for label in labels).encode())
    write_json(folder / "preprocess.json", preprocessing.to_json())
    write_bytes(folder / "predict.py", Path(standalone.__file__).read_bytes())
    write_build_script(folder / "build_engine.sh", (height, width))
    write_golden(folder, golden)
    facts = BundleFacts(
        schema=SCHEMA,
        synthkit=synthkit.__version__,
        version=1,
        default_precision=default_precision,
        input=TensorSpec(INPUT, "uint8", ("batch", height, width, 3)).to_json(),
        output=TensorSpec(OUTPUT, "float32", ("batch", len(labels))).to_json(),
        precisions={
            name: {"file": FILES[name], **model.to_json(), "golden_tolerance": asdict(TOLERANCES[name])}
            for name, model in models.items()
        },
        provenance=provenance,
        confidence=None,
    )
    seal(folder, facts)


def write_golden(folder: Path, golden: Golden) -> None:
    """Write golden.npz, with evenly chosen examples of those given."""
    kept = np.linspace(0, len(golden.inputs) - 1, min(_GOLDEN_AT_MOST, len(golden.inputs))).astype(int)
    logits = {"logits": golden.logits, **{_golden_key(name): own for name, own in golden.own.items()}}
    arrays = {name: values[kept].astype(np.float32) for name, values in logits.items()}
    with (folder / "golden.npz").open("wb") as stream:
        np.savez_compressed(stream, inputs=golden.inputs[kept], **arrays)


def seal(folder: Path, facts: BundleFacts) -> None:
    """Write bundle.json: the facts, the hash of every file that the folder now holds, and their own digest.

    Args:
        folder: holds everything else.
        facts: the content, as `read_facts` gives it; `files` and the digest are made anew.
    """
    files = {name: entry for name, entry in list_outputs(folder).items() if not _is_no_part(name)}
    # What a reader will read.
    stated = json.loads(json.dumps(replace(facts, files=files).to_json(), default=str))
    write_json(folder / FACTS, {**stated, "digest": digest(stated)})


def verify(folder: Path) -> list[str]:
    """What is wrong with a bundle, in one phrase each; empty when it is whole and computes what it should.

    Raises:
        MissingExtra: onnxruntime is not installed.
    """
    try:
        facts = read_facts(folder)
        return [*_file_failures(folder, facts), *_foreign_files(folder, facts)] or [
            *_confidence_failures(folder),
            *replay_buffer_failures(folder, facts.precisions, int(facts.output["shape"][1])),
            *(
                failure
                for name in facts.precisions
                for failure in _precision_failures(folder, facts, name)
            ),
        ]
    except BundleError as error:
        return [str(error)]


def _confidence_failures(folder: Path) -> list[str]:
    try:
        limits = standalone.read_confidence(folder)
        sound = all(0 <= (limits.get(name) or 0) <= 1 for name in ("threshold", "conformal_threshold"))
    except (ValueError, TypeError):
        sound = False
    return [] if sound else [f"{standalone.CONFIDENCE} holds no probabilities"]


def _precision_failures(folder: Path, facts: BundleFacts, precision: str) -> list[str]:
    try:
        return _model_failures(_load(Bundle, folder, facts, precision))
    except BundleError as error:
        return [str(error)]


def read_facts(folder: Path) -> BundleFacts:
    """The content of bundle.json, without its digest.

    Raises:
        BundleError: it is missing, altered, of another schema or no bundle's JSON.
    """
    path = folder / FACTS
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
        stated = facts.pop("digest", None)
        schema = facts.get("schema")
    except (FileNotFoundError, NotADirectoryError):
        raise BundleError(f"no bundle: {path} is missing; make one with `synthkit adapt`") from None
    except (ValueError, TypeError, AttributeError):
        raise BundleError(f"{path} is not a bundle's JSON; export or copy the bundle again") from None
    if schema != SCHEMA:
        raise BundleError(
            f"{path} has schema {schema!r}, this synthkit reads {SCHEMA}; "
            "use the synthkit that wrote it, or export again"
        )
    if stated != digest(facts):
        raise BundleError(f"{path} was altered; export or copy the bundle again")
    return BundleFacts.from_json(facts)


def _is_no_part(name: str) -> bool:
    return name in (FACTS, MANIFEST) or name.endswith(_MADE_BY_USE)


def _file_failures(folder: Path, facts: BundleFacts) -> list[str]:
    stated = facts.files
    present = {name: entry for name, entry in list_outputs(folder).items() if not _is_no_part(name)}
    return [
        f"{name} is missing" if name not in present else f"{name} was altered"
        for name in stated
        if stated[name] != present.get(name)
    ]


def _foreign_files(folder: Path, facts: BundleFacts) -> list[str]:
    names = (name for name in list_outputs(folder) if not _is_no_part(name))
    return [f"{name} does not belong to it" for name in names if name not in facts.files]


def _load(cls: type[AnyBundle], folder: Path, facts: BundleFacts, precision: str) -> AnyBundle:
    labels = tuple(standalone.read_labels(folder))
    try:
        preprocessing = Preprocessing.from_timm(json.loads((folder / "preprocess.json").read_text("utf-8")))
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise BundleError(f"preprocess.json is not usable: {error!r}") from None
    stated = facts.precisions[precision]
    path = folder / stated["file"]
    try:
        session = open_session(path, exact_int8=stated["target"] == "tensorrt")
    except EngineError as error:
        raise BundleError(f"{path} cannot be loaded: {error}") from None
    return cls(folder, labels, preprocessing, facts, precision, session)


def _model_failures(bundle: Bundle) -> list[str]:
    file = bundle.facts.precisions[bundle.precision]["file"]
    takes, gives = (spec_from_json(side) for side in (bundle.facts.input, bundle.facts.output))
    session = bundle.session
    if (session.inputs, session.outputs) != ((takes,), (gives,)):
        return [
            f"{file} has {_words(*session.inputs)} -> {_words(*session.outputs)}, "
            f"{FACTS} states {_words(takes)} -> {_words(gives)}"
        ]
    if len(bundle.labels) != gives.shape[1]:
        return [f"labels.txt holds {len(bundle.labels)} names, {file} has {gives.shape[1]} logits"]
    return _metadata_failures(bundle) + _golden_failures(bundle)


def _metadata_failures(bundle: Bundle) -> list[str]:
    """The same facts stand in the model, for tools that read nothing else of the bundle."""
    file = bundle.facts.precisions[bundle.precision]["file"]
    texts = bundle.session.metadata
    names, preprocessing = (json.loads(texts.get(key, "null")) for key in ("names", "preprocess"))
    stated = json.loads((bundle.folder / "preprocess.json").read_text("utf-8"))
    failures = []
    if names is not None and list(names.values()) != list(bundle.labels):
        failures.append(f"labels.txt names other classes than the metadata of {file}")
    if preprocessing is not None and preprocessing != stated:
        failures.append(f"preprocess.json differs from the metadata of {file}")
    return failures


def _golden_failures(bundle: Bundle) -> list[str]:
    stated = bundle.facts.precisions[bundle.precision]
    try:
        with np.load(bundle.folder / "golden.npz") as golden:
            expected, inputs = golden[_golden_key(bundle.precision)], golden["inputs"]
    except (ValueError, OSError, KeyError, BadZipFile):
        return [f"golden.npz holds no readable inputs and outputs for {stated['file']}"]
    allowed = stated["golden_tolerance"]["relative"] * np.abs(expected).max()
    error = np.abs(bundle.logits(inputs) - expected).max()
    if error <= allowed:  # false for NaN too
        return []
    return [f"{stated['file']} differs from golden.npz by {error:.2g}, allowed are {allowed:.2g}"]


def _golden_key(precision: str) -> str:
    return OUTPUT if precision == FP32 else f"{OUTPUT}_{precision}"


def _words(*specs: TensorSpec) -> str:
    return ", ".join(f"{spec.name} {spec.dtype} {list(spec.shape)}" for spec in specs)
