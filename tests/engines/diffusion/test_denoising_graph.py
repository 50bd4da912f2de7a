from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from synthkit.engines.diffusion.denoiser import open_denoiser
from synthkit.engines.runtime.session import open_session
from synthkit.errors import EngineError
from tests.tiny_models import WIDTH

onnx = pytest.importorskip("onnx")
N = 3


def feeds(rows: int) -> dict[str, np.ndarray]:
    random = np.random.default_rng(0)
    return {
        "sample": random.standard_normal((N, 4, 4, 4), dtype=np.float32),
        "encoder_hidden_states": random.standard_normal((rows, 77, WIDTH), dtype=np.float32),
    }


def plain(path: Path, sample: np.ndarray, texts: np.ndarray, time: float) -> np.ndarray:
    session = open_session(path)
    given = {"sample": sample, "timestep": np.asarray(time, np.float32), "encoder_hidden_states": texts}
    return session.run(given)["out_sample"]


@pytest.mark.parametrize("guidance", [1.0, 2.5])
def test_a_step_computes_what_the_plain_graph_computes(tiny_engines: Path, guidance: float) -> None:
    import torch

    path, guided = tiny_engines / "unet" / "model.onnx", guidance > 1
    given = feeds(2 * N if guided else N)
    denoiser = open_denoiser(path, "cpu", guided)
    step = denoiser.bind(
        {"encoder_hidden_states": given["encoder_hidden_states"]}, given["sample"].shape, guidance
    )
    kept = []
    for time in (900.0, 20.0):
        sample = given["sample"] * (time / 500)
        both = np.concatenate([sample, sample]) if guided else sample
        wanted = plain(path, both, given["encoder_hidden_states"], time)
        if guided:
            without, within = np.split(wanted, 2)
            wanted = without + np.float32(guidance) * (within - without)
        kept.append((step(torch.from_numpy(sample), time), wanted))
    for got, wanted in kept:  # the second step must not have overwritten the first one's output
        assert np.abs(got.numpy() - wanted).max() < 1e-5 * np.abs(wanted).max()
    assert np.abs(kept[0][1] - kept[1][1]).max() > 0.01


def test_the_step_holds_less_work(tiny_engines: Path) -> None:
    from synthkit.engines.diffusion.denoising_graph import loop_graphs

    path = tiny_engines / "unet" / "model.onnx"
    before = Counter(node.op_type for node in onnx.load(path).graph.node)
    graphs = loop_graphs(path, guided=True)
    step = graphs.step.graph
    after = Counter(node.op_type for node in step.node)
    moved = Counter(node.op_type for node in graphs.prelude.graph.node)
    assert before["Resize"] == 1 and after["Resize"] == 0
    assert after["Conv"] == before["Conv"] + 3 and after["DepthToSpace"] == 1
    assert moved["MatMul"] >= 4 and after["MatMul"] == before["MatMul"] - moved["MatMul"]
    assert "encoder_hidden_states" not in {one.name for one in step.input}
    first = next(node for node in step.node if node.op_type == "Conv")
    assert first.input[0] == "sample", "the first convolution sees each image once"
    assert any(node.output[0].endswith("/doubled") for node in step.node if node.op_type == "Concat")
    for model in (graphs.prelude, graphs.step):
        onnx.checker.check_model(model, full_check=True)


def test_weights_in_external_files_are_found(tiny_engines: Path, tmp_path: Path) -> None:
    import torch

    model, path = onnx.load(tiny_engines / "unet" / "model.onnx"), tmp_path / "model.onnx"
    onnx.save_model(model, path, save_as_external_data=True, location="model.onnx_data", size_threshold=0)
    given = feeds(2 * N)
    outputs = []
    for one in (path, tiny_engines / "unet" / "model.onnx"):
        bound = open_denoiser(one, "cpu", guided=True).bind(
            {"encoder_hidden_states": given["encoder_hidden_states"]}, given["sample"].shape, 2.0
        )
        outputs.append(bound(torch.from_numpy(given["sample"]), 500.0).numpy())
    assert np.array_equal(*outputs)


def test_a_split_upsampling_is_exact_at_the_borders(tmp_path: Path) -> None:
    from onnx import TensorProto, helper, numpy_helper

    from synthkit.engines.diffusion.denoising_graph import decoder_graph

    random = np.random.default_rng(1)
    weights = [
        numpy_helper.from_array(random.standard_normal((5, 2, 3, 3)).astype(np.float32), "w"),
        numpy_helper.from_array(random.standard_normal(5).astype(np.float32), "b"),
        numpy_helper.from_array(np.array([1, 1, 2, 2], np.float32), "scales"),
    ]
    nodes = [
        helper.make_node(
            "Resize",
            ["x", "", "scales"],
            ["large"],
            mode="nearest",
            coordinate_transformation_mode="asymmetric",
            nearest_mode="floor",
        ),
        helper.make_node("Conv", ["large", "w", "b"], ["y"], pads=[1, 1, 1, 1], kernel_shape=[3, 3]),
    ]
    tensors = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, None, None, None]) for name in "xy"]
    graph = helper.make_graph(nodes, "g", tensors[:1], tensors[1:], weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.save(model, tmp_path / "model.onnx")
    split = decoder_graph(tmp_path / "model.onnx")
    assert {node.op_type for node in split.graph.node} == {"Conv", "Concat", "DepthToSpace"}
    x = random.standard_normal((1, 2, 3, 4)).astype(np.float32)
    wanted = open_session(model.SerializeToString()).run({"x": x})["y"]
    got = open_session(split.SerializeToString()).run({"x": x})["y"]
    assert wanted.shape == (1, 5, 6, 8) and np.abs(got - wanted).max() < 1e-5


def test_a_broken_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(b"not a model")
    with pytest.raises(EngineError, match=r"cannot read .*model\.onnx.*--force"):
        open_denoiser(tmp_path / "model.onnx", "cpu", guided=True)
