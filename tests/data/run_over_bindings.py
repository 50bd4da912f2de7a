"""Drive the TensorRT backend over the real bindings; run by tests/engines/test_tensorrt_bindings.py.

    python run_over_bindings.py LIBRARY... -- ONNX_FILE WORK_FOLDER

The libraries are stand-ins that compute nothing. One line of JSON per step is printed, so that a crash shows
how far it came.
"""

from __future__ import annotations

import ctypes
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

from synthkit.engines.runtime.component_spec import BatchRange, EngineSpec
from synthkit.engines.runtime.tensor_spec import TensorSpec
from synthkit.engines.tensorrt import build as tensorrt_build
from synthkit.engines.tensorrt import timing_cache
from synthkit.engines.tensorrt.api import TensorRt, probe_tensorrt
from synthkit.engines.tensorrt.build import build_engine
from synthkit.engines.tensorrt.build_plan import BuildOptions, decide_plan
from synthkit.engines.tensorrt.session import deserialize
from synthkit.errors import EngineError
from tests.cuda_stand_ins import apply, cuda_stand_ins


def tell(step: str, answer: Any) -> None:
    print(json.dumps([step, answer]), flush=True)


def refusal(call: Any, *arguments: Any, **options: Any) -> str:
    try:
        return f"no refusal: {call(*arguments, **options)!r}"[:200]
    except EngineError as error:
        return str(error)


def main() -> None:
    split = sys.argv.index("--")
    for library in sys.argv[1:split]:
        ctypes.CDLL(library, mode=ctypes.RTLD_GLOBAL)
    onnx, work = Path(sys.argv[split + 1]), Path(sys.argv[split + 2])
    problem = probe_tensorrt()
    tell("probe", problem)
    rt = TensorRt()
    latent = TensorSpec("sample", "float32", ("batch", 4, 8, 8))
    spec = EngineSpec("unet", "unet/model.onnx", (latent,), (latent,))
    options = BuildOptions(workspace=64, level=1, version_compatible=True, refit=True, hardware="ampere+")
    plan = decide_plan(spec, BatchRange(1, 2, 4), "fp16", options, rt.version)
    tell("plan", [plan.network_flag, *plan.flags])
    if problem:
        tell("build", refusal(build_engine, rt, plan, onnx, work / "timings"))
        tell("load", refusal(deserialize, rt, b"plan", "it"))
        return
    for module in (tensorrt_build, timing_cache):
        module.bytes = lambda memory: b"of no size"  # the stand-in's memory has a size that makes no sense
    engine = build_engine(rt, plan, onnx, work / "timings")
    tell("build", len(engine))
    tell("timings", (work / "timings").read_bytes().decode())
    run_session(rt, engine)


def run_session(rt: TensorRt, engine: bytes) -> None:
    """Every call of a run: the stand-in's engine has one input without a name and without dimensions."""
    apply({**cuda_stand_ins(), "torch.cuda.CUDAGraph": _Graph})
    session = deserialize(rt, engine, "it", allow_host_code=True)
    tell("inputs", [spec.to_json() for spec in session.inputs])
    tell("layers", session.layers())
    tell("range", [len(shape) for shape in session._asked("get_tensor_profile_shape", "", 0)])
    feeds = {"": np.asarray(1, np.float16)}
    tell("one shape missing", refusal(session.run, feeds))
    session._engine = _Settled(session._engine)
    for _ in range(3):
        tell("run", sorted(session.run(feeds)))
    tell("graphs", [lane.graph.replays for lane in session._lanes.values()])
    session.close()


class _Graph:
    replays = 0

    def __init__(self) -> None:
        self.work: list[Any] = []  # stays empty: what is captured here is TensorRT's own

    def replay(self) -> None:
        self.replays += 1


class _Settled:
    """The real engine or context, but for `infer_shapes`: its 1 means that one input's shape is missing."""

    def __init__(self, real: Any) -> None:
        self._real = real

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)

    def create_execution_context(self) -> Any:
        return _Settled(self._real.create_execution_context())

    def infer_shapes(self) -> list[str]:
        self._real.infer_shapes()
        return []


if __name__ == "__main__":
    main()
