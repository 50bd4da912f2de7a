"""`generate`: synthetic images of every class through the engines, in the learned style where there is one.

    classes, style ──prompts, embedded once──┐
    (run seed, class, index) ──seed──────────┴─► batches across classes ──► images, metadata.jsonl

An image depends on its own seed and prompt alone, and is written atomically. A killed run therefore goes on
with what is missing, and ends with the same files.
"""

from __future__ import annotations

import hashlib
import io
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from synthkit import style as style_files
from synthkit.artifacts import (
    Request,
    StageResult,
    file_sha256,
    fingerprint,
    read_manifest,
    run_stage,
    write_bytes,
)
from synthkit.engines.pipeline import EnginePipeline
from synthkit.engines.texts import TextEmbeddings
from synthkit.errors import ConfigError, EngineError
from synthkit.recipes.settings import GenerateSettings
from synthkit.style import PROMPT, StyleToken

METADATA = "metadata.jsonl"


@dataclass(frozen=True)
class Planned:
    """One image to draw.

    Attributes:
        name: class name.
        index: number within the class.
        seed: of its noise.
    """

    name: str
    index: int
    seed: int

    @property
    def file_name(self) -> str:
        """Path of the image below the synthetic set."""
        return f"{self.name}/{self.index:05d}.png"


@dataclass(frozen=True)
class _Job:
    """What is drawn, and with what."""

    settings: GenerateSettings
    engines_dir: Path
    classes: Mapping[str, str]
    style: Path | None
    token: StyleToken | None

    @property
    def kept_embeddings(self) -> Path | None:
        """Beside the style token, which then runs the text encoder once; hidden from its manifest."""
        return self.style.with_name(".embeddings.npz") if self.style else None

    def prompt(self, name: str) -> str:
        return prompt_for(self.classes[name], self.token.token if self.token else None)

    @property
    def model(self) -> str:
        manifest = read_manifest(self.engines_dir)
        return str(manifest.config["model"]) if manifest else self.engines_dir.resolve().name


def image_seed(run_seed: int, class_name: str, index: int) -> int:
    """Seed of one image, the same whatever else is drawn.

    48 bits, so that every reader of metadata.jsonl holds it exactly.
    """
    text = f"{run_seed}\0{class_name}\0{index}"
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:6], "big")


def prompt_for(words: str, token: str | None) -> str:
    """The prompt of a class, with the style token or without."""
    return PROMPT.format(words=words, token=token) if token else f"A {words} photo"


def generate_request(
    settings: GenerateSettings, engines_dir: Path, classes: Mapping[str, str], style: Path | None, out: Path
) -> Request:
    """What `generate` would make; the batch size is left out, since it does not change an image.

    Args:
        settings: the stage's settings.
        engines_dir: what `build_engines` wrote.
        classes: class name -> words for prompts.
        style: a style token's file, or None.
        out: the folder to write.

    Raises:
        ConfigError: a class name cannot be a folder's name.
        EngineError: there is no engines folder.
    """
    if not engines_dir.is_dir():
        raise EngineError(f"no engines folder {engines_dir}; make it with `synthkit build-engines`")
    _check_names(classes)
    token = style_files.load(style) if style else None
    return Request(
        stage="generate",
        out=out,
        inputs={"engines": fingerprint(engines_dir), "style": style_digest(token)},
        config={
            "classes": dict(classes),
            "per_class": settings.per_class,
            "steps": settings.steps,
            "guidance": settings.guidance,
            "seed": settings.seed,
        },
    )


def style_digest(token: StyleToken | None) -> str:
    """Digest of a token's name and vectors, whatever file they came in; "none" without a token."""
    if token is None:
        return "none"
    return hashlib.sha256(token.token.encode() + b"\0" + token.vectors.tobytes()).hexdigest()


def _check_names(classes: Mapping[str, str]) -> None:
    bad = [name for name in classes if not name.strip() or name[0] == "." or "/" in name or "\0" in name]
    if bad:
        raise ConfigError(f"class names {bad} cannot be folder names; leave out slashes and leading dots")
    if not classes:
        raise ConfigError("no classes were given; name them with --real-dir DIR or --classes a,b,c")


