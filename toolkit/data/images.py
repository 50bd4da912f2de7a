"""Class folders of real or synthetic images, and what turns an image into a student's input.

    root/<class>/<image>      classes = sorted folder names; nested folders belong to their class
    root/classes.toml         optional: folder = "the words used in prompts", or ["a", "list of", "synonyms"]

Decoding and preprocessing live in `synthkit.standalone`, which also runs in a bundle without synthkit. This
module knows no model: images go out as uint8 arrays at the student's size.
"""

from __future__ import annotations

import io
import logging
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from synthkit import standalone
from synthkit.artifacts import digest, file_sha256, is_intact, read_manifest
from synthkit.config import read_toml
from synthkit.data.folders import class_folders, list_images
from synthkit.errors import BadImages, ConfigError, DataError, ModelError, abridged, nearest

log = logging.getLogger(__name__)

CLASS_WORDS = "classes.toml"


@dataclass(frozen=True)
class Preprocessing:
    """Conversion of an image to a student's input, in the words of timm's data config.

    Attributes:
        input_size: (channels, height, width).
        interpolation: Pillow's name of the resampling filter.
        crop_pct: side of the centre crop divided by the side that the image is scaled to.
        crop_mode: "center" cuts the longer side, "squash" distorts, "border" pads with the mean.
        mean: per channel, of pixels scaled to 0..1; applied inside the model.
        std: per channel, of pixels scaled to 0..1; applied inside the model.
    """

    input_size: tuple[int, int, int]
    interpolation: str
    crop_pct: float
    crop_mode: str
    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    def __post_init__(self) -> None:
        problems = [
            (self.input_size[0] != 3, f"input_size {self.input_size} has not 3 channels"),
            (self.interpolation not in standalone.INTERPOLATIONS, f"interpolation {self.interpolation!r}"),
            (self.crop_mode not in standalone.CROP_MODES, f"crop_mode {self.crop_mode!r}"),
            (not 0 < self.crop_pct <= 2, f"crop_pct {self.crop_pct}"),
        ]
        if found := [text for wrong, text in problems if wrong]:
            raise ModelError(f"this preprocessing is not supported: {', '.join(found)}; use another student")

    @classmethod
    def from_timm(cls, data_config: Mapping[str, Any]) -> Preprocessing:
        """From what `timm.data.resolve_model_data_config` gives.

        Raises:
            ModelError: the config asks for something that the bundle's reader cannot do.
        """
        return cls(
            tuple(data_config["input_size"]),
            data_config["interpolation"],
            float(data_config["crop_pct"]),
            data_config.get("crop_mode") or "center",
            tuple(data_config["mean"]),
            tuple(data_config["std"]),
        )

    def to_json(self) -> dict[str, Any]:
        """The content of a bundle's preprocess.json, which `from_timm` reads back."""
        values = asdict(self)
        return {name: list(one) if isinstance(one, tuple) else one for name, one in values.items()}

    def __call__(self, image: Image.Image) -> np.ndarray:
        """Model input of an RGB image, uint8 [height, width, 3]."""
        return standalone.preprocess(image, self.to_json())


def whole_picture(size: int) -> Preprocessing:
    """Preprocessing that keeps all of a photo in view: what tells the classes apart may touch its border."""
    return Preprocessing((3, size, size), "bicubic", 1.0, "squash", (0.5,) * 3, (0.5,) * 3)


@dataclass(frozen=True)
class LabelledImage:
    """One image file: where it is, the index of its class and the SHA-256 of its bytes."""

    path: Path
    label: int
    sha256: str


