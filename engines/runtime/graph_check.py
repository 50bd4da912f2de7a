"""Checks of an exported graph: fixed sizes, valid types, the opset and precision asked for."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from synthkit.engines.runtime.component_spec import EngineSpec
from synthkit.errors import EngineError

_LARGE = 256 * 2**20
"""Bytes of weights that lie beside the graph rather than in it. A graph with weights cannot exceed 2 GB, and
whoever edits it holds them in memory several times."""

_DTYPES = {"fp32": "FLOAT", "fp16": "FLOAT16"}
_SHARE = 0.99
"""Part of the floating-point weights that must be of the precision. The rest are constants that torch keeps
in fp32 on purpose, such as the frequencies of the timestep embedding."""


def finish_graph(path: Path, spec: EngineSpec) -> None:
    """Fix every size but the batch, and move large weights out of the graph.

    Args:
        path: the ONNX file, changed in place.
        spec: the tensors' sizes.
    """
    import onnx

    large = path.stat().st_size > _LARGE
    model = onnx.load(path, load_external_data=False)
    sizes = {tensor.name: tensor.shape for tensor in (*spec.inputs, *spec.outputs)}
    for tensor in (*model.graph.input, *model.graph.output):
        dims = tensor.type.tensor_type.shape.dim
        for dim, size in zip(dims, sizes.get(tensor.name, ()), strict=False):
            if isinstance(size, int):
                dim.dim_value = size
            else:
                dim.dim_param = size
    del model.graph.value_info[:]  # spoke of the open sizes
    if large:
        data = f"{path.name}_data"
        onnx.save(model, path, save_as_external_data=True, location=data, all_tensors_to_one_file=True)
    else:
        onnx.save(model, path)


def check_graph(path: Path, precision: str, opset: int) -> None:
    """Refuse a graph that a strict runtime would refuse, or of another opset or precision.

    Args:
        path: the ONNX file.
        precision: "fp32" or "fp16".
        opset: that it was exported with.

    Raises:
        EngineError: types or shapes do not agree, the opset is another, or the weights are of another type.
    """
    import onnx

    try:
        # The path form reads weights in external files as well; full: types and shapes inferred strictly.
        onnx.checker.check_model(str(path), full_check=True)
    except Exception as error:  # ValidationError and InferenceError share no base class
        raise EngineError(
            f"the graph {path.parent.name} is not valid ONNX: {' '.join(str(error).split())[:300]}; "
            "try another --set build-engines.opset=N"
        ) from None
    model = onnx.load(path, load_external_data=False)
    found = next(one.version for one in model.opset_import if not one.domain)
    if found != opset:
        raise EngineError(f"the graph {path.parent.name} has opset {found}, asked for was {opset}")
    histogram = dtype_histogram(model)
    share = histogram[_DTYPES[precision]] / max(histogram.total(), 1)
    if share < _SHARE:
        raise EngineError(
            f"the graph {path.parent.name} is not {precision}: of its weights {share:.1%} are "
            f"({dict(histogram)}); rebuild with another --set build-engines.opset=N"
        )


def dtype_histogram(model: Any) -> Counter[str]:
    """ONNX type name -> number of floating-point weights of that type, constants in the graph among them."""
    from onnx import TensorProto

    floating = {TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.DOUBLE}
    constants = [
        attribute.t
        for node in model.graph.node
        if node.op_type == "Constant"
        for attribute in node.attribute
        if attribute.name == "value"
    ]
    histogram: Counter[str] = Counter()
    for tensor in (*model.graph.initializer, *constants):
        if tensor.data_type in floating:
            count = 1
            for side in tensor.dims:
                count *= side
            histogram[TensorProto.DataType.Name(tensor.data_type)] += count
    return histogram
