"""Generates planned images with engines and writes them: in this process, or as one of several workers.

    planned images ──prompts, photos──► SamplerInputs: embeddings and latents, computed once
    batches of equal steps ──EnginePipeline.generate──► PNG files, each written whole or not at all

What an image looks like is settled in `synthkit.recipes.generation.plan`; batches, workers and interruptions
change nothing about it.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from synthkit import standalone
from synthkit.artifacts import write_bytes
from synthkit.data.images import png, whole_picture
from synthkit.diffusion.style_token import StyleToken
from synthkit.engines.diffusion.pipeline import EnginePipeline, StartLatents
from synthkit.engines.diffusion.text_encoder import TextEmbeddings
from synthkit.errors import BadImages
from synthkit.progress import progress_bar
from synthkit.recipes.generation.plan import Photo, PlannedImage


@dataclass(frozen=True)
class SamplingJob:
    """The settings that all images of a set are generated with.

    Attributes:
        engines_dir: what `build_engines` wrote.
        tokens: the style tokens that prompts may hold.
        negative: the negative prompt.
        strength: of starting from a photo.
        batch_size: images per batch.
        blank: whether an image of one colour is written; otherwise it is an error.
        cache: a file for the embeddings; None: they are computed anew.
    """

    engines_dir: Path
    tokens: tuple[StyleToken, ...]
    negative: str
    strength: float
    batch_size: int
    blank: bool = False
    cache: Path | None = None


@dataclass(frozen=True)
class SamplerInputs:
    """Embeddings of prompts and latents of photos, as the engines take them.

    Attributes:
        prompts: prompt -> row of `texts`.
        texts: embeddings of the prompts.
        none: the embedding that guidance leads away from.
        photos: SHA-256 of a photo -> row of `latents`.
        latents: float32 [photos, channels, side, side].
    """

    prompts: dict[str, int]
    texts: TextEmbeddings
    none: TextEmbeddings
    photos: dict[str, int]
    latents: np.ndarray


class Sampler:
    """One pipeline that generates batches of images."""

    def __init__(self, job: SamplingJob) -> None:
        self._job = job
        self._pipeline = EnginePipeline.open(job.engines_dir)

    def gather(self, images: Sequence[PlannedImage]) -> SamplerInputs:
        """Embed the prompts of some images and encode the photos that they start from, each once.

        Raises:
            BadImages: a photo cannot be read.
            ModelError: the style does not fit the engines, or a prompt is too long.
        """
        job, pipeline = self._job, self._pipeline
        prompts = sorted({image.prompt for image in images})
        texts = pipeline.embed(prompts, *job.tokens, negative=job.negative, cache=job.cache)
        photos = {image.start.sha256: image.start for image in images if image.start}
        return SamplerInputs(
            {prompt: row for row, prompt in enumerate(prompts)},
            texts,
            pipeline.unconditional(),
            {sha256: row for row, sha256 in enumerate(photos)},
            _latents(pipeline, list(photos.values())),
        )

    def load(self, batch: Sequence[PlannedImage]) -> None:
        """Load the UNet for a batch, which otherwise its first `generate` does."""
        self._pipeline.prepare(max(image.guidance for image in batch))

    def generate(self, batch: Sequence[PlannedImage], inputs: SamplerInputs) -> np.ndarray:
        """Generate one batch, which `batches` made: uint8 [n, height, width, 3].

        Raises:
            EngineError: names the images that came out as NaN or infinite, or of one colour.
        """
        self._pipeline.set_unconditional(inputs.none)
        start = None
        if batch[0].start is not None:
            rows = [inputs.photos[image.start.sha256] for image in batch if image.start]
            start = StartLatents(inputs.latents[rows], self._job.strength)
        return self._pipeline.generate(
            inputs.texts.take([inputs.prompts[image.prompt] for image in batch]),
            [image.seed for image in batch],
            batch[0].steps,
            [image.guidance for image in batch],
            [image.file_name for image in batch],
            start,
            self._job.blank,
        )

    def close(self) -> None:
        """Give the engines' memory back."""
        self._pipeline.close()


def generate_images(job: SamplingJob, images: Sequence[PlannedImage], folder: Path) -> float:
    """Generate images in this process and write them below a folder.

    Returns:
        Seconds that it took, without what comes once: loading the engines, prompts and photos.
    """
    sampler = Sampler(job)
    make_folders(images, folder)
    inputs, todo = sampler.gather(images), list(batches(images, job.batch_size))
    sampler.load(todo[0])
    started = time.perf_counter()
    with (
        progress_bar(len(images), "generate images") as bar,
        ThreadPoolExecutor(1) as writer,  # encodes a batch while the next is generated
    ):
        pending: Future[Any] = writer.submit(int)
        for batch in todo:
            pixels = sampler.generate(batch, inputs)
            pending.result()
            pending = writer.submit(write_images, folder, batch, pixels)
            bar.update(len(batch))
        pending.result()
    sampler.close()
    return time.perf_counter() - started


def batches(images: Sequence[PlannedImage], size: int) -> Iterator[list[PlannedImage]]:
    """Images in batches for one sampling loop: of equal steps, all with guidance or all without."""
    alike: dict[tuple[bool, int], list[PlannedImage]] = {}
    for image in images:
        alike.setdefault((image.guidance > 1, image.steps), []).append(image)
    for key in sorted(alike):  # the UNet is loaded anew where guidance begins
        group = alike[key]
        yield from (group[start : start + size] for start in range(0, len(group), size))


def make_folders(images: Sequence[PlannedImage], folder: Path) -> None:
    """The class folders of some images."""
    for name in {image.name for image in images}:
        (folder / name).mkdir(exist_ok=True)


def write_images(folder: Path, batch: Sequence[PlannedImage], pixels: np.ndarray) -> None:
    """Write images of a batch, each atomically."""
    for image, array in zip(batch, pixels, strict=True):
        write_bytes(folder / image.file_name, png(array))


def _latents(pipeline: EnginePipeline, photos: Sequence[Photo]) -> np.ndarray:
    if not photos:
        return np.zeros((0, 1, 1, 1), np.float32)
    size = whole_picture(pipeline.image_size).to_json()
    pixels, failures = standalone.read_inputs([photo.path for photo in photos], size)
    if failures:
        raise BadImages(failures)
    return pipeline.encode(pixels)
