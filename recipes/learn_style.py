"""`learn-style`: style tokens from the real photos, by dataset style inversion.

few_shots/ + base model ──latents, once──► clusters of one appearance ──► fit an embedding each
                                                                  ──► style/learned_embeds.safetensors
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from synthkit.artifacts import Key, write_json
from synthkit.data.contact_sheet import contact_sheet
from synthkit.data.images import ImageSet, class_prompt_names, whole_picture
from synthkit.diffusion.style_token import StyleToken, save_all
from synthkit.models.generator import (
    base_weights_fingerprint,
    model_fingerprint,
    prompt_names,
    refuse_two_encoders,
    resolve_model,
)
from synthkit.recipes.settings import StyleSettings

if TYPE_CHECKING:
    import torch

    from synthkit.calibration.textual_inversion import Inversion, Preview
    from synthkit.diffusion.parts import DiffusionParts

TOKEN_FILE = "learned_embeds.safetensors"
LOSSES = "losses.json"
CLUSTERS = "clusters.json"
PREVIEWS = "previews"
_OURS = ("lr", "schedule", "batch_size", "init_word", "steps")  # of these the paper gives the steps alone
_PREVIEWED, _PREVIEW_STEPS, _PREVIEW_GUIDANCE = 10, 15, 2.0
_SHOWN = 24  # photos of a cluster on the sheet


@dataclass(frozen=True)
class LearnStyle:
    """The stage `learn-style`; an interrupted fit goes on from its last checkpoint.

    Attributes:
        settings: of the stage.
        model: the generator, as `resolve_model` takes it.
        photos: the real photos.
        out: the folder to write.
    """

    name: ClassVar[str] = "learn-style"
    version: ClassVar[int] = 1

    settings: StyleSettings
    model: str
    photos: ImageSet
    out: Path

    def check(self, *, fetch: bool) -> None:
        """Refuse a generator that takes no style, or that does not know a class.

        Args:
            fetch: whether a hub model may be fetched to look at it.

        Raises:
            ConfigError: the photos' classes.toml cannot be used.
            ModelError: the model is unknown, has two text encoders or does not know a class.
        """
        refuse_two_encoders(resolve_model(self.model, download=fetch))
        self._words()

    def key(self) -> Key:
        """Model, photos and the words that prompts use for the classes."""
        model_dir = resolve_model(self.model, download=False)
        return Key(
            inputs={"model": model_fingerprint(model_dir), "photos": self.photos.digest},
            settings={self.name: self.settings},
            resolved={"words": self._words()},
        )

    def _words(self) -> dict[str, str]:
        """Class name -> words for prompts."""
        own = class_prompt_names(self.photos.root, self.photos.classes)
        return prompt_names(resolve_model(self.model, download=False), self.photos.classes, own)

    def run(self, work: Path, previous: Path | None) -> dict[str, Any]:
        """Fit a token per cluster of photos that look alike.

        Raises:
            ConfigError: there are fewer photos than clusters, none can be held out, or no such device.
            ModelError: the model does not load, or the token or its init word does not suit it.
        """
        from synthkit.calibration.style_clusters import cluster_by_style
        from synthkit.diffusion.parts import encode_images, image_size, load_parts
        from synthkit.learning.gradients import best_device

        settings, photos, words = self.settings, self.photos, self._words()
        if settings.early_stop:
            photos = photos.distinct()  # a copy of a photo held out must not be learned
        parts = load_parts(resolve_model(self.model), str(best_device(settings.device)))
        pixels = photos.load(whole_picture(image_size(parts)))
        latents = encode_images(parts.vae, pixels)
        groups = cluster_by_style(latents.cpu().numpy(), photos.labels, settings.clusters, settings.seed)
        names = [words[photos.classes[label]] for label in photos.labels]
        clusters = [
            _Cluster(number, cluster_token(settings.token, number), np.flatnonzero(groups == number))
            for number in range(settings.clusters)
        ]
        fits = [
            _fit(settings, one, parts, latents[one.members], [names[i] for i in one.members], work)
            for one in clusters
        ]
        shares = [len(one.members) / len(photos) for one in clusters]
        _write_tokens(settings, [one.token for one in fits], shares, self.model, work)
        _write_clusters(clusters, photos, pixels, work)
        losses = {one.token.token: {"training": one.losses, "held_out": one.held_out} for one in fits}
        write_json(work / LOSSES, losses)
        for one in clusters:
            _checkpoint(work, one.number).unlink(missing_ok=True)
        return _metrics(settings, fits, clusters)


def cluster_token(token: str, number: int) -> str:
    """Name of a cluster's token: "<site-style>" of the largest, then "<site-style-2>", "<site-style-3>".

    Args:
        token: name of the first.
        number: the cluster's, from 0.
    """
    if number == 0:
        return token
    return f"{token[:-1]}-{number + 1}>" if token.endswith(">") else f"{token}-{number + 1}"


@dataclass(frozen=True)
class _Cluster:
    """Photos that share a token.

    Attributes:
        number: 0 is the largest.
        token: the token's name.
        members: positions of the photos.
    """

    number: int
    token: str
    members: np.ndarray


def _fit(
    settings: StyleSettings,
    cluster: _Cluster,
    parts: DiffusionParts,
    latents: torch.Tensor,
    names: Sequence[str],
    work: Path,
) -> Inversion:
    """One cluster's token; its checkpoint stays until the last cluster is done."""
    from synthkit.calibration.textual_inversion import InversionSettings, invert_style, untrained_style

    named = replace(settings, token=cluster.token)
    own = InversionSettings(**{one.name: getattr(named, one.name) for one in fields(InversionSettings)})
    if settings.control:
        return untrained_style(parts, names, own, cluster.number)
    preview = _preview(named, parts, names, work) if settings.preview_every else None
    return invert_style(parts, latents, names, own, _checkpoint(work, cluster.number), preview)


