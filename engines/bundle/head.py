"""The head of a bundle's model: what enters it, what it holds, and another one in its place.

    image ──body, as it is, int8 too──► features ──head (float)──► logits

The body runs in ONNX Runtime with the head's input as one more output. This module runs on the device: it
needs the `onnx` package to edit the graph, and never torch.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from synthkit.data.images import ImageSet, Preprocessing
from synthkit.engines.bundle.format import INPUT, read_facts, seal
from synthkit.engines.bundle.replay_buffer import PER_CLASS, ReplayBuffer, write_replay_buffer
from synthkit.engines.runtime.session import open_session
from synthkit.errors import BundleError, EngineError, MissingExtra

_BATCH = 4  # 32 images leave the cache of a small processor: 25 % slower for a MobileNet


@dataclass(frozen=True)
class HeadFile:
    """An ONNX classifier whose last layer can be read and replaced.

    Attributes:
        path: the file; it is never written to.
        model: its content, an `onnx.ModelProto`.
        names: names of the head's "input", "weight" and "bias" tensors.
        exact_int8: compute a Q/DQ body step by step (see `open_session`).
    """

    path: Path
    model: Any
    names: Mapping[str, str]
    exact_int8: bool = False

    @classmethod
    def open(cls, folder: Path, stated: Mapping[str, Any]) -> HeadFile:
        """Read one of a bundle's model files.

        Args:
            folder: the bundle.
            stated: what bundle.json says of the precision.

        Raises:
            BundleError: no head is recorded, or the file does not hold it.
            MissingExtra: the onnx package is not installed.
        """
        path, names = folder / stated["file"], stated["head"]
        if not names:
            raise BundleError(
                f"{path} has no linear last layer on record, so only the workstation can adapt it: "
                "run `synthkit adapt` there and export again"
            )
        found = cls(path, _onnx().load(path), names, stated["target"] == "tensorrt")
        found.weight_and_bias()  # refuses a file that does not hold them
        return found

    def weight_and_bias(self) -> tuple[np.ndarray, np.ndarray]:
        """The head's weight, float32 [classes, width], and bias, float32 [classes]."""
        weight, bias = (_array(self._initializer(side)).astype(np.float32) for side in ("weight", "bias"))
        return (weight if self._transposed() else weight.T), bias

    def body(self) -> Callable[[np.ndarray], np.ndarray]:
        """What computes the features, float32 [N, width], of uint8 images [N, height, width, 3].

        Raises:
            BundleError: the head's recorded input is no tensor of the graph.
        """
        name = self.names["input"]
        extended = _copy(self.model)
        extended.graph.output.append(_onnx().ValueInfoProto(name=name))  # ONNX Runtime infers type and shape
        try:
            session = open_session(extended.SerializeToString(), exact_int8=self.exact_int8)
        except EngineError as error:
            raise BundleError(f"{self.path} gives no features at {name!r}: {error}") from None
        return lambda inputs: np.concatenate(
            [
                session.run({INPUT: inputs[start : start + _BATCH]})[name].astype(np.float32)
                for start in range(0, len(inputs), _BATCH)
            ]
        )

    def with_head(
        self, weight: np.ndarray, bias: np.ndarray, labels: Sequence[str], provenance: Mapping[str, Any]
    ) -> bytes:
        """The file's content with another head, for as many classes as that has.

        Args:
            weight: float [classes, width].
            bias: float [classes].
            labels: class names, for the ONNX metadata.
            provenance: how the classifier came about, for the ONNX metadata.

        Raises:
            BundleError: the head's numbers do not fit the file's element type.
        """
        onnx = _onnx()
        edited = replace(self, model=_copy(self.model))
        edited._replace("weight", weight if self._transposed() else weight.T)
        edited._replace("bias", bias)
        graph = edited.model.graph
        graph.output[0].type.tensor_type.shape.dim[1].dim_value = len(bias)
        del graph.value_info[:]  # hints of shapes, which may be those of fewer classes; readers infer them
        texts = {prop.key: prop.value for prop in edited.model.metadata_props}
        facts = {"names": dict(enumerate(labels)), "provenance": dict(provenance)}
        texts |= {key: json.dumps(value, ensure_ascii=False, default=str) for key, value in facts.items()}
        onnx.helper.set_model_props(edited.model, texts)
        onnx.checker.check_model(edited.model, full_check=True)
        return bytes(edited.model.SerializeToString())

    def _transposed(self) -> bool:
        """Whether the weight lies as [classes, width], as torch's linear layer keeps it."""
        (node,) = (node for node in self.model.graph.node if self.names["weight"] in node.input)
        return any(attribute.name == "transB" and attribute.i for attribute in node.attribute)

    def _initializer(self, side: str) -> Any:
        tensors = (one for one in self.model.graph.initializer if one.name == self.names[side])
        tensor = next(tensors, None)
        if tensor is None:
            raise BundleError(
                f"{self.path} does not hold the head's {side} {self.names[side]!r}; export the bundle again"
            )
        return tensor

    def _replace(self, side: str, values: np.ndarray) -> None:
        tensor = self._initializer(side)
        with np.errstate(over="ignore"):
            stored = np.ascontiguousarray(values).astype(_array(tensor).dtype)
        if not np.isfinite(stored).all():
            raise BundleError(f"the new head's {side} is too large for {stored.dtype} in {self.path}")
        tensor.CopyFrom(_onnx().numpy_helper.from_array(stored, tensor.name))


def fill_replay_buffer(folder: Path, photos: ImageSet) -> None:
    """Write the replay buffer of the photos that a bundle was trained on, and seal the bundle again.

    A bundle whose last layer is not on record is left as it is: a device cannot refit it.

    Args:
        folder: a bundle that was just exported.
        photos: labelled in the order of its logits.
    """
    facts = read_facts(folder)
    kept = [np.flatnonzero(photos.labels == label)[:PER_CLASS] for label in range(len(photos.classes))]
    photos = photos.subset(np.concatenate(kept))
    inputs = photos.load(Preprocessing.from_timm(json.loads((folder / "preprocess.json").read_text())))
    features = {
        name: HeadFile.open(folder, stated).body()(inputs)
        for name, stated in facts.precisions.items()
        if stated["head"]
    }
    if features:
        sha256 = np.array([item.sha256 for item in photos.items])
        write_replay_buffer(folder, ReplayBuffer(photos.labels, sha256, features))
        seal(folder, facts)


def _copy(model: Any) -> Any:
    copied = type(model)()
    copied.CopyFrom(model)
    return copied


def _array(tensor: Any) -> np.ndarray:
    return np.asarray(_onnx().numpy_helper.to_array(tensor))


def _onnx() -> Any:
    try:
        import onnx
        import onnx.checker
        import onnx.helper
        import onnx.numpy_helper
    except ImportError:
        raise MissingExtra("onnx", "device") from None
    return onnx
