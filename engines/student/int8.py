"""A student's graph in 8 bits: Q/DQ nodes around its layers, inserted by ONNX Runtime's quantiser.

CPUs and TensorRT need different Q/DQ formats. ONNX Runtime on a CPU fuses unsigned activations between layers
and wants the biases in 32-bit integers. TensorRT wants symmetric signed values with zero points of 0, float
biases, and no Q/DQ between a convolution and its activation. Softmax and the last linear layer stay in float
in both.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, numpy_helper

from synthkit.engines.bundle.format import INPUT
from synthkit.engines.runtime import onnx_graph
from synthkit.engines.runtime.session import open_session

_LAYERS = ("Conv", "Gemm", "MatMul")
_ACTIVATIONS = ("Clip", "Relu")  # fused into an 8-bit layer, whose output then has their range


@dataclass(frozen=True)
class QdqFormat:
    """Q/DQ format of a target.

    Attributes:
        activations: type of the activations, a member of onnxruntime.quantization.QuantType.
        weights: type of the weights.
        between: operators without weights that also compute in 8 bits.
        reduce_range: weights of 7 bits. Processors without VNNI add pairs of products in 16 bits, which
            overflow with weights of 8.
        guarded: shield float layers from ONNX Runtime's fusion, see `_guard`.
        options: of ONNX Runtime's quantiser.
    """

    activations: str
    weights: str = "QInt8"
    between: tuple[str, ...] = ()
    reduce_range: bool = False
    guarded: bool = False
    options: Mapping[str, Any] = field(default_factory=dict)


QDQ_FORMATS = {
    "cpu": QdqFormat(
        activations="QUInt8",
        between=("Add", "AveragePool", "Clip", "Concat", "GlobalAveragePool", "MaxPool", "Mul", "Relu"),
        reduce_range=True,
        guarded=True,
    ),
    "tensorrt": QdqFormat(
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
    """Return a function: uint8 images [N, height, width, 3] -> every float tensor of the graph by name."""
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
    qdq_format: QdqFormat,
    head: Mapping[str, str] | None,
    keep_float: Collection[str] = (),
    only: Collection[str] = (),
) -> onnx.ModelProto:
    """Quantise a model by inserting Q/DQ nodes.

    Args:
        model: in fp32.
        ranges: (low, high) of every tensor's values.
        qdq_format: of the target.
        head: names of the head's tensors; it stays in float.
        keep_float: names of layers that stay in float.
        only: names of the only layers that leave float; empty: all that can.
    """
    from onnxruntime.quantization import CalibrationMethod, QuantType
    from onnxruntime.quantization.calibrate import TensorsData
    from onnxruntime.quantization.qdq_quantizer import QDQQuantizer
    from onnxruntime.transformers.onnx_model import OnnxModel

    limits = {name: (np.float32(low), np.float32(high)) for name, (low, high) in ranges.items()}
    last = onnx_graph.head_node(model, head)
    prepared = onnx.shape_inference.infer_shapes(model)  # the quantiser looks types up; this also copies
    kept = {node.name for node in onnx_graph.normalisation(prepared, INPUT)}
    kept |= _with_activations(prepared, keep_float)
    kept |= {last.name} if last is not None else set()
    quantizer = QDQQuantizer(
        prepared,
        True,  # per channel
        qdq_format.reduce_range,
        QuantType[qdq_format.weights],
        QuantType[qdq_format.activations],
        TensorsData(CalibrationMethod.MinMax, limits),
        sorted(_with_activations(prepared, only)),
        sorted(kept),
        [*_LAYERS, *qdq_format.between],
        {**_COMMON, **qdq_format.options},
    )
    quantizer.quantize_model()
    if qdq_format.guarded:
        _guard(quantizer.model.model, keep_float)
    OnnxModel.graph_topological_sort(quantizer.model.model.graph)  # the quantiser appends
    quantized: onnx.ModelProto = quantizer.model.model
    return quantized


def _guard(model: onnx.ModelProto, names: Collection[str]) -> None:
    """Put an operator without effect between an 8-bit value and a float layer.

    ONNX Runtime gives a float layer between 8-bit ones weights of 8 bits with a single scale, which ruins
    depthwise convolutions. It does so where DequantizeLinear is right before the layer, and it removes
    Identity; it knows nothing of a Max of one value.
    """
    dequantized = {node.output[0] for node in model.graph.node if node.op_type == "DequantizeLinear"}
    for node in [one for one in model.graph.node if one.name in names and one.input[0] in dequantized]:
        shielded = f"{node.name}_shielded"
        model.graph.node.append(onnx.helper.make_node("Max", [node.input[0]], [shielded], shielded))
        node.input[0] = shielded


def _with_activations(model: onnx.ModelProto, names: Collection[str]) -> set[str]:
    """The layers and the activations behind them: an 8-bit range between the two would be mostly clipped."""
    made = {name for node in model.graph.node if node.name in names for name in node.output}
    after = {n.name for n in model.graph.node if n.op_type in _ACTIVATIONS and n.input[0] in made}
    return {*names, *after}


def correct_biases(
    model: onnx.ModelProto, rounded: Mapping[str, np.ndarray], channel_means: Mapping[str, np.ndarray]
) -> onnx.ModelProto:
    """Subtract from the biases the mean error that rounding the weights causes.

    Rounding adds to a layer's mean output the rounding error of the weights times the mean of the layer's
    input (Nagel et al. 2019, "Data-Free Quantization", section 4.2), here measured on images.

    Args:
        model: in fp32.
        rounded: name of a quantised convolution -> its dequantised weights.
        channel_means: tensor name -> mean of each channel.
    """
    corrected = onnx.ModelProto()
    corrected.CopyFrom(model)
    tensors = onnx_graph.weights(corrected)
    for node in corrected.graph.node:
        if node.name in rounded and len(node.input) == 3 and node.input[2] in tensors:
            weight, bias = (numpy_helper.to_array(tensors[name]) for name in node.input[1:])
            shift = _mean_response(rounded[node.name] - weight, channel_means[node.input[0]])
            new = (bias - shift).astype(np.float32)
            tensors[node.input[2]].CopyFrom(numpy_helper.from_array(new, node.input[2]))
    return corrected


def rounded_weights(quantized: onnx.ModelProto) -> dict[str, np.ndarray]:
    """Dequantised weights of every quantised convolution, by its name."""
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
