"""`generate`: synthetic images of every class through the engines, in the learned style where there is one.

    classes, style, photos ──plan──► planned images ──sampler or ray_sampler──► images ──filters──┐
                              ▲                                                                   │
                              └─────────── resamples of what they reject ◄────────rejections──────┘
    images that are kept ──► metadata.jsonl, totals

An image depends on its own seed and choices alone, and is written atomically. A killed run therefore
continues with what is missing and ends with the same files; a set of more images keeps those of a smaller.
"""

from __future__ import annotations

import dataclasses
import hashlib
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from synthkit.artifacts import Key, fingerprint, read_manifest
from synthkit.calibration.filters.filters import Filters, chosen_filters, filter_inputs, fit_filters
from synthkit.data.images import ImageSet
from synthkit.diffusion import style_token as style_files
from synthkit.engines.diffusion.engines_folder import check_same_model, existing_engines
from synthkit.models.generator import prompt_synonyms, resolve_model
from synthkit.recipes.generation.metadata import FinishedSet, SetSource, write_metadata
from synthkit.recipes.generation.plan import PlannedImage, make_plan
from synthkit.recipes.generation.ray_sampler import generate_with_ray
from synthkit.recipes.generation.rejections import REJECTED, ClassTotals, RejectionLog, rejected_grids
from synthkit.recipes.generation.sampler import SamplingJob, generate_images
from synthkit.recipes.settings import FilterSettings, GenerateSettings

log = logging.getLogger(__name__)

# Stands for a token that is not learned yet, where only the form of prompts is looked at.
PLACEHOLDER = "<style>"


@dataclass(frozen=True)
class Generate:
    """The stage `generate`; an interrupted set is continued.

    Images of a finished set that would come out with the same bytes are kept: of a set that lost files or
    whose files were changed, and of one with another number of images or other filters.

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
        """Generate what is missing, and resample what the filters reject.

        Returns:
            `written`, `skipped`, `rejected`, `dropped`, `images_per_second` and `per_class`.

        Raises:
            EngineError: the engines cannot be used or produce NaN, or the Ray cluster fails.
            ModelError: the style belongs to another model, or a prompt is too long.
        """
        _clear_torn(work)
        plan = make_plan(self.settings, self.words, _shares(self.style), self.photos)
        job = _job(self.settings, self.engines_dir, self.style, blank=self._filtered)
        source = self._source()
        finished = FinishedSet.open(previous, self) if previous else None
        rejections = RejectionLog(work, plan, self.filters.retries)
        filters = fit_filters(self.filters, self.photos, self.test, plan.words) if self._filtered else None

        def take_over(images: Sequence[PlannedImage]) -> None:
            if finished:
                finished.take_over(images, source, work)

        def generate(images: Sequence[PlannedImage]) -> float:
            return _generate(self.settings, job, images, work)

        written, skipped, seconds = _generate_rounds(rejections, filters, work, take_over, generate)
        write_metadata(work, rejections.images, source)
        rejected_grids(work)
        per_class = rejections.totals()
        _warn_of_empty(per_class)
        kept = [(work / image.file_name, image.name) for image in rejections.images]
        return SetTotals(
            written=written,
            skipped=skipped,
            images_per_second=round(written / seconds, 3) if seconds else 0.0,
            rejected=len(rejections.rejections),
            per_class=per_class,
            filters={**filters.describe(), "near_photos": filters.near_photos(kept)} if filters else None,
        ).to_json()

    def _source(self) -> SetSource:
        inputs = self.key().inputs
        return SetSource(
            _model(self.engines_dir),
            inputs["engines"],
            inputs["style"],
            self.settings.negative,
            self.settings.strength,
        )


@dataclass(frozen=True)
class SetTotals:
    """The figures of a run of `generate`.

    Attributes:
        written: images generated in this run, rejected ones included.
        skipped: images that were there, or were taken over from an earlier set.
        images_per_second: of this run; 0 where nothing was generated.
        rejected: samples that filters rejected.
        per_class: class name -> images kept, resampled and dropped.
        filters: thresholds and their sources, as JSON data; None without filters.
    """

    written: int
    skipped: int
    images_per_second: float
    rejected: int
    per_class: Mapping[str, ClassTotals]
    filters: Mapping[str, Any] | None = None

    @property
    def dropped(self) -> int:
        """Images that were rejected at every resample."""
        return sum(sum(totals.dropped.values()) for totals in self.per_class.values())

    def to_json(self) -> dict[str, Any]:
        """As JSON data; without the key `filters` where there are none."""
        return {
            "written": self.written,
            "skipped": self.skipped,
            "images_per_second": self.images_per_second,
            "rejected": self.rejected,
            "dropped": self.dropped,
            "per_class": {name: totals.to_json() for name, totals in self.per_class.items()},
            **({"filters": dict(self.filters)} if self.filters else {}),
        }


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


def _job(settings: GenerateSettings, engines_dir: Path, style: Path | None, blank: bool) -> SamplingJob:
    return SamplingJob(
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


def _generate_rounds(
    rejections: RejectionLog,
    filters: Filters | None,
    work: Path,
    take_over: Callable[[Sequence[PlannedImage]], None],
    generate: Callable[[Sequence[PlannedImage]], float],
) -> tuple[int, int, float]:
    """Generate what is missing, and resample what filters reject, until they reject nothing more.

    Args:
        rejections: the images, and the log of rejections.
        filters: the fitted filters, or None.
        work: folder of the set.
        take_over: brings images of an earlier set.
        generate: writes images; returns the seconds it took.

    Returns:
        Images written, images that were there or were taken over, seconds of generation.
    """
    written, skipped, seconds = 0, 0, 0.0
    todo = images = rejections.images
    while True:
        take_over(todo)
        missing = [image for image in todo if not (work / image.file_name).exists()]
        seconds += generate(missing) if missing else 0.0
        written += len(missing)
        skipped += len(todo) - len(missing)
        reasons = (
            filters.reasons([(work / image.file_name, image.name) for image in images]) if filters else []
        )
        bad = [(image, reason) for image, reason in zip(images, reasons, strict=False) if reason]
        if not bad:
            return written, skipped, seconds
        rejections.reject([image for image, _ in bad], [reason for _, reason in bad])
        images = rejections.images
        todo = [image for image in images if not (work / image.file_name).exists()]


def _generate(
    settings: GenerateSettings, job: SamplingJob, images: Sequence[PlannedImage], work: Path
) -> float:
    if settings.ray is not None:
        return generate_with_ray(job, images, work, settings.ray, settings.ray_workers)
    return generate_images(job, images, work)


def _warn_of_empty(per_class: Mapping[str, ClassTotals]) -> None:
    if empty := [name for name, totals in per_class.items() if not totals.kept]:
        log.warning(
            "generate: the filters left no image of %s; look into %s, or loosen them",
            ", ".join(empty),
            REJECTED,
        )


def _model(engines_dir: Path) -> str:
    manifest = read_manifest(engines_dir)
    return str(manifest.resolved["model_name"]) if manifest else engines_dir.resolve().name
