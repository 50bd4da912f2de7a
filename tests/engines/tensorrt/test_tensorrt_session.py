"""Running TensorRT plans, over stand-ins for TensorRT and CUDA whose engines compute in ONNX Runtime.

Not run on a GPU: what CUDA graphs, streams and memory really do there is not tested here.
"""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from synthkit.artifacts import write_bytes
from synthkit.engines.runtime.component_spec import BatchRange, read_geometry
from synthkit.engines.runtime.session import open_session
from synthkit.engines.tensorrt import session as tensorrt_session
from synthkit.engines.tensorrt.api import TensorRt
from synthkit.engines.tensorrt.build_plan import BuildOptions, decide_plan, planned_specs
from synthkit.engines.tensorrt.plan_cache import find_plans
from synthkit.engines.tensorrt.plan_worker import PlanJob, make_plan
from synthkit.engines.tensorrt.session import TensorRtSession, deserialize, has_plans, open_plan
from synthkit.errors import EngineError
from tests.cuda_stand_ins import stand_in_machine
from tests.tensorrt_behaviour import install
from tests.tensorrt_fakes import EACH_FLAVOUR, FLAVOURS, Fakes

WIDTH, TOKENS, SIDE = 32, 77, 4


def planned(onnx_engines: Path, folder: Path, version: str, component: str = "unet", **options: Any) -> Path:
    """An engines folder with the plan of one network."""
    if not folder.exists():
        shutil.copytree(onnx_engines, folder)
    spec = next(one for one in planned_specs(read_geometry(folder)) if one.component == component)
    plan = decide_plan(spec, BatchRange(1, 2, 4), "fp16", BuildOptions(**options), version)
    make_plan(PlanJob(plan, folder / component, folder.parent / "timings", stand_in_machine(version)))
    return folder


@pytest.fixture(scope="module", params=EACH_FLAVOUR)
def flavour_and_folder(
    request: pytest.FixtureRequest, half_engines: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, Path]:
    """A flavour and an engines folder with its plan of the UNet; tests that change files copy the folder."""
    with pytest.MonkeyPatch.context() as patch:
        install(patch, request.param)
        out = tmp_path_factory.mktemp("planned") / "engines"
        return request.param, planned(half_engines, out, FLAVOURS[request.param])


@pytest.fixture
def opened(
    flavour_and_folder: tuple[str, Path], monkeypatch: pytest.MonkeyPatch
) -> tuple[TensorRtSession, Path, Fakes]:
    flavour, folder = flavour_and_folder
    fakes = install(monkeypatch, flavour)
    return open_plan(folder, "unet"), folder, fakes


def feeds(rows: int, seed: int = 0) -> dict[str, np.ndarray]:
    random = np.random.default_rng(seed)
    return {
        "sample": random.standard_normal((rows, 4, SIDE, SIDE)).astype(np.float16),
        "timestep": np.asarray(500 + seed, np.float16),
        "encoder_hidden_states": random.standard_normal((rows, TOKENS, WIDTH)).astype(np.float16),
    }


def test_it_computes_what_the_onnx_file_computes(opened: tuple[TensorRtSession, Path, Fakes]) -> None:
    session, folder, fakes = opened
    reference = open_session(folder / "unet" / "model.onnx")
    assert [(one.name, one.dtype, one.shape) for one in session.inputs] == [
        ("sample", "float16", ("batch", 4, SIDE, SIDE)),
        ("timestep", "float16", ()),
        ("encoder_hidden_states", "float16", ("batch", TOKENS, WIDTH)),
    ]
    assert (session.provider, session.device, session.outputs[0].dtype) == ("tensorrt", "cuda", "float16")
    for rows, seed in [(2, 1), (2, 2), (2, 3), (8, 4), (8, 5), (2, 6), (1, 7), (2, 8)]:
        given = feeds(rows, seed)
        got, wanted = session.run(given), reference.run(given)
        np.testing.assert_array_equal(got["out_sample"], wanted["out_sample"])
    assert "IExecutionContext.execute_async_v3" in fakes.calls


def test_one_context_and_one_graph_per_shape(opened: tuple[TensorRtSession, Path, Fakes]) -> None:
    session, _, fakes = opened
    for rows in (2, 2, 2, 4, 4):
        session.run(feeds(rows))
    assert fakes.calls.count("ICudaEngine.create_execution_context") == 2
    # the first run of a shape is plain, the second is captured, and every later one replays
    assert fakes.calls.count("IExecutionContext.execute_async_v3") == 4
    assert [lane.graph.replays for lane in session._lanes.values()] == [2, 1]
    session.run(feeds(6))  # a third shape takes the place of the first
    assert [shapes[0][0] for shapes in session._lanes] == [4, 6]


