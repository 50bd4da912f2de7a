"""A UNet's graph for a sampling loop: the same function, less work in each step. Knows ONNX, no runtime.

    encoder_hidden_states ──prelude, once per batch──► keys, values, … ┐
    sample, timestep ─────────────► step, once per step ───────────────┴─► out_sample

Three rewrites; each leaves a graph as it is where it does not find its pattern:

- what depends on neither sample nor timestep moves into the prelude (loop-invariant code motion);
- under guidance the halves of the doubled batch differ by their text alone, so that what comes before the
  first text is computed once and doubled there;
- a nearest-neighbour upsampling before a 3x3 convolution becomes four 2x2 convolutions of the small image, by
  adding up the weights that meet the same pixel: 4/9 of the multiplications.

An image's result depends on that image alone, as before; some sums run in another order, so that it agrees
with the plain graph to rounding.
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


@dataclass(frozen=True)
class LoopGraphs:
    """A UNet as two models.

    Attributes:
        prelude: text inputs -> `carried`.
        step: sample [n], timestep, `carried` [2n under guidance] -> out_sample [2n under guidance].
        carried: names of the tensors that go from the one to the other.
    """

    prelude: onnx.ModelProto
    step: onnx.ModelProto
    carried: tuple[str, ...]


def loop_graphs(path: Path, guided: bool) -> LoopGraphs:
    """Rewrite a UNet for a sampling loop.

    Args:
        path: the ONNX file; weights in external files stay there, but for those that are rewritten.
        guided: whether the text inputs hold twice as many images as the sample.

    Raises:
        EngineError: the file is broken.
    """
    graph = _Graph(_load(path), path.parent)
    _split_upsamplings(graph)
    prelude, carried = _take_prelude(graph)
    if guided:
        _double_late(graph, carried)
    return LoopGraphs(prelude, graph.finished(), carried)


def decoder_graph(path: Path) -> onnx.ModelProto:
    """A VAE decoder with its upsamplings split.

    Raises:
        EngineError: the file is broken.
    """
    graph = _Graph(_load(path), path.parent)
    _split_upsamplings(graph)
    return graph.finished()


def _load(path: Path) -> onnx.ModelProto:
    try:
        return onnx.load(path, load_external_data=False)
    except Exception as error:  # protobuf's DecodeError and OSError share no base class
        raise EngineError(f"cannot read {path} ({type(error).__name__}); rebuild it with --force") from None


class _Graph:
    """An ONNX graph, and what is known of its tensors: their types, who makes them, who reads them."""

    def __init__(self, model: onnx.ModelProto, folder: Path) -> None:
        self.model, self.folder = model, folder
        self.nodes: list[onnx.NodeProto] = list(model.graph.node)
        self.weights = {tensor.name: tensor for tensor in model.graph.initializer}
        self.types = _inferred(model)
        self.refresh()

    def refresh(self) -> None:
        """Read the nodes again after they were changed."""
        self.producer = {name: node for node in self.nodes for name in node.output}
        self.readers: dict[str, list[onnx.NodeProto]] = {}
        for node in self.nodes:
            for name in set(node.input):
                self.readers.setdefault(name, []).append(node)

    def only_reader(self, node: onnx.NodeProto | None, kind: str) -> onnx.NodeProto | None:
        """The node of this kind that alone reads another's result."""
        readers = self.readers.get(node.output[0], []) if node is not None else []
        return readers[0] if len(readers) == 1 and readers[0].op_type == kind else None

    def value(self, name: str) -> np.ndarray | None:
        """A constant's value; None of a tensor that is computed."""
        if name in self.weights:
            return np.asarray(numpy_helper.to_array(self.weights[name], base_dir=str(self.folder)))
        node = self.producer.get(name)
        if node is None or node.op_type != "Constant" or node.attribute[0].name != "value":
            return None
        return np.asarray(numpy_helper.to_array(node.attribute[0].t))

    def elements(self, name: str) -> int:
        """The ONNX element type of a tensor."""
        return int(self.types[name].tensor_type.elem_type)

    def add_weight(self, name: str, value: np.ndarray) -> str:
        """A new initializer; gives its name."""
        self.weights[name] = numpy_helper.from_array(np.ascontiguousarray(value), name)
        return name

    def replace(self, old: Iterable[onnx.NodeProto], new: Sequence[onnx.NodeProto]) -> None:
        """Put new nodes in the place of the last of some old ones."""
        gone = {id(node) for node in old}
        place = max(index for index, node in enumerate(self.nodes) if id(node) in gone)
        after = [node for node in self.nodes[place + 1 :] if id(node) not in gone]
        self.nodes = [node for node in self.nodes[:place] if id(node) not in gone] + [*new, *after]
        self.refresh()

    def reached(self, names: Iterable[str]) -> set[str]:
        """The tensors that depend on some others, these among them."""
        found = set(names)
        for node in self.nodes:  # in topological order, as ONNX demands
            if found.intersection(node.input):
                found.update(node.output)
        return found

    def part(self, nodes: Sequence[onnx.NodeProto], inputs: list[Any], outputs: list[Any]) -> onnx.ModelProto:
        """A model of some of the nodes, with the weights that they read."""
        read = {name for node in nodes for name in node.input}
        weights = [tensor for name, tensor in self.weights.items() if name in read]
        body = helper.make_graph(nodes, self.model.graph.name, inputs, outputs, weights)
        return helper.make_model(
            body, opset_imports=self.model.opset_import, ir_version=self.model.ir_version
        )

    def info(self, name: str) -> onnx.ValueInfoProto:
        """A tensor as an input or output of a model, open in the batch."""
        kind = self.types[name].tensor_type
        sizes = [dim.dim_value or f"{name}/axis{axis}" for axis, dim in enumerate(kind.shape.dim)]
        if kind.elem_type in _NUMBERS:
            sizes[0] = "texts"
        return helper.make_tensor_value_info(name, kind.elem_type, sizes)

    def finished(self) -> onnx.ModelProto:
        """The model of the nodes as they are now."""
        return self.part(self.nodes, list(self.model.graph.input), list(self.model.graph.output))


