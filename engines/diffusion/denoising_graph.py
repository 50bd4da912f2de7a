"""A UNet's graph rewritten for the sampling loop: the same function with less work per step.

    encoder_hidden_states ──conditioning graph, once per batch──► keys, values, … ┐
    sample, timestep ─────────────► denoising graph, once per step ───────────────┴─► out_sample

Three rewrites. Each leaves the graph as it is where its pattern does not occur:

- Nodes that depend on neither sample nor timestep move into the conditioning graph, whose outputs are
  precomputed for the whole loop (loop-invariant code motion).
- Under guidance the two halves of the doubled batch differ by their text alone. Nodes before the first text
  input compute one half, which is doubled where the text comes in.
- A nearest-neighbour upsampling by 2 before a padded 3x3 convolution becomes four 2x2 convolutions of the
  small image, with the weights that meet the same pixel added up: 4/9 of the multiplications.

An image's result still depends on that image alone. Some sums run in another order, so results agree with
those of the plain graph to rounding. This module knows ONNX and no runtime.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from synthkit.errors import EngineError

_VARYING = ("sample", "timestep")
_NUMBERS = (TensorProto.FLOAT, TensorProto.FLOAT16)
# (coordinate_transformation_mode, nearest_mode) of a Resize by 2 that reads input pixel i // 2 for output i.
_FLOOR_OF_HALF = {
    (b"asymmetric", b"floor"),
    (b"asymmetric", b"round_prefer_floor"),
    (b"half_pixel", b"round_prefer_floor"),
    (b"half_pixel", b"round_prefer_ceil"),
}


@dataclass(frozen=True)
class SplitUnet:
    """A UNet as two models.

    Attributes:
        conditioning: text inputs [n, or 2n under guidance] -> `precomputed`.
        denoising: sample [n], timestep, `precomputed` -> out_sample [n, or 2n under guidance].
        precomputed: names of the tensors that go from the one to the other.
    """

    conditioning: onnx.ModelProto
    denoising: onnx.ModelProto
    precomputed: tuple[str, ...]


def split_unet(path: Path, guided: bool) -> SplitUnet:
    """Rewrite a UNet as a conditioning graph and a denoising graph.

    Args:
        path: the ONNX file; weights in external files stay there, but for those that are rewritten.
        guided: the text inputs hold twice as many images as the sample.

    Raises:
        EngineError: the file is broken.
    """
    graph = _Graph(_load(path), path.parent)
    _split_upsamplings(graph)
    conditioning, precomputed = _cut_conditioning(graph)
    if guided:
        _double_at_text(graph, precomputed)
    return SplitUnet(conditioning, graph.to_model(), precomputed)


def decoder_graph(path: Path) -> onnx.ModelProto:
    """Rewrite the upsamplings of a VAE decoder.

    Raises:
        EngineError: the file is broken.
    """
    graph = _Graph(_load(path), path.parent)
    _split_upsamplings(graph)
    return graph.to_model()


def _load(path: Path) -> onnx.ModelProto:
    try:
        return onnx.load(path, load_external_data=False)
    except Exception as error:  # protobuf's DecodeError and OSError share no base class
        raise EngineError(f"cannot read {path} ({type(error).__name__}); rebuild it with --force") from None


class _Graph:
    """An ONNX graph with lookup tables: type, producer and readers of every tensor."""

    def __init__(self, model: onnx.ModelProto, folder: Path) -> None:
        self.model, self.folder = model, folder
        self.nodes: list[onnx.NodeProto] = list(model.graph.node)
        self.weights = {tensor.name: tensor for tensor in model.graph.initializer}
        self.outputs = {tensor.name for tensor in model.graph.output}
        self.types = _infer_types(model)
        self.refresh()

    def refresh(self) -> None:
        """Rebuild the tables after a change of the nodes."""
        self.producer = {name: node for node in self.nodes for name in node.output}
        self.readers: dict[str, list[onnx.NodeProto]] = {}
        for node in self.nodes:
            for name in set(node.input):
                self.readers.setdefault(name, []).append(node)

    def only_reader(self, node: onnx.NodeProto, kind: str) -> onnx.NodeProto | None:
        """The one reader of a node's result, if it is of this operator and the result is no graph output."""
        readers = self.readers.get(node.output[0], [])
        alone = len(readers) == 1 and node.output[0] not in self.outputs
        return readers[0] if alone and readers[0].op_type == kind else None

    def value(self, name: str) -> np.ndarray | None:
        """Value of a constant; None for a computed tensor."""
        if name in self.weights:
            return np.asarray(numpy_helper.to_array(self.weights[name], base_dir=str(self.folder)))
        node = self.producer.get(name)
        if node is None or node.op_type != "Constant" or node.attribute[0].name != "value":
            return None
        return np.asarray(numpy_helper.to_array(node.attribute[0].t))

    def element_type(self, name: str) -> int:
        """The ONNX element type of a tensor."""
        return int(self.types[name].tensor_type.elem_type)

    def add_weight(self, name: str, value: np.ndarray) -> str:
        """Add an initializer and return its name."""
        self.weights[name] = numpy_helper.from_array(np.ascontiguousarray(value), name)
        return name

    def replace(self, old: Iterable[onnx.NodeProto], new: Sequence[onnx.NodeProto]) -> None:
        """Remove the old nodes and insert the new ones where the last of the old ones stood."""
        gone = {id(node) for node in old}
        place = max(index for index, node in enumerate(self.nodes) if id(node) in gone)
        after = [node for node in self.nodes[place + 1 :] if id(node) not in gone]
        self.nodes = [node for node in self.nodes[:place] if id(node) not in gone] + [*new, *after]
        self.refresh()

    def dependents(self, names: Iterable[str]) -> set[str]:
        """The given tensors and all that depend on them."""
        dependents = set(names)
        for node in self.nodes:  # in topological order, as ONNX demands
            if dependents.intersection(node.input):
                dependents.update(node.output)
        return dependents

    def submodel(
        self, nodes: Sequence[onnx.NodeProto], inputs: list[Any], outputs: list[Any]
    ) -> onnx.ModelProto:
        """Model of some of the nodes with the weights that they read."""
        read = {name for node in nodes for name in node.input}
        weights = [tensor for name, tensor in self.weights.items() if name in read]
        body = helper.make_graph(nodes, self.model.graph.name, inputs, outputs, weights)
        return helper.make_model(
            body, opset_imports=self.model.opset_import, ir_version=self.model.ir_version
        )

    def value_info(self, name: str) -> onnx.ValueInfoProto:
        """Declaration of a tensor as a model's input or output, with a dynamic batch axis."""
        kind = self.types[name].tensor_type
        sizes = [dim.dim_value or f"{name}/axis{axis}" for axis, dim in enumerate(kind.shape.dim)]
        if kind.elem_type in _NUMBERS:
            sizes[0] = "texts"
        return helper.make_tensor_value_info(name, kind.elem_type, sizes)

    def to_model(self) -> onnx.ModelProto:
        """Model of the current nodes."""
        return self.submodel(self.nodes, list(self.model.graph.input), list(self.model.graph.output))


