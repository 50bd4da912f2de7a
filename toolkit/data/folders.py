"""Folders of photos as people have them: classes, and the files that cameras, NAS boxes and annotators leave.

    root/<class>/<image>      classes = sorted folder names; nested folders belong to their class

The root of a data set (train/, test/), a folder wrapped in itself and a split taken for a class are refused
with the folder that was meant: they would become a classifier of "train" against "test". One list says what
is bookkeeping, for all who read folders. This module decodes no image.
"""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from synthkit.errors import DataError, abridged

# Names that parts of a data set have; compared without case.
_TRAIN = ("train", "training", "photos", "few_shots", "real", "pool", "images")
_TEST = ("test", "testing", "test_set", "val", "valid", "validation", "dev", "eval", "evaluation", "holdout")
_PARTS = frozenset((*_TRAIN, *_TEST))

# What systems and programs put beside photos; compared without case. Names that begin with a dot are hidden.
_BOOKKEEPING_FOLDERS = frozenset(
    (
        "@eadir",  # Synology's thumbnails, near-copies of the photos
        "@recycle",
        "#recycle",
        "#snapshot",
        "__macosx",  # resource forks in archives
        "lost+found",
        "$recycle.bin",
        "recycler",
        "system volume information",
        "__pycache__",
    )
)
_BOOKKEEPING_FILES = frozenset(
    ("thumbs.db", "ehthumbs.db", "ehthumbs_vista.db", "desktop.ini", "icon\r", "picasa.ini", "classes.toml")
)
# Captions, annotations, lists and settings; a thumbnail (.thm) and an edit list (.aae) of a camera.
_NO_IMAGE_SUFFIXES = frozenset(
    ".txt .json .jsonl .xml .csv .tsv .yaml .yml .toml .md .html .xmp .aae .thm .ini .db .log .cache .npy "
    ".npz .url .lnk".split()
)
_COMMON_IMAGES = frozenset(".jpg .jpeg .png .webp .bmp .gif .tif .tiff".split())


@dataclass
class Listing:
    """The files of some class folders.

    Attributes:
        images: what should be images.
        left_out: bookkeeping and sidecars, which are no images.
        failures: (path, reason) of what cannot be listed or followed.
    """

    images: list[Path] = field(default_factory=list)
    left_out: list[Path] = field(default_factory=list)
    failures: list[tuple[Path, str]] = field(default_factory=list)


def class_folders(root: Path, fewest: int) -> dict[str, list[Path]]:
    """Class name -> its folders, in the order of the names.

    Args:
        root: holds one folder per class.
        fewest: classes that there must be.

    Raises:
        DataError: the folder is missing, empty or of another level, has too few classes, or a name cannot be
            a class's.
    """
    if not root.exists():
        raise DataError(f"no folder {root}; give a folder that holds one folder of images per class")
    if not root.is_dir():
        raise DataError(f"{root} is a file; give a folder that holds one folder of images per class")
    entries = sorted(path for path in root.iterdir() if not _is_bookkeeping(path))
    folders: dict[str, list[Path]] = {}
    for path in entries:
        if path.is_dir():  # macOS writes decomposed letters, others composed ones; a class has one name
            folders.setdefault(unicodedata.normalize("NFC", path.name), []).append(path)
    _refuse_other_levels(root, [path for several in folders.values() for path in several], fewest)
    _refuse_few(root, entries, folders, fewest)
    _refuse_names(root, list(folders))
    return dict(sorted(folders.items()))


def list_images(folder: Path) -> Listing:
    """Contents of a class folder and of the folders in it, in the order of the names."""
    listing = Listing()

    def cannot_list(error: OSError) -> None:
        listing.failures.append((Path(error.filename), f"cannot be listed: {error.strerror}"))

    for here, folders, names in os.walk(folder, followlinks=True, onerror=cannot_list):
        place = Path(here).resolve()
        kept = sorted(name for name in folders if not _is_bookkeeping(Path(here, name)))
        folders[:] = [name for name in kept if not place.is_relative_to(Path(here, name).resolve())]
        _add_files(listing, [Path(here, name) for name in sorted(names)])
    return listing


def _add_files(listing: Listing, paths: Sequence[Path]) -> None:
    stems = {path.stem for path in paths if path.suffix.lower() in _COMMON_IMAGES}
    for path in paths:
        if path.name.startswith("."):
            continue
        if not path.exists():
            listing.failures.append((path, "a link to nothing"))
        elif _is_bookkeeping(path) or _is_sidecar(path, stems):
            listing.left_out.append(path)
        else:
            listing.images.append(path)


