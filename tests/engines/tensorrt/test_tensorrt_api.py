"""TensorRT's log, progress and probe, over a stand-in that is as strict as the bindings."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from synthkit.engines.diffusion.build import choose_backend
from synthkit.engines.tensorrt import api as tensorrt_api
from synthkit.engines.tensorrt.api import TensorRt, probe_tensorrt, tensorrt_version
from synthkit.errors import EngineError, MissingExtra
from tests.tensorrt_behaviour import install
from tests.tensorrt_fakes import NULLPTR


def test_progress_shows_top_phases(monkeypatch: pytest.MonkeyPatch) -> None:
    bars: list[Any] = []

    class Bar:
        def __init__(self, total: int, label: str) -> None:
            self.total, self.label, self.count, self.closed = total, label, 0, False
            bars.append(self)

        def update(self) -> None:
            self.count += 1

        def close(self) -> None:
            self.closed = True

    monkeypatch.setattr(tensorrt_api, "progress_bar", Bar)
    fakes = install(monkeypatch, "11")
    monitor = tensorrt_api.progress_monitor(fakes.module, tensorrt_api.Progress("unet"))
    monitor.phase_start("Building Engine", None, 3)
    monitor.phase_start("Timing", "Building Engine", 9)
    assert monitor.step_complete("Timing", 0) is True and monitor.step_complete("Building Engine", 0) is True
    monitor.phase_finish("Timing")
    monitor.phase_finish("Building Engine")
    (bar,) = bars
    assert (bar.total, bar.label) == (3, "unet: Building Engine")
    assert (bar.count, bar.closed) == (1, True)
    del fakes.module.IProgressMonitor  # as in 8.6
    assert tensorrt_api.progress_monitor(fakes.module, tensorrt_api.Progress("unet")) is None


def test_what_tensorrt_logs(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    fakes = install(monkeypatch, "10")
    rt, kinds = TensorRt(), fakes.module.ILogger
    with caplog.at_level(1, "synthkit"):
        rt.logger.log(kinds.ERROR, "Version tag does not match. Note: Current Version: 237")
        rt.logger.log(kinds.VERBOSE, "a tactic")
    assert "TensorRT: a tactic" in caplog.text
    error = rt.failure("load it")
    assert "load it: Version tag does not match" in str(error) and "another TensorRT version; rebuild" in str(
        error
    )
    assert "it gives no reason; see --verbose" in str(rt.failure("load it")), "each error is told once"


def test_the_probe(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, "10")
    assert probe_tensorrt() is None and tensorrt_version() == "10.3.0"
    assert choose_backend("auto") == ("tensorrt", "it works here")
    assert choose_backend("tensorrt") == ("tensorrt", "asked for")
    assert choose_backend("onnxruntime") == ("onnxruntime", "asked for")
    install(monkeypatch, "10", {"Runtime.__init__": TypeError(NULLPTR)})
    assert probe_tensorrt() == "TensorRT 10.3.0 cannot start: it finds no GPU and driver that it can use"
    assert choose_backend("auto")[0] == "onnxruntime"
    with pytest.raises(EngineError, match=r"cannot build TensorRT engines: TensorRT 10\.3\.0 cannot start"):
        choose_backend("tensorrt")
    install(monkeypatch, "10", {"Runtime.__init__": RuntimeError("CUDA initialization failure: 35")})
    assert probe_tensorrt() == "TensorRT 10.3.0 cannot start: CUDA initialization failure: 35"


def test_without_tensorrt_or_its_libraries(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    assert probe_tensorrt() == "the tensorrt package is not installed" and tensorrt_version() is None
    with pytest.raises(MissingExtra):
        TensorRt()
    assert choose_backend("auto") == ("onnxruntime", "the tensorrt package is not installed")
    (tmp_path / "tensorrt.py").write_text(
        'raise ImportError("libnvinfer.so.11: cannot open shared object file")'
    )
    monkeypatch.delitem(sys.modules, "tensorrt")
    monkeypatch.syspath_prepend(tmp_path)
    text = "the tensorrt package does not import: libnvinfer.so.11: cannot open shared object file"
    assert probe_tensorrt() == text and tensorrt_version() is None
    with pytest.raises(EngineError, match=f"{text}; reinstall it"):
        TensorRt()


def test_tensorrt_without_a_gpu_for_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, "10")
    monkeypatch.undo()
    fakes = install(monkeypatch, "10")
    from synthkit.engines.diffusion import build
    from synthkit.engines.tensorrt import plan_cache

    monkeypatch.setattr(build, "this_machine", plan_cache.this_machine)
    backend, reason = choose_backend("auto")
    assert backend == "onnxruntime" and "sees no GPU" in reason and fakes.calls
