"""The reference classifier, which tells if an image shows its class: a student or a local CLIP model.

CLIP (Radford et al. 2021, arXiv 2103.00020) is asked zero-shot, "a photo of a {words}." for each class; of
several words for a class it takes the mean embedding. It has never seen the site's photos; a student may have
been trained on them, and is then surer of them than of any other image. Images that a student was trained on,
synthetic ones too, it rates too well. This module knows no threshold.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from synthkit.errors import MissingExtra, ModelError

_TEMPLATE = "a photo of a {words}."

Words = Mapping[str, str | Sequence[str]]
"""Class name -> the words for it in prompts, one or several."""

BATCH = 64
"""Images that a classifier sees at once."""


@dataclass(frozen=True)
class ReferenceClassifier:
    """A classifier as the filters use it.

    Attributes:
        name: what it is, for the manifest.
        classes: names in the order of the probabilities.
        prepare: RGB image -> its input.
        probabilities: inputs of `BATCH` images, stacked -> float64 [BATCH, classes].
    """

    name: str
    classes: tuple[str, ...]
    prepare: Callable[[Image.Image], np.ndarray]
    probabilities: Callable[[np.ndarray], np.ndarray]

    def of_class(self, inputs: Sequence[np.ndarray], names: Sequence[str]) -> np.ndarray:
        """Probability of one named class per image, float64 [N], for at most `BATCH` images.

        The classifier always sees a whole batch, filled up with the last image: in batches of another size
        the same image gets other last digits, and a result may hang on them.

        Args:
            inputs: what `prepare` made of each image.
            names: the class to ask for, per image.
        """
        whole = np.stack([*inputs, *[inputs[-1]] * (BATCH - len(inputs))])
        columns = [self.classes.index(name) for name in names]
        return self.probabilities(whole)[np.arange(len(inputs)), columns]


def open_classifier(folder: Path, words: Words) -> ReferenceClassifier:
    """Load a classifier that knows every class of a set.

    Args:
        folder: what `synthkit train` or `adapt` wrote, a timm folder with labels, or a CLIP folder.
        words: class name -> the words that CLIP is asked with, one or several.

    Raises:
        ModelError: the folder is neither, its weights do not fit, or it does not know a class.
        MissingExtra: torch and its kin are not installed.
    """
    config = _config(folder)
    try:
        is_clip = config.get("model_type") == "clip"
        classifier = _clip_classifier(folder, words) if is_clip else _student_classifier(folder)
    except ModuleNotFoundError as error:
        raise MissingExtra(error.name or "torch", "train") from None
    unknown = [name for name in words if name not in classifier.classes]
    if unknown:
        raise ModelError(
            f"the classifier {folder} does not know the class {', '.join(map(repr, unknown))}, only "
            f"{', '.join(classifier.classes)}; give a student of these classes, or a CLIP folder"
        )
    return classifier


def _config(folder: Path) -> dict[str, Any]:
    try:
        content = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise ModelError(
            f"{folder} is no classifier: it has no readable config.json; give the folder of a student or of "
            "a CLIP model with --classifier"
        ) from None
    return content if isinstance(content, dict) else {}


def _student_classifier(folder: Path) -> ReferenceClassifier:
    from synthkit.learning.students import load_student

    student = load_student(folder)

    def probabilities(inputs: np.ndarray) -> np.ndarray:
        return np.asarray(student.logits(inputs, BATCH).double().softmax(1).numpy())

    return ReferenceClassifier(
        f"student {student.architecture}", student.classes, student.preprocessing, probabilities
    )


def _clip_classifier(folder: Path, words: Words) -> ReferenceClassifier:
    import torch

    model, tokenizer, processor = _clip_parts(folder)
    normalize = torch.nn.functional.normalize

    @torch.no_grad()
    def embedding(one: str | Sequence[str]) -> Any:
        texts = [_TEMPLATE.format(words=text) for text in ([one] if isinstance(one, str) else one)]
        tokens = tokenizer(texts, padding=True, truncation=True, return_tensors="pt")
        return normalize(normalize(model.get_text_features(**tokens), dim=1).mean(0), dim=0)

    text = torch.stack([embedding(one) for one in words.values()])

    def prepare(image: Image.Image) -> np.ndarray:
        return np.asarray(processor(images=image, return_tensors="np")["pixel_values"][0])

    @torch.no_grad()
    def probabilities(inputs: np.ndarray) -> np.ndarray:
        seen = normalize(model.get_image_features(torch.from_numpy(inputs)), dim=1)
        return np.asarray((model.logit_scale.exp() * seen @ text.T).double().softmax(1).numpy())

    return ReferenceClassifier("CLIP, zero-shot", tuple(words), prepare, probabilities)


def _clip_parts(folder: Path) -> tuple[Any, Any, Any]:
    """Model, tokenizer and image processor of a folder: safetensors alone, no code, no network."""
    from transformers import CLIPImageProcessor, CLIPModel, CLIPTokenizer

    place, local = str(folder), {"local_files_only": True}
    try:
        model, found = CLIPModel.from_pretrained(
            place, use_safetensors=True, output_loading_info=True, **local
        )
        parts = (
            CLIPTokenizer.from_pretrained(place, **local),
            CLIPImageProcessor.from_pretrained(place, **local),
        )
    except Exception as error:  # of many kinds; what a user can do is the same for all
        raise _no_clip(folder, " ".join(str(error).split())[:200]) from None
    if wrong := [*found["missing_keys"], *found["mismatched_keys"]]:
        raise _no_clip(folder, f"its weights lack {len(wrong)} tensors, for example {wrong[0]}")
    return model.eval(), *parts


def _no_clip(folder: Path, reason: str) -> ModelError:
    return ModelError(
        f"cannot load CLIP from {folder}: {reason}; it needs config.json, model.safetensors, "
        "preprocessor_config.json, vocab.json and merges.txt"
    )
