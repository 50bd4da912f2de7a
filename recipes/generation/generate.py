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
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from synthkit.artifacts import (
    Request,
    StageResult,
    file_sha256,
    fingerprint,
    read_manifest,
    run_stage,
    write_bytes,
)
from synthkit.calibration.filters.screening import Filters, chosen_filters, filter_inputs, fit_filters
from synthkit.data.images import ImageSet
from synthkit.diffusion import style_token as style_files
from synthkit.engines.diffusion.engines_folder import check_same_model
from synthkit.errors import EngineError
from synthkit.recipes.generation.filter_report import rejected_grids
from synthkit.recipes.generation.plan import Planned, Words, make_plan, number_or_range
from synthkit.recipes.generation.ray_sampler import draw_with_ray
from synthkit.recipes.generation.rejections import REJECTED, Rounds
from synthkit.recipes.generation.sampler import Job, draw_images
from synthkit.recipes.settings import FilterSettings, GenerateSettings

log = logging.getLogger(__name__)

METADATA = "metadata.jsonl"

#: Settings that change no image, or count in a form of their own.
_NOT_IN_KEY = ("batch_size", "ray", "ray_workers", "steps", "guidance")
_ALWAYS_IN_KEY = ("per_class", "seed")


@dataclass(frozen=True)
class Screening:
    """What filters are to reject.

    Attributes:
        choices: which filters, and how strict.
        test: test photos, which no image may resemble.
    """

    choices: FilterSettings = dataclasses.field(default_factory=FilterSettings)
    test: ImageSet | None = None


def generate_request(
    settings: GenerateSettings,
    engines_dir: Path,
    classes: Words,
    style: Path | None,
    out: Path,
    photos: ImageSet | None = None,
    screening: Screening | None = None,
) -> Request:
    """What `generate` would make; what changes no image is left out.

    Args:
        settings: the stage's settings.
        engines_dir: what `build_engines` wrote.
        classes: class name -> the words for it in prompts, one or several.
        style: a file of style tokens, or None.
        out: the folder to write.
        photos: the real photos, to start from and to take filters' thresholds from.
        screening: what filters are to reject; None: nothing.

    Raises:
        ConfigError: a class name cannot be a folder's name, or a setting cannot be used.
        DataError: a class has no photo to start from.
        EngineError: there is no engines folder.
        ModelError: the style cannot be read, or was learned for another model.
    """
    if not engines_dir.is_dir():
        raise EngineError(f"no engines folder {engines_dir}; make it with `synthkit build-engines`")
    if style:
        check_same_model(style, engines_dir)
    make_plan(settings, classes, _shares(style), photos)
    choices, test = (screening.choices, screening.test) if screening else (FilterSettings(), None)
    inputs = {"engines": fingerprint(engines_dir), "style": style_digest(style)}
    if settings.init == "real" and photos:
        inputs["photos"] = photos.digest
    return Request(
        stage="generate",
        out=out,
        inputs=inputs | filter_inputs(choices, photos, test),
        config={
            "classes": {name: _key_words(one) for name, one in classes.items()},
            **_key_settings(settings),
            **_key_filters(choices),
        },
    )


def _key_words(words: str | Sequence[str]) -> str | list[str]:
    several = [words] if isinstance(words, str) else list(words)
    return several[0] if len(several) == 1 else several


def _key_settings(settings: GenerateSettings) -> dict[str, Any]:
    """The settings of a set's key; one that has its default only where it always counted."""
    usual = GenerateSettings()
    values = {
        field.name: getattr(settings, field.name)
        for field in dataclasses.fields(settings)
        if field.name not in _NOT_IN_KEY
    }
    if settings.init == "noise":
        del values["strength"]
    return {
        "steps": number_or_range("steps", settings.steps, int),
        "guidance": number_or_range("guidance", settings.guidance, float),
        **{
            name: value
            for name, value in values.items()
            if name in _ALWAYS_IN_KEY or value != getattr(usual, name)
        },
    }


def _key_filters(choices: FilterSettings) -> dict[str, Any]:
    if not chosen_filters(choices):
        return {}
    values = dataclasses.asdict(choices)
    del values["classifier"]  # its content is among the inputs
    return {"filters": values}


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


def generate(
    settings: GenerateSettings,
    engines_dir: Path,
    classes: Words,
    style: Path | None,
    out: Path,
    force: bool = False,
    photos: ImageSet | None = None,
    screening: Screening | None = None,
) -> StageResult:
    """Draw the synthetic set, or find it drawn; an interrupted one is gone on with.

    A finished set that lost files, or whose files were changed, gets just these again; with filters, whose
    verdicts are on whole sets, it is drawn anew.

    Args:
        settings: the stage's settings.
        engines_dir: what `build_engines` wrote.
        classes: class name -> the words for it in prompts, one or several.
        style: a file of style tokens, or None for plain prompts.
        out: the folder to write.
        force: draw again even when nothing changed.
        photos: the real photos, to start from and to take filters' thresholds from.
        screening: what filters are to reject; None: nothing.

    Returns:
        the stage; its metrics are `written`, `skipped`, `rejected`, `given_up`, `images_per_second` and
        `per_class`.

    Raises:
        ConfigError: a class name cannot be a folder's name, or a setting cannot be used.
        DataError: a class has no photo to start from.
        EngineError: the engines cannot be used or draw NaN, or the Ray cluster fails.
        ModelError: the style belongs to another model, or a prompt is too long.
    """
    request = generate_request(settings, engines_dir, classes, style, out, photos, screening)
    plan = make_plan(settings, classes, _shares(style), photos)
    screening = screening or Screening()
    filtered = bool(chosen_filters(screening.choices))
    job = _job(settings, engines_dir, style, blank=filtered)

    def produce(work: Path) -> dict[str, Any]:
        _clear_torn(work)
        rounds = Rounds(work, plan, screening.choices.retries)
        if not filtered and not force:
            _take_over(request, rounds.images)
        asked = (screening.choices, photos, screening.test, plan.words)
        filters = fit_filters(*asked) if filtered else None
        drawn = _draw_rounds(rounds, filters, work, lambda images: _draw(settings, job, images, work))
        _write_metadata(work, rounds.images, job, request)
        rejected_grids(work)
        return drawn | _totals(rounds, filters, work)

    return run_stage(request, produce, force=force)


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


def _take_over(request: Request, images: Sequence[Planned]) -> None:
    """Bring over what is whole of a finished set of the same key, which lacks something or was changed."""
    manifest = read_manifest(request.out)
    if manifest is None or manifest.key != request.key:
        return
    for image in images:
        old, new = request.out / image.file_name, request.partial / image.file_name
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


def _write_metadata(work: Path, images: Sequence[Planned], job: Job, request: Request) -> None:
    """One line per image: what `redo` needs to draw it again, and the SHA-256 of what was drawn."""
    common = {
        "negative_prompt": job.negative,
        "model": _model(job.engines_dir),
        "engines": request.inputs["engines"],
        "style": request.inputs["style"],
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
    return str(manifest.config["model"]) if manifest else engines_dir.resolve().name
