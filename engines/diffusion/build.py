"""Building engines: choice of the backend, export, parity check, TensorRT plans, entries for the manifest."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from synthkit.engines.diffusion.export import component_precisions, export_pipeline
from synthkit.engines.diffusion.parity import component_parity
from synthkit.engines.runtime.component_spec import BatchRange, read_geometry
from synthkit.engines.tensorrt.api import probe_tensorrt, tensorrt_version
from synthkit.engines.tensorrt.build_plan import BuildOptions, BuildPlan, decide_plan, planned_specs
from synthkit.engines.tensorrt.plan_cache import (
    Machine,
    network_digest,
    plan_key,
    plan_path,
    read_plan,
    read_sidecar,
    sidecar_path,
    this_machine,
    write_plan,
)
from synthkit.engines.tensorrt.plan_worker import PlanJob, make_plan, make_plan_in_child
from synthkit.engines.tensorrt.precision_check import graph_weights, main_precision
from synthkit.engines.tensorrt.timing_cache import timing_cache_path
from synthkit.errors import EngineError

log = logging.getLogger(__name__)


def choose_backend(wanted: str) -> tuple[str, str]:
    """Choose the backend to build for; return it with the reason.

    Args:
        wanted: "auto", "tensorrt" or "onnxruntime".

    Raises:
        EngineError: TensorRT was asked for and does not work here.
    """
    if wanted == "onnxruntime":
        return "onnxruntime", "asked for"
    problem = probe_tensorrt() or _machine_problem()
    if wanted == "tensorrt" and problem:
        raise EngineError(
            f"cannot build TensorRT engines: {problem}; use --backend onnxruntime or --backend auto"
        )
    if problem:
        return "onnxruntime", problem
    return "tensorrt", "asked for" if wanted == "tensorrt" else "it works here"


def _machine_problem() -> str:
    try:
        tensorrt_machine()
    except EngineError as error:
        return str(error)
    return ""


def tensorrt_machine() -> Machine:
    """This machine, for which plans are built.

    Raises:
        EngineError: TensorRT or torch's CUDA does not work here.
    """
    version = tensorrt_version()
    if version is None:
        raise EngineError("the tensorrt package is not installed; use --backend onnxruntime")
    return this_machine(version)


def build_onnx(
    work: Path,
    model_dir: Path,
    precision: str,
    opset: int | None,
    size: int | None,
    vae_precision: str | None = None,
) -> dict[str, Any]:
    """Export a pipeline into a stage's work folder and check its parity.

    Args:
        work: the folder to write.
        model_dir: a diffusers folder.
        precision: "fp32" or "fp16".
        opset: ONNX opset; None: the exporter's default.
        size: image side in pixels; None: the model's own.
        vae_precision: of the VAE; None: see `component_precisions`.

    Returns:
        metrics: `engines`, one entry per component with its parity and the seconds of the comparison, and
        `export_seconds`.

    Raises:
        EngineError: the export or an engine fails.
        ParityError: an engine does not compute what its source computes.
    """
    started = time.perf_counter()
    export_pipeline(model_dir, work, precision, opset, size, vae_precision)
    exported = time.perf_counter() - started
    log.info("build-engines: exported in %.0f s, comparing with diffusers", exported)
    parities = component_parity(model_dir, work, precision, vae_precision)
    precisions = component_precisions(read_geometry(work), precision, vae_precision)
    engines = [
        {
            "component": parity.component,
            "path": f"{parity.component}/model.onnx",
            "backend": "onnxruntime",
            "precision": precisions[parity.component],
            "max_abs_error": parity.max_abs_error,
            "tolerance": parity.tolerance,
            "seconds": parity.seconds,
            "cached": False,
        }
        for parity in parities
    ]
    return {"engines": engines, "export_seconds": round(exported, 3)}


@dataclass(frozen=True)
class PlanBuild:
    """Settings for the plans of a folder.

    Attributes:
        machine: the plans' target.
        batch: in images.
        options: the user's choices.
        cache_dir: holds the timing cache; None: the user's own cache folder.
        low_memory: build each network in a process of its own.
    """

    machine: Machine
    batch: BatchRange
    options: BuildOptions
    cache_dir: Path | None = None
    low_memory: bool = False


def build_plans(work: Path, previous: Path | None, how: PlanBuild) -> list[dict[str, Any]]:
    """Build a plan beside every ONNX file that gets one, or take over one that still fits.

    Args:
        work: the engines folder that is being made; holds the ONNX files.
        previous: the engines folder that it will replace, whose plans may be taken over; None: none may.
        how: machine, batch and options.

    Returns:
        An entry per plan for the manifest's `engines`.

    Raises:
        EngineError, ParityError: see `make_plan`.
    """
    entries = []
    for spec in planned_specs(read_geometry(work)):
        precision = main_precision(graph_weights(work / spec.path))  # a VAE may stay fp32 beside an fp16 UNet
        plan = decide_plan(spec, how.batch, precision, how.options, how.machine.tensorrt)
        entries.append(_plan_entry(work, previous, plan, how))
    return entries


def _plan_entry(work: Path, previous: Path | None, plan: BuildPlan, how: PlanBuild) -> dict[str, Any]:
    folder = work / plan.component
    key = plan_key(network_digest(folder), plan, how.machine)
    places = [work, previous] if previous else [work]
    candidates = (plan_path(place / plan.component, key) for place in places)
    found = next((path for path in candidates if _still_good(path, key)), None)
    if found is None:
        log.info("build-engines: building the TensorRT plan of %s", plan.component)
        timings = timing_cache_path(how.cache_dir, how.machine)
        job = PlanJob(plan, folder, timings, how.machine)
        path = make_plan_in_child(job) if how.low_memory else make_plan(job)
    else:
        path = found if found.parent == folder else _taken_over(found, folder, key)
    facts = read_sidecar(path)
    return {
        "component": plan.component,
        "path": str(path.relative_to(work)),
        "backend": "tensorrt",
        "precision": plan.precision,
        **{name: facts[name] for name in ("precision_check", "max_abs_error", "tolerance", "seconds")},
        "cached": found is not None,
    }


def _still_good(plan: Path, key: dict[str, Any]) -> bool:
    if not plan.is_file() and not sidecar_path(plan).is_file():
        return False
    try:
        read_plan(plan)
    except EngineError as error:
        log.warning("build-engines: %s", error)
        return False
    return bool(read_sidecar(plan)["key"] == key)


def _taken_over(plan: Path, folder: Path, key: dict[str, Any]) -> Path:
    facts = {
        name: value for name, value in read_sidecar(plan).items() if name not in ("key", "sha256", "bytes")
    }
    return write_plan(folder, key, read_plan(plan), facts)