def generate(
    settings: GenerateSettings,
    engines_dir: Path,
    classes: Mapping[str, str],
    style: Path | None,
    out: Path,
    force: bool = False,
) -> StageResult:
    """Draw the synthetic set, or find it drawn; an interrupted one is gone on with.

    Args:
        settings: the stage's settings.
        engines_dir: what `build_engines` wrote.
        classes: class name -> words for prompts.
        style: a style token's file, or None for plain prompts.
        out: the folder to write.
        force: draw again even when nothing changed.

    Returns:
        the stage; its metrics are `written`, `skipped`, `rejected`, `images_per_second`.

    Raises:
        ConfigError: a class name cannot be a folder's name.
        EngineError: the engines cannot be used, or draw NaN.
        ModelError: the style belongs to another model, or a prompt is too long.
    """
    request = generate_request(settings, engines_dir, classes, style, out)
    job = _Job(settings, engines_dir, classes, style, style_files.load(style) if style else None)

    def produce(work: Path) -> dict[str, Any]:
        plan = plan_images(settings, classes)
        _clear_torn(work)
        missing = [image for image in plan if not (work / image.file_name).exists()]
        seconds = _draw_missing(work, missing, job) if missing else 0.0
        _write_metadata(work, plan, job)
        return {
            "written": len(missing),
            "skipped": len(plan) - len(missing),
            "rejected": 0,
            "images_per_second": round(len(missing) / seconds, 3) if seconds else 0.0,
        }

    return run_stage(request, produce, force=force)


def plan_images(settings: GenerateSettings, classes: Mapping[str, str]) -> list[Planned]:
    """Every image of the set, in order of class and index."""
    return [
        Planned(name, index, image_seed(settings.seed, name, index))
        for name in sorted(classes)
        for index in range(settings.per_class)
    ]


def _clear_torn(work: Path) -> None:
    for path in work.rglob(".*.tmp"):  # a killed run's unfinished writes
        path.unlink()


def _draw_missing(work: Path, missing: Sequence[Planned], job: _Job) -> float:
    """Draw and write images; returns the seconds that it took, without the loading of the engines."""
    pipeline = EnginePipeline.open(job.engines_dir)
    names = sorted({image.name for image in missing})
    for name in names:
        (work / name).mkdir(exist_ok=True)
    started = time.perf_counter()
    embeddings = pipeline.embed([job.prompt(name) for name in names], job.token, job.kept_embeddings)
    rows = {name: row for row, name in enumerate(names)}
    with (
        tqdm(total=len(missing), unit="image", desc="generate", disable=None) as bar,
        ThreadPoolExecutor(1) as writer,  # encodes a batch while the next is drawn
    ):
        pending = writer.submit(int)
        for batch in _batches(missing, job.settings.batch_size):
            texts = embeddings.take([rows[image.name] for image in batch])
            pixels = _draw_batch(pipeline, batch, texts, job.settings)
            pending.result()
            pending = writer.submit(_write_images, work, batch, pixels)
            bar.update(len(batch))
        pending.result()
    pipeline.close()
    return time.perf_counter() - started


def _draw_batch(
    pipeline: EnginePipeline,
    batch: Sequence[Planned],
    texts: TextEmbeddings,
    settings: GenerateSettings,
) -> np.ndarray:
    return pipeline.draw(
        texts,
        [image.seed for image in batch],
        settings.steps,
        settings.guidance,
        [image.file_name for image in batch],
    )


def _batches(images: Sequence[Planned], size: int) -> Iterator[Sequence[Planned]]:
    for start in range(0, len(images), size):
        yield images[start : start + size]


def _write_images(work: Path, batch: Sequence[Planned], pixels: np.ndarray) -> int:
    for image, array in zip(batch, pixels, strict=True):
        buffer = io.BytesIO()
        Image.fromarray(array).save(buffer, format="PNG")
        write_bytes(work / image.file_name, buffer.getvalue())
    return len(batch)


def _write_metadata(work: Path, plan: Sequence[Planned], job: _Job) -> None:
    style, model = style_digest(job.token), job.model
    lines = [
        {
            "file_name": image.file_name,
            "class": image.name,
            "index": image.index,
            "prompt": job.prompt(image.name),
            "seed": image.seed,
            "guidance": job.settings.guidance,
            "steps": job.settings.steps,
            "model": model,
            "style": style,
            "sha256": file_sha256(work / image.file_name),
        }
        for image in plan
    ]
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    write_bytes(work / METADATA, text.encode())