@dataclass(frozen=True)
class ImageSet:
    """The images of a folder of class folders.

    Attributes:
        root: the folder.
        classes: class names; a label is an index into them.
        items: the images, ordered by class and content.
    """

    root: Path
    classes: tuple[str, ...]
    items: tuple[LabelledImage, ...]

    @classmethod
    def scan(
        cls, root: Path, skip_bad: bool = False, fewest: int = 2, known: Collection[str] = ()
    ) -> ImageSet:
        """Find every image, and decode it once to see that it can be.

        The images of an intact stage folder are not decoded, since the stage itself has written them; nor are
        those of a set whose digest is known.

        Args:
            root: holds one folder per class.
            skip_bad: leave unreadable files out with a warning instead of refusing the folder.
            fewest: classes that there must be.
            known: digests of sets that were found readable before, see `recorded_inputs`.

        Raises:
            BadImages: names every file that cannot be read.
            DataError: the folder is missing, empty, has too few classes or a class without images, or one
                image lies in two classes.
        """
        classes = class_folders(root, fewest)
        if (entries := _entries_of_stage(root)) is not None:
            return cls._of(root, classes, _of_stage(root, classes, entries))
        listed = {name: [list_images(folder) for folder in classes[name]] for name in classes}
        everything = [one for several in listed.values() for one in several]
        _tell_left_out(root, [path for listing in everything for path in listing.left_out])
        failures = [failure for listing in everything for failure in listing.failures]
        files: list[LabelledImage] = []
        for label, listings in enumerate(listed.values()):
            for path in (path for listing in listings for path in listing.images):
                try:
                    files.append(LabelledImage(path, label, file_sha256(path)))
                except OSError as error:
                    failures.append((path, f"cannot be read: {error.strerror}"))
        whole = cls._of(root, classes, files)
        if not failures and whole.digest in known:
            return whole
        failures += [(item.path, reason) for item in files if (reason := _unreadable(item.path))]
        if failures and not skip_bad:
            raise BadImages(failures)
        if failures:
            log.warning("left out %d unreadable file(s): %s", len(failures), _list_failures(failures))
        bad = {path for path, _ in failures}
        found = cls._of(root, classes, [item for item in files if item.path not in bad])
        _refuse_empty_classes(found)
        _refuse_contradictions(found)
        return found

    @classmethod
    def _of(cls, root: Path, classes: Iterable[str], items: Iterable[LabelledImage]) -> ImageSet:
        # By content, so that what is learned from the images does not depend on the names of the files.
        return cls(root, tuple(classes), tuple(sorted(items, key=lambda item: (item.label, item.sha256))))

    def __len__(self) -> int:
        return len(self.items)

    @property
    def labels(self) -> np.ndarray:
        """Class index of every image, int64 [N]."""
        return np.array([item.label for item in self.items], dtype=np.int64)

    @property
    def digest(self) -> str:
        """Digest of classes, labels and contents, wherever the files lie and whatever they are called."""
        return digest([self.classes, sorted((item.label, item.sha256) for item in self.items)])

    def subset(self, indices: Iterable[int]) -> ImageSet:
        """The images at the given positions, with the same classes."""
        return ImageSet(self.root, self.classes, tuple(self.items[int(index)] for index in indices))

    def distinct(self) -> ImageSet:
        """The images without exact copies, so that none is held out of what its copy is learned in."""
        first = {item.sha256: position for position, item in reversed(list(enumerate(self.items)))}
        return self.subset(sorted(first.values()))

    def load(self, preprocessing: Preprocessing) -> np.ndarray:
        """Every image as model input, uint8 [N, height, width, 3].

        Raises:
            BadImages: a file became unreadable since the scan.
        """
        inputs, failures = standalone.read_inputs([item.path for item in self.items], preprocessing.to_json())
        if failures:
            raise BadImages(failures)
        return inputs

    def counts(self) -> dict[str, int]:
        """Class name -> number of images."""
        numbers = np.bincount(self.labels, minlength=len(self.classes))
        return {name: int(number) for name, number in zip(self.classes, numbers, strict=True)}

    def with_classes(self, classes: Sequence[str]) -> ImageSet:
        """The same images, labelled by positions in another list of classes.

        Raises:
            DataError: the folder has a class that the list lacks.
        """
        unknown = [name for name in self.classes if name not in classes]
        if unknown:
            raise DataError(
                f"{self.root} has a class that is not known: {', '.join(map(repr, unknown))}; "
                f"known are {', '.join(classes)}{nearest(unknown[0], classes)}"
            )
        position = [list(classes).index(name) for name in self.classes]
        items = (LabelledImage(item.path, position[item.label], item.sha256) for item in self.items)
        return ImageSet(self.root, tuple(classes), tuple(items))