def _infer_types(model: onnx.ModelProto) -> dict[str, onnx.TypeProto]:
    """Type of every tensor. Inference copies the model, so the weights' content is left out."""
    bare = onnx.ModelProto()
    bare.CopyFrom(model)
    for tensor in bare.graph.initializer:
        if tensor.data_type != TensorProto.INT64:  # int64 constants may be shapes, which inference reads
            tensor.ClearField("raw_data")
            tensor.data_location = TensorProto.EXTERNAL
    graph = onnx.shape_inference.infer_shapes(bare).graph
    return {one.name: one.type for one in (*graph.value_info, *graph.input, *graph.output)}


def _split_upsamplings(graph: _Graph) -> None:
    """Replace a Resize by 2 and its 3x3 convolution by four 2x2 convolutions and DepthToSpace."""
    for resize in [node for node in graph.nodes if node.op_type == "Resize"]:
        conv = graph.only_reader(resize, "Conv")
        if conv is None or not _repeats_each_pixel(graph, resize):
            continue
        weight = graph.value(conv.input[1])
        if weight is None or not _is_padded_3x3(conv, weight):
            continue
        corners = [
            _corner(graph, resize.input[0], conv, weight, row, column) for row in (0, 1) for column in (0, 1)
        ]
        joined = f"{conv.output[0]}/corners"
        graph.replace(
            [resize, conv],
            [
                *corners,
                helper.make_node("Concat", [one.output[0] for one in corners], [joined], joined, axis=1),
                helper.make_node("DepthToSpace", [joined], conv.output, f"{conv.name}/joined", blocksize=2),
            ],
        )


