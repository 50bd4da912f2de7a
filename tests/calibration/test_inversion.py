"""Style inversion: the vectors alone are trained, a kill costs nothing, and the engines read the token."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("diffusers")
pytest.importorskip("onnxruntime")

import torch

from synthkit import style
from synthkit.calibration import inversion
from synthkit.calibration.inversion import InversionSettings, invert_style
from synthkit.diffusion import DiffusionParts, encode_images, load_parts, noise_prediction_loss, token_ids
from synthkit.engines.pipeline import EnginePipeline
from synthkit.errors import ModelError
from synthkit.style import PROMPT
from tests.tiny_models import IMAGE, WIDTH
from tests.tiny_students import noise

IMAGES = noise(4, IMAGE)
WORDS = ("digit one", "digit two", "letter a", "letter b")
SETTINGS = InversionSettings("<s>", 1, "the", 6, 0.05, 3, 2, 0)


@pytest.fixture
def parts(tiny_model: Path) -> DiffusionParts:
    """Fresh ones, since the tokenizer learns the token."""
    return load_parts(tiny_model)


def run(parts: DiffusionParts, tmp_path: Path, **changes: Any) -> tuple[style.StyleToken, list[float]]:
    return invert_style(parts, IMAGES, WORDS, replace(SETTINGS, **changes), tmp_path / "c.safetensors")


def weights(parts: DiffusionParts) -> dict[str, torch.Tensor]:
    modules = {"text": parts.text_encoder, "unet": parts.unet, "vae": parts.vae}
    return {
        f"{name}.{key}": value.clone()
        for name, one in modules.items()
        for key, value in one.state_dict().items()
    }


def test_the_vectors_are_trained_and_nothing_else(parts: DiffusionParts, tmp_path: Path) -> None:
    before = weights(parts)
    row = parts.text_encoder.get_input_embeddings().weight[parts.tokenizer.convert_tokens_to_ids("the</w>")]
    token, losses = run(parts, tmp_path, vectors=2)
    after = weights(parts)
    assert all(torch.equal(after[key], before[key]) for key in before) and after.keys() == before.keys()
    assert all(one.grad is None for one in parts.text_encoder.parameters())
    assert token.token == "<s>" and token.vectors.shape == (2, WIDTH) and token.vectors.dtype == np.float32
    moved = np.abs(token.vectors - row.detach().numpy()).max(axis=1)
    assert (moved > 0.05).all() and (moved < 1).all(), "each vector left the init word"
    assert len(losses) == 6 and all(np.isfinite(losses))


def fixed_loss(parts: DiffusionParts, vectors: np.ndarray) -> float:
    """The loss of all photos under noise that the fit did not see."""
    ids = token_ids(parts.tokenizer, [PROMPT.format(words=one, token="<s>") for one in WORDS])
    table = torch.cat([parts.text_encoder.get_input_embeddings().weight, torch.from_numpy(vectors)])
    latents = encode_images(parts.vae, IMAGES)
    with torch.no_grad():
        text = inversion._embed(parts, table, ids)
        losses = [
            noise_prediction_loss(parts, latents, text, torch.Generator().manual_seed(1000 + seed))
            for seed in range(20)
        ]
    return float(torch.stack(losses).mean())


def test_the_loss_falls(parts: DiffusionParts, tmp_path: Path) -> None:
    start = parts.text_encoder.get_input_embeddings().weight[inversion._init_id(parts, "the")]
    token, _ = run(parts, tmp_path, steps=40, batch_size=12)
    assert fixed_loss(parts, token.vectors) < fixed_loss(parts, start.detach().numpy()[None]) - 0.01


class Interrupted(Exception):
    pass


def failing_at(count: int) -> Callable[..., torch.Tensor]:
    calls = iter(range(count))

    def loss(*arguments: Any) -> torch.Tensor:
        if next(calls, None) is None:
            raise Interrupted
        return noise_prediction_loss(*arguments)

    return loss


def test_an_interrupted_fit_ends_as_an_uninterrupted_one(
    parts: DiffusionParts, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "whole").mkdir()
    whole, whole_losses = run(parts, tmp_path / "whole", vectors=2)
    with monkeypatch.context() as patch:
        patch.setattr(inversion, "noise_prediction_loss", failing_at(3))
        with pytest.raises(Interrupted):
            run(load_parts(tiny_model), tmp_path, vectors=2)
    with monkeypatch.context() as patch:
        patch.setattr(inversion, "noise_prediction_loss", failing_at(4))  # steps 3 to 6, not 1 and 2
        token, losses = run(load_parts(tiny_model), tmp_path, vectors=2)
    assert np.array_equal(token.vectors, whole.vectors)
    assert losses == whole_losses, "the losses before the interruption are kept"


def test_a_fit_that_was_killed_after_its_last_step_is_done(
    parts: DiffusionParts, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, losses = run(parts, tmp_path)
    monkeypatch.setattr(inversion, "noise_prediction_loss", failing_at(0))
    again, same = run(load_parts(tiny_model), tmp_path)
    assert np.array_equal(again.vectors, whole.vectors) and same == losses


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"init_word": "zebra"}, r"init word 'zebra' is 5 tokens .* --init-word"),
        ({"token": "the</w>"}, r"already knows the token .* --token"),
        ({"vectors": 60}, r"is longer than the model's 77 tokens; give shorter words .* or fewer --vectors"),
    ],
)
def test_what_cannot_be_learned_is_refused(
    parts: DiffusionParts, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ModelError, match=message):
        run(parts, tmp_path, **changes)


def test_a_token_that_was_added_before_is_refused(parts: DiffusionParts, tmp_path: Path) -> None:
    run(parts, tmp_path, steps=1)
    with pytest.raises(ModelError, match="already knows the token '<s>'"):
        run(parts, tmp_path, steps=1)


@pytest.mark.parametrize("vectors", [1, 3])
def test_the_engines_embed_the_token_as_torch_does(
    parts: DiffusionParts, tiny_engines: Path, tmp_path: Path, vectors: int
) -> None:
    token, _ = run(parts, tmp_path, vectors=vectors)
    token.save(tmp_path / "learned_embeds.safetensors", "tiny")
    loaded = style.load(tmp_path / "learned_embeds.safetensors")
    prompt = PROMPT.format(words="digit one", token="<s>")
    found = EnginePipeline.open(tiny_engines).embed([prompt], loaded).hidden

    ids = token_ids(parts.tokenizer, [prompt.replace("<s>", " ".join(token.words))])
    table = torch.cat([parts.text_encoder.get_input_embeddings().weight, torch.from_numpy(token.vectors)])
    with torch.no_grad():
        expected = inversion._embed(parts, table, ids).numpy()
    assert np.abs(found - expected).max() < 1e-4
    plain = EnginePipeline.open(tiny_engines).embed(["A digit one photo in the style of"]).hidden
    assert np.abs(found - plain).max() > 0.01, "the token says something"
