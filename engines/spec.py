"""What a pipeline's engines look like, read from its config files alone: no torch, no runtime, no weights.

text_encoder   input_ids                               -> last_hidden_state
unet           sample, timestep, encoder_hidden_states -> out_sample
vae_decoder    latent_sample                           -> sample
vae_encoder    sample                                  -> latent_parameters
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from synthkit.errors import ConfigError, ModelError
from synthkit.tensors import TensorSpec

_FURTHER_INPUTS = ("addition_embed_type", "time_cond_proj_dim", "class_embed_type")
COMPONENTS = ("text_encoder", "unet", "vae_decoder", "vae_encoder")


@dataclass(frozen=True)
class EngineSpec:
    """One network of a pipeline as an ONNX file.

    Attributes:
        component: one of `COMPONENTS`.
        path: the ONNX file, relative to the engines folder.
        inputs: what it takes.
        outputs: what of its results the pipeline uses.
    """

    component: str
    path: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]


@dataclass(frozen=True)
class Geometry:
    """The sizes of a pipeline.

    Attributes:
        image: side of an image in pixels.
        latent: side of a latent.
        channels: latent channels.
        step: an image's side must be a multiple of it, in pixels.
        width: width of the text embeddings.
        length: tokens of a prompt.
        vocabulary: rows of the text encoder's embedding table.
        scaling: latents are divided by it before they are decoded.
        shift: added to latents after that.
    """

    image: int
    latent: int
    channels: int
    step: int
    width: int
    length: int
    vocabulary: int
    scaling: float
    shift: float


@dataclass(frozen=True)
class BatchRange:
    """Smallest, usual and largest batch, in images; guidance doubles it inside the UNet."""

    minimum: int
    usual: int
    maximum: int


def parse_batch(text: str) -> BatchRange:
    """Batch range of the form "MIN:OPT:MAX"; one number stands for all three.

    Raises:
        ConfigError: the text is of another form, or the numbers are not in order.
    """
    if not re.fullmatch(r"\d+(:\d+:\d+)?", text):
        raise ConfigError(f"batch = {text!r} must be MIN:OPT:MAX in images, for example 1:32:128")
    numbers = [int(number) for number in text.split(":")]
    low, usual, high = numbers if len(numbers) == 3 else numbers * 3
    if not 1 <= low <= usual <= high:
        raise ConfigError(f"batch = {text!r} must have 1 <= MIN <= OPT <= MAX, for example 1:32:128")
    return BatchRange(low, usual, high)


def read_geometry(folder: Path, size: int | None = None) -> Geometry:
    """Sizes of the pipeline in a diffusers folder or in an engines folder.

    Args:
        folder: holds the components' config.json files.
        size: image side in pixels; None: the model's own.

    Raises:
        ConfigError: the size is not a multiple of what the networks need.
        ModelError: a config file is missing, broken or of an unsupported kind of network.
    """
    text, unet = _config(folder, "text_encoder"), _config(folder, "unet")
    vae = _config(folder, "vae" if (folder / "vae").is_dir() else "vae_decoder")
    try:
        pixels_per_latent = 2 ** (len(vae["block_out_channels"]) - 1)
        step = pixels_per_latent * 2 ** (len(unet["block_out_channels"]) - 1)
        image = size or unet["sample_size"] * pixels_per_latent
        _check_kind(folder, unet, text)
        _check_size(image, step)
        return Geometry(
            image=image,
            latent=image // pixels_per_latent,
            channels=unet["in_channels"],
            step=step,
            width=text["hidden_size"],
            length=text["max_position_embeddings"],
            vocabulary=text["vocab_size"],
            scaling=vae.get("scaling_factor") or 0.18215,
            shift=vae.get("shift_factor") or 0.0,
        )
    except (KeyError, TypeError) as error:
        raise ModelError(
            f"the config files of {folder} lack {error}; supported are Stable Diffusion 1.x and 2.x"
        ) from None


def _config(folder: Path, component: str) -> dict[str, Any]:
    path = folder / component / "config.json"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"cannot read {path} ({type(error).__name__}); give a whole folder") from None
    if not isinstance(content, dict):
        raise ModelError(f"{path} must hold a JSON object; fetch the model again")
    return content


def _check_kind(folder: Path, unet: dict[str, Any], text: dict[str, Any]) -> None:
    extra = [name for name in _FURTHER_INPUTS if unet.get(name)]
    if unet["in_channels"] != unet["out_channels"]:
        extra.append(f"in_channels = {unet['in_channels']}")
    if unet["cross_attention_dim"] != text["hidden_size"]:
        extra.append(f"cross_attention_dim = {unet['cross_attention_dim']}")
    if extra:
        raise ModelError(
            f"the UNet of {folder} needs more than text ({', '.join(extra)}); supported are text-to-image "
            "pipelines of Stable Diffusion 1.x and 2.x"
        )


def _check_size(image: int, step: int) -> None:
    if image % step:
        low = max(image // step * step, step)
        raise ConfigError(
            f"size = {image} must be a multiple of {step} pixels for this model, e.g. {low} or {low + step}"
        )


def component_specs(geometry: Geometry) -> tuple[EngineSpec, ...]:
    """The engines of a pipeline, one per component, in the order of `COMPONENTS`."""
    side, channels = geometry.latent, geometry.channels
    latent = ("batch", channels, side, side)
    image = ("batch", 3, geometry.image, geometry.image)
    text = TensorSpec("encoder_hidden_states", "float32", ("batch", geometry.length, geometry.width))
    parts = {
        "text_encoder": (
            [TensorSpec("input_ids", "int64", ("batch", geometry.length))],
            [TensorSpec("last_hidden_state", "float32", text.shape)],
        ),
        "unet": (
            [TensorSpec("sample", "float32", latent), TensorSpec("timestep", "float32", ()), text],
            [TensorSpec("out_sample", "float32", latent)],
        ),
        "vae_decoder": (
            [TensorSpec("latent_sample", "float32", latent)],
            [TensorSpec("sample", "float32", image)],
        ),
        "vae_encoder": (
            [TensorSpec("sample", "float32", image)],
            [TensorSpec("latent_parameters", "float32", ("batch", 2 * channels, side, side))],
        ),
    }
    return tuple(
        EngineSpec(name, f"{name}/model.onnx", tuple(inputs), tuple(outputs))
        for name, (inputs, outputs) in parts.items()
    )