def _inferred(model: onnx.ModelProto) -> dict[str, onnx.TypeProto]:
    """Type of every tensor; inference copies the model, so the weights' content is left out."""
    bare = onnx.ModelProto()
    bare.CopyFrom(model)
    for tensor in bare.graph.initializer:
        if tensor.data_type != TensorProto.INT64:  # int64 ones may say of a shape what it is
            tensor.ClearField("raw_data")
            tensor.data_location = TensorProto.EXTERNAL
    graph = onnx.shape_inference.infer_shapes(bare).graph
    return {one.name: one.type for one in (*graph.value_info, *graph.input, *graph.output)}


def _split_upsamplings(graph: _Graph) -> None:
    """Resize by 2 and a 3x3 convolution become four 2x2 convolutions and DepthToSpace."""
    for resize in [node for node in graph.nodes if node.op_type == "Resize"]:
        conv = graph.only_reader(resize, "Conv")
        scales = graph.value(resize.input[2]) if len(resize.input) > 2 else None
        doubled = scales is not None and scales.tolist() == [1, 1, 2, 2]
        if conv is None or not doubled or not _nearest(resize) or not _three_by_three(conv):
            continue
        weight = graph.value(conv.input[1])
        assert weight is not None  # of every convolution in a diffusion network
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
    """The convolution of the output pixels with this parity of row and column.

    Pixel 2i reads the small image at i - 1 (first tap) and i (the other two), 2i + 1 at i and i + 1.
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


def _nearest(resize: onnx.NodeProto) -> bool:
    settings = {one.name: one.s for one in resize.attribute}
    return bool(settings.get("mode", b"nearest") == b"nearest")


def _three_by_three(conv: onnx.NodeProto) -> bool:
    wanted = {
        "kernel_shape": [3, 3],
        "pads": [1, 1, 1, 1],
        "strides": [1, 1],
        "dilations": [1, 1],
        "group": 1,
    }
    return all(helper.get_attribute_value(one) == wanted[one.name] for one in conv.attribute)


def _take_prelude(graph: _Graph) -> tuple[onnx.ModelProto, tuple[str, ...]]:
    """Cut out what is the same in every step; what it hands over becomes the graph's inputs."""
    inputs = {tensor.name: tensor for tensor in graph.model.graph.input}
    varying = graph.reached(_VARYING)
    fixed = graph.reached(set(inputs) - set(_VARYING)) - varying
    early = [node for node in graph.nodes if fixed.intersection(node.output)]
    late = [node for node in graph.nodes if not fixed.intersection(node.output)]
    carried = tuple(sorted({name for node in late for name in node.input if name in fixed}))
    needed = _ancestors(graph, early)
    texts = [tensor for name, tensor in inputs.items() if name not in _VARYING]
    prelude = graph.part(needed, texts, [graph.info(name) for name in carried])
    graph.nodes = late
    del graph.model.graph.input[:]
    graph.model.graph.input.extend(
        [inputs[name] for name in _VARYING] + [graph.info(name) for name in carried]
    )
    graph.refresh()
    return prelude, carried


def _ancestors(graph: _Graph, nodes: Sequence[onnx.NodeProto]) -> list[onnx.NodeProto]:
    """Nodes with all constants that they read, in order."""
    wanted = {name for node in nodes for name in (*node.input, *node.output)}
    own = {id(node) for node in nodes}
    return [
        node
        for node in graph.nodes
        if id(node) in own or (wanted.intersection(node.output) and not any(node.input))
    ]


def _double_late(graph: _Graph, carried: Sequence[str]) -> None:
    """Double the batch where tensors of the sample first meet the text."""
    late = graph.reached(carried)
    batched = graph.reached(["sample"]) - late
    doubling = _Doubling(graph, batched)
    nodes: list[onnx.NodeProto] = []
    for node in graph.nodes:
        if late.intersection(node.output):
            inputs = [doubling.of(name) for name in node.input]
            nodes += doubling.take()
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
    """Doubled forms of tensors, each made once.

    Numbers are repeated along the batch; shapes are computed again from shapes with twice the batch.
    """

    def __init__(self, graph: _Graph, batched: set[str]) -> None:
        self._graph, self._batched = graph, batched
        self._made: dict[str, str] = {}
        self._new: list[onnx.NodeProto] = []

    def take(self) -> list[onnx.NodeProto]:
        """The nodes made since the last call."""
        new, self._new = self._new, []
        return new

    def of(self, name: str) -> str:
        """The doubled form's name."""
        if name not in self._batched:
            return name
        if name not in self._made:
            self._made[name] = f"{name}/doubled"
            self._make(name, self._made[name])
        return self._made[name]

    def _make(self, name: str, doubled: str) -> None:
        node = self._graph.producer.get(name)
        if node is None or self._graph.elements(name) in _NUMBERS:
            self._new.append(helper.make_node("Concat", [name, name], [doubled], doubled, axis=0))
        elif node.op_type == "Shape":
            self._make_shape(node.input[0], doubled)
        else:
            copy = _with_inputs(node, [self.of(one) for one in node.input])
            del copy.output[:]
            copy.output.append(doubled)
            copy.name = doubled
            self._new.append(copy)

    def _make_shape(self, name: str, doubled: str) -> None:
        """The shape of a tensor with twice its batch, whatever its rank."""
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
