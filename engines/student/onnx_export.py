"""A torch student as one ONNX file: uint8 NHWC images in, logits out, normalisation inside the graph.

The file gets its name only after its numbers were compared with the student's.

Torch's TorchScript exporter comes first: it is fast and writes opset 17, the newest that TensorRT 8.6
(JetPack 6.0) reads. The dynamo exporter is much slower, starts at opset 18 and fails to convert classifiers
down. Dynamo is the fall-back for students that TorchScript cannot export; the
bundle says which one was used.
"""

from __future__ import annotations

import contextlib
import copy
import io
import logging
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import numpy_helper

from synthkit.data.images import Preprocessing
from synthkit.engines.bundle.format import INPUT, OUTPUT, ModelFacts, Parity
from synthkit.engines.runtime import onnx_graph
from synthkit.engines.runtime.session import open_session
from synthkit.errors import EngineError, ParityError, first_line
from synthkit.standalone import in_batches

log = logging.getLogger(__name__)

OPSET = 17
_DYNAMO_OPSET = 18

# Both sides compute in fp32 and sum in another order, which stays far below this. A wrong or missing weight
# shows at 1e-2 and more. An error within the tolerance changes the top-1 only of an image whose two best
# logits are as near as that.
TOLERANCE = 1e-4
"""Largest error of a logit, as a part of the largest absolute logit of the torch student."""


class Uint8Student(torch.nn.Module):
    """A student that takes uint8 NHWC images and normalises them itself.

    The cast comes first because TensorRT takes uint8 inputs into a Cast only.

    Args:
        model: gives logits from normalised float NCHW images; it is copied.
        preprocessing: holds the mean and the standard deviation.
    """

    def __init__(self, model: torch.nn.Module, preprocessing: Preprocessing) -> None:
        super().__init__()
        self.model = copy.deepcopy(model).cpu()
        mean, std = torch.tensor(preprocessing.mean), torch.tensor(preprocessing.std)
        self.register_buffer("scale", (1 / (255 * std)).view(1, 3, 1, 1))
        self.register_buffer("shift", (-mean / std).view(1, 3, 1, 1))
        self.eval()  # all of it: the exporter puts every part back into the mode of the whole

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Logits of uint8 [N, height, width, 3]."""
        return self.model(images.float().permute(0, 3, 1, 2) * self.scale + self.shift)


def torch_logits(student: Uint8Student, images: np.ndarray) -> np.ndarray:
    """Logits of the torch student for uint8 [N, height, width, 3]."""

    def run(batch: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            return np.asarray(student(torch.from_numpy(batch)).numpy())

    return in_batches(run, images)


def export_student(
    model: torch.nn.Module,
    preprocessing: Preprocessing,
    images: np.ndarray,
    path: Path,
    metadata: Mapping[str, str],
    opset: int = OPSET,
) -> tuple[ModelFacts, np.ndarray]:
    """Write a student as one ONNX file and verify that it computes the same.

    Args:
        model: gives logits from normalised float NCHW images.
        preprocessing: the student's; the graph takes uint8 images of its size.
        images: uint8 [N, height, width, 3] to compare on; real ones tell more than noise.
        path: the file to write; it is written only when the comparison succeeds.
        metadata: key -> text for the ONNX metadata.
        opset: the newest that the target reads.

    Returns:
        What is known of the file, and the torch student's logits for the images.

    Raises:
        EngineError: no exporter can express the student within the opset.
        ParityError: the file does not compute what the student computes.
    """
    student = Uint8Student(model, preprocessing)
    logits = torch_logits(student, images)
    if not np.isfinite(logits).all():
        raise ParityError("the student gives logits that are not finite; train it again")
    unverified = path.with_name(f".{path.name}.unverified")
    try:
        exporter = _export(student, preprocessing, unverified, opset)
        head = _finish(unverified, model, preprocessing, metadata)
        parity = check_parity(logits, unverified, images)
        unverified.replace(path)
    finally:
        unverified.unlink(missing_ok=True)
    (written,) = (one.version for one in onnx.load(path).opset_import if one.domain in ("", "ai.onnx"))
    return ModelFacts(written, exporter, head, parity), logits


def check_parity(expected: np.ndarray, path: Path, images: np.ndarray) -> Parity:
    """Compare an ONNX file with the torch student's logits, in batches and one image alone.

    Args:
        expected: the torch student's logits for the images.
        path: the ONNX file.
        images: uint8 [N, height, width, 3].

    Raises:
        ParityError: a logit is not finite or differs by more than `TOLERANCE`.
    """
    session = open_session(path)
    logits = in_batches(lambda batch: session.run({INPUT: batch})[OUTPUT], images)
    alone = session.run({INPUT: images[:1]})[OUTPUT]
    error = float(max(np.abs(logits - expected).max(), np.abs(alone - expected[:1]).max()))
    allowed = TOLERANCE * float(np.abs(expected).max())
    if not error <= allowed:  # NaN too
        raise ParityError(
            f"the exported model differs from the torch student by {error:.2g} in a logit, allowed are "
            f"{allowed:.2g}, so it was not written; use another --student and report this one"
        )
    return Parity(
        max_abs_error=error,
        top1_agreement=float(np.mean(logits.argmax(1) == expected.argmax(1))),
        images=len(images),
        tolerance=allowed,
        finite=bool(np.isfinite(logits).all()),
    )


def _export(student: Uint8Student, preprocessing: Preprocessing, path: Path, opset: int) -> str:
    _, height, width = preprocessing.input_size
    example = torch.zeros((2, height, width, 3), dtype=torch.uint8)
    refusals = []
    for name, export in _EXPORTERS.items():
        try:
            with quiet():
                export(student, example, path, opset)
            return name
        except Exception as error:  # exporters raise whatever an operator's translation raises
            refusals.append(f"{name}: {first_line(error)[:200]}")
            log.debug("the %s exporter failed: %s", name, error)
    raise EngineError(f"this student cannot become ONNX ({'; '.join(refusals)}); use another --student")


def _torchscript(student: Uint8Student, example: torch.Tensor, path: Path, opset: int) -> None:
    torch.onnx.export(
        student,
        (example,),
        str(path),
        dynamo=False,
        opset_version=opset,
        input_names=[INPUT],
        output_names=[OUTPUT],
        dynamic_axes={INPUT: {0: "batch"}, OUTPUT: {0: "batch"}},
    )


def _dynamo(student: Uint8Student, example: torch.Tensor, path: Path, opset: int) -> None:
    if opset < OPSET:
        raise EngineError(f"it starts at opset {_DYNAMO_OPSET}, the target reads {opset}")
    torch.onnx.export(
        student,
        (example,),
        str(path),
        dynamo=True,
        opset_version=_DYNAMO_OPSET,
        input_names=[INPUT],
        output_names=[OUTPUT],
        dynamic_shapes=({0: torch.export.Dim("batch")},),
        external_data=False,
        verbose=False,
    )


_EXPORTERS: dict[str, Callable[[Uint8Student, torch.Tensor, Path, int], None]] = {
    "torchscript": _torchscript,
    "dynamo": _dynamo,
}


@contextlib.contextmanager
def quiet() -> Any:
    """Deprecation and tracer warnings say nothing that the parity check does not decide."""
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        yield


def _finish(
    path: Path, model: torch.nn.Module, preprocessing: Preprocessing, metadata: Mapping[str, str]
) -> dict[str, str] | None:
    """Make sizes constant, name the head's tensors, add the metadata, check the file; gives the head."""
    exported = onnx.load(path)
    _unshare(exported.graph)
    _, height, width = preprocessing.input_size
    onnx_graph.fold_sizes(exported, INPUT, np.zeros((height, width, 3), np.uint8))
    onnx_graph.fuse_padding(exported)
    linear = _linear_head(model)
    head = head_tensors(exported.graph, linear) if linear is not None else None
    onnx.helper.set_model_props(exported, dict(metadata))
    onnx.checker.check_model(exported, full_check=True)
    onnx.save(exported, path)
    return head


