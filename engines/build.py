"""Building engines: which backend, then export, comparison and what the manifest says of each engine.

TensorRT is looked for here, and only here is its package imported; this version builds no plans with it yet.
"""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import Any

from synthkit.engines.export import component_parity, export_pipeline
from synthkit.engines.spec import component_specs, read_geometry
from synthkit.errors import EngineError

log = logging.getLogger(__name__)


def probe_tensorrt() -> str | None:
    """Why TensorRT does not work on this machine; None where it does.

    A package that imports proves little: a Runtime needs the driver and the device.
    """
    try:
        import tensorrt
    except ModuleNotFoundError:
        return "the tensorrt package is not installed"
    except Exception as error:  # a bindings wheel without its libraries raises OSError and others
        return f"the tensorrt package does not import ({type(error).__name__})"
    try:
        runtime = tensorrt.Runtime(tensorrt.Logger(tensorrt.Logger.ERROR))
    except Exception as error:  # the bindings raise TypeError and RuntimeError where there is no device
        return f"TensorRT {tensorrt.__version__} cannot start: {str(error).splitlines()[0]}"
    return None if runtime else f"TensorRT {tensorrt.__version__} finds no usable GPU"


def choose_backend(wanted: str) -> tuple[str, str]:
    """The backend to build for, and the reason.

    Args:
        wanted: "auto", "tensorrt" or "onnxruntime".

    Raises:
        EngineError: TensorRT was asked for.
    """
    if wanted == "onnxruntime":
        return "onnxruntime", "asked for"
    problem = probe_tensorrt()
    if wanted == "tensorrt":
        raise EngineError(
            f"cannot build TensorRT engines: {problem or 'this version of synthkit builds no plans yet'}; "
            "use --backend onnxruntime or --backend auto"
        )
    return "onnxruntime", problem or "TensorRT works here, but this version of synthkit builds no plans yet"


def build_onnx(
    work: Path, model_dir: Path, precision: str, opset: int | None, size: int | None
) -> dict[str, Any]:
    """Export a pipeline into a stage's work folder and prove it.

    Args:
        work: the folder to write.
        model_dir: a diffusers folder.
        precision: "fp32" or "fp16".
        opset: ONNX opset; None: the exporter's default.
        size: image side in pixels; None: the model's own.

    Returns:
        metrics: `engines`, one entry per component with its parity and the seconds of the comparison, and
        `export_seconds`.

    Raises:
        EngineError: the export or an engine fails.
        ParityError: an engine does not compute what its source computes.
    """
    started = time.perf_counter()
    export_pipeline(model_dir, work, precision, opset, size)
    exported = time.perf_counter() - started
    log.info("build-engines: exported in %.0f s, comparing with diffusers", exported)
    parities = {parity.component: parity for parity in component_parity(model_dir, work, precision)}
    engines = [
        {
            "component": spec.component,
            "path": spec.path,
            "backend": "onnxruntime",
            "precision": precision,
            "max_abs_error": parities[spec.component].max_abs_error,
            "tolerance": parities[spec.component].tolerance,
            "seconds": parities[spec.component].seconds,
            "cached": False,
        }
        for spec in component_specs(read_geometry(work))
    ]
    return {"engines": engines, "export_seconds": round(exported, 3)}
