from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from synthkit.engines.runtime import session
from synthkit.engines.runtime.session import content_prefix, open_session
from synthkit.engines.runtime.tensor_spec import TensorSpec
from synthkit.errors import EngineError, MissingExtra

pytest.importorskip("onnxruntime")
IDS = np.zeros((2, 77), np.int64)


def test_a_session_tells_its_tensors_and_runs(tiny_engines: Path) -> None:
    encoder = open_session(tiny_engines / "text_encoder" / "model.onnx")
    assert encoder.provider == "cpu"
    assert encoder.inputs == (TensorSpec("input_ids", "int64", ("batch", 77)),)
    assert encoder.run({"input_ids": IDS})["last_hidden_state"].shape == (2, 77, 32)


def test_what_does_not_fit_is_refused_by_name(tiny_engines: Path) -> None:
    unet = open_session(tiny_engines / "unet" / "model.onnx")
    feeds = {
        "sample": np.zeros((1, 4, 4, 4), np.float32),
        "timestep": np.zeros((), np.float32),
        "encoder_hidden_states": np.zeros((1, 77, 32), np.float32),
    }
    unet.run(feeds)
    with pytest.raises(EngineError, match=r"input 'sample' must be float32 .* got float64 \[1, 4, 4, 4\]"):
        unet.run({**feeds, "sample": np.zeros((1, 4, 4, 4))})
    with pytest.raises(EngineError, match=r"got float32 \[1, 3, 4, 4\]"):
        unet.run({**feeds, "sample": np.zeros((1, 3, 4, 4), np.float32)})
    with pytest.raises(EngineError, match=r"takes the inputs .* got \['sample'\]"):
        unet.run({"sample": feeds["sample"]})
    with pytest.raises(EngineError, match="failed while running"):
        unet.run({**feeds, "encoder_hidden_states": np.zeros((3, 77, 32), np.float32)})


def test_a_closed_session_does_not_run(tiny_engines: Path) -> None:
    encoder = open_session(tiny_engines / "text_encoder" / "model.onnx")
    encoder.close()
    with pytest.raises(EngineError, match="was closed"):
        encoder.run({"input_ids": IDS})


def test_absent_and_broken_files(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match=r"no engine .*absent\.onnx; make it with"):
        open_session(tmp_path / "absent.onnx")
    (tmp_path / "broken.onnx").write_bytes(b"not a model")
    with pytest.raises(EngineError, match=r"cannot load .*broken\.onnx.*--force") as caught:
        open_session(tmp_path / "broken.onnx")
    assert "\n" not in str(caught.value)


class FallsBack:
    """ONNX Runtime with a CUDA provider that is listed and does not load."""

    SessionOptions = staticmethod(lambda: SimpleNamespace(add_session_config_entry=lambda *_: None))

    def get_available_providers(self) -> list[str]:
        return ["CUDAExecutionProvider", "CPUExecutionProvider"]

    def InferenceSession(self, *_: Any, **__: Any) -> Any:
        return SimpleNamespace(
            get_providers=lambda: ["CPUExecutionProvider"],
            get_inputs=list,
            get_outputs=list,
            get_modelmeta=lambda: SimpleNamespace(custom_metadata_map={}),
            disable_fallback=lambda: None,
        )


def test_a_provider_that_did_not_load_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session, "_onnxruntime", FallsBack)
    with pytest.raises(EngineError, match="'cuda' did not load"):
        open_session(b"model", "cuda")
    assert open_session(b"model", "auto").provider == "cpu"


def test_an_unknown_or_absent_provider_is_an_error(tiny_engines: Path) -> None:
    import onnxruntime

    with pytest.raises(
        EngineError, match=r"no provider 'cud'; did you mean cuda.*; one of auto, cpu, cuda, tensorrt"
    ):
        open_session(tiny_engines / "unet" / "model.onnx", "cud")
    if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        with pytest.raises(EngineError, match="has no CUDAExecutionProvider"):
            open_session(tiny_engines / "unet" / "model.onnx", "cuda")


def test_without_onnxruntime_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(MissingExtra, match=r"synthkit-edge\[cpu\]"):
        open_session(b"model")


def test_a_bound_session_fills_the_tensors_it_was_given(tiny_engines: Path) -> None:
    import torch

    decoder = open_session(tiny_engines / "vae_decoder" / "model.onnx")
    latents, images = torch.zeros(2, 4, 4, 4), torch.empty(2, 3, 16, 16)
    compute = decoder.bind({"latent_sample": latents}, {"sample": images})
    for value in (0.0, 1.0):
        latents.fill_(value)
        compute()
        wanted = decoder.run({"latent_sample": latents.numpy()})["sample"]
        assert np.array_equal(images.numpy(), wanted)
    with pytest.raises(EngineError, match=r"input 'latent_sample' must be float32 .* got float64"):
        decoder.bind({"latent_sample": latents.double()}, {"sample": images})
    with pytest.raises(EngineError, match="'latent_sample' must be a contiguous tensor on cpu"):
        decoder.bind({"latent_sample": latents.transpose(2, 3)}, {"sample": images})
    decoder.close()
    with pytest.raises(EngineError, match="was closed"):
        compute()


def test_the_placement_names_every_provider(tiny_engines: Path) -> None:
    placed = open_session(tiny_engines / "vae_decoder" / "model.onnx").placement()
    assert list(placed) == ["CPUExecutionProvider"] and placed["CPUExecutionProvider"] > 10


def test_a_provider_whose_registration_fails_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    class Raises(FallsBack):
        def get_available_providers(self) -> list[str]:
            return ["TensorrtExecutionProvider", *super().get_available_providers()]

        def InferenceSession(self, *_: Any, **given: Any) -> Any:
            assert given["enable_fallback"] == 0, "Python would open the model on the CPU"
            raise RuntimeError("Failed to load TensorrtExecutionProvider: libnvinfer.so.10: not found")

    monkeypatch.setattr(session, "_onnxruntime", Raises)
    with pytest.raises(
        EngineError, match=r"'tensorrt' did not load .*libnvinfer\.so\.10.*; install TensorRT 10"
    ):
        open_session(b"model", "tensorrt")


def test_cached_engines_are_named_by_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(b"graph")
    names = [content_prefix(path)]
    (tmp_path / "model.onnx_data").write_bytes(b"weights")
    names.append(content_prefix(path))
    (tmp_path / "model.onnx_data").write_bytes(b"weightt")
    names.append(content_prefix(path))
    assert len(set(names)) == 3
    moved = tmp_path / "elsewhere"
    moved.mkdir()
    for file in ("model.onnx", "model.onnx_data"):
        (moved / file).write_bytes((tmp_path / file).read_bytes())
    assert content_prefix(moved / "model.onnx") == names[-1]
    monkeypatch.setattr(session, "_CACHE", tmp_path / "cache")
    (_, options), after = session._wished("tensorrt", path)
    assert options["trt_engine_cache_prefix"] == names[-1] and after == "CUDAExecutionProvider"
    assert options["trt_engine_cache_path"] == str(tmp_path / "cache") and (tmp_path / "cache").is_dir()
