"""The model's folder: weights, class words, model card and sample sheet."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline
from transformers import CLIPTokenizer

from synthkit.data.contact_sheet import contact_sheet
from synthkit.diffusion.parts import DiffusionParts
from synthkit.recipes.glyphs32.captions import CLASS_WORDS
from synthkit.recipes.glyphs32.denoiser import new_scheduler

SAMPLES = "samples.png"
_STYLES = (
    "",
    " in the style of handwritten, white on black",
    " in the style of printed, black on white",
    " in the style of seven segment display",
    " in the style of roller counter",
    " in the style of dot matrix display",
    " in the style of engraved",
    " in the style of stamped, red on white",
)
_SHOWN = "0123456789ABGHKQRSXZ"

_CARD = """---
license: apache-2.0
library_name: diffusers
pipeline_tag: text-to-image
---
# glyphs-32

A Stable Diffusion pipeline, only small: CLIPTextModel, UNet2DConditionModel, AutoencoderKL, CLIPTokenizer. It
draws the ten digits and the 26 capital letters at 32x32 pixels in many styles, and nothing else. It exists so that
synthkit works without a download, and so that tests and demos run the very code that Stable Diffusion runs.

![samples](samples.png)

| part | size |
|---|---|
| UNet | {unet:.2f} M parameters, latents 8x8x6, velocity prediction, zero terminal SNR |
| text encoder | {text:.2f} M parameters, width 96, 24 tokens |
| VAE | {vae:.2f} M parameters, 4x downsampling |

Weights are stored as float16; load them as float32 on a CPU.

## Data
{images:,} images that `recipes/glyphs32` renders itself, from the fonts that matplotlib carries (DejaVu, STIX,
Computer Modern) and from strokes, segments and dots of its own: printed, handwritten, seven-segment, dot-matrix,
roller-counter, engraved and stamped characters, with varied weight, slant, size, colour, light, blur, noise, frames
and reflections, each captioned in words. **It never saw a real image.** The renderer was designed while looking at
photos of meters; no pixel of any photo went into it.

## Training
`python -m synthkit.recipes.glyphs32 --out DIR`: a VAE ({vae_steps} steps of 16), then UNet and text encoder
together ({unet_steps} steps of 64, AdamW, one-cycle learning rate, exponential moving average).{remarks}

## Prompts
`A digit seven photo in the style of handwritten, white on black`, `a photo of the capital letter q, blurred`.
Class words are in `classes.toml`. Words of style: printed, handwritten, seven segment display, dot matrix display,
roller counter, engraved, stamped, scanned; bold, thin, italic, outlined; colours ("red on white"); blurred, noisy,
low contrast, framed, small, large, uneven light, reflection, shadow. Guidance 2, DDIM, 20 steps.

## Limits
No lower-case letters, no other signs, one character per image, 32x32 pixels. Some drawings are illegible or
show another character: look at the samples, and measure on real images.

## Licence
Apache-2.0, as synthkit. The fonts are used to render training images and are not part of the model.
"""


def write_model(
    parts: DiffusionParts, vae: AutoencoderKL, tokenizer_dir: Path, out: Path, facts: dict[str, object]
) -> None:
    """Write the diffusers folder with its card.

    Args:
        parts: trained UNet and text encoder.
        vae: the trained VAE.
        tokenizer_dir: the tokenizer's files.
        out: the model's folder.
        facts: `images`, `vae_steps`, `unet_steps` and `remarks`, for the card.
    """
    pipeline = StableDiffusionPipeline(
        vae=copy.deepcopy(vae).half(),
        text_encoder=copy.deepcopy(parts.text_encoder).half(),
        tokenizer=CLIPTokenizer.from_pretrained(tokenizer_dir),
        unet=copy.deepcopy(parts.unet).half(),
        scheduler=new_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(out, safe_serialization=True)
    lines = [f'"{name}" = "{words}"' for name, words in CLASS_WORDS.items()]
    (out / "classes.toml").write_text("\n".join(lines) + "\n", "utf-8")
    draw_samples(out)
    sizes = {"unet": _millions(parts.unet), "text": _millions(parts.text_encoder), "vae": _millions(vae)}
    (out / "README.md").write_text(_CARD.format(**sizes, **facts), "utf-8")


def _millions(module: torch.nn.Module) -> float:
    return float(sum(parameter.numel() for parameter in module.parameters())) / 1e6


def draw_samples(model_dir: Path) -> None:
    """Draw some classes in some styles into the model's sample sheet."""
    pipeline = StableDiffusionPipeline.from_pretrained(
        model_dir, torch_dtype=torch.float32, safety_checker=None, requires_safety_checker=False
    )
    pipeline.set_progress_bar_config(disable=True)
    rows = []
    for style in _STYLES:
        prompts = [f"a {CLASS_WORDS[symbol]} photo{style}" for symbol in _SHOWN]
        generators = [torch.Generator().manual_seed(seed) for seed in range(len(prompts))]
        images = pipeline(
            prompts, guidance_scale=2.0, num_inference_steps=20, generator=generators, output_type="np"
        ).images
        rows.append((style.removeprefix(" in the style of ") or "no style", list(_to_uint8(images))))
    contact_sheet(rows, model_dir / SAMPLES)


def _to_uint8(images: np.ndarray) -> np.ndarray:
    return np.round(images * 255).astype(np.uint8)
