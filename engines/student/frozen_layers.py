"""The frozen layers of a student in ONNX Runtime, several times as fast on a CPU as torch.

    layers ──exported in memory──► ONNX Runtime ──compared with torch on photos──► layers
                                                └─ differs, or cannot be had ─────► torch's, as they are

A student trained on what comes out differs from the plain one by rounding alone.
"""

from __future__ import annotations

import io
import logging

import onnx
import torch

from synthkit.engines.runtime.onnx_graph import fold_sizes, fuse_padding
from synthkit.engines.runtime.session import OrtSession, open_session
from synthkit.engines.student.onnx_export import OPSET, TOLERANCE, quiet
from synthkit.errors import EngineError, MissingExtra, ParityError, first_line
from synthkit.learning.feature_cache import Layers

log = logging.getLogger(__name__)

_INPUT = "images"


def in_onnxruntime(layers: Layers, images: torch.Tensor) -> Layers:
    """The same layers, run by ONNX Runtime where it computes the same.

    Args:
        layers: images [N, 3, H, W] -> activations, each [N, ...], in eval mode and on the CPU.
        images: float32 [N, 3, H, W], a few normalised photos to compare the two on.
    """
    with torch.no_grad():
        expected = layers(images)
    try:
        compiled = _layers(open_session(_exported(layers, images, len(expected))))
        _check_parity(compiled(images), expected)
        _check_parity(compiled(images[:1]), tuple(one[:1] for one in expected))  # no batch size was built in
    except (EngineError, MissingExtra, ParityError) as error:
        log.info("the frozen layers run in torch (%s)", error)
        return layers
    return compiled


class _Called(torch.nn.Module):
    """A module without the attribute `graph` of torch.fx's, which the exporter takes for its own."""

    def __init__(self, layers: Layers) -> None:
        super().__init__()
        self._layers = layers

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The activations."""
        found: tuple[torch.Tensor, ...] = self._layers(images)
        return found


def _exported(layers: Layers, images: torch.Tensor, count: int) -> bytes:
    names, file = [_INPUT, *(f"activations_{number}" for number in range(count))], io.BytesIO()
    try:
        with quiet():
            torch.onnx.export(
                _Called(layers).eval(),
                (images,),
                file,
                dynamo=False,
                opset_version=OPSET,
                input_names=names[:1],
                output_names=names[1:],
                dynamic_axes={name: {0: "batch"} for name in names},
            )
        model = onnx.load_from_string(file.getvalue())
        fold_sizes(model, _INPUT, images[0].numpy())
        fuse_padding(model)
    except Exception as error:  # exporters raise whatever an operator's translation raises
        raise EngineError(f"not exported: {first_line(error)}") from None
    return bytes(model.SerializeToString())


def _layers(session: OrtSession) -> Layers:
    def run(images: torch.Tensor) -> tuple[torch.Tensor, ...]:
        found = session.run({_INPUT: images.contiguous().numpy()})
        return tuple(torch.from_numpy(found[spec.name]) for spec in session.outputs)

    return run


def _check_parity(found: tuple[torch.Tensor, ...], expected: tuple[torch.Tensor, ...]) -> None:
    """Refuse activations of other shapes, or off by more than `TOLERANCE` of torch's largest, or NaN."""
    for one, other in zip(found, expected, strict=True):
        if one.shape != other.shape:
            raise ParityError(
                f"ONNX Runtime answers {tuple(one.shape)} where torch does {tuple(other.shape)}"
            )
        error, allowed = float((one - other).abs().max()), TOLERANCE * float(other.abs().max())
        if not error <= allowed:
            raise ParityError(f"ONNX Runtime differs by {error:.2g}, allowed are {allowed:.2g}")