def test_answers_do_not_change_later(opened: tuple[TensorRtSession, Path, Fakes]) -> None:
    session, _, _ = opened
    first = session.run(feeds(2, 1))["out_sample"]
    kept = first.copy()
    session.run(feeds(2, 2))
    np.testing.assert_array_equal(first, kept)


def test_inputs_of_any_layout(opened: tuple[TensorRtSession, Path, Fakes]) -> None:
    session, _, _ = opened
    plain = feeds(2)
    odd = {
        **plain,
        "sample": np.asfortranarray(plain["sample"]),
        "encoder_hidden_states": np.broadcast_to(plain["encoder_hidden_states"][:1], (2, TOKENS, WIDTH)),
    }
    plain["encoder_hidden_states"] = np.ascontiguousarray(odd["encoder_hidden_states"])
    np.testing.assert_array_equal(session.run(odd)["out_sample"], session.run(plain)["out_sample"])
    odd["encoder_hidden_states"].flags.writeable = False
    session.run(odd)


def test_tensors_can_be_bound(opened: tuple[TensorRtSession, Path, Fakes]) -> None:
    import torch

    session, folder, _ = opened
    inputs = {name: torch.from_numpy(value.copy()) for name, value in feeds(2).items()}
    outputs = {"out_sample": torch.zeros(2, 4, SIDE, SIDE, dtype=torch.float16)}
    compute = session.bind(inputs, outputs)
    reference = open_session(folder / "unet" / "model.onnx")
    for seed in (1, 2, 3):
        for name, value in feeds(2, seed).items():
            inputs[name].copy_(torch.from_numpy(value))
        compute()
        wanted = reference.run(feeds(2, seed))["out_sample"]
        np.testing.assert_array_equal(outputs["out_sample"].numpy(), wanted)
    inputs["sample"] = inputs["sample"].float()
    with pytest.raises(EngineError, match="'sample' must be float16"):
        session.bind(inputs, outputs)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"sample": feeds(9)["sample"]}, r"built for batches of 1 to 8 \(4 images with guidance\), got 9"),
        ({"sample": feeds(3)["sample"]}, "inputs of different batches"),
        ({"sample": feeds(2)["sample"][0]}, "'sample' must be float16"),
        ({"sample": feeds(2)["sample"][..., :2]}, "'sample' must be float16"),
        ({"timestep": np.zeros(1, np.float16)}, "'timestep' must be float16"),
        ({"timestep": np.asarray(5, np.float32)}, "'timestep' must be float16"),
        ({"more": np.zeros(1)}, "takes the inputs"),
    ],
)
def test_inputs_that_do_not_fit(
    opened: tuple[TensorRtSession, Path, Fakes], change: dict[str, np.ndarray], problem: str
) -> None:
    session, _, fakes = opened
    with pytest.raises(EngineError, match=problem):
        session.run({**feeds(2), **change})
    assert "ICudaEngine.create_execution_context" not in fakes.calls


