"""`build-engines`: a diffusion model becomes a folder of engines, once per device.

model folder ──export──► ONNX per component ──compared with diffusers──► engines/
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from synthkit.artifacts import Request, StageResult, read_manifest, run_stage
from synthkit.engines.build import build_onnx, choose_backend
from synthkit.engines.spec import parse_batch, read_geometry
from synthkit.errors import EngineError
from synthkit.models import model_fingerprint, resolve_model
from synthkit.recipes.settings import EngineSettings

log = logging.getLogger(__name__)


def build_engines_request(settings: EngineSettings, out: Path, *, download: bool = False) -> Request:
    """What `build_engines` would make.

    Args:
        settings: the stage's settings.
        out: the engines folder.
        download: whether a hub model may be fetched to look at it.

    Raises:
        ConfigError: the batch range or the size cannot be used.
        EngineError: the backend does not work here.
        ModelError: the model is unknown, incomplete or of an unsupported kind.
    """
    parse_batch(settings.batch)
    backend, _ = choose_backend(settings.backend)
    model_dir = resolve_model(settings.model, download=download)
    geometry = read_geometry(model_dir, settings.size)
    return Request(
        stage="build-engines",
        out=out,
        inputs={"model": model_fingerprint(model_dir)},
        config={
            "model": _short_name(settings.model),
            "backend": backend,
            "precision": settings.precision,
            "size": geometry.image,
            "opset": settings.opset,
        },
    )


def build_engines(settings: EngineSettings, out: Path, force: bool = False) -> StageResult:
    """Make the engines folder, or find it made.

    The manifest's `config.model` is the model's short name; `metrics.model` is what `resolve_model` takes (a
    local folder absolute), see `base_model`.

    Raises:
        ConfigError, EngineError, ModelError: see `build_engines_request`.
        ParityError: an engine does not compute what its source computes.
    """
    request = build_engines_request(settings, out, download=True)

    def produce(work: Path) -> dict[str, Any]:
        log.info("build-engines: %s for %s (%s)", settings.model, *choose_backend(settings.backend))
        model_dir = resolve_model(settings.model)
        measured = build_onnx(work, model_dir, settings.precision, settings.opset, settings.size)
        return {**measured, "model": _resolvable(settings.model), "batch": settings.batch}

    return run_stage(request, produce, force=force)


def existing_engines(folder: Path) -> Path:
    """The engines folder, when there is one.

    Raises:
        EngineError: there is none.
    """
    if not folder.is_dir():
        raise EngineError(f"no engines folder {folder}; make it with `synthkit build-engines`")
    return folder


def base_model(engines_dir: Path) -> str:
    """What `resolve_model` takes to find the model that an engines folder was made of.

    A folder without a manifest (written by Optimum itself, say) is named by its path.
    """
    manifest = read_manifest(engines_dir)
    return str(manifest.metrics["model"]) if manifest else str(engines_dir.resolve())


def engine_list(result: StageResult) -> list[dict[str, Any]]:
    """The manifest's engines, marked as cached where the stage was skipped."""
    return [{**engine, "cached": result.skipped} for engine in result.manifest.metrics["engines"]]


def _short_name(model: str) -> str:
    folder = Path(model).expanduser()
    return folder.resolve().name if folder.is_dir() else model


def _resolvable(model: str) -> str:
    folder = Path(model).expanduser()
    return str(folder.resolve()) if folder.is_dir() else model