def _corner(
    graph: _Graph, small: str, conv: onnx.NodeProto, weight: np.ndarray, row: int, column: int
) -> onnx.NodeProto:
    """The convolution that computes the output pixels with this parity of row and column.

    Output pixel 2i reads the small image at i - 1 (first tap) and i (the other two), 2i + 1 at i (the first
    two) and i + 1.
    """
    wide = weight.astype(np.float64)
    for axis, odd in ((2, row), (3, column)):
        first, middle, last = np.split(wide, 3, axis)
        wide = np.concatenate([first + middle, last] if odd else [first, middle + last], axis)
    name = f"{conv.output[0]}/corner{row}{column}"
    kernel = graph.add_weight(f"{name}/weight", wide.astype(weight.dtype))
    pads = [1 - row, 1 - column, row, column]
    inputs = [small, kernel, *conv.input[2:]]
    return helper.make_node("Conv", inputs, [name], name, kernel_shape=[2, 2], pads=pads)


def _repeats_each_pixel(graph: _Graph, resize: onnx.NodeProto) -> bool:
    """True for a nearest-neighbour Resize of images by 2 whose output pixel i is input pixel i // 2."""
    scales = graph.value(resize.input[2]) if len(resize.input) > 2 else None
    given = {one.name: helper.get_attribute_value(one) for one in resize.attribute}
    mode = given.get("mode", b"nearest")
    rounding = (
        given.get("coordinate_transformation_mode", b"half_pixel"),
        given.get("nearest_mode", b"round_prefer_floor"),
    )
    doubles = scales is not None and scales.tolist() == [1, 1, 2, 2] and "axes" not in given
    return doubles and mode == b"nearest" and rounding in _FLOOR_OF_HALF


def _is_padded_3x3(conv: onnx.NodeProto, weight: np.ndarray) -> bool:
    """True for a 3x3 convolution of stride 1 with one zero around the image, ONNX's defaults filled in.

    Automatic padding does not count, also where it comes to the same.
    """
    given = {one.name: helper.get_attribute_value(one) for one in conv.attribute}
    automatic = given.pop("auto_pad", b"NOTSET") != b"NOTSET"
    defaults = {"pads": [0, 0, 0, 0], "strides": [1, 1], "dilations": [1, 1], "group": 1}
    wanted = defaults | {"pads": [1, 1, 1, 1], "kernel_shape": [3, 3]}
    return not automatic and defaults | {"kernel_shape": list(weight.shape[2:])} | given == wanted


def _cut_conditioning(graph: _Graph) -> tuple[onnx.ModelProto, tuple[str, ...]]:
    """Move the nodes that give the same in every step into a model of their own.

    The tensors that the rest reads of them become inputs of the rest.

    Returns:
        The conditioning graph and the names of these tensors.
    """
    inputs = {tensor.name: tensor for tensor in graph.model.graph.input}
    varying = graph.dependents(_VARYING)
    constant = graph.dependents(set(inputs) - set(_VARYING)) - varying
    once = [node for node in graph.nodes if constant.intersection(node.output)]
    per_step = [node for node in graph.nodes if not constant.intersection(node.output)]
    precomputed = tuple(sorted({name for node in per_step for name in node.input if name in constant}))
    needed = _with_constants(graph, once)
    texts = [tensor for name, tensor in inputs.items() if name not in _VARYING]
    conditioning = graph.submodel(needed, texts, [graph.value_info(name) for name in precomputed])
    graph.nodes = per_step
    del graph.model.graph.input[:]
    graph.model.graph.input.extend(
        [inputs[name] for name in _VARYING] + [graph.value_info(name) for name in precomputed]
    )
    graph.refresh()
    return conditioning, precomputed


