"""The half-precision, 8-bit and rearranged graphs of a student: what they hold and what they compute."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from synthkit.calibration.ranges import fit_ranges, observe
from synthkit.engines import half, onnx_graph, quantize, targets
from synthkit.engines.onnx_header import read_opset
from synthkit.engines.session import open_session
from synthkit.engines.student_onnx import export_student
from synthkit.errors import EngineError, ParityError
from synthkit.standalone import softmax
from tests.tiny_students import PREPROCESSING, noise, tiny_student

Exported = tuple[onnx.ModelProto, dict[str, str], np.ndarray, Path]


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    path = tmp_path_factory.mktemp("student") / "model.onnx"
    model = tiny_student(name="mobilenetv3_small_050").model
    facts, logits = export_student(model, PREPROCESSING, noise(), path, {"names": "{}"})
    return onnx.load(path), dict(facts.head), logits, path


def run(model: onnx.ModelProto, images: np.ndarray, exact: bool = False) -> np.ndarray:
    return open_session(model.SerializeToString(), exact_int8=exact).run({"image": images})["logits"]


def error(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.sqrt(np.mean((found - expected) ** 2) / np.mean(expected**2)))


def quantised(exported: Exported, target: str, **rest: Any) -> onnx.ModelProto:
    model, head, _, _ = exported
    ranges = fit_ranges(observe(quantize.float_values(model), noise(24, seed=1)), "min-max")
    return quantize.to_int8(model, ranges, quantize.FORMS[target], head, **rest)


def test_half_precision_computes_in_half_but_for_its_islands(exported: Exported) -> None:
    model, head, logits, _ = exported
    made = half.to_half(model, head)
    assert 0 < error(run(made, noise()), logits) < 0.01
    kinds = {one.name: one.data_type for one in made.graph.initializer}
    assert kinds[head["weight"]] == kinds[head["bias"]] == TensorProto.FLOAT
    convolutions = [node for node in made.graph.node if node.op_type == "Conv"]
    assert convolutions and {kinds[node.input[1]] for node in convolutions} == {TensorProto.FLOAT16}
    assert [node.op_type for node in onnx_graph.normalisation(made, "image")] == [
        "Cast",
        "Transpose",
        "Mul",
        "Add",
    ]
    assert next(node for node in made.graph.node if "logits" in node.output).op_type == "Gemm"
    assert onnx_graph.present_head(made, head)["input"] != head["input"]
    assert {prop.key for prop in made.metadata_props} == {"names"}


def test_a_weight_beyond_half_precision_is_refused_by_name(exported: Exported) -> None:
    model = onnx.ModelProto()
    model.CopyFrom(exported[0])
    tensor = next(one for one in model.graph.initializer if len(one.dims) == 4)
    tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor) + np.float32(1e5), tensor.name))
    with pytest.raises(EngineError, match=rf"{tensor.name} exceeds 65504"):
        half.to_half(model, exported[1])


def test_tensorrts_form_keeps_its_rules(exported: Exported) -> None:
    made = quantised(exported, "tensorrt")
    constants = onnx_graph.constant_values(made)
    pairs = [node for node in made.graph.node if node.op_type in ("QuantizeLinear", "DequantizeLinear")]
    assert pairs
    for node in pairs:
        zero_point = constants[node.input[2]]
        assert zero_point.dtype == np.int8 and not zero_point.any(), node.name
    assert not [name for name, value in constants.items() if value.dtype == np.int32 and "bias" in name]
    convolutions = [node for node in made.graph.node if node.op_type == "Conv"]
    makers = {name: node for node in made.graph.node for name in node.output}
    for node in convolutions:
        weight = makers[node.input[1]]
        assert (
            weight.op_type == "DequantizeLinear" and constants[weight.input[1]].size > 1
        )  # a scale per channel
    activations = [node for node in made.graph.node if node.op_type in ("Relu", "HardSwish")]
    assert activations and {makers[node.input[0]].op_type for node in activations} == {"Conv"}  # they fuse
    assert error(run(made, noise(), exact=True), exported[2]) < 0.2


@pytest.mark.parametrize("target", ["cpu", "tensorrt"])
def test_the_head_stays_in_float_and_can_be_replaced(exported: Exported, target: str) -> None:
    made = quantised(exported, target)
    onnx.checker.check_model(made, full_check=True)
    head = onnx_graph.present_head(made, exported[1])
    tensors = onnx_graph.weights(made)
    assert tensors[head["weight"]].data_type == tensors[head["bias"]].data_type == TensorProto.FLOAT
    features = open_session(onnx_graph.exposed(made, [head["input"]])).run({"image": noise()})[head["input"]]
    weight, bias = (numpy_helper.to_array(tensors[head[name]]) for name in ("weight", "bias"))
    assert np.allclose(features @ weight.T + bias, run(made, noise()), atol=1e-4)


def test_cpu_weights_are_integers_and_the_file_shrinks(exported: Exported) -> None:
    made = quantised(exported, "cpu")
    sizes = [one.ByteSize() for one in (made, exported[0])]
    assert sizes[0] < 0.6 * sizes[1]  # graph text weighs in a student this small
    assert error(run(made, noise(), exact=True), exported[2]) < 0.3


def test_layers_can_stay_in_float(exported: Exported) -> None:
    names = quantize.layers(exported[0], exported[1])
    assert "/model/classifier/Gemm" not in names and len(names) > 20
    made = quantised(exported, "cpu", keep_float=names)
    assert error(run(made, noise()), exported[2]) < error(
        run(quantised(exported, "cpu"), noise()), exported[2]
    )
    assert not {one.data_type for one in made.graph.initializer if len(one.dims) == 4} & {TensorProto.INT8}


def test_bias_correction_takes_out_the_mean_error() -> None:
    """One convolution with coarse weights on images of a positive mean: the output's mean comes back."""
    rng = np.random.default_rng(0)
    weight = rng.normal(size=(4, 3, 1, 1)).astype(np.float32)
    nodes = [
        helper.make_node("Cast", ["image"], ["c"], "cast", to=TensorProto.FLOAT),
        helper.make_node("Transpose", ["c"], ["t"], "transpose", perm=[0, 3, 1, 2]),
        helper.make_node("Mul", ["t", "scale"], ["m"], "mul"),
        helper.make_node("Add", ["m", "shift"], ["a"], "add"),
        helper.make_node("Conv", ["a", "w", "b"], ["logits"], "conv"),
    ]
    values = {
        "scale": np.full((1, 3, 1, 1), 1 / 255),
        "shift": np.zeros((1, 3, 1, 1)),
        "w": weight,
        "b": np.zeros(4),
    }
    graph = helper.make_graph(
        nodes,
        "one",
        [helper.make_tensor_value_info("image", TensorProto.UINT8, ["batch", 8, 8, 3])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", 4, 8, 8])],
        [numpy_helper.from_array(np.float32(value), name) for name, value in values.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10)
    images = noise(16, 8)
    observed = observe(quantize.float_values(model), images)
    ranges = fit_ranges(observed, "min-max")
    form = quantize.FORMS["cpu"]
    plain = quantize.to_int8(model, ranges, form, None)
    means = {name: seen.channel_means for name, seen in observed.items()}
    corrected = quantize.to_int8(quantize.correct_biases(model, plain, means), ranges, form, None)
    expected = run(model, images)
    off = [
        np.abs((run(one, images, exact=True) - expected).mean(axis=(0, 2, 3))).max()
        for one in (plain, corrected)
    ]
    assert off[1] < 0.5 * off[0]


def test_sizes_become_constants_and_padding_joins_its_convolution(tmp_path: Path) -> None:
    import timm
    import torch

    torch.manual_seed(0)
    model = timm.create_model("mobilenetv3_small_050", num_classes=3, pad_type="same").eval()
    export_student(model, PREPROCESSING, noise(), tmp_path / "model.onnx", {})  # proves parity itself
    nodes = onnx.load(tmp_path / "model.onnx").graph.node
    assert not {"Shape", "Gather", "Pad"} & {node.op_type for node in nodes}
    stem = next(node for node in nodes if node.op_type == "Conv")
    assert list(next(a.ints for a in stem.attribute if a.name == "pads")) == [0, 0, 1, 1]


@pytest.mark.parametrize("feed", [targets.IMAGENET, targets.RAW_PIXELS])
def test_a_float_input_gives_the_same_probabilities(
    exported: Exported, tmp_path: Path, feed: targets.Feed
) -> None:
    model, _, logits, original = exported
    path = tmp_path / "variant.onnx"
    onnx.save(targets.with_float_input(model, feed, ("input_0", "output_0"), 1), path)
    session = open_session(path)
    assert [(one.name, one.dtype, one.shape) for one in (*session.inputs, *session.outputs)] == [
        ("input_0", "float32", (1, 3, 32, 32)),
        ("output_0", "float32", (1, 3)),
    ]
    found = session.run({"input_0": feed.of(noise()[:1])})["output_0"]
    assert np.abs(found - softmax(logits[:1])).max() < 1e-5
    assert targets.prove_variant(path, original, feed, noise()) < 1e-5
    other = targets.RAW_PIXELS if feed is targets.IMAGENET else targets.IMAGENET
    with pytest.raises(ParityError, match="in a probability"):
        targets.prove_variant(path, original, other, noise())


def test_the_opset_is_read_without_the_onnx_package(exported: Exported, tmp_path: Path) -> None:
    assert read_opset(exported[3]) == 17
    (tmp_path / "junk").write_bytes(b"no graph \xff\xff")
    assert read_opset(tmp_path / "junk") is None


def test_an_older_opset_is_written_where_a_target_needs_it(tmp_path: Path) -> None:
    model = tiny_student().model
    facts, _ = export_student(model, PREPROCESSING, noise(), tmp_path / "model.onnx", {}, opset=16)
    assert facts.opset == read_opset(tmp_path / "model.onnx") == 16
