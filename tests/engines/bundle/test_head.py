"""The head of a model file in every precision: read, features before it, and replaced."""

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest

from synthkit.engines.bundle.format import verify
from synthkit.engines.bundle.head import HeadFile
from synthkit.engines.runtime.session import open_session
from synthkit.errors import BundleError, MissingExtra
from tests.small_bundles import facts_of, three_precisions
from tests.tiny_students import CLASSES, noise

#: Half precision carries 11 bits; the int8 body is exact but for the order of the float head's sums.
NEAR = {"fp32": 1e-5, "fp16": 1e-2, "int8": 1e-5}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return three_precisions(tmp_path_factory.mktemp("made") / "bundle")


def opened(folder: Path, precision: str) -> HeadFile:
    entry = facts_of(folder).precisions[precision]
    return HeadFile.open(folder, entry)


def run(model: bytes | Path, inputs: np.ndarray) -> np.ndarray:
    return open_session(model).run({"image": inputs})["logits"]


def test_the_fixture_is_a_whole_bundle(folder: Path) -> None:
    assert verify(folder) == []
    types = {node.op_type for node in onnx.load(folder / "model.int8.onnx").graph.node}
    assert {"QuantizeLinear", "DequantizeLinear", "Gemm"} <= types


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
def test_head_of_the_features_gives_the_logits(folder: Path, precision: str) -> None:
    head = opened(folder, precision)
    weight, bias = head.weight_and_bias()
    inputs = noise(7, seed=3)
    features = head.body()(inputs)
    assert features.dtype == np.float32 and features.shape == (7, weight.shape[1]) and len(bias) == 3
    expected = run(head.path, inputs)
    error = np.abs(features @ weight.T + bias - expected).max()
    assert error <= NEAR[precision] * np.abs(expected).max()


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
def test_another_head_with_more_classes(folder: Path, precision: str) -> None:
    head = opened(folder, precision)
    before = head.path.read_bytes()
    random = np.random.default_rng(0)
    width = head.weight_and_bias()[0].shape[1]
    weight, bias = random.normal(0, 1, (5, width)), random.normal(0, 1, 5)
    labels = (*CLASSES, "four", "five")
    content = head.with_head(weight, bias, labels, {"trained_on": ["00"]})
    inputs = noise(6, seed=4)
    expected = head.body()(inputs) @ weight.T + bias
    found = run(content, inputs)
    assert found.shape == (6, 5)
    assert np.abs(found - expected).max() <= NEAR[precision] * np.abs(expected).max()
    assert head.path.read_bytes() == before and len(head.weight_and_bias()[1]) == 3  # nothing in place
    texts = {prop.key: prop.value for prop in onnx.load_from_string(content).metadata_props}
    assert list(json.loads(texts["names"]).values()) == list(labels)
    assert json.loads(texts["provenance"]) == {"trained_on": ["00"]} and texts["task"] == "classify"


def test_what_is_no_head_is_refused(folder: Path, tmp_path: Path) -> None:
    shutil.copy(folder / "model.onnx", tmp_path / "model.onnx")
    stated = facts_of(folder).precisions["fp32"]
    names = stated["head"]
    with pytest.raises(BundleError, match=r"no linear last layer on record.*workstation"):
        HeadFile.open(tmp_path, {**stated, "head": None})
    with pytest.raises(BundleError, match="does not hold the head's weight 'absent'"):
        HeadFile.open(tmp_path, {**stated, "head": {**names, "weight": "absent"}})
    with pytest.raises(BundleError, match="gives no features at 'absent'"):
        HeadFile.open(tmp_path, {**stated, "head": {**names, "input": "absent"}}).body()


def test_numbers_beyond_half_precision_are_refused(folder: Path) -> None:
    head = opened(folder, "fp16")
    weight, bias = head.weight_and_bias()
    with pytest.raises(BundleError, match="too large for float16"):
        head.with_head(weight * 1e9, bias, CLASSES, {})


def test_without_onnx_the_extra_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(MissingExtra, match=r"pip install 'synthkit-edge\[device\]'"):
        opened(folder, "fp32")