def _with_constants(graph: _Graph, nodes: Sequence[onnx.NodeProto]) -> list[onnx.NodeProto]:
    """The nodes and the Constant nodes that they read, in the graph's order."""
    wanted = {name for node in nodes for name in (*node.input, *node.output)}
    own = {id(node) for node in nodes}
    return [
        node
        for node in graph.nodes
        if id(node) in own or (wanted.intersection(node.output) and not any(node.input))
    ]


def _double_at_text(graph: _Graph, precomputed: Sequence[str]) -> None:
    """Double the batch where tensors of the sample first meet the text."""
    of_both = graph.dependents(precomputed)
    of_sample = graph.dependents(["sample"]) - of_both
    doubling = _Doubling(graph, of_sample)
    nodes: list[onnx.NodeProto] = []
    for node in graph.nodes:
        if of_both.intersection(node.output):
            inputs = [doubling.doubled(name) for name in node.input]
            nodes += doubling.take_nodes()
            node = _with_inputs(node, inputs)
        nodes.append(node)
    graph.nodes = nodes
    graph.refresh()


def _with_inputs(node: onnx.NodeProto, inputs: Sequence[str]) -> onnx.NodeProto:
    changed = onnx.NodeProto()
    changed.CopyFrom(node)
    del changed.input[:]
    changed.input.extend(inputs)
    return changed


class _Doubling:
    """Doubles tensors along the batch, each once.

    Numbers are repeated. Shapes are computed again from shapes with twice the batch.

    Args:
        graph: whose tensors.
        batched: names of those that have the sample's batch.
    """

    def __init__(self, graph: _Graph, batched: set[str]) -> None:
        self._graph, self._batched = graph, batched
        self._made: dict[str, str] = {}
        self._new: list[onnx.NodeProto] = []

    def take_nodes(self) -> list[onnx.NodeProto]:
        """The nodes that were added since the last call."""
        new, self._new = self._new, []
        return new

    def doubled(self, name: str) -> str:
        """Name of the doubled tensor, or the same name where it has no batch."""
        if name not in self._batched:
            return name
        if name not in self._made:
            self._made[name] = f"{name}/doubled"
            self._make(name, self._made[name])
        return self._made[name]

    def _make(self, name: str, doubled: str) -> None:
        node = self._graph.producer.get(name)
        if node is None or self._graph.element_type(name) in _NUMBERS:
            self._new.append(helper.make_node("Concat", [name, name], [doubled], doubled, axis=0))
        elif node.op_type == "Shape":
            self._make_shape(node.input[0], doubled)
        else:
            copy = _with_inputs(node, [self.doubled(one) for one in node.input])
            del copy.output[:]
            copy.output.append(doubled)
            copy.name = doubled
            self._new.append(copy)

    def _make_shape(self, name: str, doubled: str) -> None:
        """Shape of a tensor of any rank with twice its batch."""
        whole, batch, rest, twice = (f"{doubled}/{part}" for part in ("whole", "batch", "rest", "twice"))
        zero, one, two, end = (
            self._graph.add_weight(f"{doubled}/{value}", np.array([value])) for value in (0, 1, 2, 2**31 - 1)
        )
        self._new += [
            helper.make_node("Shape", [name], [whole], whole),
            helper.make_node("Slice", [whole, zero, one], [batch], batch),
            helper.make_node("Slice", [whole, one, end], [rest], rest),
            helper.make_node("Mul", [batch, two], [twice], twice),
            helper.make_node("Concat", [twice, rest], [doubled], doubled, axis=0),
        ]
