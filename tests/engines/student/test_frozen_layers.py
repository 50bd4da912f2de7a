"""The frozen layers in ONNX Runtime: torch's activations, or torch itself."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import pytest

pytest.importorskip("timm")

import torch

from synthkit.engines.student import frozen_layers as frozen_onnx
from synthkit.engines.student.frozen_layers import in_onnxruntime
from synthkit.errors import EngineError
from synthkit.learning.feature_cache import before_last
from tests.tiny_students import lively_student


def pixels(count: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(seed))


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind", ["test_resnet", "test_efficientnet", "test_convnext", "tf_mobilenetv3_small_075"]
)
def test_the_activations_are_those_of_torch(kind: str) -> None:
    """Another number of other images than those of the export; the last student computes its padding."""
    layers, _ = before_last(lively_student(name=kind), [1, 2, 4])
    compiled = in_onnxruntime(layers, pixels(2))
    assert compiled is not layers, "torch took its place"
    with torch.no_grad():
        expected = layers(pixels(5, seed=1))
    for one, other in zip(compiled(pixels(5, seed=1)), expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4 * float(other.abs().max()))


class _Unknown(torch.nn.Module):
    """Computes what no exporter knows."""

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return (torch.special.bessel_j0(images),)


def test_what_cannot_be_exported_stays_in_torch(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "synthkit")
    layers = _Unknown()
    assert in_onnxruntime(layers, pixels(2)) is layers
    assert "the frozen layers run in torch (not exported: " in caplog.text


class _TwoAtOnce(torch.nn.Module):
    """Knows after tracing no other number of images than that of the export."""

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return (images.reshape(int(images.shape[0]), -1),)


def test_a_batch_size_that_was_built_in_stays_in_torch(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "synthkit")
    layers = _TwoAtOnce()
    assert in_onnxruntime(layers, pixels(2)) is layers
    assert "the frozen layers run in torch" in caplog.text


def wrong(session: Any) -> Any:
    return lambda images: tuple(one + 0.01 for one in real(session)(images))


def not_finite(session: Any) -> Any:
    return lambda images: tuple(one * np.nan for one in real(session)(images))


real = frozen_onnx._layers


@pytest.mark.parametrize("broken", [wrong, not_finite])
def test_what_computes_something_else_stays_in_torch(
    broken: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "synthkit")
    monkeypatch.setattr(frozen_onnx, "_layers", broken)
    layers, _ = before_last(lively_student(), [1])
    assert in_onnxruntime(layers, pixels(2)) is layers
    assert "ONNX Runtime differs by" in caplog.text


def test_a_machine_without_onnx_runtime_stays_in_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_model: bytes) -> None:
        raise EngineError("ONNX Runtime cannot load the model")

    monkeypatch.setattr(frozen_onnx, "open_session", refuse)
    layers, _ = before_last(lively_student(), [1])
    assert in_onnxruntime(layers, pixels(2)) is layers