def _checkpoint(work: Path, number: int) -> Path:
    return work / (f".inversion-{number + 1}.safetensors" if number else ".inversion.safetensors")


def _preview(settings: StyleSettings, parts: DiffusionParts, names: Sequence[str], work: Path) -> Preview:
    """A row of images per evaluation, one photo of each word, as `previews/<token>/<step>.png`."""
    from synthkit.calibration.textual_inversion import Preview
    from synthkit.diffusion.parts import sample_images, token_ids

    photos = np.sort(np.unique(names, return_index=True)[1])[:_PREVIEWED].tolist()
    folder = work / PREVIEWS / settings.token.strip("<>")
    folder.mkdir(parents=True, exist_ok=True)
    ids = token_ids(parts.tokenizer, [""]).to(parts.text_encoder.device)
    plain = parts.text_encoder(ids).last_hidden_state

    def show(step: int, embeddings: torch.Tensor) -> None:
        images = sample_images(parts, embeddings, plain, _PREVIEW_STEPS, _PREVIEW_GUIDANCE, settings.seed)
        contact_sheet([(f"{step:05d}", list(images))], folder / f"{step:05d}.png", min(128, images.shape[1]))

    return Preview(settings.preview_every, photos, show)


def _write_tokens(
    settings: StyleSettings, tokens: Sequence[StyleToken], shares: Sequence[float], model: str, work: Path
) -> None:
    known = shares if len(tokens) > 1 else None
    save_all(tokens, work / TOKEN_FILE, model, known, base_weights_fingerprint(resolve_model(model)))
    for token in tokens if settings.a1111 else ():
        token.save_unnamed(work / "a1111")


def _write_clusters(clusters: Sequence[_Cluster], photos: ImageSet, pixels: np.ndarray, work: Path) -> None:
    """Which photos share a token, as names and as a sheet to look at."""
    if len(clusters) == 1:
        return
    paths = [item.path.relative_to(photos.root).as_posix() for item in photos.items]
    write_json(work / CLUSTERS, {one.token: [paths[i] for i in one.members] for one in clusters})
    rows = [(one.token, [pixels[i] for i in one.members[:_SHOWN]]) for one in clusters]
    contact_sheet(rows, work / "clusters.png", min(64, pixels.shape[1]))


def _metrics(
    settings: StyleSettings, fits: Sequence[Inversion], clusters: Sequence[_Cluster]
) -> dict[str, Any]:
    tokens = [
        {"token": one.token, "photos": len(one.members), "steps": len(fit.losses), **_loss_summary(fit)}
        for fit, one in zip(fits, clusters, strict=True)
    ]
    photos = [len(one.members) for one in clusters]
    means = {
        name: None
        if settings.control
        else round(float(np.average([one[name] for one in tokens], weights=photos)), 6)
        for name in ("loss_first", "loss_last")
    }
    ours = {name: getattr(settings, name) for name in _OURS}
    return {**means, "tokens": tokens, "not_from_the_paper": ours}


def _loss_summary(fit: Inversion) -> dict[str, float | None]:
    """Mean loss of the first and of the last tenth of the steps, and the lowest held-out loss."""
    tenth = max(1, len(fit.losses) // 10)
    return {
        "loss_first": float(np.mean(fit.losses[:tenth])) if fit.losses else None,
        "loss_last": float(np.mean(fit.losses[-tenth:])) if fit.losses else None,
        "loss_held_out": min(fit.held_out.values(), default=None),
    }
