"""An engines folder read back: is it there, which model was it made of, does a style token go with it."""

from __future__ import annotations

from pathlib import Path

from synthkit.artifacts import read_manifest
from synthkit.diffusion.style_token import base_of
from synthkit.errors import EngineError, ModelError
from synthkit.models.generator import short_name


def existing_engines(folder: Path) -> Path:
    """Return the folder if it exists.

    Raises:
        EngineError: it does not.
    """
    if not folder.is_dir():
        raise EngineError(f"no engines folder {folder}; make it with `synthkit build-engines`")
    return folder


def base_model(engines_dir: Path) -> str:
    """Name or path, as `resolve_model` takes it, of the model that the engines were made of.

    A folder without a manifest, for instance one written by Optimum, is named by its own path.
    """
    manifest = read_manifest(engines_dir)
    return str(manifest.metrics["model"]) if manifest else str(engines_dir.resolve())


def check_same_model(style: Path, engines_dir: Path) -> None:
    """Refuse style tokens that were learned for other weights than those of the engines.

    Tokens of other tools and folders of other tools do not name their weights. They pass here; the width of
    the text embeddings is still checked when the prompts are encoded.

    Raises:
        ModelError: the weights differ; names both models.
    """
    manifest, (base, weights) = read_manifest(engines_dir), base_of(style)
    own = manifest.metrics.get("weights") if manifest else None
    if manifest and own and weights and own != weights:
        raise ModelError(
            f"the style {style} was learned for {short_name(base)!r}, the engines {engines_dir} are made of "
            f"{manifest.resolved['model_name']!r} with other weights; learn a style for this one with "
            "`synthkit learn-style`, or build engines of the style's own model"
        )