def _entries_of_stage(root: Path) -> dict[str, dict[str, Any]] | None:
    """Relative path -> entry of the manifest, where a stage has written the folder and nobody touched it."""
    manifest = read_manifest(root)
    return manifest.outputs if manifest and is_intact(root, manifest) else None


def _of_stage(
    root: Path, classes: Mapping[str, Sequence[Path]], entries: Mapping[str, Mapping[str, Any]]
) -> list[LabelledImage]:
    """The images of an intact stage folder, by its manifest alone."""
    labels = {path.name: label for label, paths in enumerate(classes.values()) for path in paths}
    return [
        LabelledImage(root / name, labels[folder], str(entry["sha256"]))
        for name, entry in entries.items()
        if (folder := name.partition("/")[0]) in labels
    ]


def _refuse_empty_classes(images: ImageSet) -> None:
    empty = [name for name, number in images.counts().items() if not number]
    if empty:
        names = ", ".join(map(repr, empty))
        raise DataError(f"no usable image in class {names} of {images.root}; add images or remove the folder")


def _refuse_contradictions(images: ImageSet) -> None:
    """Refuse an image that is labelled as two classes: one of the two is wrong."""
    seen: dict[str, LabelledImage] = {}
    pairs = [
        f"{item.path} is also {first.path}"
        for item in images.items
        if (first := seen.setdefault(item.sha256, item)).label != item.label
    ]
    if pairs:
        raise DataError(
            f"{len(pairs)} image(s) of {images.root} lie in two classes: {abridged(pairs, 5, '; ')}; "
            "remove the wrong one of each pair"
        )


def _tell_left_out(root: Path, paths: Sequence[Path]) -> None:
    if paths:
        names = abridged([str(path.relative_to(root)) for path in paths], 3, ", ")
        log.info("%s: left out %d file(s) that are no images: %s", root, len(paths), names)


def _unreadable(path: Path) -> str:
    """Why a file is not a usable image; empty when it is one."""
    try:
        standalone.open_image(path)
    except standalone.UnusableImage as error:
        return str(error)
    return ""


def _list_failures(failures: Iterable[tuple[Path, str]]) -> str:
    return "; ".join(f"{path} ({reason})" for path, reason in failures)


def class_prompt_names(root: Path, classes: Sequence[str]) -> dict[str, str]:
    """Class name -> the words that a prompt uses: the first of `class_synonyms`.

    Raises:
        ConfigError: as `class_synonyms`.
    """
    return {name: several[0] for name, several in class_synonyms(root, classes).items()}


def class_synonyms(root: Path, classes: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """Class name -> words for it that mean the same: from `root/classes.toml`, else the name itself.

    Raises:
        ConfigError: a key is no class, or a value is neither a text nor a list of texts; all of them at once.
    """
    given = read_toml(root / CLASS_WORDS) if (root / CLASS_WORDS).exists() else {}
    lists = {name: value if isinstance(value, list) else [value] for name, value in given.items()}
    problems = [
        f"there is no folder of the class {name!r}{nearest(name, classes)}"
        for name in given
        if name not in classes
    ]
    problems += [
        f"{name} = {given[name]!r} must be a text in quotes, or a list of them"
        for name, words in lists.items()
        if not words or not all(isinstance(one, str) and one.strip() for one in words)
    ]
    if problems:
        raise ConfigError(f"{root / CLASS_WORDS}: {'; '.join(problems)}")
    return {name: tuple(lists.get(name, [name.replace("_", " ")])) for name in classes}


def png(pixels: np.ndarray) -> bytes:
    """An image, uint8 [H, W, 3] or grey [H, W], as the content of a PNG file."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG")
    return buffer.getvalue()
