"""Generators: bundled ones, local diffusers folders and models of the Hugging Face hub.

A generator's folder may hold `classes.toml` (class name = "prompt name"); the generator then knows these
classes and no others. This module knows folders and files, and nothing of what the weights compute.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from synthkit.artifacts import digest, file_sha256
from synthkit.config import read_toml
from synthkit.errors import ConfigError, MissingExtra, ModelError, abridged, nearest

CLASSES = "classes.toml"
INDEX = "model_index.json"
_HERE = Path(__file__).parent
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_WEIGHTS = ("text_encoder", "unet", "vae")
_PATTERNS = ("*.json", "*.txt", "*.safetensors", CLASSES)
_FOLDERS = (*_WEIGHTS, "tokenizer", "scheduler")
_SECOND = ("text_encoder_2", "tokenizer_2")  # of SDXL
_PIPELINES = ("StableDiffusionPipeline", "StableDiffusionXLPipeline")
_WAYS_OUT = "give another generator with --model HUB_ID_OR_DIR, or leave synthetic images out with --no-synth"


def bundled_models() -> dict[str, Path]:
    """Generators that come with synthkit: name -> folder."""
    return {folder.name: folder for folder in sorted(_HERE.iterdir()) if (folder / INDEX).is_file()}


def resolve_model(name_or_dir: str, *, download: bool = True) -> Path:
    """Find a generator's folder and check that it holds every file that the export reads.

    Args:
        name_or_dir: a bundled name, a diffusers folder, or a hub id "org/name".
        download: fetch a hub model; otherwise it must have been fetched before.

    Raises:
        ModelError: the name is unknown, the folder is incomplete, or the hub does not answer.
        MissingExtra: a hub id was given and huggingface_hub is not installed.
    """
    bundled = bundled_models()
    if name_or_dir in bundled:
        return bundled[name_or_dir]
    folder = Path(name_or_dir).expanduser()
    if folder.is_dir():
        return _complete(folder)
    if folder.exists():
        raise ModelError(
            f"{folder} is a single file, not a diffusers folder; make one of a checkpoint with diffusers: "
            "StableDiffusionPipeline.from_single_file(FILE).save_pretrained(DIR)"
        )
    if _HUB_ID.fullmatch(name_or_dir) and not name_or_dir.startswith("."):
        return _complete(_from_hub(name_or_dir, download))
    raise ModelError(
        f"no generator {name_or_dir!r}{nearest(name_or_dir, bundled)}; give a bundled name "
        f"({', '.join(bundled) or 'none here'}), a diffusers folder or a hub id with --model"
    )


def short_name(name_or_dir: str) -> str:
    """Name of a generator without the path: of a local folder its own name, otherwise the name as given."""
    folder = Path(name_or_dir).expanduser()
    return folder.resolve().name if folder.is_dir() else name_or_dir


def refuse_two_encoders(folder: Path) -> None:
    """Refuse to learn a style for a generator with two text encoders.

    Raises:
        ModelError: it is SDXL.
    """
    if (folder / _SECOND[0]).is_dir():
        raise ModelError(
            f"{folder} is SDXL, whose token would need two embeddings, which learn-style does not learn; "
            "learn a style with a Stable Diffusion 1.x or 2.x model, or generate with plain prompts: "
            "`synthkit build-engines`, then `synthkit generate`"
        )


def _complete(folder: Path) -> Path:
    """Return the folder if it holds a whole Stable Diffusion pipeline in safetensors."""
    if not (folder / INDEX).is_file():
        whole = sorted(path.parent for path in folder.glob(f"snapshots/*/{INDEX}"))
        meant = f"--model {whole[-1]}" if whole else "one with --model DIR"
        raise ModelError(f"{folder} is not a diffusers folder: it holds no {INDEX}; give {meant}")
    try:
        index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
        kind = index.get("_class_name")
    except (ValueError, AttributeError):
        raise ModelError(f"{folder / INDEX} is not valid JSON; fetch the model again") from None
    if kind not in _PIPELINES:
        raise ModelError(
            f"{folder} holds a {kind or 'pipeline of unknown kind'}; supported are text-to-image pipelines "
            f"of Stable Diffusion 1.x and 2.x, SD-Turbo and SDXL ({', '.join(_PIPELINES)})"
        )
    second = _SECOND if kind == _PIPELINES[1] else ()
    missing = [f"{name}/" for name in (*_FOLDERS, *second) if not (folder / name).is_dir()]
    missing += [
        f"{name}/*.safetensors"
        for name in (*_WEIGHTS, *second[:1])
        if f"{name}/" not in missing and not list((folder / name).glob("*.safetensors"))
    ]
    if missing:
        raise ModelError(
            f"{folder} lacks {', '.join(missing)}; give a whole diffusers folder with safetensors weights "
            "(pickled .bin or .ckpt weights are not read: save_pretrained(DIR, safe_serialization=True))"
        )
    return folder


def _from_hub(hub_id: str, download: bool) -> Path:
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise MissingExtra("huggingface_hub", "train") from None
    patterns = [INDEX, CLASSES, *(f"{folder}/{one}" for folder in (*_FOLDERS, *_SECOND) for one in _PATTERNS)]
    skipped = ["*.fp16.*", "*.non_ema.*"]
    try:
        folder = snapshot_download(
            hub_id, allow_patterns=patterns, ignore_patterns=skipped, local_files_only=not download
        )
    except (OSError, ValueError) as error:  # the hub's own errors derive from these two
        if not download:
            raise ModelError(
                f"the hub model {hub_id!r} is not on this machine yet; build-engines fetches it "
                "when it runs without --dry-run, or give a local diffusers folder with --model DIR"
            ) from None
        reason = " ".join(str(error).split()).split(". ")[0]
        raise ModelError(
            f"cannot fetch {hub_id!r} from the hub ({type(error).__name__}: {reason}); on a machine without "
            "network, copy the model's diffusers folder here and give it with --model DIR"
        ) from None
    return Path(folder)


def model_fingerprint(model_dir: Path) -> str:
    """Digest of the files that the export reads, by content and name."""
    folders = [model_dir / name for name in (*_FOLDERS, *_SECOND) if (model_dir / name).is_dir()]
    files = [model_dir / INDEX, *(path for folder in folders for path in sorted(folder.iterdir()))]
    if (model_dir / CLASSES).is_file():
        files.append(model_dir / CLASSES)
    read = [path for path in files if path.is_file() and any(path.match(one) for one in _PATTERNS)]
    return digest({path.relative_to(model_dir).as_posix(): file_sha256(path) for path in read})


def base_weights_fingerprint(model_dir: Path) -> str:
    """Digest of the weights that a style token is learned on: those of the text encoders and the UNet."""
    folders = [model_dir / name for name in ("text_encoder", "text_encoder_2", "unet")]
    files = [path for folder in folders for path in sorted(folder.glob("*.safetensors"))]
    return digest({path.relative_to(model_dir).as_posix(): file_sha256(path) for path in files})


def known_prompt_names(model_dir: Path) -> dict[str, str] | None:
    """Prompt names of the classes that the generator knows; None if it is not limited to some classes.

    Raises:
        ConfigError: the folder's classes.toml is broken.
    """
    path = model_dir / CLASSES
    if not path.is_file():
        return None
    return {name: _prompt_name(name, value, path) for name, value in read_toml(path).items()}


def _prompt_name(name: str, value: Any, path: Path) -> str:
    if not isinstance(value, str) or not value.strip():
        raise ConfigError(f'{path}: {name} = {value!r} must be words in quotes, for example "digit seven"')
    return value


def prompt_names(model_dir: Path, classes: Sequence[str], own_names: Mapping[str, str]) -> dict[str, str]:
    """One prompt name per class; see `prompt_synonyms`."""
    own = {name: (given,) for name, given in own_names.items()}
    return {name: several[0] for name, several in prompt_synonyms(model_dir, classes, own).items()}


def prompt_synonyms(
    model_dir: Path, classes: Sequence[str], own_names: Mapping[str, Sequence[str]]
) -> dict[str, tuple[str, ...]]:
    """Prompt names per class, several where the user gave several.

    The user's own names come first, then the generator's, then the class name with _ and - as spaces.

    Args:
        model_dir: the generator's folder, or the engines made of it.
        classes: class names.
        own_names: class -> names in the user's classes.toml; may be partial.

    Raises:
        ModelError: the generator does not know some of the classes; names them and the ways out.
    """
    known = known_prompt_names(model_dir)
    names = {
        name: tuple(_chosen(name, own, known or {}) for own in own_names.get(name, (name,)))
        for name in classes
    }
    if known is None:
        return names
    known_values = {value.casefold() for value in known.values()}
    foreign = [name for name in classes if not {one.casefold() for one in names[name]} <= known_values]
    if foreign:
        raise ModelError(
            f"the generator does not know {', '.join(map(repr, foreign))}; it knows only "
            f"{abridged(list(known), 12, ', ')} (classes.toml beside the photos may map a folder to the "
            f"words of one of these); {_WAYS_OUT}"
        )
    return names


def _chosen(name: str, own: str, known: Mapping[str, str]) -> str:
    # A name that only repeats the class name is no choice of the user's.
    if _without_separators(own) != _without_separators(name):
        return own
    return known.get(name) or _without_separators(name)


def _without_separators(name: str) -> str:
    return name.replace("_", " ").replace("-", " ").strip()
