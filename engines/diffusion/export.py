"""From a diffusers folder to ONNX files that are checked one by one before they count.

Every use of Optimum is in this file. `synthkit.engines.diffusion.parity` verifies that the files compute
the same.
"""

from __future__ import annotations

import contextlib
import json
import logging
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from synthkit.artifacts import write_json
from synthkit.engines.runtime.component_spec import Geometry, component_specs, read_geometry
from synthkit.engines.runtime.graph_check import check_graph, finish_graph
from synthkit.errors import EngineError, MissingExtra, ModelError
from synthkit.models.generator import CLASSES, INDEX

OPSET = 17
"""The first opset with LayerNormalization whole, which computes in fp32 whatever the graph's precision; also
the newest that TensorRT 8.6 (JetPack 6.0) reads."""

TRACED_BATCH = 3
"""Images that the exporter traces with; a parity check with another number shows a batch that was frozen."""

_CHATTER = (
    (DeprecationWarning, ""),  # the exporter is torch's older one, which Optimum 0.1 needs
    (FutureWarning, ""),
    (UserWarning, "Exporting aten::"),
    (UserWarning, "Constant folding"),
)


def component_precisions(geometry: Geometry, precision: str, vae_precision: str | None) -> dict[str, str]:
    """Precision of every component.

    Args:
        geometry: of the pipeline.
        precision: "fp32" or "fp16".
        vae_precision: of the VAE; None: the same, but fp32 where its activations overflow in half precision,
            as SDXL's do (black images).
    """
    vae = vae_precision or ("fp32" if geometry.vae_force_upcast else precision)
    return {
        spec.component: vae if spec.component.startswith("vae_") else precision
        for spec in component_specs(geometry)
    }


def export_pipeline(
    model_dir: Path,
    out: Path,
    precision: str = "fp32",
    opset: int | None = None,
    size: int | None = None,
    vae_precision: str | None = None,
) -> None:
    """Write the ONNX folder of a Stable Diffusion pipeline, as Optimum and diffusers read it.

    The graphs are of one image size and open in the batch. Half precision is made in torch, so that every
    operator's types agree; where a config asks for fp32 inside (`upcast_attention`), it becomes Cast nodes.

    Args:
        model_dir: a diffusers folder with safetensors weights.
        out: the folder to write.
        precision: "fp32" or "fp16", of the weights in the graphs.
        opset: ONNX opset; None: `OPSET`.
        size: image side in pixels; None: the model's own.
        vae_precision: precision of the VAE; see `component_precisions`.

    Raises:
        EngineError: the exporter fails, or a graph does not pass its checks.
        ModelError: the model cannot be loaded.
        MissingExtra: Optimum, diffusers or torch is not installed.
    """
    geometry, opset = read_geometry(model_dir, size), opset or OPSET
    precisions = component_precisions(geometry, precision, vae_precision)
    with quiet():
        pipeline = _load_pipeline(model_dir, precision)
        _keep_upcasts(pipeline.unet)
        _export(pipeline, out, opset)
        if precisions["vae_decoder"] != precision:
            _export_vae(pipeline, model_dir, out, opset, precisions["vae_decoder"])
        del pipeline
    _tidy_configs(out)
    _state_size(out, geometry)
    for spec in component_specs(geometry):
        finish_graph(out / spec.path, spec)
        check_graph(out / spec.path, precisions[spec.component], opset)
    if (model_dir / CLASSES).is_file():
        shutil.copyfile(model_dir / CLASSES, out / CLASSES)


def _load_pipeline(model_dir: Path, precision: str) -> Any:
    try:
        import diffusers
        import torch
    except ImportError as error:
        raise MissingExtra(error.name or "diffusers", "train") from None
    two_texts = (model_dir / "text_encoder_2").is_dir()
    absent: dict[str, Any] = {"feature_extractor": None, "image_encoder": None}
    kind = diffusers.StableDiffusionXLPipeline if two_texts else diffusers.StableDiffusionPipeline
    if not two_texts:
        absent |= {"safety_checker": None, "requires_safety_checker": False}
    try:
        return kind.from_pretrained(
            str(model_dir),
            torch_dtype=torch.float16 if precision == "fp16" else torch.float32,
            use_safetensors=True,
            local_files_only=True,
            **absent,
        )
    except Exception as error:  # diffusers lets every reader's own error through
        raise ModelError(f"cannot load the pipeline {model_dir}: {_one_line(error)}") from None


