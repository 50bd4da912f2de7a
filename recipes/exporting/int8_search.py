"""Search for the int8 quantization config with the least loss on held-out images.

    photos, synthetic images ─┬─ calibrate: ranges by every method, bias correction ─┐
                              └─ held out: agreement with fp32, drift per layer ─────┴─► int8 model + report

The loss is measured as the target computes: with ONNX Runtime's integer kernels of this machine for "cpu",
exactly for "tensorrt".
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from synthkit.calibration.ranges import METHODS, Observed, Ranges, fit_ranges, observe
from synthkit.engines.bundle.format import INPUT, OUTPUT
from synthkit.engines.runtime.session import open_session
from synthkit.errors import ConfigError, nearest
from synthkit.recipes.settings import ExportSettings
from synthkit.standalone import in_batches

if TYPE_CHECKING:
    import onnx

log = logging.getLogger(__name__)

_CALIBRATE_AT_MOST, _HOLD_OUT_AT_MOST, _DRIFT_ON = 64, 64, 8
_FLOAT_AT_MOST = 0.5  # fraction of the layers; beyond that the model is int8 in name only
_COUNTS = (1, 2, 4, 8, 16, 32)  # numbers of float layers to try
# Photos that the student learned lie far from its decision boundaries and keep their top-1 where others do
# not, so the logits' error is limited as well.
_ERROR_AT_MOST = 0.05


@dataclass(frozen=True)
class QuantizationConfig:
    """Settings of one quantisation.

    Attributes:
        method: of finding ranges, a key of `METHODS`.
        weight_bits: 7 or 8.
        bias_correction: subtract the mean rounding error of the weights from the biases.
        kept_float: names of layers that stay in float.
    """

    method: str
    weight_bits: int
    bias_correction: bool = False
    kept_float: tuple[str, ...] = ()


@dataclass(frozen=True)
class QuantizationLoss:
    """Cost of a quantisation on held-out images.

    Attributes:
        agreement: fraction of images with the same top-1 as in fp32.
        error: root mean square error of the logits, as a part of their root mean square.
    """

    agreement: float
    error: float

    @property
    def rank(self) -> tuple[float, float]:
        """Sort key: larger is better."""
        return self.agreement, -self.error

    def within(self, max_drop: float) -> bool:
        """True if no further layer needs to stay in float."""
        return self.agreement >= 1 - max_drop / 100 and self.error <= _ERROR_AT_MOST


@dataclass(frozen=True)
class LayerDrift:
    """Cost of quantising one layer alone.

    Attributes:
        layer: name of its node.
        operator: of the node, for example "Conv".
        error: as `QuantizationLoss.error`.
    """

    layer: str
    operator: str
    error: float


@dataclass(frozen=True)
class Int8Report:
    """The search for an int8 model: its choice, losses and drift.

    Attributes:
        config: the chosen one.
        calibrated_on: number of images that gave the ranges.
        held_out: number of images that the losses were measured on.
        tried: every config with its loss, in the order of the search.
        drift: every layer that can be quantised, worst first.
    """

    config: QuantizationConfig
    calibrated_on: int
    held_out: int
    tried: tuple[tuple[QuantizationConfig, QuantizationLoss], ...]
    drift: tuple[LayerDrift, ...]

    def to_json(self) -> dict[str, Any]:
        """The report as JSON data; of a config that was tried, `kept_float` is a number of layers."""
        return {
            **asdict(self.config),
            "kept_float": list(self.config.kept_float),
            "calibrated_on": self.calibrated_on,
            "held_out": self.held_out,
            "tried": [
                {**asdict(config), "kept_float": len(config.kept_float), **asdict(loss)}
                for config, loss in self.tried
            ],
            "drift": [asdict(layer) for layer in self.drift],
        }


@dataclass(frozen=True)
class Int8Model:
    """The chosen model and the report of its search."""

    model: onnx.ModelProto
    report: Int8Report


@dataclass
class _Search:
    """A student, its images, and the models and losses of the configs tried so far."""

    model: onnx.ModelProto
    head: Mapping[str, str] | None
    target: str
    held: np.ndarray
    observed: Mapping[str, Observed]
    expected: np.ndarray
    tried: dict[QuantizationConfig, QuantizationLoss] = field(default_factory=dict)
    models: dict[QuantizationConfig, onnx.ModelProto] = field(default_factory=dict)
    ranges: dict[str, Ranges] = field(default_factory=dict)
    rounded: dict[int, Mapping[str, np.ndarray]] = field(default_factory=dict)

    def model_of(self, config: QuantizationConfig) -> onnx.ModelProto:
        if config not in self.models:
            self.models[config] = self._quantised(config)
        return self.models[config]

    def model_with_only(self, layer: str, config: QuantizationConfig) -> onnx.ModelProto:
        return self._quantised(replace(config, kept_float=()), [layer])

    def _quantised(self, config: QuantizationConfig, only: Collection[str] = ()) -> onnx.ModelProto:
        from synthkit.engines.student import int8 as quantize

        qdq_format = replace(quantize.QDQ_FORMATS[self.target], reduce_range=config.weight_bits == 7)
        ranges = self._ranges(config.method)
        source = self._corrected(config, only) if config.bias_correction else self.model
        return quantize.to_int8(source, ranges, qdq_format, self.head, config.kept_float, only)

    def _ranges(self, method: str) -> Ranges:
        if method not in self.ranges:
            self.ranges[method] = fit_ranges(self.observed, method)
        return self.ranges[method]

    def _corrected(self, config: QuantizationConfig, only: Collection[str]) -> onnx.ModelProto:
        """The model with corrected biases in the layers that get quantised."""
        from synthkit.engines.student import int8 as quantize

        if config.weight_bits not in self.rounded:
            plain = self.model_of(replace(config, bias_correction=False, kept_float=()))
            self.rounded[config.weight_bits] = quantize.rounded_weights(plain)
        means = {name: seen.channel_means for name, seen in self.observed.items()}
        leave = set(only) or set(self.rounded[config.weight_bits]) - set(config.kept_float)
        rounded = {name: weight for name, weight in self.rounded[config.weight_bits].items() if name in leave}
        return quantize.correct_biases(self.model, rounded, means)

    def loss(self, config: QuantizationConfig) -> QuantizationLoss:
        if config not in self.tried:
            content = self.model_of(config).SerializeToString()
            logits = run_model(content, self.held, exact=self.target == "tensorrt")
            self.tried[config] = _loss(logits, self.expected)
            log.info("int8 %s: %s", config, self.tried[config])
        return self.tried[config]

    def best(self, configs: Sequence[QuantizationConfig]) -> QuantizationConfig:
        return max(configs, key=lambda config: self.loss(config).rank)


def run_model(content: bytes, images: np.ndarray, exact: bool = False) -> np.ndarray:
    """Logits of a serialised model for uint8 images [N, height, width, 3]."""
    session = open_session(content, exact_int8=exact)
    return in_batches(lambda batch: session.run({INPUT: batch})[OUTPUT], images)


def _loss(logits: np.ndarray, expected: np.ndarray) -> QuantizationLoss:
    agreement = float(np.mean(logits.argmax(1) == expected.argmax(1)))
    error = float(np.sqrt(np.mean((logits - expected) ** 2) / max(float(np.mean(expected**2)), 1e-12)))
    return QuantizationLoss(agreement, error if np.isfinite(error) else float("inf"))


def choose_int8(
    model: onnx.ModelProto,
    head: Mapping[str, str] | None,
    images: np.ndarray,
    settings: ExportSettings,
    target: str,
) -> Int8Model:
    """Quantise a student by the best of all configs tried.

    Args:
        model: the student in fp32.
        head: names of the head's tensors; it stays in float.
        images: photos and synthetic images, uint8 [N, height, width, 3]; every second one is held out.
        settings: weight bits, layers that stay in float, largest drop.
        target: "cpu" or "tensorrt".

    Raises:
        ConfigError: there are too few images, or `export.keep_float` names no layer.
    """
    from synthkit.engines.student.int8 import float_values, layers

    if len(images) < 2:
        raise ConfigError("int8 needs images to find its ranges; give --real-dir or --synth-dir")
    names = layers(model, head)
    named = _named_layers(settings.keep_float, names)
    held = _evenly(images[1::2], _HOLD_OUT_AT_MOST)
    calibrate = _evenly(images[::2], _CALIBRATE_AT_MOST)
    expected = run_model(model.SerializeToString(), held)
    search = _Search(model, head, target, held, observe(float_values(model), calibrate), expected)
    bits = (7, 8) if target == "cpu" and settings.weight_bits == "auto" else (_bits(settings, target),)
    first = next(iter(METHODS))
    # Bits and biases together: rounding to 7 bits costs more before its mean is taken out than after.
    config = search.best(
        [QuantizationConfig(first, one, corrected, named) for one in bits for corrected in (False, True)]
    )
    config = search.best([replace(config, method=method) for method in METHODS])
    drift = _drift(search, config, names)
    if settings.keep_float == "auto":
        config = _keep_worst_in_float(search, config, [layer.layer for layer in drift], settings.max_drop)
    tried = tuple(search.tried.items())
    report = Int8Report(config, len(calibrate), len(held), tried, drift)
    return Int8Model(search.model_of(config), report)


def _bits(settings: ExportSettings, target: str) -> int:
    """TensorRT's integer arithmetic does not overflow: its weights have 8 bits."""
    return 8 if target == "tensorrt" or settings.weight_bits == "auto" else int(settings.weight_bits)


