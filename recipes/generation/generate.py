"""`generate`: synthetic images of every class through the engines, in the learned style where there is one.

    classes, style, photos ──set_plan──► planned images ──drawing or ray_workers──► images ──filters──┐
                                  ▲                                                                   │
                                  └──────────── next attempts at what they reject ◄──────────rounds───┘
    what is kept ──► metadata.jsonl, totals

An image depends on its own seed and choices alone, and is written atomically. A killed run therefore goes on
with what is missing, and ends with the same files.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from synthkit.artifacts import Key, file_sha256, fingerprint, read_manifest, same_key, write_bytes
from synthkit.calibration.filters.filters import Filters, chosen_filters, filter_inputs, fit_filters
from synthkit.data.images import ImageSet
from synthkit.diffusion import style_token as style_files
from synthkit.engines.diffusion.engines_folder import check_same_model, existing_engines
from synthkit.models.generator import prompt_synonyms, resolve_model
from synthkit.recipes.generation.plan import Planned, make_plan
from synthkit.recipes.generation.ray_sampler import draw_with_ray
from synthkit.recipes.generation.rejections import REJECTED, Rounds, rejected_grids
from synthkit.recipes.generation.sampler import Job, draw_images
from synthkit.recipes.settings import FilterSettings, GenerateSettings

log = logging.getLogger(__name__)

METADATA = "metadata.jsonl"

# Stands for a token that is not learned yet, where only the form of prompts is looked at.
PLACEHOLDER = "<style>"


@dataclass(frozen=True)
class Generate:
    """The stage `generate`; an interrupted set is gone on with.

    A finished set that lost files, or whose files were changed, gets just these again; with filters, whose
    results are on whole sets, it is drawn anew.

    Attributes:
        settings: of the stage.
        engines_dir: what `build-engines` wrote.
        classes: class names, which become folder names.
        out: the folder to write.
        own_names: class name -> the user's words for it, where there are some.
        model: the generator whose class words are used, as `resolve_model` takes it; None: the engines'.
        style: a file of style tokens, or None for plain prompts.
        photos: the real photos, to start from and to take filters' thresholds from.
        filters: which images are rejected.
        test: test photos, which no image may resemble where the filter "leak" is on.
    """

    name: ClassVar[str] = "generate"
    version: ClassVar[int] = 1

    settings: GenerateSettings
    engines_dir: Path
    classes: tuple[str, ...]
    out: Path
    own_names: Mapping[str, Sequence[str]] = dataclasses.field(default_factory=dict)
    model: str | None = None
    style: Path | None = None
    photos: ImageSet | None = None
    filters: FilterSettings = dataclasses.field(default_factory=FilterSettings)
    test: ImageSet | None = None

    def check(self, *, fetch: bool) -> None:
        """Refuse settings, classes and filters that cannot be used.

        Args:
            fetch: whether a hub model may be fetched to look at its class words.

        Raises:
            ConfigError: a class name cannot be a folder's name, or a setting cannot be used.
            DataError: a class has no photo to start from.
            ModelError: the generator does not know a class.
        """
        if self.model:
            resolve_model(self.model, download=fetch)
        if self.model or self.engines_dir.is_dir():
            token = [] if self.style is None else [(PLACEHOLDER, 1.0)]
            make_plan(self.settings, self.words, token, self.photos)
        filter_inputs(self.filters, self.photos, self.test)

    def key(self) -> Key:
        """Engines, style and words by content; what changes no image is left out.

        Raises:
            EngineError: there is no engines folder.
            ModelError: the style cannot be read, or was learned for another model.
        """
        existing_engines(self.engines_dir)
        if self.style:
            check_same_model(self.style, self.engines_dir)
        inputs = {"engines": fingerprint(self.engines_dir), "style": style_digest(self.style)}
        if self.settings.init == "real" and self.photos:
            inputs["photos"] = self.photos.digest
        filters = self.filters if self._filtered else FilterSettings()
        return Key(
            inputs=inputs | filter_inputs(self.filters, self.photos, self.test),
            settings={self.name: self.settings, "filter": filters},
            resolved={"classes": {name: list(several) for name, several in self.words.items()}},
        )

    @property
    def words(self) -> dict[str, tuple[str, ...]]:
        """Class name -> the words for it in prompts.

        Raises:
            ModelError: the generator does not know a class.
        """
        folder = resolve_model(self.model, download=False) if self.model else self.engines_dir
        return prompt_synonyms(folder, self.classes, self.own_names)

    @property
    def _filtered(self) -> bool:
        return bool(chosen_filters(self.filters))

    def run(self, work: Path, previous: Path | None) -> dict[str, Any]:
        """Draw what is missing, and again what the filters reject.

        Returns:
            `written`, `skipped`, `rejected`, `given_up`, `images_per_second` and `per_class`.

        Raises:
            EngineError: the engines cannot be used or draw NaN, or the Ray cluster fails.
            ModelError: the style belongs to another model, or a prompt is too long.
        """
        _clear_torn(work)
        plan = make_plan(self.settings, self.words, _shares(self.style), self.photos)
        job = _job(self.settings, self.engines_dir, self.style, blank=self._filtered)
        rounds = Rounds(work, plan, self.filters.retries)
        if previous and not self._filtered:
            _take_over(self, previous, work, rounds.images)
        asked = (self.filters, self.photos, self.test, plan.words)
        filters = fit_filters(*asked) if self._filtered else None
        drawn = _draw_rounds(rounds, filters, work, lambda images: _draw(self.settings, job, images, work))
        _write_metadata(work, rounds.images, job, self.key())
        rejected_grids(work)
        return drawn | _totals(rounds, filters, work)


def style_digest(style: Path | None) -> str:
    """Digest of tokens' names, vectors and shares, whatever file they came in; "none" without a style."""
    if style is None:
        return "none"
    state = hashlib.sha256()
    tokens, shares = style_files.load_all(style), style_files.shares(style)
    for token, share in zip(tokens, shares, strict=True):
        state.update(token.token.encode() + b"\0" + token.vectors.tobytes())
        if len(tokens) > 1:
            state.update(f"\0{share!r}\0".encode())
    return state.hexdigest()


