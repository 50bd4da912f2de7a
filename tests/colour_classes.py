"""Pictures whose colour is their class, and classifiers: a student trained in seconds, a random CLIP."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from synthkit.data.images import ImageSet
from tests.tiny_models import tiny_tokenizer

CLASSES = ("blue", "green", "red")
WORDS = {"red": "red square", "green": ("green square", "lawn"), "blue": "blue square"}


def picture(name: str, seed: int, brighter: int = 110) -> Image.Image:
    """A smooth random picture, brighter in the channel of its class, without clipped values."""
    coarse = np.random.default_rng([seed, CLASSES.index(name)]).integers(20, 110, (6, 6, 3), dtype=np.uint8)
    coarse[..., 2 - CLASSES.index(name)] += brighter
    return Image.fromarray(coarse).resize((32, 32), Image.Resampling.BILINEAR)


def class_folders(root: Path, each: int, seed: int, faintest: int = 110) -> Path:
    """Pictures of every class, of which the first shows its class only faintly."""
    for name in CLASSES:
        (root / name).mkdir(parents=True)
        for index in range(each):
            shown = picture(name, seed + index, 110 if index else faintest)
            shown.save(root / name / f"{index:05d}.png")
    return root


def colour_student(root: Path) -> Path:
    """A student that tells the classes apart."""
    from synthkit.learning.fit import Examples, FitSettings, fit
    from synthkit.learning.students import new_student

    images = ImageSet.scan(class_folders(root / "images", 12, seed=500))
    made = new_student("test_resnet", CLASSES, image_size=32)
    fit(made, Examples(images, made.preprocessing), FitSettings(25, 0.003, 16))
    made.save(root / "student")
    return root / "student"


def tiny_clip(folder: Path, size: int = 32) -> Path:
    """CLIP with random weights, as `save_pretrained` writes it."""
    import torch
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel

    layers = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {**layers, "vocab_size": 520, "bos_token_id": 518, "eos_token_id": 519, "pad_token_id": 519}
    torch.manual_seed(0)
    config = CLIPConfig(text, {**layers, "image_size": size, "patch_size": 8}, projection_dim=16)
    model = CLIPModel(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.3)
    model.save_pretrained(folder)
    tiny_tokenizer(folder.parent / "vocabulary").save_pretrained(folder)
    CLIPImageProcessor(size={"shortest_edge": size}, crop_size=size).save_pretrained(folder)
    return folder
