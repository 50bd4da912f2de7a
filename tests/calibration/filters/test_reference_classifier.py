"""Reference classifiers: a student's folder, CLIP's folder, and that company changes no probability."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from synthkit.calibration.filters.filters import fit_filters
from synthkit.calibration.filters.reference_classifier import BATCH, open_classifier
from synthkit.data.images import ImageSet
from synthkit.errors import ModelError
from synthkit.recipes.settings import FilterSettings
from tests.colour_classes import CLASSES, WORDS, class_folders, colour_student, picture, tiny_clip


@pytest.mark.slow
def test_a_probability_is_the_same_to_the_last_bit_in_any_company(tmp_path: Path) -> None:
    classifier = open_classifier(colour_student(tmp_path), WORDS)
    inputs = [classifier.prepare(picture("red", seed)) for seed in range(BATCH)]
    together = classifier.of_class(inputs, ["red"] * BATCH)
    alone = [classifier.of_class([one], ["red"])[0] for one in inputs[:8]]
    assert together[:8].tolist() == alone
    assert classifier.of_class(inputs[::-1], ["red"] * BATCH).tolist() == together[::-1].tolist()


def test_a_clip_folder_classifies_zero_shot(tmp_path: Path) -> None:
    """Probabilities are those of transformers, and what lies below the photos' quantile is rejected."""
    import torch
    from transformers import CLIPModel, CLIPProcessor

    photos = ImageSet.scan(class_folders(tmp_path / "photos", 4, seed=0))
    folder = tiny_clip(tmp_path / "clip")
    words = {"red": "red square", "green": "green square", "blue": "blue square"}
    classifier = open_classifier(folder, words)
    pictures = [picture(name, 7) for name in CLASSES]
    processor = CLIPProcessor.from_pretrained(folder)
    texts = [f"a photo of a {one}." for one in words.values()]
    inputs = processor(text=texts, images=pictures, return_tensors="pt", padding=True)
    with torch.no_grad():
        expected = CLIPModel.from_pretrained(folder)(**inputs).logits_per_image.softmax(1).numpy()
    for column, name in enumerate(words):
        found = classifier.of_class([classifier.prepare(one) for one in pictures], [name] * 3)
        np.testing.assert_allclose(found, expected[:, column], atol=1e-5)
    assert np.ptp(expected) > 0.01  # random weights that answer something
    filters = fit_filters(FilterSettings("class", 0.5, str(folder)), photos, None, words)
    reasons = filters.reasons([(item.path, photos.classes[item.label]) for item in photos.items])
    assert reasons.count("class") == 6
    assert filters.describe()["thresholds"]["class"]["classifier"] == "CLIP, zero-shot"


def test_several_words_are_one_class_to_clip(tmp_path: Path) -> None:
    folder = tiny_clip(tmp_path / "clip")
    one = open_classifier(folder, {"red": "red square", "green": "lawn"})
    twice = open_classifier(folder, {"red": ["red square", "red square"], "green": "lawn"})
    other = open_classifier(folder, {"red": ["red square", "brick"], "green": "lawn"})
    image = [one.prepare(picture("red", 1))]
    first, second, third = (classifier.of_class(image, ["red"])[0] for classifier in (one, twice, other))
    assert second == pytest.approx(first, abs=1e-6) and abs(third - first) > 1e-5


def test_weights_that_lack_a_tensor_are_no_clip(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    clip = tiny_clip(tmp_path / "clip")
    tensors = load_file(clip / "model.safetensors")
    tensors.pop("visual_projection.weight")
    save_file(tensors, clip / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"lack 1 tensors, for example visual_projection.weight"):
        open_classifier(clip, WORDS)