def _unshare(graph: onnx.GraphProto) -> None:
    """Give equal weights, which the exporter merges, a tensor each: the head's must be replaceable alone."""
    weights = {tensor.name: tensor for tensor in graph.initializer}
    shared = [node for node in graph.node if node.op_type == "Identity" and node.input[0] in weights]
    for node in shared:
        own = onnx.TensorProto()
        own.CopyFrom(weights[node.input[0]])
        own.name = node.output[0]
        graph.initializer.append(own)
        graph.node.remove(node)


def _linear_head(model: torch.nn.Module) -> torch.nn.Linear | None:
    head = model.get_classifier() if hasattr(model, "get_classifier") else None
    return head if isinstance(head, torch.nn.Linear) else None


def head_tensors(graph: onnx.GraphProto, linear: torch.nn.Linear) -> dict[str, str]:
    """Names of the head's input, weight and bias in a graph; a bias that the exporter left out is put back.

    Args:
        graph: the exported graph.
        linear: the student's last layer.

    Raises:
        ParityError: the last matrix product of the graph is not that layer.
    """
    gemm = next((node for node in reversed(graph.node) if node.op_type == "Gemm"), None)
    if gemm is not None and len(gemm.input) == 2:
        gemm.input.append(f"{gemm.input[1]}.bias")
        zeros = np.zeros(linear.out_features, np.float32)
        graph.initializer.append(numpy_helper.from_array(zeros, gemm.input[2]))
    weights = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    bias = linear.bias if linear.bias is not None else torch.zeros(linear.out_features)
    wanted = [tensor.detach().cpu().numpy() for tensor in (linear.weight, bias)]
    if gemm is None or not all(
        name in weights and np.array_equal(weights[name], values)
        for name, values in zip(gemm.input[1:], wanted, strict=True)
    ):
        raise ParityError("the exported graph does not end in the student's head; use another --student")
    return dict(zip(("input", "weight", "bias"), gemm.input, strict=True))
