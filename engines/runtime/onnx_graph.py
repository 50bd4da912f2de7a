"""Small edits of a student's ONNX graph that the half-precision, 8-bit and target forms share."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import onnx
from onnx import TensorProto, numpy_helper

from synthkit.engines.runtime.session import open_session
from synthkit.errors import EngineError

_INTEGERS = (TensorProto.INT64, TensorProto.INT32, TensorProto.BOOL)


def opset(model: onnx.ModelProto) -> int:
    """Version of the standard operators."""
    return next(int(entry.version) for entry in model.opset_import if not entry.domain)


def weights(model: onnx.ModelProto) -> dict[str, onnx.TensorProto]:
    """Name -> initializer."""
    return {tensor.name: tensor for tensor in model.graph.initializer}


def consumers(model: onnx.ModelProto, tensor: str) -> list[onnx.NodeProto]:
    """The nodes that read a tensor."""
    return [node for node in model.graph.node if tensor in node.input]


def head_node(model: onnx.ModelProto, head: Mapping[str, str] | None) -> onnx.NodeProto | None:
    """The node of the last linear layer; None where the student has none."""
    return consumers(model, head["weight"])[0] if head else None


def present_head(model: onnx.ModelProto, head: Mapping[str, str] | None) -> dict[str, str] | None:
    """The head's tensors after an edit that renamed its input, but not its weights."""
    node = head_node(model, head)
    return dict(zip(("input", "weight", "bias"), node.input, strict=True)) if node else None


def value_types(model: onnx.ModelProto) -> dict[str, onnx.ValueInfoProto]:
    """Name -> type and shape of every value that a node computes."""
    graph = onnx.shape_inference.infer_shapes(model).graph
    made = {name for node in graph.node for name in node.output}
    return {info.name: info for info in (*graph.value_info, *graph.output) if info.name in made}


def compute(
    model: onnx.ModelProto, names: Iterable[str], feeds: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """Values of inner tensors."""
    return open_session(exposed(model, names)).run(feeds)


def exposed(model: onnx.ModelProto, names: Iterable[str]) -> bytes:
    """The model with inner tensors as its outputs."""
    types = value_types(model)
    shown = onnx.ModelProto()
    shown.CopyFrom(model)
    del shown.graph.output[:]
    shown.graph.output.extend(types[name] for name in names)
    return bytes(shown.SerializeToString())


def fold_sizes(model: onnx.ModelProto, input_name: str, image: np.ndarray) -> None:
    """Turn the sizes that a graph computes, such as the padding of TensorFlow's convolutions, into constants.

    TensorRT before 10.4 takes constant padding only, and ONNX Runtime then fuses it into the convolution.
    What comes out the same for one image and for three does not depend on the batch.

    Args:
        model: changed in place.
        input_name: of the images.
        image: one of the input's shape and type, whatever it shows.
    """
    sizes = [name for name, info in value_types(model).items() if _is_size(info)]
    if not sizes:
        return
    one, three = (compute(model, sizes, {input_name: np.stack([image] * count)}) for count in (1, 3))
    fixed = {name: one[name] for name in sizes if np.array_equal(one[name], three[name])}
    for node in list(model.graph.node):
        if node.output and set(node.output) <= set(fixed):
            model.graph.node.remove(node)
    model.graph.initializer.extend(numpy_helper.from_array(value, name) for name, value in fixed.items())
    drop_unused(model)


def _is_size(info: onnx.ValueInfoProto) -> bool:
    return info.type.tensor_type.elem_type in _INTEGERS


def fuse_padding(model: onnx.ModelProto) -> None:
    """Give constant zero padding to the convolution behind it, where runtimes compute it for nothing."""
    constants = constant_values(model)
    for pad in [node for node in model.graph.node if node.op_type == "Pad"]:
        readers = consumers(model, pad.output[0])
        sides = _zero_padding(pad, constants)
        if sides is not None and readers and all(_takes_padding(node) for node in readers):
            for conv in readers:
                _add_padding(conv, sides)
                conv.input[0] = pad.input[0]
    drop_unused(model)


def constant_values(model: onnx.ModelProto) -> dict[str, np.ndarray]:
    """Name -> value of every initializer and Constant node."""
    values = {tensor.name: tensor for tensor in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type == "Constant" and node.attribute[0].name == "value":
            values[node.output[0]] = node.attribute[0].t
    return {name: numpy_helper.to_array(tensor) for name, tensor in values.items()}


def _zero_padding(pad: onnx.NodeProto, constants: Mapping[str, np.ndarray]) -> list[int] | None:
    """(top, left, bottom, right) of a Pad that adds zeros around the image, otherwise None."""
    mode = next((a.s for a in pad.attribute if a.name == "mode"), b"constant")
    value = constants.get(pad.input[2]) if len(pad.input) > 2 and pad.input[2] else np.zeros(())
    sides = constants.get(pad.input[1])
    if mode != b"constant" or len(pad.input) > 3 or value is None or sides is None or sides.size != 8:
        return None
    batch_channels = [*sides[:2], *sides[4:6]]
    around = [int(side) for side in (*sides[2:4], *sides[6:])]
    return None if value.any() or any(batch_channels) or min(around) < 0 else around


def _takes_padding(node: onnx.NodeProto) -> bool:
    automatic = any(a.name == "auto_pad" and a.s != b"NOTSET" for a in node.attribute)
    return node.op_type == "Conv" and not automatic


def _add_padding(conv: onnx.NodeProto, sides: Sequence[int]) -> None:
    present = next((a for a in conv.attribute if a.name == "pads"), None)
    old = list(present.ints) if present else [0] * len(sides)
    if present:
        conv.attribute.remove(present)
    total = [a + b for a, b in zip(old, sides, strict=True)]
    conv.attribute.append(onnx.helper.make_attribute("pads", total))


def drop_unused(model: onnx.ModelProto) -> None:
    """Remove nodes and weights whose values nobody reads."""
    while True:
        read = {name for node in model.graph.node for name in node.input}
        read |= {output.name for output in model.graph.output}
        dead = [node for node in model.graph.node if not read & set(node.output)]
        for node in dead:
            model.graph.node.remove(node)
        if not dead:
            break
    kept = [tensor for tensor in model.graph.initializer if tensor.name in read]
    del model.graph.initializer[:]
    model.graph.initializer.extend(kept)


def normalisation(model: onnx.ModelProto, input_name: str) -> list[onnx.NodeProto]:
    """The nodes from the uint8 images to the first layer: Cast, Transpose, Mul, Add.

    Raises:
        EngineError: the graph does not begin like that.
    """
    chain, tensor = [], input_name
    for kind in ("Cast", "Transpose", "Mul", "Add"):
        node = next((node for node in consumers(model, tensor) if node.op_type == kind), None)
        if node is None:
            raise EngineError(
                f"the exported graph does not begin with Cast, Transpose, Mul, Add: no {kind} of {tensor}; "
                "export with --target generic"
            )
        chain.append(node)
        tensor = node.output[0]
    return chain
