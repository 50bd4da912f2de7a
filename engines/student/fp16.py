"""A student's graph in half precision, typed as TensorRT 10 and 11 take it: they compute what it says.

ONNX Runtime's converter does the work. What stays in fp32: the normalisation, the first three convolutions,
the head, and what overflows or loses most in 16 bits (Softmax, LayerNormalization and the parts that older
opsets spell it with). An error of the first convolutions passes through all layers behind them, and they hold
few weights.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx
from onnx import TensorProto

from synthkit.engines.bundle.format import INPUT
from synthkit.engines.runtime import onnx_graph
from synthkit.errors import EngineError, first_line

_FP32_OPERATORS = ("Softmax", "LayerNormalization", "InstanceNormalization", "ReduceMean", "Pow", "Sqrt")
_FIRST_LAYERS = 3  # a MobileNet's first convolution, first depthwise one and what mixes its channels


def to_half(model: onnx.ModelProto, head: Mapping[str, str] | None) -> onnx.ModelProto:
    """Convert a model to fp16 weights and arithmetic; inputs, logits and head keep their types.

    Args:
        model: in fp32.
        head: names of the head's tensors in it.

    Raises:
        EngineError: a weight does not fit into 16 bits, or the result fails the full type check.
    """
    from onnxruntime.transformers import float16
    from onnxruntime.transformers.onnx_model import OnnxModel

    _refuse_large_weights(model)
    kept = [*onnx_graph.normalisation(model, INPUT), *_first_layers(model)]
    if (last := onnx_graph.head_node(model, head)) is not None:
        kept.append(last)
    source = onnx.ModelProto()
    source.CopyFrom(model)  # the converter changes what it is given
    half = float16.convert_float_to_float16(
        source,
        keep_io_types=True,
        op_block_list=[*float16.DEFAULT_OP_BLOCK_LIST, *_FP32_OPERATORS],
        node_block_list=[node.name for node in kept],
    )
    _drop_round_trips(half)
    OnnxModel.graph_topological_sort(half.graph)
    _check_types(half)
    return half


def _first_layers(model: onnx.ModelProto) -> list[onnx.NodeProto]:
    """The nodes up to the third convolution: an error there goes through all layers behind it."""
    nodes = list(model.graph.node)
    convolutions = [place for place, node in enumerate(nodes) if node.op_type == "Conv"][:_FIRST_LAYERS]
    return nodes[: convolutions[-1] + 1] if convolutions else []


def _refuse_large_weights(model: onnx.ModelProto) -> None:
    largest = np.finfo(np.float16).max
    for tensor in model.graph.initializer:
        if tensor.data_type == TensorProto.FLOAT:
            values = onnx.numpy_helper.to_array(tensor)
            if values.size and np.abs(values).max() > largest:
                raise EngineError(
                    f"the weight {tensor.name} exceeds {largest:.0f}, the largest number of fp16; "
                    "leave fp16 out of --precision"
                )


def _drop_round_trips(model: onnx.ModelProto) -> None:
    """Join neighbours that stay in fp32: the converter rounds to fp16 between any two of them."""
    nodes = model.graph.node
    down = {node.output[0]: node.input[0] for node in nodes if _casts_to(node, TensorProto.FLOAT16)}
    source = {
        node.output[0]: down[node.input[0]]
        for node in nodes
        if _casts_to(node, TensorProto.FLOAT) and node.input[0] in down
    }
    for node in nodes:
        for position, name in enumerate(node.input):
            node.input[position] = source.get(name, name)
    _name_outputs(model, source)
    onnx_graph.drop_unused(model)


def _name_outputs(model: onnx.ModelProto, source: Mapping[str, str]) -> None:
    """Let a layer that computes an output in fp32 give it itself, not two casts after it."""
    for output in (one.name for one in model.graph.output if one.name in source):
        maker = next(node for node in model.graph.node if source[output] in node.output)
        for node in [one for one in model.graph.node if output in one.output]:
            model.graph.node.remove(node)
        maker.output[list(maker.output).index(source[output])] = output


def _casts_to(node: onnx.NodeProto, element: int) -> bool:
    return node.op_type == "Cast" and any(a.name == "to" and a.i == element for a in node.attribute)


def _check_types(model: onnx.ModelProto) -> None:
    """A dress rehearsal of strong typing: TensorRT refuses what mixes types."""
    try:
        onnx.checker.check_model(model, full_check=True)
        onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True)
    except Exception as error:  # the checker's errors share no base class
        reason = first_line(error)[:200]
        raise EngineError(
            f"the half-precision graph fails the type check ({reason}); leave fp16 out of --precision"
        ) from None
