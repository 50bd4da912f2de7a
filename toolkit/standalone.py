#!/usr/bin/env python3
"""Classify images with a synthkit bundle: NumPy, Pillow and onnxruntime alone.

    python predict.py IMAGE... [--top N] [--json]

This file is `synthkit/standalone.py` and lies in every bundle as `predict.py`, so that the toolkit and a bare
device read and preprocess an image by the very same code. It imports nothing of synthkit.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
from PIL import Image, ImageOps, JpegImagePlugin, UnidentifiedImageError

# onnxruntime collects usage data from version 1.29 on unless this is set before it is imported.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "box", "hamming", "lanczos")
CROP_MODES = ("center", "squash", "border")

LABELS = "labels.txt"
"""File of a bundle with the class names in the order of the logits."""

CONFIDENCE = "confidence.json"
"""File of a bundle that says below which probability an answer is "unknown", where that was fitted."""

UNKNOWN = "unknown"

_MOST_ELONGATED = 200  # a longer strip grows to gigabytes when its short side is scaled to model size
_SIXTEEN_TO_EIGHT_BITS = 257  # 65535 / 255
_LARGEST_JPEG = 4  # times Pillow's own limit of 89 million pixels: phones have 200 million, a bomb has more
_NEW_SUBFILE_TYPE, _SUB_IFDS, _DNG_VERSION = 254, 330, 50706  # tags of TIFF and DNG
_WEB_PAGE = (b"<!doctype html", b"<html", b"<?xml")
_BATCH = 32


class UnusableImage(Exception):
    """A file cannot be read as an image; its text is the short reason."""


def open_image(source: str | Path | IO[bytes]) -> Image.Image:
    """The picture of a file as a person sees it: upright, RGB, 8 bit, transparency on white.

    A JPEG of more pixels than Pillow reads at once, as phones of 100 and 200 megapixels write it, is scaled
    down while it is decoded.

    Args:
        source: the file's path, or the open file.

    Raises:
        UnusableImage: missing, empty, not an image, truncated, a camera's raw file, or a decompression bomb.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's remarks about odd metadata; the pixels decide
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            if isinstance(source, (str, Path)):
                with Path(source).open("rb") as stream:
                    image = _decode(stream)
            else:
                image = _decode(source)
    except UnusableImage:
        raise
    except FileNotFoundError:
        raise UnusableImage("no such file") from None
    except (Image.DecompressionBombWarning, Image.DecompressionBombError):
        raise UnusableImage(f"more than {Image.MAX_IMAGE_PIXELS} pixels, a decompression bomb") from None
    except UnidentifiedImageError:
        raise UnusableImage(_unidentified(source)) from None
    except Exception as error:  # decoders raise OSError, SyntaxError, struct.error, ValueError...
        raise UnusableImage(_short(error)) from None
    return _as_rgb(image)  # our own code: an error in it is no fault of the photo


def _decode(stream: IO[bytes]) -> Image.Image:
    """An image in any mode, loaded and turned upright."""
    image = _opened(stream)
    if _is_raw(image):
        raise UnusableImage("a camera's raw file, of which Pillow reads a thumbnail; convert it to JPEG")
    image.load()
    if max(image.size) > _MOST_ELONGATED * min(image.size):
        raise UnusableImage(
            f"{image.width}x{image.height} pixels, one side over {_MOST_ELONGATED} times the other"
        )
    return ImageOps.exif_transpose(image) or image


