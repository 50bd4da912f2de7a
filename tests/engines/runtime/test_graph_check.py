from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from synthkit.engines.runtime import graph_check as onnx_gate
from synthkit.engines.runtime.component_spec import component_specs, read_geometry
from synthkit.engines.runtime.graph_check import check_graph, dtype_histogram, finish_graph
from synthkit.engines.runtime.session import open_session
from synthkit.errors import EngineError

onnx = pytest.importorskip("onnx")
OPSET = 17


def write(path: Path, second: type = np.float32, opset: int = OPSET) -> Path:
    """y = x + a + b, with `b` of a type of its own."""
    from onnx import TensorProto, helper, numpy_helper

    weights = [
        numpy_helper.from_array(np.ones(200, np.float32), "a"),
        numpy_helper.from_array(np.ones(200, second), "b"),
    ]
    nodes = [helper.make_node("Add", ["x", "a"], ["h"]), helper.make_node("Add", ["h", "b"], ["y"])]
    tensors = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", 200]) for name in "xy"]
    graph = helper.make_graph(nodes, "g", tensors[:1], tensors[1:], weights)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8), path)
    return path


def test_a_sound_graph_passes(tmp_path: Path) -> None:
    path = write(tmp_path / "model.onnx")
    check_graph(path, "fp32", OPSET)
    assert dtype_histogram(onnx.load(path)) == {"FLOAT": 400}


@pytest.mark.parametrize(
    ("second", "precision", "opset", "problem"),
    [
        (np.float16, "fp32", OPSET, "is not valid ONNX"),  # Add(float, float16)
        (np.float32, "fp16", OPSET, r"is not fp16: of its weights 0\.0% are"),
        (np.float32, "fp32", 18, "has opset 17, asked for was 18"),
    ],
)
def test_other_graphs_are_refused(
    tmp_path: Path, second: type, precision: str, opset: int, problem: str
) -> None:
    with pytest.raises(EngineError, match=problem) as caught:
        check_graph(write(tmp_path / "model.onnx", second), precision, opset)
    assert "\n" not in str(caught.value)


def test_large_weights_move_out_of_the_graph(
    tiny_engines: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onnx_gate, "_LARGE", 1000)
    spec = next(one for one in component_specs(read_geometry(tiny_engines)) if one.component == "vae_decoder")
    source, path = tiny_engines / spec.path, tmp_path / "model.onnx"
    path.write_bytes(source.read_bytes())
    finish_graph(path, spec)
    assert path.stat().st_size < source.stat().st_size / 2 and (tmp_path / "model.onnx_data").is_file()
    check_graph(path, "fp32", OPSET)
    latents = np.ones((1, 4, 4, 4), np.float32)
    wanted = open_session(source).run({"latent_sample": latents})["sample"]
    assert np.array_equal(open_session(path).run({"latent_sample": latents})["sample"], wanted)