def _is_bookkeeping(path: Path) -> bool:
    name = path.name.lower()
    if name.startswith(".") or name in _BOOKKEEPING_FOLDERS | _BOOKKEEPING_FILES:
        return True
    return path.suffix.lower() in _NO_IMAGE_SUFFIXES and not path.is_dir()


def _is_sidecar(path: Path, stems: set[str]) -> bool:
    """True if a file goes with an image of its name: a raw file, a short film, an edit list."""
    return path.suffix.lower() not in _COMMON_IMAGES and bool(path.suffix) and path.stem in stems


def _refuse_other_levels(root: Path, folders: Sequence[Path], fewest: int) -> None:
    """Refuse a root whose folders are not classes but parts of a data set, or one folder wrapped around."""
    inner = {path: set(_folder_names(path)) for path in folders if _holds_folders_only(path)}
    if fewest > 1 and len(folders) == 1 and len(inner.get(folders[0], ())) > 1:
        inside = folders[0]
        raise DataError(f"{root} holds one folder, {inside.name}, which holds the classes; give {inside}")
    siblings = {path.name for path in folders}
    parts = [
        path
        for path, names in inner.items()
        if path.name.lower() in _PARTS
        and (
            names & siblings
            or any(names & others for one, others in inner.items() if one != path)
            or all(one.name.lower() in _PARTS for one in folders)
        )
    ]
    if parts:
        raise DataError(_meant(root, parts))
    if len(folders) >= 2 and all(path.name.lower() in _PARTS for path in folders):
        names = " and ".join(path.name for path in folders)
        raise DataError(
            f"{root} holds {names}, which are parts of a data set and no classes; in each there must be one "
            "folder of images per class"
        )


def _meant(root: Path, parts: Sequence[Path]) -> str:
    """Hint at the folder most likely meant where the root of a data set was given."""
    names = {path.name.lower(): path for path in parts}
    photos = next((names[name] for name in _TRAIN if name in names), None)
    test = next((names[name] for name in _TEST if name in names), None)
    listed = abridged([path.name for path in parts], 4, ", ")
    meant = " ".join(
        f"{option} {path}" for option, path in (("--real-dir", photos), ("--test-dir", test)) if path
    )
    kind = "is a part" if len(parts) == 1 else "are parts"
    return f"{root} holds {listed}, which {kind} of a data set and no class; did you mean {meant}?"


def _holds_folders_only(path: Path) -> bool:
    try:
        entries = [one for one in path.iterdir() if not _is_bookkeeping(one)]
    except OSError:
        return False  # told when its files are listed
    return bool(entries) and all(one.is_dir() for one in entries)


def _folder_names(path: Path) -> Iterator[str]:
    return (one.name for one in path.iterdir() if one.is_dir() and not _is_bookkeeping(one))


def _refuse_few(
    root: Path, entries: Sequence[Path], folders: Mapping[str, Sequence[Path]], fewest: int
) -> None:
    loose = [path for path in entries if path.is_file()]
    if not folders and loose:
        raise DataError(
            f"{root} holds {len(loose)} file(s) such as {loose[0].name} but no class folder; "
            "put the images of each class into a folder named after it"
        )
    if not folders:
        raise DataError(f"{root} is empty; put the images of each class into a folder named after it")
    if len(folders) < fewest:
        only = next(iter(folders))
        raise DataError(f"{root} has one class only, {only!r}; a classifier needs two folders")


def _refuse_names(root: Path, names: Sequence[str]) -> None:
    """Refuse names that no label file can hold, and names that a person takes for the same."""
    for name in names:
        if len(name.splitlines()) != 1:
            raise DataError(f"the folder name {name!r} in {root} holds a line break; rename the folder")
        try:
            name.encode()
        except UnicodeEncodeError:
            shown = os.fsencode(name)
            raise DataError(f"the folder name {shown!r} in {root} is not UTF-8; rename the folder") from None
    alike: dict[str, str] = {}
    for name in names:
        first = alike.setdefault(name.strip().casefold(), name)
        if first != name:
            raise DataError(
                f"the folders {first!r} and {name!r} in {root} differ in case or blanks alone; put the "
                "images of a class into one folder"
            )
