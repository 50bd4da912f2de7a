"""From a diffusers folder to ONNX files, and the proof that they compute the same.

Every use of Optimum is in this file.
"""

from __future__ import annotations

import contextlib
import json
import logging
import shutil
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from synthkit.artifacts import write_json
from synthkit.engines.session import open_session
from synthkit.engines.spec import EngineSpec, Geometry, component_specs, read_geometry
from synthkit.errors import EngineError, MissingExtra, ModelError, ParityError
from synthkit.models import CLASSES, INDEX

TOLERANCE = {
    # Both sides sum in fp32, in another order: 1e-6 to 1e-5 of the output's scale after some hundred layers.
    # A wrong constant, a dropped bias or a dimension frozen at export shows at 1e-2 and more.
    "fp32": 1e-4,
    # fp16 keeps 11 bits, 5e-4 of a value's size per rounding; roundings of many layers add up.
    "fp16": 3e-2,
}
"""Largest error of an engine's output, as a part of the largest absolute value of the reference."""

_BATCH = 3  # not the exporter's own 2, so that a batch frozen into the graph shows
_CHATTER = (
    (DeprecationWarning, ""),  # the exporter is torch's older one, which Optimum 0.1 needs
    (FutureWarning, ""),
    (UserWarning, "Exporting aten::"),
    (UserWarning, "Constant folding"),
)


@dataclass(frozen=True)
class ComponentParity:
    """How near an engine comes to its source.

    Attributes:
        component: the network's name.
        max_abs_error: largest absolute difference of an output.
        tolerance: what was allowed.
        seconds: time of the comparison.
    """

    component: str
    max_abs_error: float
    tolerance: float
    seconds: float


def export_pipeline(
    model_dir: Path, out: Path, precision: str = "fp32", opset: int | None = None, size: int | None = None
) -> None:
    """Write the ONNX folder of a Stable Diffusion pipeline, as Optimum and diffusers read it.

    Args:
        model_dir: a diffusers folder with safetensors weights.
        out: the folder to write.
        precision: "fp32" or "fp16", of the weights in the graphs.
        opset: ONNX opset; None: the exporter's default.
        size: image side in pixels that the folder states; None: the model's own.

    Raises:
        EngineError: the exporter fails.
        ModelError: the model cannot be loaded.
        MissingExtra: Optimum, diffusers or torch is not installed.
    """
    geometry = read_geometry(model_dir, size)
    with _quiet():
        pipeline = _load_pipeline(model_dir, precision)
        _export(pipeline, out, opset)
    _tidy_configs(out)
    _state_size(out, geometry)
    if (model_dir / CLASSES).is_file():
        shutil.copyfile(model_dir / CLASSES, out / CLASSES)


