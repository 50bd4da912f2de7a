"""The smaller precisions of a student, made from its fp32 model, with their parity, latency and accuracy."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from synthkit.engines.bundle import format as bundle
from synthkit.engines.bundle.format import FP16, FP32, INPUT, INT8, OUTPUT, Accuracy, ModelFacts, Parity
from synthkit.engines.runtime.session import Session, open_session
from synthkit.errors import ConfigError, ParityError, nearest
from synthkit.metrics import classification as metrics
from synthkit.recipes.exporting.int8_search import Int8Report, choose_int8
from synthkit.recipes.settings import ExportSettings
from synthkit.standalone import in_batches

_WARM_UP, _RUNS = 5, 30
_PROBED_AT_MOST = 128


@dataclass(frozen=True)
class TestSet:
    """Images that nothing was trained or calibrated on.

    Attributes:
        inputs: uint8 [N, height, width, 3].
        labels: class indices [N].
        torch: the torch student's predictions, class indices [N].
    """

    inputs: np.ndarray
    labels: np.ndarray
    torch: np.ndarray


@dataclass(frozen=True)
class Made:
    """The models of a bundle.

    Attributes:
        facts: precision -> facts of its model.
        golden: precision -> its own logits for the golden inputs; every precision but fp32.
        int8: choice of the int8 model; None where there is none.
    """

    facts: dict[str, ModelFacts]
    golden: dict[str, np.ndarray]
    int8: Int8Report | None


def chosen_precisions(text: str) -> list[str]:
    """Parse `--precision`. fp32 is always among them and first: the others are made from it.

    Raises:
        ConfigError: one is unknown.
    """
    named = [name.strip() for name in text.split(",") if name.strip()]
    if unknown := [name for name in named if name not in bundle.FILES]:
        raise ConfigError(
            f"--precision: unknown {unknown[0]!r}{nearest(unknown[0], bundle.FILES)}; "
            f"a comma-separated choice of {', '.join(bundle.FILES)}"
        )
    return [name for name in bundle.FILES if name in named or name == FP32]


def make_precisions(
    folder: Path,
    fp32: ModelFacts,
    golden_inputs: np.ndarray,
    images: np.ndarray,
    settings: ExportSettings,
    int8_target: str,
) -> Made:
    """Write a model file for every precision that was asked for beside model.onnx.

    Args:
        folder: holds model.onnx.
        fp32: facts of that model.
        golden_inputs: uint8 [N, height, width, 3].
        images: photos and synthetic images, uint8 [N, height, width, 3]; they give int8 its ranges.
        settings: precisions, and the settings of int8.
        int8_target: "cpu" or "tensorrt".

    Raises:
        ParityError: a model gives values that are not finite, or fp16 loses too much.
        EngineError: the student cannot be expressed in fp16.
        ConfigError: int8 has no images to find its ranges with.
    """
    made = Made({FP32: fp32}, {}, None)
    for precision in chosen_precisions(settings.precision)[1:]:
        if precision == FP16:
            facts, report = _half(folder, fp32), None
        else:
            facts, report = _int8(folder, fp32, images, settings, int8_target)
        probe = images if len(images) else golden_inputs
        parity = _parity(folder, precision, facts, probe)
        made.facts[precision] = replace(facts, parity=parity)
        made.golden[precision] = _logits(folder, precision, facts, golden_inputs)
        made = replace(made, int8=report or made.int8)
    return made


def _half(folder: Path, fp32: ModelFacts) -> ModelFacts:
    import onnx

    from synthkit.engines.runtime import onnx_graph
    from synthkit.engines.student import fp16 as half

    model = half.to_half(onnx.load(folder / bundle.FILES[FP32]), fp32.head)
    onnx.save(model, folder / bundle.FILES[FP16])
    head = onnx_graph.present_head(model, fp32.head)
    return replace(fp32, exporter="onnxruntime.transformers.float16", head=head)


def _int8(
    folder: Path, fp32: ModelFacts, images: np.ndarray, settings: ExportSettings, target: str
) -> tuple[ModelFacts, Int8Report]:
    import onnx

    from synthkit.engines.runtime import onnx_graph

    model = onnx.load(folder / bundle.FILES[FP32])
    chosen = choose_int8(model, fp32.head, images, settings, target)
    onnx.checker.check_model(chosen.model, full_check=True)
    onnx.save(chosen.model, folder / bundle.FILES[INT8])
    head = onnx_graph.present_head(chosen.model, fp32.head)
    facts = replace(fp32, exporter="onnxruntime.quantization", head=head, target=target)
    return facts, chosen.report


def _session(folder: Path, precision: str, facts: ModelFacts) -> Session:
    return open_session(folder / bundle.FILES[precision], exact_int8=facts.target == "tensorrt")


def _logits(folder: Path, precision: str, facts: ModelFacts, images: np.ndarray) -> np.ndarray:
    session = _session(folder, precision, facts)
    return in_batches(lambda batch: session.run({INPUT: batch})[OUTPUT], images)


def _parity(folder: Path, precision: str, facts: ModelFacts, images: np.ndarray) -> Parity:
    """Compare a smaller precision with fp32.

    Raises:
        ParityError: a value is not finite, or an fp16 logit is too far off.
    """
    probe = images[np.linspace(0, len(images) - 1, min(_PROBED_AT_MOST, len(images))).astype(int)]
    expected = _logits(folder, FP32, facts, probe)
    logits = _logits(folder, precision, facts, probe)
    error, largest = float(np.abs(logits - expected).max()), float(np.abs(expected).max())
    relative = bundle.TOLERANCES[precision].relative
    if not np.isfinite(logits).all() or (precision == FP16 and error > relative * largest):
        raise ParityError(
            f"the {precision} model differs from fp32 by {error:.2g} in a logit, allowed are "
            f"{relative * largest:.2g}; leave {precision} out of --precision"
        )
    return Parity(
        max_abs_error=error,
        top1_agreement=float(np.mean(logits.argmax(1) == expected.argmax(1))),
        images=len(probe),
        against="fp32",
        relative_error=error / largest if largest else 0.0,
    )


def measure(
    folder: Path, facts: Mapping[str, ModelFacts], image: np.ndarray, test: TestSet | None
) -> dict[str, ModelFacts]:
    """Add the latency of every precision, and its accuracy where there is a test set.

    Args:
        folder: holds the model files.
        facts: precision -> facts of its model.
        image: one input, uint8 [1, height, width, 3].
        test: the test set, if any.
    """
    sessions = {name: open_session(folder / bundle.FILES[name]) for name in facts}
    times = latencies(sessions, image)
    measured = {name: replace(one, latency_ms=times[name]) for name, one in facts.items()}
    if test is None:
        return measured
    answers = {name: _logits(folder, name, one, test.inputs).argmax(1) for name, one in facts.items()}
    return {
        name: replace(one, accuracy=_accuracy(answers[name], answers[FP32], test))
        for name, one in measured.items()
    }


def latencies(sessions: Mapping[str, Session], image: np.ndarray) -> dict[str, float]:
    """Median milliseconds per image. The sessions take turns, so that a busy machine slows all alike."""
    times: dict[str, list[float]] = {name: [] for name in sessions}
    for _ in range(_WARM_UP + _RUNS):
        for name, session in sessions.items():
            started = time.perf_counter()
            session.run({INPUT: image})
            times[name].append(1000 * (time.perf_counter() - started))
    return {name: round(float(np.median(each[_WARM_UP:])), 3) for name, each in times.items()}


def _accuracy(predicted: np.ndarray, fp32: np.ndarray, test: TestSet) -> Accuracy:
    right = int(np.sum(predicted == test.labels))
    return Accuracy(
        top1=metrics.top1(predicted, test.labels),
        n_test=len(test.labels),
        interval=metrics.wilson_interval(right, len(test.labels)),
        torch_top1=metrics.top1(test.torch, test.labels),
        agreement_with_fp32=float(np.mean(predicted == fp32)),
        agreement_with_torch=float(np.mean(predicted == test.torch)),
    )


def settle_default(settings: ExportSettings, facts: Mapping[str, ModelFacts]) -> tuple[str, str]:
    """Decide the precision that runs when none is named.

    A smaller precision may cost at most `max_drop` points: of top-1 on the test set, or without one the
    percentage of images on which it disagrees with fp32, which no drop of top-1 can exceed.

    Returns:
        The precision, and the reason if the one that was asked for was refused (otherwise empty).

    Raises:
        ConfigError: the wish is not among the precisions.
    """
    wish = settings.default_precision
    if wish not in facts:
        raise ConfigError(
            f"--default-precision {wish} is not exported; add it: --precision {','.join(facts)},{wish}"
        )
    if wish == FP32:
        return wish, ""
    cost, how = _cost(facts[FP32], facts[wish])
    if cost <= settings.max_drop:
        return wish, ""
    return FP32, (
        f"{wish} costs {cost:.1f} points ({how}), more than export.max_drop = {settings.max_drop:g}; the "
        "bundle holds it, but the default stays fp32"
    )


def _cost(fp32: ModelFacts, other: ModelFacts) -> tuple[float, str]:
    if fp32.accuracy and other.accuracy:
        return 100 * (fp32.accuracy.top1 - other.accuracy.top1), "top-1 on the test set"
    how = "disagreement with fp32; give --test-dir to measure top-1"
    return 100 * (1 - other.parity.top1_agreement), how
