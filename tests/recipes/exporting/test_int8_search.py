"""The search for the int8 config: what it tries, what it keeps in float, and that it does nothing twice."""

from collections import Counter
from typing import Any

import numpy as np
import onnx
import pytest

from synthkit.calibration.ranges import METHODS
from synthkit.engines.runtime import onnx_graph
from synthkit.engines.student import int8 as quantize
from synthkit.engines.student.onnx_export import export_student
from synthkit.errors import ConfigError
from synthkit.recipes.exporting import int8_search as int8
from synthkit.recipes.exporting.int8_search import QuantizationConfig, choose_int8
from synthkit.recipes.exporting.int8_search import QuantizationLoss as Loss
from synthkit.recipes.settings import ExportSettings
from tests.tiny_students import PREPROCESSING, noise, tiny_student

pytestmark = pytest.mark.slow

Exported = tuple[onnx.ModelProto, dict[str, str]]


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    path = tmp_path_factory.mktemp("student") / "model.onnx"
    facts, _ = export_student(tiny_student().model, PREPROCESSING, noise(), path, {})
    return onnx.load(path), dict(facts.head)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often the costly steps ran."""
    counted: Counter[str] = Counter()

    def count(module: Any, name: str) -> None:
        original = getattr(module, name)

        def counting(*arguments: Any, **named: Any) -> Any:
            counted[name] += 1
            return original(*arguments, **named)

        monkeypatch.setattr(module, name, counting)

    count(int8, "fit_ranges")
    count(quantize, "to_int8")
    return counted


def chosen(exported: Exported, target: str = "cpu", **settings: Any) -> int8.Int8Model:
    return choose_int8(*exported, noise(12), ExportSettings(**settings), target)


def test_every_config_is_tried_once(exported: Exported, calls: Counter[str]) -> None:
    report = chosen(exported, keep_float="none").report.to_json()
    tried = [(one["method"], one["weight_bits"], one["bias_correction"]) for one in report["tried"]]
    assert {pair[1:] for pair in tried} == {(7, False), (7, True), (8, False), (8, True)}
    assert {pair[0] for pair in tried} == set(METHODS) and len(tried) == len(set(tried)) == 3 + len(METHODS)
    best = max(report["tried"], key=lambda one: (one["agreement"], -one["error"]))
    assert [report[name] for name in ("method", "weight_bits", "bias_correction")] == [
        best[name] for name in ("method", "weight_bits", "bias_correction")
    ]
    assert calls == {"fit_ranges": len(METHODS), "to_int8": len(tried) + len(report["drift"])}


@pytest.mark.parametrize("target", ["cpu", "tensorrt"])
def test_the_loss_is_measured_on_images_that_gave_no_range_and_as_the_target_computes(
    exported: Exported, monkeypatch: pytest.MonkeyPatch, target: str
) -> None:
    calibrated: set[bytes] = set()
    judged: list[tuple[set[bytes], bool]] = []
    observe, run_model = int8.observe, int8.run_model

    def observing(compute: Any, images: np.ndarray) -> Any:
        calibrated.update(image.tobytes() for image in images)
        return observe(compute, images)

    def running(content: bytes, images: np.ndarray, exact: bool = False) -> np.ndarray:
        judged.append(({image.tobytes() for image in images}, exact))
        return run_model(content, images, exact)

    monkeypatch.setattr(int8, "observe", observing)
    monkeypatch.setattr(int8, "run_model", running)
    chosen(exported, target, keep_float="none")
    assert len(calibrated) == 6 and not calibrated & set().union(*(images for images, _ in judged))
    (_, reference), *quantised = judged
    assert not reference and {exact for _, exact in quantised} == {target == "tensorrt"}


def test_a_layer_in_float_keeps_its_bias(exported: Exported, monkeypatch: pytest.MonkeyPatch) -> None:
    best = Loss(1.0, 0.0), Loss(1.0, 0.4)
    monkeypatch.setattr(int8._Search, "loss", lambda self, config: best[not config.bias_correction])
    name, *others = quantize.layers(*exported)
    found = chosen(exported, keep_float=name)
    assert found.report.to_json()["bias_correction"]
    node = next(node for node in exported[0].graph.node if node.name == name)
    before, after = (onnx_graph.constant_values(one)[node.input[2]] for one in (exported[0], found.model))
    assert np.array_equal(before, after) and others


def test_tensorrts_weights_keep_their_eight_bits(exported: Exported) -> None:
    report = chosen(exported, "tensorrt", weight_bits="7").report.to_json()
    assert {one["weight_bits"] for one in report["tried"]} == {8}


def test_the_drift_table_names_every_layer_worst_first(exported: Exported) -> None:
    drift = chosen(exported).report.to_json()["drift"]
    assert {row["layer"] for row in drift} == set(quantize.layers(*exported))
    errors = [row["error"] for row in drift]
    assert errors == sorted(errors, reverse=True) and min(errors) > 0
    assert "fc" not in " ".join(row["layer"] for row in drift), "the head stays in float"


def test_the_worst_layers_stay_in_float_until_the_loss_is_small(
    exported: Exported, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses = {0: 0.4, 1: 0.3, 2: 0.2, 4: 0.01}
    monkeypatch.setattr(int8, "_loss", lambda found, expected: Loss(1.0, 0.4))
    monkeypatch.setattr(int8._Search, "loss", lambda self, config: Loss(1.0, losses[len(config.kept_float)]))
    report = chosen(exported).report.to_json()
    assert report["kept_float"] == [row["layer"] for row in report["drift"][:4]]
    losses[0] = 0.01
    assert chosen(exported).report.to_json()["kept_float"] == []


def test_of_hopeless_configs_the_best_is_taken(exported: Exported, monkeypatch: pytest.MonkeyPatch) -> None:
    losses = {0: 0.4, 1: 0.3, 2: 0.5, 4: 0.6}
    monkeypatch.setattr(int8, "_loss", lambda found, expected: Loss(1.0, 0.4))
    monkeypatch.setattr(
        int8._Search, "loss", lambda self, config: Loss(1.0, losses.get(len(config.kept_float), 0.7))
    )
    assert len(chosen(exported).report.to_json()["kept_float"]) == 1


def test_named_layers_stay_in_float_and_wrong_names_are_refused(exported: Exported) -> None:
    name = quantize.layers(*exported)[0]
    found = chosen(exported, keep_float=name)
    assert found.report.to_json()["kept_float"] == [name]
    assert name not in quantize.rounded_weights(found.model)
    with pytest.raises(ConfigError, match="no layer 'cnov'"):
        chosen(exported, keep_float="cnov")
    with pytest.raises(ConfigError, match="needs images"):
        choose_int8(*exported, noise(1), ExportSettings(), "cpu")


@pytest.mark.parametrize(
    ("loss", "within"),
    [(Loss(1.0, 0.02), True), (Loss(0.985, 0.02), False), (Loss(0.995, 0.02), True), (Loss(1.0, 0.2), False)],
)
def test_the_limits_of_a_loss(loss: Loss, within: bool) -> None:
    assert loss.within(max_drop=1.0) is within


def test_the_loss_is_relative_and_never_undefined() -> None:
    expected = np.array([[3.0, 0.0], [0.0, 3.0]])
    found = int8._loss(expected[:, ::-1], expected)
    assert found.agreement == 0 and np.isclose(found.error, np.sqrt(2))
    assert int8._loss(expected, expected) == Loss(1.0, 0.0)
    assert int8._loss(expected * np.nan, expected).error == float("inf")
    assert Loss(1.0, 0.3).rank > Loss(0.9, 0.0).rank and Loss(1.0, 0.1).rank > Loss(1.0, 0.2).rank
    assert QuantizationConfig("min-max", 8) == QuantizationConfig("min-max", 8, False, ())