def _load_pipeline(model_dir: Path, precision: str) -> Any:
    try:
        import torch
        from diffusers import StableDiffusionPipeline
    except ImportError as error:
        raise MissingExtra(error.name or "diffusers", "train") from None
    try:
        return StableDiffusionPipeline.from_pretrained(
            str(model_dir),
            torch_dtype=torch.float16 if precision == "fp16" else torch.float32,
            use_safetensors=True,
            local_files_only=True,
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
    except Exception as error:  # diffusers lets every reader's own error through
        raise ModelError(f"cannot load the pipeline {model_dir}: {_one_line(error)}") from None


def _export(pipeline: Any, out: Path, opset: int | None) -> None:
    try:
        from optimum.exporters.onnx import onnx_export_from_model
    except ImportError as error:
        raise MissingExtra(error.name or "optimum", "train") from None
    try:
        onnx_export_from_model(pipeline, out, opset=opset, task="text-to-image", do_validation=False)
    except Exception as error:  # torch's exporter and Optimum raise many kinds
        raise EngineError(f"the ONNX export failed: {_one_line(error)}; try another --opset") from None


def _tidy_configs(out: Path) -> None:
    """Without the absolute path of the model, which would make equal engines differ."""
    for path in (out / INDEX, *out.glob("*/config.json")):
        config = json.loads(path.read_text(encoding="utf-8"))
        config.pop("_name_or_path", None)
        write_json(path, config)


def _state_size(out: Path, geometry: Geometry) -> None:
    """Where Optimum and this project look for the side of the images."""
    path = out / "unet" / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    write_json(path, {**config, "sample_size": geometry.latent})


def component_parity(model_dir: Path, engines_dir: Path, precision: str = "fp32") -> list[ComponentParity]:
    """Compare every engine in ONNX Runtime with its source in torch fp32, on random inputs.

    Args:
        model_dir: the diffusers folder.
        engines_dir: the folder that `export_pipeline` wrote.
        precision: of the engines; sets the tolerance.

    Raises:
        ParityError: names the component, its error and the tolerance, or the outputs that are not finite.
    """
    geometry = read_geometry(engines_dir)
    return [_compare(spec, geometry, model_dir, engines_dir, precision) for spec in component_specs(geometry)]


def _compare(
    spec: EngineSpec, geometry: Geometry, model_dir: Path, engines_dir: Path, precision: str
) -> ComponentParity:
    started = time.perf_counter()
    feeds = _random_feeds(spec, geometry)
    with _quiet():
        wanted = _reference(spec.component, model_dir, feeds)
    got = _engine_outputs(engines_dir / spec.path, feeds, tuple(one.name for one in spec.outputs))
    error, tolerance = 0.0, 0.0
    for name, reference in wanted.items():
        allowed = TOLERANCE[precision] * float(np.abs(reference).max())
        found = _difference(spec.component, reference, got[name])
        if found > allowed:
            raise ParityError(
                f"the engine {spec.component} differs from its source by {found:.3g} in {name!r}, allowed is "
                f"{allowed:.3g}; rebuild with --force, and with another --opset if it persists"
            )
        error, tolerance = max(error, found), max(tolerance, allowed)
    return ComponentParity(spec.component, error, tolerance, round(time.perf_counter() - started, 3))


def _difference(component: str, reference: np.ndarray, got: np.ndarray) -> float:
    if got.shape != reference.shape:
        raise ParityError(
            f"the engine {component} answers {list(got.shape)} where its source answers "
            f"{list(reference.shape)}; rebuild with another --opset"
        )
    if not np.isfinite(got).all():
        raise ParityError(
            f"the engine {component} answers with NaN or infinite values; rebuild it with --precision fp32"
        )
    return float(np.abs(got - reference).max())


def _random_feeds(spec: EngineSpec, geometry: Geometry) -> dict[str, np.ndarray]:
    random = np.random.default_rng(0)
    feeds: dict[str, np.ndarray] = {}
    for tensor in spec.inputs:
        shape = tuple(_BATCH if isinstance(side, str) else side for side in tensor.shape)
        if tensor.name == "input_ids":
            feeds[tensor.name] = random.integers(0, geometry.vocabulary, shape)
        elif tensor.name == "timestep":
            feeds[tensor.name] = np.asarray(random.integers(1, 1000), dtype=tensor.dtype)
        else:
            feeds[tensor.name] = random.standard_normal(shape, dtype=np.float32)
    return feeds


def _engine_outputs(
    path: Path, feeds: dict[str, np.ndarray], names: tuple[str, ...]
) -> dict[str, np.ndarray]:
    session = open_session(path)
    answers = session.run(
        {one.name: feeds[one.name].astype(one.dtype) for one in session.inputs if one.name in feeds}
    )
    session.close()
    return {name: answers[name].astype(np.float32) for name in names}


def _reference(component: str, model_dir: Path, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """What diffusers and transformers compute in fp32; one network in memory at a time."""
    import torch

    inputs = {name: torch.from_numpy(value) for name, value in feeds.items()}
    with torch.inference_mode():
        name, tensor = _COMPUTE[component](model_dir, inputs)
    return {name: tensor.numpy()}


def _text_encoder(model_dir: Path, inputs: dict[str, Any]) -> tuple[str, Any]:
    from transformers import CLIPTextModel

    return "last_hidden_state", _load(CLIPTextModel, model_dir, "text_encoder")(**inputs).last_hidden_state


def _unet(model_dir: Path, inputs: dict[str, Any]) -> tuple[str, Any]:
    from diffusers import UNet2DConditionModel

    return "out_sample", _load(UNet2DConditionModel, model_dir, "unet")(**inputs).sample


def _vae_decoder(model_dir: Path, inputs: dict[str, Any]) -> tuple[str, Any]:
    from diffusers import AutoencoderKL

    return "sample", _load(AutoencoderKL, model_dir, "vae").decode(inputs["latent_sample"]).sample


def _vae_encoder(model_dir: Path, inputs: dict[str, Any]) -> tuple[str, Any]:
    from diffusers import AutoencoderKL

    encoded = _load(AutoencoderKL, model_dir, "vae").encode(inputs["sample"])
    return "latent_parameters", encoded.latent_dist.parameters


_COMPUTE = {
    "text_encoder": _text_encoder,
    "unet": _unet,
    "vae_decoder": _vae_decoder,
    "vae_encoder": _vae_encoder,
}


def _load(kind: Any, model_dir: Path, folder: str) -> Any:
    import torch

    model = kind.from_pretrained(
        str(model_dir / folder), use_safetensors=True, local_files_only=True, torch_dtype=torch.float32
    )
    return model.eval()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep back what the libraries say about their own insides while they load and trace."""
    loggers = [logging.getLogger(name) for name in ("diffusers", "transformers", "optimum")]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings(), _no_bars():
        for category, message in _CHATTER:
            warnings.filterwarnings("ignore", message, category)
        with contextlib.suppress(ImportError):
            from torch.jit import TracerWarning

            warnings.filterwarnings("ignore", category=TracerWarning)
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)


@contextlib.contextmanager
def _no_bars() -> Iterator[None]:
    try:
        from diffusers.utils import logging as messages
    except ImportError:
        raise MissingExtra("diffusers", "train") from None
    messages.disable_progress_bar()
    try:
        yield
    finally:
        messages.enable_progress_bar()


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
