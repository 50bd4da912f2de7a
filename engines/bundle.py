"""The bundle: a classifier as a folder that runs without synthkit, and the checks that it is whole.

    model.onnx        uint8 [batch, height, width, 3] -> logits, one file
    labels.txt        class names, one per line, in the order of the logits
    preprocess.json   how an image becomes the input, in the words of timm's data config
    bundle.json       schema, every other file's hash, opset, specs, parity, accuracy, lineage, head tensors
    golden.npz        a few inputs and the logits that the torch student gives for them
    predict.py        `synthkit/standalone.py`: NumPy, Pillow and onnxruntime alone
    build_engine.sh   the trtexec line per TensorRT generation

A bundle that fails a check is refused, not used. This module runs on the device: it never imports torch.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import synthkit
from synthkit import standalone
from synthkit.artifacts import MANIFEST, digest, list_outputs, write_bytes, write_json
from synthkit.engines.session import Session, open_session
from synthkit.errors import BadImages, BundleError, EngineError
from synthkit.images import Preprocessing
from synthkit.tensors import TensorSpec, spec_from_json

SCHEMA = 1
FACTS = "bundle.json"
MODEL = "model.onnx"
INPUT, OUTPUT = "image", "logits"

_GOLDEN_AT_MOST = 8
# Another processor sums in another order and may fuse multiply and add: about 1e-6 of the largest logit in
# fp32. A wrong weight, label order or normalisation shows at 1e-2 and more.
_GOLDEN_TOLERANCE = 1e-3
_MADE_BY_USE = (".plan", ".engine", ".pyc")  # of build_engine.sh, and of importing predict.py


@dataclass(frozen=True)
class ModelFacts:
    """What is known of an exported model.

    Attributes:
        opset: ONNX opset of the graph.
        exporter: which of torch's exporters wrote it.
        head: names of the last linear layer's "input", "weight" and "bias" tensors; None where there is none.
        parity: how near it comes to the torch student.
    """

    opset: int
    exporter: str
    head: Mapping[str, str] | None
    parity: Mapping[str, Any]


@dataclass(frozen=True)
class Bundle:
    """An opened bundle.

    Attributes:
        folder: where it lies.
        labels: class names in the order of the logits.
        preprocessing: how an image becomes its input.
        facts: the content of bundle.json.
        session: the loaded model.
    """

    folder: Path
    labels: tuple[str, ...]
    preprocessing: Preprocessing
    facts: Mapping[str, Any]
    session: Session

    @classmethod
    def open(cls, folder: Path) -> Bundle:
        """Check a bundle and load its model.

        Raises:
            BundleError: names what is missing, altered or wrong.
            MissingExtra: onnxruntime is not installed.
        """
        facts = _read_facts(folder)
        failures = _file_failures(folder, facts)
        if not failures:
            bundle = _load(folder, facts)
            failures = _model_failures(bundle)
        if failures:
            raise BundleError(f"{folder} cannot be used: {'; '.join(failures)}; export or copy it again")
        return bundle

    def logits(self, inputs: np.ndarray) -> np.ndarray:
        """Logits, float32 [N, classes].

        Args:
            inputs: uint8 [N, height, width, 3], at least one.
        """
        return standalone.in_batches(lambda batch: self.session.run({INPUT: batch})[OUTPUT], inputs)

    def classify(self, paths: Sequence[Path], top: int = 1) -> list[dict[str, Any]]:
        """Path, label, score and the most likely labels of every image file.

        Raises:
            BadImages: names every file that cannot be read.
        """
        inputs, failures = standalone.read_inputs(paths, self.preprocessing.to_json())
        if failures:
            raise BadImages(failures)
        rows = zip(paths, self.logits(inputs), strict=True)
        return [standalone.prediction(path, logits, self.labels, top) for path, logits in rows]


def write_bundle(
    folder: Path,
    *,
    labels: Sequence[str],
    preprocessing: Preprocessing,
    model: ModelFacts,
    golden: tuple[np.ndarray, np.ndarray],
    lineage: Mapping[str, Any],
    accuracy: Mapping[str, Any] | None,
) -> None:
    """Complete a folder that already holds model.onnx.

    Args:
        folder: where to write.
        labels: class names in the order of the logits.
        preprocessing: how an image becomes the model's input.
        model: what is known of model.onnx.
        golden: model inputs and the logits expected for them; a few are kept.
        lineage: how the student came about; "trained_on" lists the SHA-256 of every real photo.
        accuracy: what was measured on a test set, if anything.
    """
    _, height, width = preprocessing.input_size
    write_bytes(folder / "labels.txt", "".join(f"{label}\n" for label in labels).encode())
    write_json(folder / "preprocess.json", preprocessing.to_json())
    write_bytes(folder / "predict.py", Path(standalone.__file__).read_bytes())
    write_bytes(folder / "build_engine.sh", _BUILD_ENGINE.format(height=height, width=width).encode())
    (folder / "build_engine.sh").chmod(0o755)
    _write_golden(folder / "golden.npz", *golden)
    facts = {
        "schema": SCHEMA,
        "synthkit": synthkit.__version__,
        "opset": model.opset,
        "exporter": model.exporter,
        "input": TensorSpec(INPUT, "uint8", ("batch", height, width, 3)).to_json(),
        "output": TensorSpec(OUTPUT, "float32", ("batch", len(labels))).to_json(),
        "head": model.head,
        "precisions": {"fp32": {"file": MODEL, "parity": model.parity, "accuracy": accuracy}},
        "lineage": lineage,
        "files": {name: entry for name, entry in list_outputs(folder).items() if name != FACTS},
    }
    facts = json.loads(json.dumps(facts, default=str))  # the digest is of what a reader will read
    write_json(folder / FACTS, {**facts, "digest": digest(facts)})


def _write_golden(path: Path, inputs: np.ndarray, logits: np.ndarray) -> None:
    count = min(_GOLDEN_AT_MOST, len(inputs))
    kept = np.linspace(0, len(inputs) - 1, count).astype(int)
    with path.open("wb") as stream:
        np.savez_compressed(stream, inputs=inputs[kept], logits=logits[kept].astype(np.float32))


def verify(folder: Path) -> list[str]:
    """What is wrong with a bundle, in one phrase each; empty when it is whole and computes what it should.

    Raises:
        MissingExtra: onnxruntime is not installed.
    """
    try:
        facts = _read_facts(folder)
        return _file_failures(folder, facts) or _model_failures(_load(folder, facts))
    except BundleError as error:
        return [str(error)]


def _read_facts(folder: Path) -> dict[str, Any]:
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
    return dict(facts)


def _file_failures(folder: Path, facts: Mapping[str, Any]) -> list[str]:
    stated = facts["files"]
    present = {
        name: entry
        for name, entry in list_outputs(folder).items()
        if name not in (FACTS, MANIFEST) and not name.endswith(_MADE_BY_USE)
    }
    return [
        f"{name} is missing" if name not in present else f"{name} was altered"
        for name in stated
        if stated[name] != present.get(name)
    ] + [f"{name} does not belong to it" for name in present if name not in stated]


def _load(folder: Path, facts: Mapping[str, Any]) -> Bundle:
    labels = tuple(standalone.read_labels(folder))
    config = json.loads((folder / "preprocess.json").read_text(encoding="utf-8"))
    try:
        session = open_session(folder / MODEL)
    except EngineError as error:
        raise BundleError(f"{folder / MODEL} cannot be loaded: {error}") from None
    return Bundle(folder, labels, Preprocessing.from_timm(config), facts, session)


def _model_failures(bundle: Bundle) -> list[str]:
    takes, gives = (spec_from_json(bundle.facts[side]) for side in ("input", "output"))
    session = bundle.session
    if (session.inputs, session.outputs) != ((takes,), (gives,)):
        return [
            f"{MODEL} has {_words(*session.inputs)} -> {_words(*session.outputs)}, "
            f"{FACTS} states {_words(takes)} -> {_words(gives)}"
        ]
    if len(bundle.labels) != gives.shape[1]:
        return [f"labels.txt holds {len(bundle.labels)} names, {MODEL} has {gives.shape[1]} logits"]
    with np.load(bundle.folder / "golden.npz") as golden:
        expected, logits = golden["logits"], bundle.logits(golden["inputs"])
    error, allowed = np.abs(logits - expected).max(), _GOLDEN_TOLERANCE * np.abs(expected).max()
    within = bool(error <= allowed)  # false for NaN too
    return [] if within else [f"{MODEL} differs from golden.npz by {error:.2g}, allowed are {allowed:.2g}"]


def _words(*specs: TensorSpec) -> str:
    return ", ".join(f"{spec.name} {spec.dtype} {list(spec.shape)}" for spec in specs)


_BUILD_ENGINE = """#!/bin/sh
# Builds model.plan from model.onnx with TensorRT, on the very device that will run it.
# These lines were written from NVIDIA's documentation and were NOT RUN ON HARDWARE.
# The input is uint8. TensorRT 8.5 and newer accept that because a Cast to float is its only consumer;
# older ones (JetPack 5.0 and before) do not parse the model. The engine computes in fp32 (or TF32).
#   ./build_engine.sh [MAX_BATCH]
set -eu
cd "$(dirname "$0")"
max="${{1:-8}}"
opt=$(( max < 4 ? max : 4 ))
min="image:1x{height}x{width}x3"
opt="image:${{opt}}x{height}x{width}x3"
max="image:${{max}}x{height}x{width}x3"
trtexec="${{TRTEXEC:-$(command -v trtexec || echo /usr/src/tensorrt/bin/trtexec)}}"
help=$("$trtexec" --help 2>&1 || true)
case "$help" in
  *--fp16*--stronglyTyped* | *--stronglyTyped*--fp16*)  # TensorRT 10: computes in the types of the graph
    "$trtexec" --onnx=model.onnx --saveEngine=model.plan --stronglyTyped \\
      --minShapes="$min" --optShapes="$opt" --maxShapes="$max" ;;
  *)  # TensorRT 8.5, 8.6 (fp32 unless told otherwise) and 11 (always strongly typed, no precision flags)
    "$trtexec" --onnx=model.onnx --saveEngine=model.plan \\
      --minShapes="$min" --optShapes="$opt" --maxShapes="$max" ;;
esac
"""
