"""`metadata.jsonl` of a synthetic set, one line per image with all that decides its bytes, and reuse by it.

Hugging Face's ImageFolder reads the file. An image whose line would be the same need not be generated again,
so that a larger set keeps the images of a smaller one.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from synthkit.artifacts import Manifest, Stage, file_sha256, read_manifest, same_key, write_bytes
from synthkit.recipes.generation.plan import PlannedImage

METADATA = "metadata.jsonl"


@dataclass(frozen=True)
class SetSource:
    """What all images of a set come from.

    Attributes:
        model: name of the generator.
        engines: fingerprint of the engines folder.
        style: digest of the style tokens, or "none".
        negative_prompt: of guidance.
        strength: noise strength of images that start from a photo.
    """

    model: str
    engines: str
    style: str
    negative_prompt: str
    strength: float

    def line(self, image: PlannedImage) -> dict[str, Any]:
        """The line of an image in metadata.jsonl, as JSON data, without the SHA-256 of its file."""
        return {
            "file_name": image.file_name,
            "class": image.name,
            "index": image.index,
            "resample": image.resample,
            "prompt": image.prompt,
            "token": image.token,
            "seed": image.seed,
            "guidance": image.guidance,
            "steps": image.steps,
            "init": image.start.name if image.start else None,
            "init_sha256": image.start.sha256 if image.start else None,
            "strength": self.strength if image.start else None,
            "negative_prompt": self.negative_prompt,
            "model": self.model,
            "engines": self.engines,
            "style": self.style,
        }


def write_metadata(folder: Path, images: Sequence[PlannedImage], source: SetSource) -> None:
    """Write metadata.jsonl of a set whose images are all there."""
    lines = [source.line(image) | {"sha256": file_sha256(folder / image.file_name)} for image in images]
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    write_bytes(folder / METADATA, text.encode())


@dataclass(frozen=True)
class FinishedSet:
    """Images of an earlier run that may be used again.

    Attributes:
        folder: the synthetic set.
        manifest: of the run that wrote it.
        lines: file name -> its line in metadata.jsonl; empty where the file is not the run's own.
        same_key: whether the run was asked for the very same set.
    """

    folder: Path
    manifest: Manifest
    lines: Mapping[str, Mapping[str, Any]]
    same_key: bool

    @classmethod
    def open(cls, folder: Path, stage: Stage) -> FinishedSet | None:
        """Read a set; None where it has no manifest, or another version of the stage wrote it."""
        manifest = read_manifest(folder)
        if manifest is None or manifest.version != stage.version:
            return None
        return cls(folder, manifest, _lines(folder, manifest), same_key(stage, manifest))

    def take_over(self, images: Sequence[PlannedImage], source: SetSource, work: Path) -> None:
        """Link or copy into a folder the images that would be generated with the very same bytes.

        Args:
            images: the images that are asked for.
            source: what they would be generated from.
            work: the folder of the new set; images that it has stay.
        """
        for image in images:
            old, new = self.folder / image.file_name, work / image.file_name
            if not new.exists() and self._same(image, source) and self._whole(old, image.file_name):
                new.parent.mkdir(exist_ok=True)
                link_or_copy(old, new)

    def _same(self, image: PlannedImage, source: SetSource) -> bool:
        line = self.lines.get(image.file_name)
        if line is None:
            # The plan of the same key is the same; but which sample was kept, only the line tells.
            return self.same_key and not self.manifest.metrics.get("rejected")
        # A photo's name says nothing about its content.
        return {**line, "init": None, "sha256": None} == {**source.line(image), "init": None, "sha256": None}

    def _whole(self, path: Path, file_name: str) -> bool:
        entry = self.manifest.outputs.get(file_name, {})
        return path.is_file() and file_sha256(path) == entry.get("sha256")


def _lines(folder: Path, manifest: Manifest) -> dict[str, dict[str, Any]]:
    path = folder / METADATA
    if not path.is_file() or file_sha256(path) != manifest.outputs.get(METADATA, {}).get("sha256"):
        return {}
    lines = [json.loads(text) for text in path.read_text(encoding="utf-8").splitlines()]
    return {line["file_name"]: line for line in lines}


def link_or_copy(source: Path, target: Path) -> None:
    """A hard link, or a copy where the file system has none (exFAT, some network shares)."""
    try:
        target.hardlink_to(source)
    except OSError:
        write_bytes(target, source.read_bytes())
