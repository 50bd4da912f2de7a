"""Specs of a pipeline's engines, read from its config files alone: no torch, no runtime, no weights.

text_encoder    input_ids                               -> last_hidden_state
unet            sample, timestep, encoder_hidden_states -> out_sample
vae_decoder     latent_sample                           -> sample
vae_encoder     sample                                  -> latent_parameters

SDXL takes the last layer but one of two text encoders, and tells the UNet a pooled text and sizes:

text_encoder    input_ids                               -> hidden_states.N
text_encoder_2  input_ids                               -> hidden_states.N, text_embeds
unet            and text_embeds, time_ids
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from synthkit.engines.runtime.tensor_spec import TensorSpec
from synthkit.errors import ConfigError, ModelError

SUPPORTED = "text-to-image pipelines of Stable Diffusion 1.x and 2.x, SD-Turbo and SDXL"
_FURTHER_INPUTS = ("addition_embed_type", "time_cond_proj_dim", "class_embed_type", "encoder_hid_dim_type")
_TIME_IDS = 6  # SDXL is told heights and widths: of the original, of the crop's corner, of the target


@dataclass(frozen=True)
class EngineSpec:
    """One network of a pipeline as an ONNX file.

    Attributes:
        component: the network's name, which is its folder's.
        path: the ONNX file, relative to the engines folder.
        inputs: its inputs.
        outputs: those of its outputs that the pipeline uses.
    """

    component: str
    path: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]


@dataclass(frozen=True)
class TextSpec:
    """One text encoder of a pipeline, and its outputs that the UNet takes.

    Attributes:
        component: "text_encoder" or "text_encoder_2".
        hidden: name of the output that the UNet takes.
        width: of that output.
        vocabulary: rows of the embedding table.
        pooled: width of the output "text_embeds"; 0 where it is not used.
    """

    component: str
    hidden: str
    width: int
    vocabulary: int
    pooled: int = 0

    @property
    def tokenizer(self) -> str:
        """Folder of the tokenizer that goes with it."""
        return self.component.replace("text_encoder", "tokenizer")


@dataclass(frozen=True)
class Geometry:
    """The sizes of a pipeline.

    Attributes:
        image: side of an image in pixels.
        latent: side of a latent.
        channels: latent channels.
        size_multiple: an image's side must be a multiple of it, in pixels.
        max_tokens: length of a tokenised prompt.
        texts: the text encoders.
        scaling: latents are divided by it before they are decoded.
        shift: added to latents after that.
        vae_force_upcast: the VAE overflows in half precision, by its config's flag `force_upcast`.
    """

    image: int
    latent: int
    channels: int
    size_multiple: int
    max_tokens: int
    texts: tuple[TextSpec, ...]
    scaling: float
    shift: float
    vae_force_upcast: bool

    @property
    def width(self) -> int:
        """Width of the text embeddings, all encoders side by side."""
        return sum(text.width for text in self.texts)

    @property
    def pooled(self) -> int:
        """Width of the pooled text that the UNet takes; 0 where it takes none."""
        return sum(text.pooled for text in self.texts)


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
    unet = _config(folder, "unet")
    vae = _config(folder, "vae" if (folder / "vae").is_dir() else "vae_decoder")
    try:
        texts = _texts(folder, unet)
        pixels_per_latent = 2 ** (len(vae["block_out_channels"]) - 1)
        size_multiple = pixels_per_latent * 2 ** (len(unet["block_out_channels"]) - 1)
        image = size or unet["sample_size"] * pixels_per_latent
        _check_kind(folder, unet, texts)
        _check_size(image, size_multiple)
        return Geometry(
            image=image,
            latent=image // pixels_per_latent,
            channels=unet["in_channels"],
            size_multiple=size_multiple,
            max_tokens=_config(folder, "text_encoder")["max_position_embeddings"],
            texts=texts,
            scaling=vae.get("scaling_factor") or 0.18215,
            shift=vae.get("shift_factor") or 0.0,
            # Configs of Stable Diffusion 1.x and 2.x have the flag too, as diffusers' default; only SDXL's
            # decoder needs it.
            vae_force_upcast=bool(vae.get("force_upcast", True)) and len(texts) > 1,
        )
    except (KeyError, TypeError) as error:
        raise ModelError(f"the config files of {folder} lack {error}; supported are {SUPPORTED}") from None


def _texts(folder: Path, unet: dict[str, Any]) -> tuple[TextSpec, ...]:
    first = _config(folder, "text_encoder")
    if unet.get("addition_embed_type") != "text_time":
        return (TextSpec("text_encoder", "last_hidden_state", first["hidden_size"], first["vocab_size"]),)
    second = _config(folder, "text_encoder_2")
    return tuple(
        TextSpec(
            name,
            f"hidden_states.{config['num_hidden_layers'] - 1}",
            config["hidden_size"],
            config["vocab_size"],
            pooled,
        )
        for name, config, pooled in (
            ("text_encoder", first, 0),
            ("text_encoder_2", second, second["projection_dim"]),
        )
    )


def _config(folder: Path, component: str) -> dict[str, Any]:
    path = folder / component / "config.json"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"cannot read {path} ({type(error).__name__}); give a whole folder") from None
    if not isinstance(content, dict):
        raise ModelError(f"{path} must hold a JSON object; fetch the model again")
    return content


def _check_kind(folder: Path, unet: dict[str, Any], texts: tuple[TextSpec, ...]) -> None:
    extra = [f"{name} = {unet[name]}" for name in _FURTHER_INPUTS if unet.get(name)]
    if len(texts) > 1:
        extra.remove("addition_embed_type = text_time")
        taken = unet["projection_class_embeddings_input_dim"]
        if texts[-1].pooled + _TIME_IDS * unet["addition_time_embed_dim"] != taken:
            extra.append(f"projection_class_embeddings_input_dim = {taken}")
    if unet["in_channels"] != unet["out_channels"]:
        extra.append(f"in_channels = {unet['in_channels']}")
    if unet["cross_attention_dim"] != sum(text.width for text in texts):
        extra.append(f"cross_attention_dim = {unet['cross_attention_dim']}")
    if extra:
        raise ModelError(
            f"the UNet of {folder} needs more than text ({', '.join(extra)}); supported are {SUPPORTED}"
        )


def _check_size(image: int, multiple: int) -> None:
    if image % multiple:
        low = max(image // multiple * multiple, multiple)
        raise ConfigError(
            f"size = {image} must be a multiple of {multiple} pixels for this model, "
            f"e.g. {low} or {low + multiple}"
        )


def component_specs(geometry: Geometry) -> tuple[EngineSpec, ...]:
    """The engines of a pipeline: text encoders, UNet, VAE decoder, VAE encoder."""
    side, channels = geometry.latent, geometry.channels
    latent = ("batch", channels, side, side)
    image = ("batch", 3, geometry.image, geometry.image)
    return (
        *(_text_engine(text, geometry.max_tokens) for text in geometry.texts),
        _engine("unet", _unet_inputs(geometry), [TensorSpec("out_sample", "float32", latent)]),
        _engine(
            "vae_decoder",
            [TensorSpec("latent_sample", "float32", latent)],
            [TensorSpec("sample", "float32", image)],
        ),
        _engine(
            "vae_encoder",
            [TensorSpec("sample", "float32", image)],
            [TensorSpec("latent_parameters", "float32", ("batch", 2 * channels, side, side))],
        ),
    )


def _engine(name: str, inputs: list[TensorSpec], outputs: list[TensorSpec]) -> EngineSpec:
    return EngineSpec(name, f"{name}/model.onnx", tuple(inputs), tuple(outputs))


def _text_engine(text: TextSpec, max_tokens: int) -> EngineSpec:
    outputs = [TensorSpec(text.hidden, "float32", ("batch", max_tokens, text.width))]
    if text.pooled:
        outputs.append(TensorSpec("text_embeds", "float32", ("batch", text.pooled)))
    return _engine(text.component, [TensorSpec("input_ids", "int64", ("batch", max_tokens))], outputs)


def _unet_inputs(geometry: Geometry) -> list[TensorSpec]:
    side = geometry.latent
    inputs = [
        TensorSpec("sample", "float32", ("batch", geometry.channels, side, side)),
        TensorSpec("timestep", "float32", ()),
        TensorSpec("encoder_hidden_states", "float32", ("batch", geometry.max_tokens, geometry.width)),
    ]
    if geometry.pooled:
        inputs.append(TensorSpec("text_embeds", "float32", ("batch", geometry.pooled)))
        inputs.append(TensorSpec("time_ids", "float32", ("batch", _TIME_IDS)))
    return inputs
