"""`generate --redo`: draws an image of a set again, from its line in metadata.jsonl, and compares bytes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from synthkit.artifacts import file_sha256, fingerprint, read_manifest
from synthkit.data.images import ImageSet, png
from synthkit.diffusion import style_token as style_files
from synthkit.errors import DataError
from synthkit.recipes.generation.generate import METADATA, style_digest
from synthkit.recipes.generation.plan import Photo, Planned, image_file
from synthkit.recipes.generation.sampler import Drawer, Job

_Number = (int, float)
_FIELDS: dict[str, tuple[type, ...]] = {
    "file_name": (str,),
    "class": (str,),
    "index": (int,),
    "attempt": (int,),
    "prompt": (str,),
    "negative_prompt": (str,),
    "token": (str, type(None)),
    "seed": (int,),
    "guidance": _Number,
    "steps": (int,),
    "init": (str, type(None)),
    "init_sha256": (str, type(None)),
    "strength": (*_Number, type(None)),
    "engines": (str,),
    "style": (str,),
    "sha256": (str,),
}


@dataclass(frozen=True)
class Redone:
    """An image that was drawn again.

    Attributes:
        file_name: its path below the set.
        content: the PNG file, as drawn now.
        wanted: SHA-256 that metadata.jsonl has.
    """

    file_name: str
    content: bytes
    wanted: str

    @property
    def sha256(self) -> str:
        """Of what was drawn now."""
        return hashlib.sha256(self.content).hexdigest()

    @property
    def same(self) -> bool:
        """Whether the bytes are those of the set."""
        return self.sha256 == self.wanted


def redo(
    root: Path, file_name: str, engines_dir: Path, style: Path | None, photos: ImageSet | None
) -> Redone:
    """Draw one image of a set again.

    Args:
        root: the synthetic set.
        file_name: the image below it.
        engines_dir: the engines that the set was drawn with.
        style: the style that the set was drawn with; not looked at where it was drawn without.
        photos: the photos that the set started from, if it did.

    Raises:
        DataError: the set has no such image, its line was edited, or it was drawn with something else.
    """
    number, line = _line_of(root, file_name)
    where = f"{root / METADATA}, line {number}"
    _refuse_edited(root, line, where)
    styled = line["style"] != "none"
    _refuse_other(where, "engines", line["engines"], fingerprint(engines_dir), f"--engines {engines_dir}")
    if styled:
        _refuse_other(where, "style", line["style"], style_digest(style), f"--style {style}")
    image = Planned(
        line["class"],
        line["index"],
        line["attempt"],
        line["seed"],
        line["prompt"],
        line["token"],
        line["steps"],
        float(line["guidance"]),
        _photo(line, photos, where) if line["init_sha256"] else None,
    )
    tokens = style_files.load_all(style) if styled and style else ()
    job = Job(engines_dir, tokens, line["negative_prompt"], line["strength"] or 0.0, 1, blank=True)
    drawer = Drawer(job)
    pixels = drawer.draw([image], drawer.gather([image]))
    drawer.close()
    return Redone(file_name, png(pixels[0]), line["sha256"])


def find_set(image: Path, usual: Path) -> tuple[Path, str]:
    """The set that an image belongs to, and its path below it; the file itself need not exist any more.

    Args:
        image: path of the image, or its path below the usual set.
        usual: the workspace's set.

    Raises:
        DataError: no folder above it is a synthetic set.
    """
    for path in (image, usual / image):
        for folder in path.absolute().parents:
            if (folder / METADATA).is_file():
                return folder, path.absolute().relative_to(folder).as_posix()
    raise DataError(
        f"{image} lies in no synthetic set: no folder above it, nor {usual}, holds a {METADATA}; "
        "name an image such as 7/00012.png"
    )


def _line_of(root: Path, file_name: str) -> tuple[int, dict[str, Any]]:
    found = [(number, line) for number, line in _lines(root) if line["file_name"] == file_name]
    if not found:
        raise DataError(f"{root / METADATA} has no image {file_name!r}; names look like 7/00012.png")
    if len(found) > 1:
        numbers = ", ".join(str(number) for number, _ in found)
        raise DataError(f"{root / METADATA} was edited: the lines {numbers} are all of {file_name}")
    return found[0]


def _lines(root: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Lines of metadata.jsonl with their numbers, from 1, each checked."""
    path = root / METADATA
    try:
        texts = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read {path} ({type(error).__name__}); draw the set anew") from None
    for number, text in enumerate(texts, 1):
        problem, line = _parsed(text)
        if problem:
            raise DataError(
                f"{path}, line {number}: {problem}; the file was edited: put it back, or run "
                "`synthkit generate` again, which writes it anew"
            )
        yield number, line


def _parsed(text: str) -> tuple[str, dict[str, Any]]:
    """What is wrong with a line, or nothing, and its content."""
    try:
        line = json.loads(text)
    except ValueError:
        return "is not JSON", {}
    if not isinstance(line, dict):
        return "is not a JSON object", {}
    if missing := [name for name in _FIELDS if name not in line]:
        return f"lacks {', '.join(missing)}", {}
    for name, kinds in _FIELDS.items():
        if not isinstance(line[name], kinds) or isinstance(line[name], bool):
            return f"{name} = {line[name]!r} is of the wrong kind", {}
    return _impossible(line), line


def _impossible(line: Mapping[str, Any]) -> str:
    if line["file_name"] != image_file(line["class"], line["index"]):
        return (
            f"file_name = {line['file_name']!r} is not that of class {line['class']!r}, index {line['index']}"
        )
    if line["seed"] < 0 or line["steps"] < 1 or not 0 <= line["guidance"] < float("inf"):
        return f"seed {line['seed']}, steps {line['steps']}, guidance {line['guidance']}: one is impossible"
    return "" if 0 <= (line["strength"] or 0) <= 1 else f"strength = {line['strength']} must lie in 0 to 1"


def _refuse_edited(root: Path, line: Mapping[str, Any], where: str) -> None:
    """Where the set still has its manifest, metadata.jsonl must be the one that it was finished with."""
    manifest = read_manifest(root)
    written = manifest.outputs.get(METADATA, {}).get("sha256") if manifest else None
    if written and written != file_sha256(root / METADATA):
        raise DataError(
            f"{where}: {METADATA} was changed after the set was finished, so that {line['file_name']} cannot "
            "be drawn from it; put it back, or run `synthkit generate` again, which writes it anew"
        )


def _refuse_other(where: str, what: str, wanted: str, found: str, flag: str) -> None:
    if wanted != found:
        raise DataError(
            f"{where}: drawn with other {what} ({wanted[:12]}) than {flag} ({found[:12]}); "
            f"name those of the set with --{what}"
        )


def _photo(line: Mapping[str, Any], photos: ImageSet | None, where: str) -> Photo:
    for item in photos.items if photos else ():
        if item.sha256 == line["init_sha256"]:
            return Photo(item.path, line["init"], item.sha256)
    raise DataError(
        f"{where}: the image starts from the photo {line['init']} ({line['init_sha256'][:12]}), which "
        f"{photos.root if photos else 'no --real-dir'} does not hold; name its folder with --real-dir"
    )
