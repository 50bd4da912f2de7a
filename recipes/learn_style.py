"""`learn-style`: a style token from the real photos, by dataset style inversion.

few_shots/ + base model ──latents, once──► fit one embedding ──► style/learned_embeds.safetensors
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from synthkit.artifacts import Request, StageResult, run_stage, write_json
from synthkit.images import ImageSet, Preprocessing
from synthkit.models import model_fingerprint, resolve_model
from synthkit.recipes.settings import StyleSettings

TOKEN_FILE = "learned_embeds.safetensors"
LOSSES = "losses.json"
_CHECKPOINT = ".inversion.safetensors"


def learn_style_request(
    settings: StyleSettings, model: str, photos: ImageSet, words: Mapping[str, str], out: Path
) -> Request:
    """What `learn_style` would make.

    Args:
        settings: the stage's settings.
        model: what `resolve_model` takes.
        photos: the real photos.
        words: class name -> words for prompts.
        out: the folder to write.
    """
    config = asdict(settings)
    del config["checkpoint_every"]  # changes nothing in the result
    return Request(
        stage="learn-style",
        out=out,
        inputs={"model": model_fingerprint(resolve_model(model)), "photos": photos.digest},
        config={**config, "words": dict(words)},
    )


def learn_style(
    settings: StyleSettings,
    model: str,
    photos: ImageSet,
    words: Mapping[str, str],
    out: Path,
    force: bool = False,
) -> StageResult:
    """Make the style folder, or find it made; an interrupted fit goes on from its last checkpoint.

    Raises:
        ModelError: the model does not load, or the token or its init word does not suit it.
    """

    def produce(work: Path) -> dict[str, Any]:
        from synthkit.calibration.inversion import InversionSettings, invert_style
        from synthkit.diffusion import image_size, load_parts

        parts = load_parts(resolve_model(model))
        pixels = photos.load(whole_picture(image_size(parts)))
        names = [words[photos.classes[label]] for label in photos.labels]
        checkpoint = work / _CHECKPOINT
        token, losses = invert_style(parts, pixels, names, InversionSettings(**asdict(settings)), checkpoint)
        token.save(work / TOKEN_FILE, base_model=model)
        write_json(work / LOSSES, losses)
        checkpoint.unlink(missing_ok=True)
        tenth = max(1, len(losses) // 10)
        return {"loss_first": float(np.mean(losses[:tenth])), "loss_last": float(np.mean(losses[-tenth:]))}

    return run_stage(learn_style_request(settings, model, photos, words, out), produce, force=force)


def whole_picture(size: int) -> Preprocessing:
    """Preprocessing that keeps all of a photo in view: what tells the classes apart may touch its border."""
    return Preprocessing((3, size, size), "bicubic", 1.0, "squash", (0.5,) * 3, (0.5,) * 3)