def test_a_fixed_batch_is_refused_in_images_too(
    half_engines: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(monkeypatch, "10")
    folder = planned(half_engines, tmp_path / "engines", "10.3.0", "vae_decoder")
    session = open_plan(folder, "vae_decoder")
    latents = np.zeros((5, 4, SIDE, SIDE), np.float16)
    with pytest.raises(
        EngineError, match="built for batches of 1 to 4 images, got 5; give another --batch-size"
    ):
        session.run({"latent_sample": latents})
    assert session.run({"latent_sample": latents[:4]})["sample"].shape == (4, 3, 16, 16)


def test_a_closed_session(opened: tuple[TensorRtSession, Path, Fakes]) -> None:
    session, _, _ = opened
    session.run(feeds(2))
    session.close()
    with pytest.raises(EngineError, match="was closed; open it again"):
        session.run(feeds(2))


def test_a_buffer_that_is_not_aligned(
    opened: tuple[TensorRtSession, Path, Fakes], monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    session, _, _ = opened
    aligned = torch.empty

    def shifted(shape: Any, *, dtype: Any, device: Any) -> Any:
        room = aligned((int(np.prod(shape)) + 8,), dtype=dtype, device=device)
        return room[8:].view(tuple(shape))

    monkeypatch.setattr(torch, "empty", shifted)
    with pytest.raises(EngineError, match="not at a multiple of 256 bytes"):
        session.run(feeds(2))


def test_a_shape_that_is_known_only_while_running(opened: tuple[TensorRtSession, Path, Fakes]) -> None:
    session, _, fakes = opened
    fakes.inject["IExecutionContext.get_tensor_shape"] = (-1, 4, SIDE, SIDE)
    with pytest.raises(EngineError, match="does not say the shape of 'sample' before it runs"):
        session.run(feeds(2))


def test_names_of_tensors_that_lack_a_shape(opened: tuple[TensorRtSession, Path, Fakes]) -> None:
    session, _, fakes = opened
    fakes.inject["IExecutionContext.infer_shapes"] = ["timestep"]
    with pytest.raises(EngineError, match=r"not enough is known of .'timestep'."):
        session.run(feeds(2))


RUN_CALLS = {
    "ICudaEngine.create_execution_context": "make a context",
    "IExecutionContext.set_input_shape": "set sample of .* to",
    "IExecutionContext.infer_shapes": "infer the shapes",
    "IExecutionContext.get_tensor_shape": "tell the shape of sample",
    "IExecutionContext.set_tensor_address": "bind sample",
    "IExecutionContext.execute_async_v3": "run .*unet",
    "ICudaEngine.get_tensor_profile_shape": "answer get_tensor_profile_shape",
}


@pytest.mark.slow
@pytest.mark.parametrize("call", RUN_CALLS)
def test_a_call_that_fails_while_running(opened: tuple[TensorRtSession, Path, Fakes], call: str) -> None:
    session, _, fakes = opened
    fakes.inject[call] = None
    with pytest.raises(EngineError, match=f"could not {RUN_CALLS[call]}"):
        session.run(feeds(2))
    fakes.inject[call] = RuntimeError("CUDA error: out of memory")
    with pytest.raises(EngineError, match="out of memory; lower --batch"):
        session.run(feeds(2))
    fakes.inject.clear()
    assert session.run(feeds(2))["out_sample"].shape == (2, 4, SIDE, SIDE), "a failed run spoils nothing"


def test_a_failure_during_capture_leaves_a_plain_run(
    opened: tuple[TensorRtSession, Path, Fakes],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    import torch

    session, _, fakes = opened
    first = session.run(feeds(2))["out_sample"]

    def refused(graph: Any, stream: Any) -> Any:
        raise RuntimeError("operation not permitted\nwhen stream is capturing")

    monkeypatch.setattr(torch.cuda, "graph", refused)
    with caplog.at_level(logging.WARNING, "synthkit"):
        for _ in range(3):
            np.testing.assert_array_equal(session.run(feeds(2))["out_sample"], first)
    assert caplog.text.count("running without a CUDA graph") == 1
    assert fakes.calls.count("IExecutionContext.execute_async_v3") == 4


def test_what_is_no_plan_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, "10")
    with pytest.raises(
        EngineError, match="could not load it: magicTagRead == kMAGIC_TAG failed; the file is no"
    ):
        deserialize(TensorRt(), b"\x08\x07onnx", "it")


def test_a_type_that_cannot_be_fed(
    half_engines: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fakes = install(monkeypatch, "11")
    folder = planned(half_engines, tmp_path / "engines", "11.4.0.106", "vae_decoder")
    fakes.inject["ICudaEngine.get_tensor_dtype"] = fakes.module.DataType.FP8
    with pytest.raises(EngineError, match=r"is of the type DataType\.FP8, which cannot be fed"):
        open_plan(folder, "vae_decoder")


@pytest.mark.slow
def test_a_damaged_or_foreign_plan_never_reaches_tensorrt(
    half_engines: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(monkeypatch, "10")
    assert not has_plans(half_engines)
    folder = planned(half_engines, tmp_path / "engines", "10.3.0", "unet")
    assert has_plans(folder)
    (plan,) = find_plans(folder / "unet")
    content = bytearray(plan.read_bytes())
    content[len(content) // 2] ^= 4
    write_bytes(plan, bytes(content))
    fakes = install(monkeypatch, "10")
    with pytest.raises(EngineError, match="SHA-256 differs"):
        open_plan(folder, "unet")
    fakes = install(monkeypatch, "11")
    with pytest.raises(
        EngineError, match=r"10\.3\.0, here is 11\.4.*build-engines --backend tensorrt --force"
    ):
        open_plan(folder, "unet")
    assert not [call for call in fakes.calls if call.startswith("Runtime")]


def test_code_in_a_plan_runs_only_when_allowed(
    half_engines: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(monkeypatch, "10")
    folder = planned(half_engines, tmp_path / "engines", "10.3.0", "vae_decoder", version_compatible=True)
    with pytest.raises(EngineError, match=r"holds code that runs on loading; .*SYNTHKIT_ENGINE_HOST_CODE=1"):
        open_plan(folder, "vae_decoder")
    monkeypatch.setenv(tensorrt_session.HOST_CODE, "1")
    session = open_plan(folder, "vae_decoder")
    assert session.outputs[0].name == "sample"
