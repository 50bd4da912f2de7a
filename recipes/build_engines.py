"""`build-engines`: a diffusion model becomes a folder of engines, once per device.

model folder ──export──► ONNX per component ──compared with diffusers──► engines/
                              └──TensorRT──► plan per component ──compared with the ONNX file──► engines/
"""

from __future__ import annotations

import logging
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

from synthkit.artifacts import Key, StageResult
from synthkit.engines.diffusion.build import (
    PlanBuild,
    build_onnx,
    build_plans,
    choose_backend,
    tensorrt_machine,
)
from synthkit.engines.diffusion.export import component_precisions
from synthkit.engines.runtime.component_spec import parse_batch, read_geometry
from synthkit.engines.tensorrt.api import tensorrt_version
from synthkit.engines.tensorrt.build_plan import (
    BuildOptions,
    BuildPlan,
    decide_plan,
    default_opset,
    describe,
    planned_specs,
    trtexec_line,
)
from synthkit.models.generator import base_weights_fingerprint, model_fingerprint, resolve_model, short_name
from synthkit.recipes.settings import EngineSettings

log = logging.getLogger(__name__)

PLANNED_FOR = "10.3.0"
"""The TensorRT version of JetPack 6, for which `--dry-run` plans where none is installed."""

_TENSORRT_SETTINGS = ("trt_workspace", "trt_level", "trt_hardware", "trt_version_compatible", "trt_refit")


@dataclass(frozen=True)
class BuildEngines:
    """The stage `build-engines`.

    The manifest's `resolved.model_name` is the model's short name; `metrics.model` is what `resolve_model`
    takes (a local folder absolute), see `base_model`.

    Attributes:
        settings: of the stage.
        out: the engines folder.
    """

    name: ClassVar[str] = "build-engines"
    version: ClassVar[int] = 1

    settings: EngineSettings
    out: Path

    def check(self, *, fetch: bool) -> None:
        """Refuse a batch range, a backend or a model that cannot be used.

        Args:
            fetch: whether a hub model may be fetched to look at it.

        Raises:
            ConfigError: the batch range cannot be used.
            EngineError: the backend does not work here.
            ModelError: the model is unknown, incomplete or of an unsupported kind.
        """
        parse_batch(self.settings.batch)
        choose_backend(self.settings.backend)
        read_geometry(resolve_model(self.settings.model, download=fetch), self.settings.size)

    def key(self) -> Key:
        """The model by content, the backend and what it needs; see `check` for what is raised."""
        settings, backend = self.settings, self.backend
        model_dir = resolve_model(settings.model, download=False)
        return Key(
            inputs={"model": model_fingerprint(model_dir)},
            settings={self.name: settings},
            resolved={
                "model_name": short_name(settings.model),
                "backend": backend,
                "precision": _precision(settings, backend),
                "size": read_geometry(model_dir, settings.size).image,
                **(_tensorrt_config(settings) if backend == "tensorrt" else {}),
            },
        )

    @property
    def backend(self) -> str:
        """The backend that is used here."""
        return choose_backend(self.settings.backend)[0]

    def run(self, work: Path, previous: Path | None) -> dict[str, Any]:
        """Export, compare and, for TensorRT, build what `previous` has no valid plan of.

        Raises:
            ParityError: an engine does not compute what its source computes.
        """
        settings, backend = self.settings, self.backend
        log.info("build-engines: %s for %s (%s)", settings.model, *choose_backend(settings.backend))
        model_dir, opset = resolve_model(settings.model), settings.opset
        if backend == "tensorrt":
            opset = opset or default_opset(asdict(tensorrt_machine())["tensorrt"])
        precision, vae = _precision(settings, backend), _vae_precision(settings)
        measured = build_onnx(work, model_dir, precision, opset, settings.size, vae)
        if backend == "tensorrt":
            plans = build_plans(work, previous, _plan_build(settings))
            measured["engines"] += plans
        return {
            **measured,
            "model": _resolvable(settings.model),
            "weights": base_weights_fingerprint(model_dir),
            "batch": settings.batch,
        }


def _precision(settings: EngineSettings, backend: str) -> str:
    if settings.precision != "auto":
        return settings.precision
    return "fp16" if backend == "tensorrt" else "fp32"


def _vae_precision(settings: EngineSettings) -> str | None:
    return None if settings.vae_precision == "auto" else settings.vae_precision


def _tensorrt_config(settings: EngineSettings) -> dict[str, Any]:
    """What changes a plan, and nothing that does not."""
    values = asdict(settings)
    return {
        "batch": settings.batch,
        "machine": asdict(tensorrt_machine()),
        "tensorrt": {name: values[name] for name in _TENSORRT_SETTINGS},
    }


def _plan_build(settings: EngineSettings) -> PlanBuild:
    cache_dir = Path(settings.cache_dir).expanduser() if settings.cache_dir else None
    return PlanBuild(
        tensorrt_machine(), parse_batch(settings.batch), _options(settings), cache_dir, settings.low_memory
    )


def _options(settings: EngineSettings) -> BuildOptions:
    values = asdict(settings)
    return BuildOptions(**{name.removeprefix("trt_"): values[name] for name in _TENSORRT_SETTINGS})


def preview_plans(settings: EngineSettings) -> list[dict[str, Any]]:
    """The plans that a TensorRT build would make, decided without TensorRT and without a GPU.

    Returns:
        For each network: the fields of its `BuildPlan`, `text` (one line for a person), `tensorrt` (the
        version that it was decided for) and `trtexec` (major version -> command).

    Raises:
        ConfigError, EngineError, ModelError: see `BuildEngines.check`.
    """
    version = tensorrt_version() or PLANNED_FOR
    geometry = read_geometry(resolve_model(settings.model, download=False), settings.size)
    precisions = component_precisions(geometry, _precision(settings, "tensorrt"), _vae_precision(settings))
    batch, options = parse_batch(settings.batch), _options(settings)
    plans = [
        decide_plan(spec, batch, precisions[spec.component], options, version)
        for spec in planned_specs(geometry)
    ]
    return [_preview(plan, version) for plan in plans]


def _preview(plan: BuildPlan, version: str) -> dict[str, Any]:
    commands = {str(major): trtexec_line(plan, major) for major in (8, 10, 11)}
    return {**asdict(plan), "text": describe(plan), "tensorrt": version, "trtexec": commands}


def engine_list(result: StageResult) -> list[dict[str, Any]]:
    """The manifest's engines, marked as cached where the stage was skipped."""
    engines = result.manifest.metrics["engines"]
    return [{**engine, "cached": result.skipped or engine["cached"]} for engine in engines]


def _resolvable(model: str) -> str:
    folder = Path(model).expanduser()
    return str(folder.resolve()) if folder.is_dir() else model