def _shares(style: Path | None) -> list[tuple[str, float]]:
    """(style token, share of the images) of a style file."""
    if style is None:
        return []
    names = [token.token for token in style_files.load_all(style)]
    return list(zip(names, style_files.shares(style), strict=True))


def _job(settings: GenerateSettings, engines_dir: Path, style: Path | None, blank: bool) -> Job:
    return Job(
        engines_dir,
        style_files.load_all(style) if style else (),
        settings.negative,
        settings.strength,
        settings.batch_size,
        blank,
        # Beside the style token, which then runs the text encoder once; hidden from its manifest.
        style.with_name(".embeddings.npz") if style else None,
    )


def _clear_torn(work: Path) -> None:
    for path in work.rglob(".*.tmp"):  # a killed run's unfinished writes
        path.unlink()


def _take_over(stage: Generate, previous: Path, work: Path, images: Sequence[Planned]) -> None:
    """Bring over what is whole of a finished set of the same key, which lacks something or was changed."""
    manifest = read_manifest(previous)
    if manifest is None or not same_key(stage, manifest):
        return
    for image in images:
        old, new = previous / image.file_name, work / image.file_name
        entry = manifest.outputs.get(image.file_name, {})
        if old.is_file() and not new.exists() and file_sha256(old) == entry.get("sha256"):
            new.parent.mkdir(exist_ok=True)
            new.hardlink_to(old)


def _draw_rounds(
    rounds: Rounds, filters: Filters | None, work: Path, draw: Callable[[Sequence[Planned]], float]
) -> dict[str, Any]:
    """Draw what is missing, and again what filters reject, until they reject nothing more."""
    written, seconds = 0, 0.0
    skipped = sum((work / image.file_name).exists() for image in rounds.images)
    while True:
        images = rounds.images
        missing = [image for image in images if not (work / image.file_name).exists()]
        seconds += draw(missing) if missing else 0.0
        written += len(missing)
        judged = filters.judge([(work / image.file_name, image.name) for image in images]) if filters else []
        bad = [(image, reason) for image, reason in zip(images, judged, strict=False) if reason]
        if not bad:
            break
        rounds.reject([image for image, _ in bad], [reason for _, reason in bad])
    rate = round(written / seconds, 3) if seconds else 0.0
    return {"written": written, "skipped": skipped, "images_per_second": rate}


def _draw(settings: GenerateSettings, job: Job, images: Sequence[Planned], work: Path) -> float:
    if settings.ray is not None:
        return draw_with_ray(job, images, work, settings.ray, settings.ray_workers)
    return draw_images(job, images, work)


def _totals(rounds: Rounds, filters: Filters | None, work: Path) -> dict[str, Any]:
    totals = rounds.totals()
    empty = [name for name, one in totals.items() if not one["kept"]]
    if empty:
        log.warning(
            "generate: the filters left no image of %s; look into %s, or loosen them",
            ", ".join(empty),
            REJECTED,
        )
    given_up = sum(sum(one["given_up"].values()) for one in totals.values())
    told: dict[str, Any] = {"rejected": len(rounds.rejections), "given_up": given_up, "per_class": totals}
    if filters:
        kept = [(work / image.file_name, image.name) for image in rounds.images]
        told["filters"] = {**filters.describe(), "near_photos": filters.near_photos(kept)}
    return told


def _write_metadata(work: Path, images: Sequence[Planned], job: Job, key: Key) -> None:
    """One line per image: all that the image came from, and its SHA-256."""
    common = {
        "negative_prompt": job.negative,
        "model": _model(job.engines_dir),
        "engines": key.inputs["engines"],
        "style": key.inputs["style"],
    }
    lines = (json.dumps(_line(image, work, job, common), ensure_ascii=False) + "\n" for image in images)
    write_bytes(work / METADATA, "".join(lines).encode())


def _line(image: Planned, work: Path, job: Job, common: dict[str, Any]) -> dict[str, Any]:
    return {
        "file_name": image.file_name,
        "class": image.name,
        "index": image.index,
        "attempt": image.attempt,
        "prompt": image.prompt,
        "token": image.token,
        "seed": image.seed,
        "guidance": image.guidance,
        "steps": image.steps,
        "init": image.start.name if image.start else None,
        "init_sha256": image.start.sha256 if image.start else None,
        "strength": job.strength if image.start else None,
        **common,
        "sha256": file_sha256(work / image.file_name),
    }


def _model(engines_dir: Path) -> str:
    manifest = read_manifest(engines_dir)
    return str(manifest.resolved["model_name"]) if manifest else engines_dir.resolve().name
