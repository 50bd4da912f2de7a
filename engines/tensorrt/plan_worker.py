"""One network becomes a verified plan, in this process or in a child of its own.

A builder holds several copies of a network's weights and gives some of that memory back only when its process
ends. On a device with little memory each network is therefore built in a child, which
`build-engines.low_memory` asks for.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from synthkit.engines.runtime.session import Session, open_session
from synthkit.engines.runtime.tensor_spec import TensorSpec
from synthkit.engines.tensorrt.api import TensorRt
from synthkit.engines.tensorrt.build import build_engine
from synthkit.engines.tensorrt.build_plan import BuildPlan, Profile
from synthkit.engines.tensorrt.plan_cache import Machine, network_digest, plan_key, write_plan
from synthkit.engines.tensorrt.precision_check import check_precision, graph_weights
from synthkit.engines.tensorrt.session import deserialize
from synthkit.errors import EngineError, ParityError, SynthkitError

TOLERANCE = {
    # Tensor cores multiply fp32 as TF32, with 11 bits as in fp16, and sum in fp32.
    "fp32": 1e-2,
    # As for the ONNX graph itself: 11 bits in every rounding, and roundings of many layers add up.
    "fp16": 3e-2,
}
"""Largest difference between a plan and its ONNX file, as a part of the largest value of the output."""


@dataclass(frozen=True)
class PlanJob:
    """A network to build.

    Attributes:
        plan: settings of the build.
        folder: holds `model.onnx`, and gets the plan and its sidecar.
        timings: the timing cache.
        machine: that the plan is for.
    """

    plan: BuildPlan
    folder: Path
    timings: Path
    machine: Machine


def make_plan(job: PlanJob) -> Path:
    """Build, verify and write a plan.

    Returns:
        The plan's file; what was measured lies in its sidecar.

    Raises:
        EngineError: TensorRT fails, or the engine is not of the precision asked for.
        ParityError: the engine does not compute what its ONNX file computes.
    """
    started = time.perf_counter()
    rt, plan, onnx = TensorRt(), job.plan, job.folder / "model.onnx"
    key = plan_key(network_digest(job.folder), plan, job.machine)
    engine = build_engine(rt, plan, onnx, job.timings)
    own = "VERSION_COMPATIBLE" in plan.flags  # it holds code, which this very process has just put there
    session = deserialize(rt, engine, f"the plan of {plan.component}", allow_host_code=own)
    weights = sum(graph_weights(onnx).values())
    evidence = check_precision(plan, session.layers(), len(engine), weights)
    error, tolerance = compare(plan, session, onnx)
    session.close()
    facts = {
        "precision_check": evidence,
        "max_abs_error": error,
        "tolerance": tolerance,
        "seconds": round(time.perf_counter() - started, 3),
    }
    return write_plan(job.folder, key, engine, facts)


def compare(plan: BuildPlan, session: Session, onnx: Path) -> tuple[float, float]:
    """Largest difference between a plan and its ONNX file in ONNX Runtime on the CPU, and what is allowed.

    Args:
        plan: its smallest batch is what both compute, on random inputs.
        session: on the plan.
        onnx: the file that it was built of.

    Raises:
        ParityError: the difference is larger than that, or a value is not finite.
    """
    smallest = {one.name: one.minimum for one in plan.profiles}
    feeds = {spec.name: _random(spec, smallest.get(spec.name, ())) for spec in session.inputs}
    got, reference = session.run(feeds), open_session(onnx)
    wanted = reference.run(feeds)
    reference.close()
    largest, allowed = 0.0, 0.0
    for name, values in got.items():
        expected = wanted[name].astype(np.float32)
        limit = TOLERANCE[plan.precision] * float(np.abs(expected).max())
        error = float(np.abs(values.astype(np.float32) - expected).max())
        if not error <= limit:  # NaN is no number below the limit either
            raise ParityError(
                f"the plan of {plan.component} differs from its ONNX file by {error:.3g} in {name!r}, "
                f"allowed is {limit:.3g}; it was not kept; rebuild with --precision fp32, "
                "or use --backend onnxruntime"
            )
        largest, allowed = max(largest, error), max(allowed, limit)
    return largest, allowed


def _random(spec: TensorSpec, shape: tuple[int, ...]) -> np.ndarray:
    """Unit noise; a timestep, which is the one input without a batch, lies between 0 and 1000."""
    random = np.random.default_rng(0)
    values = random.standard_normal(shape) if shape else np.asarray(random.integers(1, 1000))
    return values.astype(spec.dtype)


def make_plan_in_child(job: PlanJob) -> Path:
    """`make_plan` in a process of its own, whose progress bar and messages appear here.

    Raises:
        EngineError: as `make_plan`, or the process was ended from outside.
    """
    line = [sys.executable, "-m", "synthkit.engines.tensorrt.plan_worker"]
    text = json.dumps(asdict(job), default=str)
    done = subprocess.run(line, input=text, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode < 0:
        raise EngineError(
            f"the builder of {job.plan.component} was ended by signal {-done.returncode}, mostly for want of "
            "memory; lower --batch, build-engines.trt_workspace or the size"
        )
    try:
        answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    except (IndexError, ValueError):
        raise EngineError(
            f"the builder of {job.plan.component} ended with {done.returncode} and no answer; "
            "what it wrote to stderr stands above"
        ) from None
    if "error" in answer:
        raise EngineError(answer["error"])
    return Path(answer["path"])


def job_from_json(data: dict[str, Any]) -> PlanJob:
    """The inverse of `dataclasses.asdict` and JSON."""
    plan = dict(data["plan"])
    plan["flags"] = tuple(plan["flags"])
    plan["profiles"] = tuple(
        Profile(one["name"], tuple(one["minimum"]), tuple(one["usual"]), tuple(one["maximum"]))
        for one in plan["profiles"]
    )
    machine = Machine(**data["machine"])
    return PlanJob(BuildPlan(**plan), Path(data["folder"]), Path(data["timings"]), machine)


def _main() -> int:
    """Read a job on stdin; the last line of stdout is the answer."""
    try:
        path = make_plan(job_from_json(json.load(sys.stdin)))
    except SynthkitError as error:
        print(json.dumps({"error": str(error)}))
        return 1
    print(json.dumps({"path": str(path)}))
    return 0


if __name__ == "__main__":
    sys.exit(_main())
