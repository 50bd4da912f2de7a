"""How a student becomes 8 bits with the least loss: every way is tried, images held out decide.

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
_FLOAT_AT_MOST = 0.5  # of the layers; beyond that the model is int8 in name only
_COUNTS = (1, 2, 4, 8, 16, 32)  # of layers in float that are tried
# Photos that the student learned lie far from its decision boundaries and keep their top-1 where others do
# not: with an error of 0.05 the first student measured kept 97 % of unseen answers, with 0.23 only 85 %.
_ERROR_AT_MOST = 0.05


@dataclass(frozen=True)
class Way:
    """One way to quantise.

    Attributes:
        method: how ranges are found, a key of `METHODS`.
        weight_bits: 7 or 8.
        bias_correction: whether the mean rounding error of the weights was taken out of the biases.
        kept_float: names of layers that stay in float.
    """

    method: str
    weight_bits: int
    bias_correction: bool = False
    kept_float: tuple[str, ...] = ()


@dataclass(frozen=True)
class Loss:
    """What quantising costs on held-out images.

    Attributes:
        agreement: share of images with the same top-1 as in fp32.
        error: root mean square error of the logits, as a part of their root mean square.
    """

    agreement: float
    error: float

    @property
    def rank(self) -> tuple[float, float]:
        """The larger, the better."""
        return self.agreement, -self.error

    def within(self, max_drop: float) -> bool:
        """Whether it is small enough for no layer to be kept in float."""
        return self.agreement >= 1 - max_drop / 100 and self.error <= _ERROR_AT_MOST


@dataclass(frozen=True)
class Int8:
    """The chosen model and how it was chosen."""

    model: onnx.ModelProto
    report: dict[str, Any]


@dataclass
class _Search:
    """A student, its images, and every way tried so far, with the model that it gave."""

    model: onnx.ModelProto
    head: Mapping[str, str] | None
    target: str
    held: np.ndarray
    observed: Mapping[str, Observed]
    expected: np.ndarray
    tried: dict[Way, Loss] = field(default_factory=dict)
    models: dict[Way, onnx.ModelProto] = field(default_factory=dict)
    ranges: dict[str, Ranges] = field(default_factory=dict)
    rounded: dict[int, Mapping[str, np.ndarray]] = field(default_factory=dict)

    def model_of(self, way: Way) -> onnx.ModelProto:
        if way not in self.models:
            self.models[way] = self._quantised(way)
        return self.models[way]

    def model_with_only(self, layer: str, way: Way) -> onnx.ModelProto:
        return self._quantised(replace(way, kept_float=()), [layer])

    def _quantised(self, way: Way, only: Collection[str] = ()) -> onnx.ModelProto:
        from synthkit.engines.student import int8 as quantize

        form = replace(quantize.FORMS[self.target], reduce_range=way.weight_bits == 7)
        ranges = self._ranges(way.method)
        source = self._corrected(way, only) if way.bias_correction else self.model
        return quantize.to_int8(source, ranges, form, self.head, way.kept_float, only)

    def _ranges(self, method: str) -> Ranges:
        if method not in self.ranges:
            self.ranges[method] = fit_ranges(self.observed, method)
        return self.ranges[method]

    def _corrected(self, way: Way, only: Collection[str]) -> onnx.ModelProto:
        """The model with the biases of the layers that leave float corrected."""
        from synthkit.engines.student import int8 as quantize

        if way.weight_bits not in self.rounded:
            plain = self.model_of(replace(way, bias_correction=False, kept_float=()))
            self.rounded[way.weight_bits] = quantize.rounded_weights(plain)
        means = {name: seen.channel_means for name, seen in self.observed.items()}
        leave = set(only) or set(self.rounded[way.weight_bits]) - set(way.kept_float)
        rounded = {name: weight for name, weight in self.rounded[way.weight_bits].items() if name in leave}
        return quantize.correct_biases(self.model, rounded, means)

    def loss(self, way: Way) -> Loss:
        if way not in self.tried:
            content = self.model_of(way).SerializeToString()
            found = run_model(content, self.held, exact=self.target == "tensorrt")
            self.tried[way] = _loss(found, self.expected)
            log.info("int8 %s: %s", way, self.tried[way])
        return self.tried[way]

    def best(self, ways: Sequence[Way]) -> Way:
        return max(ways, key=lambda way: self.loss(way).rank)


def run_model(content: bytes, images: np.ndarray, exact: bool = False) -> np.ndarray:
    """Logits of a model's content for uint8 images [N, height, width, 3]."""
    session = open_session(content, exact_int8=exact)
    return in_batches(lambda batch: session.run({INPUT: batch})[OUTPUT], images)