def _named_layers(wish: str, names: Sequence[str]) -> tuple[str, ...]:
    if wish in ("auto", "none"):
        return ()
    chosen = tuple(name.strip() for name in wish.split(",") if name.strip())
    if unknown := [name for name in chosen if name not in names]:
        raise ConfigError(
            f"[export] keep_float: no layer {unknown[0]!r}{nearest(unknown[0], names)}; "
            "give auto, none, or names from the drift table"
        )
    return chosen


def _evenly(images: np.ndarray, most: int) -> np.ndarray:
    chosen = np.linspace(0, len(images) - 1, min(most, len(images))).astype(int)
    return np.asarray(images[chosen])


def _drift(search: _Search, config: QuantizationConfig, names: Sequence[str]) -> tuple[LayerDrift, ...]:
    """Cost of each layer when it alone is quantised, worst first."""
    few, expected = search.held[:_DRIFT_ON], search.expected[:_DRIFT_ON]
    operators = {node.name: node.op_type for node in search.model.graph.node}
    rows = []
    for name in names:
        content = search.model_with_only(name, config).SerializeToString()
        loss = _loss(run_model(content, few, exact=search.target == "tensorrt"), expected)
        rows.append(LayerDrift(name, operators[name], loss.error))
    return tuple(sorted(rows, key=lambda row: -row.error))


def _keep_worst_in_float(
    search: _Search, config: QuantizationConfig, worst: Sequence[str], max_drop: float
) -> QuantizationConfig:
    """Keep as few layers in float, worst first, as bring the loss within the limits; else the best tried."""
    configs = [config]
    for count in _COUNTS:
        if search.loss(configs[-1]).within(max_drop):
            return configs[-1]
        if count <= len(worst) * _FLOAT_AT_MOST:
            configs.append(replace(config, kept_float=tuple(worst[:count])))
    return search.best(configs)