def _keep_upcasts(unet: Any) -> None:
    """Attention whose config asks for fp32 (Stable Diffusion 2.x overflows otherwise) is computed so.

    Diffusers' default, torch's fused attention, sums in fp32 by itself and ignores the config; taken apart
    into ONNX's operators it would not.
    """
    from diffusers.models.attention_processor import AttnProcessor

    if unet.config.upcast_attention:
        unet.set_attn_processor(AttnProcessor())


def _small_example(pipeline: Any) -> dict[str, int]:
    """Make the exporter trace small images, and return their shapes as it wants to be told.

    What it writes is open in the size until `finish_graph`. Tracing computes, and half-precision convolutions
    of torch are slow on a CPU: many minutes for Stable Diffusion 1.5 at full size.
    """
    # Each side makes the deepest feature map of its network 2x2.
    pipeline.unet.register_to_config(sample_size=2 ** len(pipeline.unet.config.block_out_channels))
    pipeline.vae.register_to_config(sample_size=2 ** len(pipeline.vae.config.block_out_channels))
    return {"batch_size": TRACED_BATCH, "height": 2, "width": 2}  # of the VAE decoder's latents


def _export(pipeline: Any, out: Path, opset: int) -> None:
    try:
        from optimum.exporters.onnx import onnx_export_from_model
    except ImportError as error:
        raise MissingExtra(error.name or "optimum", "train") from None
    with _export_errors():
        onnx_export_from_model(
            pipeline,
            out,
            opset=opset,
            task="text-to-image",
            do_validation=False,
            **_small_example(pipeline),
        )


def _export_vae(pipeline: Any, model_dir: Path, out: Path, opset: int, precision: str) -> None:
    """The VAE once more, in a precision of its own; Optimum exports a whole pipeline in one."""
    import torch
    from diffusers import AutoencoderKL
    from optimum.exporters.onnx.convert import export_models
    from optimum.exporters.utils import get_diffusion_models_for_export

    # Read again: what was loaded with the pipeline is rounded already.
    kind = torch.float16 if precision == "fp16" else torch.float32
    pipeline.vae = AutoencoderKL.from_pretrained(
        str(model_dir / "vae"), torch_dtype=kind, use_safetensors=True, local_files_only=True
    )
    parts = ("vae_encoder", "vae_decoder")
    for part in parts:
        for old in (out / part).glob("*.onnx*"):
            old.unlink()
    with _export_errors():
        models = get_diffusion_models_for_export(pipeline, float_dtype=precision)
        export_models(
            {part: models[part] for part in parts},
            out,
            opset=opset,
            input_shapes=_small_example(pipeline),
            output_names=[f"{part}/model.onnx" for part in parts],
            dtype=precision,
        )


@contextlib.contextmanager
def _export_errors() -> Iterator[None]:
    try:
        yield
    except Exception as error:  # torch's exporter and Optimum raise many kinds
        raise EngineError(
            f"the ONNX export failed: {_one_line(error)}; try another --set build-engines.opset=N"
        ) from None


def _tidy_configs(out: Path) -> None:
    """Remove the absolute path of the model, which would make equal engines differ."""
    for path in (out / INDEX, *out.glob("*/config.json")):
        config = json.loads(path.read_text(encoding="utf-8"))
        config.pop("_name_or_path", None)
        write_json(path, config)


def _state_size(out: Path, geometry: Geometry) -> None:
    """Write the image side where Optimum and `read_geometry` read it."""
    sides = {"unet": geometry.latent, "vae_decoder": geometry.image, "vae_encoder": geometry.image}
    for component, side in sides.items():
        path = out / component / "config.json"
        config = json.loads(path.read_text(encoding="utf-8"))
        write_json(path, {**config, "sample_size": side})


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence the libraries' warnings about their own internals while they load and trace."""
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
