"""A student's graph in 8 bits: Q/DQ nodes around its layers, put there by ONNX Runtime's quantiser.

One form does not serve two worlds. ONNX Runtime on a CPU fuses unsigned activations between layers and wants
the biases in 32-bit integers; TensorRT wants symmetric signed values with zero points of 0, float biases, and
no Q/DQ between a convolution and its activation. Softmax and the last linear layer stay in float in both.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, numpy_helper

from synthkit.engines import onnx_graph
from synthkit.engines.bundle import INPUT
from synthkit.engines.session import open_session

_LAYERS = ("Conv", "Gemm", "MatMul")


@dataclass(frozen=True)
class Form:
    """How a target wants its Q/DQ graph.

    Attributes:
        activations: name of the activations' type in onnxruntime.quantization.QuantType.
        between: operators without weights that compute in 8 bits too.
        reduce_range: weights of 7 bits. Processors without VNNI add pairs of products in 16 bits, which
            overflow with weights of 8.
        options: of ONNX Runtime's quantiser.
    """

    activations: str
    weights: str = "QInt8"
    between: tuple[str, ...] = ()
    reduce_range: bool = False
    options: Mapping[str, Any] = field(default_factory=dict)


FORMS = {
    "cpu": Form(
        activations="QUInt8",
        between=("Add", "AveragePool", "Clip", "Concat", "GlobalAveragePool", "MaxPool", "Mul", "Relu"),
        reduce_range=True,
    ),
    "tensorrt": Form(
        activations="QInt8",
        options={
            "ActivationSymmetric": True,
            "AddQDQPairToWeight": True,
            "DedicatedQDQPair": True,
            "QuantizeBias": False,
            "OpTypesToExcludeOutputQuantization": list(_LAYERS),
        },
    ),
}
_COMMON = {"WeightSymmetric": True, "MatMulConstBOnly": True}


def float_values(model: onnx.ModelProto) -> Callable[[np.ndarray], dict[str, np.ndarray]]:
    """A function that computes every float tensor of the graph from uint8 images [N, height, width, 3]."""
    types = onnx_graph.value_types(model)
    names = [name for name, info in types.items() if info.type.tensor_type.elem_type == TensorProto.FLOAT]
    constant = onnx_graph.constant_values(model)
    session = open_session(onnx_graph.exposed(model, [name for name in names if name not in constant]))
    return lambda images: session.run({INPUT: images})


def layers(model: onnx.ModelProto, head: Mapping[str, str] | None) -> list[str]:
    """Names of the layers that can compute in 8 bits: those with constant weights, without the head."""
    last = onnx_graph.head_node(model, head)
    constant = onnx_graph.constant_values(model)
    return [
        node.name
        for node in model.graph.node
        if node.op_type in _LAYERS and node.input[1] in constant and (last is None or node.name != last.name)
    ]


def to_int8(
    model: onnx.ModelProto,
    ranges: Mapping[str, tuple[float, float]],
    form: Form,
    head: Mapping[str, str] | None,
    keep_float: Collection[str] = (),
) -> onnx.ModelProto:
    """The model with Q/DQ nodes.

    Args:
        model: in fp32.
        ranges: (low, high) of every tensor's values.
        form: what the target wants.
        head: names of the head's tensors; it stays in float.
        keep_float: names of layers that stay in float.
    """
    from onnxruntime.quantization import CalibrationMethod, QuantType
    from onnxruntime.quantization.calibrate import TensorsData
    from onnxruntime.quantization.qdq_quantizer import QDQQuantizer
    from onnxruntime.transformers.onnx_model import OnnxModel

    limits = {name: (np.float32(low), np.float32(high)) for name, (low, high) in ranges.items()}
    last = onnx_graph.head_node(model, head)
    prepared = onnx.shape_inference.infer_shapes(model)  # the quantiser looks types up; this also copies
    kept = {node.name for node in onnx_graph.normalisation(prepared, INPUT)} | set(keep_float)
    kept |= {last.name} if last is not None else set()
    quantizer = QDQQuantizer(
        prepared,
        True,  # per channel
        form.reduce_range,
        QuantType[form.weights],
        QuantType[form.activations],
        TensorsData(CalibrationMethod.MinMax, limits),
        [],
        sorted(kept),
        [*_LAYERS, *form.between],
        {**_COMMON, **form.options},
    )
    quantizer.quantize_model()
    OnnxModel.graph_topological_sort(quantizer.model.model.graph)  # the quantiser appends
    quantized: onnx.ModelProto = quantizer.model.model
    return quantized


def correct_biases(
    model: onnx.ModelProto, quantized: onnx.ModelProto, channel_means: Mapping[str, np.ndarray]
) -> onnx.ModelProto:
    """The model with the mean error that rounding its weights causes taken out of its biases.

    What rounding adds to a layer's mean output is the rounding error of the weights times the mean of the
    layer's input (Nagel et al. 2019, "Data-Free Quantization", section 4.2), here measured on images.

    Args:
        model: in fp32.
        quantized: the same with Q/DQ nodes, whose weights tell how they were rounded.
        channel_means: tensor name -> mean of each channel.
    """
    corrected = onnx.ModelProto()
    corrected.CopyFrom(model)
    tensors = onnx_graph.weights(corrected)
    rounded = _rounded_weights(quantized)
    for node in corrected.graph.node:
        if node.name in rounded and len(node.input) == 3 and node.input[2] in tensors:
            weight, bias = (numpy_helper.to_array(tensors[name]) for name in node.input[1:])
            shift = _mean_response(rounded[node.name] - weight, channel_means[node.input[0]])
            new = (bias - shift).astype(np.float32)
            tensors[node.input[2]].CopyFrom(numpy_helper.from_array(new, node.input[2]))
    return corrected


def _rounded_weights(quantized: onnx.ModelProto) -> dict[str, np.ndarray]:
    """Name of a quantised convolution -> its weights as they come back from 8 bits."""
    made = {name for node in quantized.graph.node for name in node.output}
    convolutions = [n for n in quantized.graph.node if n.op_type == "Conv" and n.input[1] in made]
    if not convolutions:
        return {}
    height_width = [side.dim_value for side in quantized.graph.input[0].type.tensor_type.shape.dim[1:]]
    image = {INPUT: np.zeros((1, *height_width), np.uint8)}
    values = onnx_graph.compute(quantized, [node.input[1] for node in convolutions], image)
    return {node.name: values[node.input[1]] for node in convolutions}


def _mean_response(weight: np.ndarray, means: np.ndarray) -> np.ndarray:
    """Mean output of a convolution [out, in / groups, ...] whose input channels have the given means."""
    taps = weight.reshape(*weight.shape[:2], -1).sum(axis=2)  # [out, in / groups]
    groups = len(means) // taps.shape[1]
    own = np.repeat(means.reshape(groups, -1), len(taps) // groups, axis=0)  # each output's own inputs
    return np.asarray((taps * own).sum(axis=1))