def _opened(stream: IO[bytes]) -> Image.Image:
    """The file, opened; a JPEG that is too large for `Image.open` is set to half its size."""
    try:
        return Image.open(stream)
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as bomb:
        stream.seek(0)
        try:
            image = JpegImagePlugin.JpegImageFile(stream)  # unlike Image.open, it does not count pixels
        except SyntaxError:  # no JPEG
            raise bomb from None
        limit = Image.MAX_IMAGE_PIXELS or 0
        if image.width * image.height > _LARGEST_JPEG * limit:
            raise
        image.draft("RGB", (image.width // 2, image.height // 2))
        return image


def _is_raw(image: Image.Image) -> bool:
    """Whether a TIFF is a raw file: its first page is a reduced image, and the pixels lie in SubIFDs."""
    tags = getattr(image, "tag_v2", {})
    return _DNG_VERSION in tags or (tags.get(_NEW_SUBFILE_TYPE) == 1 and _SUB_IFDS in tags)


def as_seen(image: Image.Image) -> Image.Image:
    """An image as a person sees it: upright, RGB, 8 bit, transparency on white.

    Args:
        image: loaded, in any mode.

    Raises:
        UnusableImage: its pixel values fit neither 8 nor 16 bits.
    """
    return _as_rgb(ImageOps.exif_transpose(image) or image)


def _as_rgb(image: Image.Image) -> Image.Image:
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        return Image.fromarray(_eight_bits(np.asarray(image), image.mode)).convert("RGB")
    if "transparency" not in image.info and image.mode not in ("RGBA", "LA", "PA"):
        return image.convert("RGB")
    rgba = image.convert("RGBA")
    if rgba.getchannel("A").getextrema() == (0, 0):  # not an invisible photo: the alpha was left unset
        return rgba.convert("RGB")
    return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")


def _eight_bits(values: np.ndarray, mode: str) -> np.ndarray:
    """Integers are taken as 16 bit; floats as 0..1, or as 0..255 when one exceeds 1."""
    scale = 1 / _SIXTEEN_TO_EIGHT_BITS if mode != "F" else 255.0 if values.max() <= 1 else 1.0
    scaled = values.astype(np.float64) * scale
    if not (scaled.min() >= 0 and scaled.max() <= 255):
        raise UnusableImage(f"pixel values from {values.min()} to {values.max()} fit neither 8 nor 16 bits")
    return np.round(scaled).astype(np.uint8)


def _unidentified(source: str | Path | IO[bytes]) -> str:
    """What a file is, by its content, that Pillow cannot read."""
    if isinstance(source, (str, Path)):
        with Path(source).open("rb") as stream:
            head = stream.read(64)
    else:
        source.seek(0)
        head = source.read(64)
    if not head:
        return "empty file"
    brand = head[8:12] if head[4:8] == b"ftyp" else b""
    if brand in (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1"):
        return "HEIC photo, which Pillow cannot read; convert it to JPEG"
    if head.startswith(b"version https://git-lfs"):
        return "a Git LFS pointer and not the image; fetch it with `git lfs pull`"
    if brand == b"crx " or head.startswith((b"FUJIFILMCCD-RAW", b"IIU\0", b"IIRO", b"MMOR")):
        return "a camera's raw file; convert it to JPEG"
    if brand:
        return "a video or a format that Pillow cannot read; give pictures"
    if head.startswith(b"%PDF"):
        return "a PDF and not an image"
    return "a web page and not an image" if head.lstrip().lower().startswith(_WEB_PAGE) else "not an image"


def _short(error: Exception) -> str:
    text = " ".join((getattr(error, "strerror", None) or str(error)).split())
    return text[:120] or type(error).__name__


def preprocess(image: Image.Image, config: Mapping[str, Any]) -> np.ndarray:
    """Model input, uint8 [height, width, 3], as timm's and torchvision's evaluation transform cuts it.

    The mean and the standard deviation of the config are applied inside the model, not here.

    Args:
        image: an RGB image.
        config: the content of preprocess.json.
    """
    height, width = (int(side) for side in config["input_size"][-2:])
    scaled = [int(side / config["crop_pct"]) for side in (height, width)]
    names = getattr(Image, "Resampling", Image)  # Pillow before 9.1 has them in the module itself
    resample = getattr(names, config["interpolation"].upper())
    resized = image.resize(_resized_size(image.size, scaled, config["crop_mode"]), resample)
    mean = [round(255 * value) for value in config["mean"]]
    return _centre(np.asarray(resized), height, width, mean if config["crop_mode"] == "border" else [0, 0, 0])


def _resized_size(size: tuple[int, int], scaled: Sequence[int], crop_mode: str) -> tuple[int, int]:
    """(width, height) before the centre crop; the rounding is timm's, case by case."""
    (width, height), (to_height, to_width) = size, scaled
    if crop_mode == "squash":
        return to_width, to_height
    if crop_mode == "center" and to_height == to_width:
        short, long = to_width, int(to_width * max(size) / min(size))
        return (short, long) if width <= height else (long, short)
    choose = max if crop_mode == "border" else min
    ratio = choose(height / to_height, width / to_width)
    return max(1, round(width / ratio)), max(1, round(height / ratio))


def _centre(pixels: np.ndarray, height: int, width: int, border: Sequence[int]) -> np.ndarray:
    rows, top = _window(pixels.shape[0], height)
    columns, left = _window(pixels.shape[1], width)
    inner = pixels[rows, columns]
    canvas = np.empty((height, width, 3), np.uint8)
    canvas[:] = border
    canvas[top : top + inner.shape[0], left : left + inner.shape[1]] = inner
    return canvas


def _window(have: int, want: int) -> tuple[slice, int]:
    """What to take of one axis, and where to put it."""
    if have <= want:
        return slice(0, have), (want - have) // 2
    start = round((have - want) / 2)
    return slice(start, start + want), 0


def softmax(logits: np.ndarray) -> np.ndarray:
    """Probabilities along the last axis."""
    powers = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return np.asarray(powers / powers.sum(axis=-1, keepdims=True))


def rank(logits: np.ndarray, labels: Sequence[str], top: int) -> list[list[Any]]:
    """The most likely labels of one image, best first, as [label, probability]."""
    scores = softmax(logits.astype(np.float64))
    order = np.argsort(-scores, kind="stable")[:top]
    return [[labels[i], round(float(scores[i]), 6)] for i in order]


def prediction(path: str | Path, logits: np.ndarray, labels: Sequence[str], top: int) -> dict[str, Any]:
    """One entry of "predictions": path, label, score and top."""
    best = rank(logits, labels, max(1, top))
    return {"path": str(path), "label": best[0][0], "score": best[0][1], "top": best}


def decided(one: Mapping[str, Any], confidence: Mapping[str, Any], top: int) -> dict[str, Any]:
    """A prediction as the bundle's confidence lets it stand.

    Args:
        one: what `prediction` gives with every label in its "top".
        confidence: the content of confidence.json; empty where there is none.
        top: how many labels to keep in "top".

    Returns:
        The prediction; its label is "unknown" where the score is below the threshold, and "set" holds the
        labels that are likely enough to be the right one (see `calibration/confidence.py` of synthkit).
    """
    found = {**one, "top": one["top"][: max(1, top)]}
    if one["score"] < (confidence.get("threshold") or 0):
        found["label"] = UNKNOWN
    if (least := confidence.get("conformal_threshold")) is not None:
        found["set"] = [label for label, score in one["top"] if score >= least]
    return found


def read_inputs(
    paths: Sequence[str | Path], config: Mapping[str, Any]
) -> tuple[np.ndarray, list[tuple[Path, str]]]:
    """Model inputs of the readable files, uint8 [N, height, width, 3], and (path, reason) of every other."""
    inputs, failures = [], []
    for path in paths:
        try:
            inputs.append(preprocess(open_image(path), config))
        except UnusableImage as error:
            failures.append((Path(path), str(error)))
    height, width = config["input_size"][-2:]
    return np.stack(inputs) if inputs else np.empty((0, height, width, 3), np.uint8), failures


def read_labels(folder: Path) -> list[str]:
    """The class names of a bundle, in the order of the logits."""
    return (folder / LABELS).read_text(encoding="utf-8").rstrip("\n").split("\n")


def read_confidence(folder: Path) -> dict[str, Any]:
    """The content of a bundle's confidence.json; empty where it has none."""
    path = folder / CONFIDENCE
    return dict(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else {}


def in_batches(run: Callable[[np.ndarray], np.ndarray], inputs: np.ndarray) -> np.ndarray:
    """Logits [N, classes] of one or more inputs, computed a few at a time to bound the memory."""
    if len(inputs) <= _BATCH:
        return run(inputs)
    return np.concatenate([run(inputs[start : start + _BATCH]) for start in range(0, len(inputs), _BATCH)])


def main(arguments: Sequence[str] | None = None) -> int:
    """Classify the images named on the command line with the bundle that this file lies in."""
    parser = argparse.ArgumentParser(description="Classify images with the bundle that this file lies in.")
    parser.add_argument("images", nargs="+", metavar="IMAGE")
    parser.add_argument("--top", type=int, default=3, metavar="N", help="labels per image [default: 3]")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args(arguments)
    folder = Path(__file__).resolve().parent
    for stream in (sys.stdout, sys.stderr):  # a file's name may hold what the console cannot show
        stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    try:
        import onnxruntime
    except ModuleNotFoundError as error:
        if error.name != "onnxruntime":
            return _fail(f"onnxruntime does not load: {_short(error)}")
        return _fail("onnxruntime is not installed; install it with: pip install onnxruntime")
    except ImportError as error:  # there, but for another NumPy or without a library of the system
        return _fail(f"onnxruntime does not load: {_short(error)}")
    config = json.loads((folder / "preprocess.json").read_text(encoding="utf-8"))
    inputs, failures = read_inputs(options.images, config)
    if failures:
        return _fail("; ".join(f"{path}: {reason}" for path, reason in failures))
    session = onnxruntime.InferenceSession(str(folder / "model.onnx"), providers=["CPUExecutionProvider"])
    logits = in_batches(lambda batch: session.run(["logits"], {"image": batch})[0], inputs)
    labels, confidence = read_labels(folder), read_confidence(folder)
    pairs = zip(options.images, logits)  # noqa: B905 - Python 3.8 and 3.9 know no strict=
    ranked = [prediction(path, row, labels, len(labels)) for path, row in pairs]
    found = [decided(one, confidence, options.top) for one in ranked]
    print(json.dumps({"predictions": found}, ensure_ascii=False) if options.json else as_text(found))
    return 0


def as_text(predictions: Sequence[Mapping[str, Any]]) -> str:
    """One line per image: path, then the labels with their probabilities."""
    return "\n".join(f"{one['path']}: {_answer_text(one)}" for one in predictions)


def _answer_text(one: Mapping[str, Any]) -> str:
    ranked = ", ".join(f"{label} {score:.3f}" for label, score in one["top"])
    text = f"{UNKNOWN} ({ranked})" if one["label"] == UNKNOWN != one["top"][0][0] else ranked
    return f"{text}; one of: {', '.join(one['set']) or 'none of the labels'}" if "set" in one else text


def _fail(text: str) -> int:
    print(f"error: {text}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
