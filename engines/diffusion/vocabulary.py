"""A style token goes into a text encoder's ONNX graph as rows of its embedding table; nothing is rebuilt."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from synthkit.errors import EngineError, MissingExtra

_PASSING = {"Reshape", "Cast", "Identity", "Unsqueeze", "Squeeze", "Flatten"}  # leave token ids as they are


def with_rows(model_path: Path, rows: Mapping[int, np.ndarray]) -> bytes:
    """Content of the ONNX model with rows of its token-embedding table set; the table grows as needed.

    Weights that lie in external files stay there, but for the table itself.

    Args:
        model_path: the text encoder.
        rows: token id -> float [width].

    Raises:
        EngineError: the file is broken, or has no table that the token ids look up.
        MissingExtra: the onnx package is not installed.
    """
    onnx = _onnx()
    try:
        model = onnx.load(model_path, load_external_data=False)
    except Exception as error:  # protobuf's DecodeError and OSError share no base class
        raise EngineError(
            f"cannot read {model_path} ({type(error).__name__}); rebuild it with --force"
        ) from None
    table = _table(model.graph, model_path)
    values = onnx.numpy_helper.to_array(table, base_dir=str(model_path.parent))
    table.CopyFrom(onnx.numpy_helper.from_array(_grown(values, rows), table.name))
    return bytes(model.SerializeToString())


def _grown(values: np.ndarray, rows: Mapping[int, np.ndarray]) -> np.ndarray:
    grown = np.zeros((max(len(values), max(rows) + 1), values.shape[1]), values.dtype)
    grown[: len(values)] = values
    for index, row in rows.items():
        grown[index] = row
    return grown


def _table(graph: Any, model_path: Path) -> Any:
    """The initializer that `input_ids` look up, followed through the nodes that only reshape them."""
    initializers = {tensor.name: tensor for tensor in graph.initializer}
    ids = {"input_ids"}
    for node in graph.node:  # in topological order, as ONNX demands
        if node.op_type in _PASSING and node.input[0] in ids:
            ids.add(node.output[0])
        if node.op_type == "Gather" and node.input[1] in ids and node.input[0] in initializers:
            return initializers[node.input[0]]
    raise EngineError(
        f"{model_path} has no embedding table that input_ids look up; a style token cannot be added"
    )


def _onnx() -> Any:
    try:
        import onnx
        import onnx.numpy_helper
    except ImportError:
        raise MissingExtra("onnx", "train") from None
    return onnx