def _loss(found: np.ndarray, expected: np.ndarray) -> Loss:
    agreement = float(np.mean(found.argmax(1) == expected.argmax(1)))
    error = float(np.sqrt(np.mean((found - expected) ** 2) / max(float(np.mean(expected**2)), 1e-12)))
    return Loss(agreement, error if np.isfinite(error) else float("inf"))


def choose_int8(
    model: onnx.ModelProto,
    head: Mapping[str, str] | None,
    images: np.ndarray,
    settings: ExportSettings,
    target: str,
) -> Int8:
    """Quantise a student in the best of all ways tried.

    Args:
        model: the student in fp32.
        head: names of the head's tensors; it stays in float.
        images: photos and synthetic images, uint8 [N, height, width, 3]; every other one is held out.
        settings: which ways are allowed.
        target: "cpu" or "tensorrt".

    Raises:
        ConfigError: there are too few images, or `--keep-float` names no layer.
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
    way = search.best([Way(first, one, corrected, named) for one in bits for corrected in (False, True)])
    way = search.best([replace(way, method=method) for method in METHODS])
    drift = _drift(search, way, names)
    if settings.keep_float == "auto":
        way = _keep_worst_in_float(search, way, [str(row["layer"]) for row in drift], settings.max_drop)
    return Int8(search.model_of(way), _report(search, way, drift, len(calibrate)))


def _bits(settings: ExportSettings, target: str) -> int:
    """TensorRT's integer arithmetic does not overflow: its weights have 8 bits."""
    return 8 if target == "tensorrt" or settings.weight_bits == "auto" else int(settings.weight_bits)


def _named_layers(wish: str, names: Sequence[str]) -> tuple[str, ...]:
    if wish in ("auto", "none"):
        return ()
    chosen = tuple(name.strip() for name in wish.split(",") if name.strip())
    if unknown := [name for name in chosen if name not in names]:
        raise ConfigError(
            f"--keep-float: no layer {unknown[0]!r}{nearest(unknown[0], names)}; "
            "give auto, none, or names from the drift table"
        )
    return chosen


def _evenly(images: np.ndarray, most: int) -> np.ndarray:
    chosen = np.linspace(0, len(images) - 1, min(most, len(images))).astype(int)
    return np.asarray(images[chosen])


def _drift(search: _Search, way: Way, names: Sequence[str]) -> list[dict[str, Any]]:
    """What each layer costs when it alone is quantised, worst first."""
    few, expected = search.held[:_DRIFT_ON], search.expected[:_DRIFT_ON]
    operators = {node.name: node.op_type for node in search.model.graph.node}
    rows = []
    for name in names:
        content = search.model_with_only(name, way).SerializeToString()
        loss = _loss(run_model(content, few, exact=search.target == "tensorrt"), expected)
        rows.append({"layer": name, "operator": operators[name], "error": loss.error})
    return sorted(rows, key=lambda row: -float(row["error"]))


def _keep_worst_in_float(search: _Search, way: Way, worst: Sequence[str], max_drop: float) -> Way:
    """As few layers in float as bring the loss within the limits, worst first; otherwise the best tried."""
    ways = [way]
    for count in _COUNTS:
        if search.loss(ways[-1]).within(max_drop):
            return ways[-1]
        if count <= len(worst) * _FLOAT_AT_MOST:
            ways.append(replace(way, kept_float=tuple(worst[:count])))
    return search.best(ways)


def _report(search: _Search, way: Way, drift: list[dict[str, Any]], calibrated_on: int) -> dict[str, Any]:
    tried = [
        {**asdict(one), "kept_float": len(one.kept_float), **asdict(loss)}
        for one, loss in search.tried.items()
    ]
    return {
        **asdict(way),
        "kept_float": list(way.kept_float),
        "calibrated_on": calibrated_on,
        "held_out": len(search.held),
        "tried": tried,
        "drift": drift,
    }
