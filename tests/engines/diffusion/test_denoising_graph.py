"""The denoising graph computes what the plain UNet computes, with less work per step."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

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


@pytest.mark.slow
@pytest.mark.parametrize("guidance", [1.0, 2.5])
def test_a_prediction_equals_that_of_the_plain_graph(tiny_engines: Path, guidance: float) -> None:
    import torch

    path, guided = tiny_engines / "unet" / "model.onnx", guidance > 1
    given = feeds(2 * N if guided else N)
    denoiser = open_denoiser(path, "cpu", guided)
    predict = denoiser.bind(
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
        kept.append((predict(torch.from_numpy(sample), time), wanted))
    for got, wanted in kept:  # the second prediction must not have overwritten the first one's output
        assert np.abs(got.numpy() - wanted).max() < 1e-5 * np.abs(wanted).max()
    assert np.abs(kept[0][1] - kept[1][1]).max() > 0.01


def test_the_denoising_graph_holds_less_work(tiny_engines: Path) -> None:
    from synthkit.engines.diffusion.denoising_graph import split_unet

    path = tiny_engines / "unet" / "model.onnx"
    before = Counter(node.op_type for node in onnx.load(path).graph.node)
    graphs = split_unet(path, guided=True)
    denoising = graphs.denoising.graph
    after = Counter(node.op_type for node in denoising.node)
    moved = Counter(node.op_type for node in graphs.conditioning.graph.node)
    assert before["Resize"] == 1 and after["Resize"] == 0
    assert after["Conv"] == before["Conv"] + 3 and after["DepthToSpace"] == 1
    assert moved["MatMul"] >= 4 and after["MatMul"] == before["MatMul"] - moved["MatMul"]
    assert "encoder_hidden_states" not in {one.name for one in denoising.input}
    first = next(node for node in denoising.node if node.op_type == "Conv")
    assert first.input[0] == "sample", "the first convolution sees each image once"
    assert any(node.output[0].endswith("/doubled") for node in denoising.node if node.op_type == "Concat")
    for model in (graphs.conditioning, graphs.denoising):
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


def conv_behind_resize(
    path: Path, conv: dict[str, Any], resize: dict[str, Any], side: int = 3, shared: bool = False
) -> Any:
    """Model of an upsampling by 2 and a convolution with these attributes; `shared`: both are outputs."""
    from onnx import TensorProto, helper, numpy_helper

    random = np.random.default_rng(1)
    weights = [
        numpy_helper.from_array(random.standard_normal((5, 2, side, side)).astype(np.float32), "w"),
        numpy_helper.from_array(random.standard_normal(5).astype(np.float32), "b"),
        numpy_helper.from_array(np.array([1, 1, 2, 2], np.float32), "scales"),
    ]
    nodes = [
        helper.make_node("Resize", ["x", "", "scales"], ["large"], **resize),
        helper.make_node("Conv", ["large", "w", "b"], ["y"], **conv),
    ]
    x, large, y = (
        helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, None, None, None])
        for name in ("x", "large", "y")
    )
    graph = helper.make_graph(nodes, "g", [x], [y, large] if shared else [y], weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.save(model, path)
    return model


def operators(model: Any) -> set[str]:
    return {node.op_type for node in model.graph.node}


PADDED = {"pads": [1, 1, 1, 1]}
REPEATED = {"mode": "nearest", "coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"}


@pytest.mark.parametrize(
    ("conv", "resize"),
    [
        (PADDED | {"kernel_shape": [3, 3]}, REPEATED),
        (PADDED, REPEATED),  # the kernel's shape is that of the weight
        (PADDED | {"auto_pad": "NOTSET", "strides": [1, 1], "dilations": [1, 1], "group": 1}, REPEATED),
        (PADDED, {}),  # Resize's defaults: nearest, half_pixel, round_prefer_floor
        (PADDED, {"nearest_mode": "round_prefer_ceil"}),
        (PADDED, {"coordinate_transformation_mode": "asymmetric"}),
    ],
)
def test_a_split_upsampling_is_exact_at_the_borders(
    tmp_path: Path, conv: dict[str, Any], resize: dict[str, Any]
) -> None:
    from synthkit.engines.diffusion.denoising_graph import decoder_graph

    model = conv_behind_resize(tmp_path / "model.onnx", conv, resize)
    split = decoder_graph(tmp_path / "model.onnx")
    assert operators(split) == {"Conv", "Concat", "DepthToSpace"}
    x = np.random.default_rng(2).standard_normal((1, 2, 3, 4)).astype(np.float32)
    wanted = open_session(model.SerializeToString()).run({"x": x})["y"]
    got = open_session(split.SerializeToString()).run({"x": x})["y"]
    assert wanted.shape == (1, 5, 6, 8) and np.abs(got - wanted).max() < 1e-5


@pytest.mark.parametrize(
    ("conv", "resize", "side"),
    [
        ({}, REPEATED, 3),  # without pads ONNX pads nothing
        ({"auto_pad": "VALID"}, REPEATED, 3),
        ({"auto_pad": "SAME_UPPER"}, REPEATED, 3),
        ({"pads": [1, 1, 0, 0]}, REPEATED, 3),
        (PADDED | {"strides": [2, 2]}, REPEATED, 3),
        (PADDED | {"dilations": [2, 2]}, REPEATED, 3),
        (PADDED, REPEATED, 5),
        (PADDED, REPEATED | {"nearest_mode": "ceil"}, 3),
        (PADDED, REPEATED | {"coordinate_transformation_mode": "half_pixel"}, 3),
        (PADDED, REPEATED | {"coordinate_transformation_mode": "align_corners"}, 3),
        (PADDED, {"mode": "linear"}, 3),
    ],
)
def test_any_other_upsampling_stays_as_it_is(
    tmp_path: Path, conv: dict[str, Any], resize: dict[str, Any], side: int
) -> None:
    from synthkit.engines.diffusion.denoising_graph import decoder_graph

    model = conv_behind_resize(tmp_path / "model.onnx", conv, resize, side)
    split = decoder_graph(tmp_path / "model.onnx")
    assert list(split.graph.node) == list(model.graph.node)


def test_an_upsampling_that_is_an_output_itself_stays(tmp_path: Path) -> None:
    from synthkit.engines.diffusion.denoising_graph import decoder_graph

    conv_behind_resize(tmp_path / "model.onnx", PADDED, REPEATED, shared=True)
    assert operators(decoder_graph(tmp_path / "model.onnx")) == {"Resize", "Conv"}


def test_a_broken_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(b"not a model")
    with pytest.raises(EngineError, match=r"cannot read .*model\.onnx.*--force"):
        open_denoiser(tmp_path / "model.onnx", "cpu", guided=True)
