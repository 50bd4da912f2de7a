"""Style inversion: the vectors alone are trained, a kill costs nothing, and the engines read the token."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("diffusers")
pytest.importorskip("onnxruntime")

import torch

from synthkit.calibration import textual_inversion as inversion
from synthkit.calibration.textual_inversion import (
    Inversion,
    InversionSettings,
    Preview,
    invert_style,
    untrained_style,
)
from synthkit.diffusion import style_token as style
from synthkit.diffusion.parts import (
    DiffusionParts,
    encode_images,
    load_parts,
    noise_prediction_loss,
    token_ids,
)
from synthkit.diffusion.style_token import PROMPT
from synthkit.engines.diffusion.pipeline import EnginePipeline
from synthkit.errors import ConfigError, ModelError
from tests.tiny_models import IMAGE, WIDTH
from tests.tiny_students import noise

IMAGES = noise(4, IMAGE)
WORDS = ("digit one", "digit two", "letter a", "letter b")
SETTINGS = InversionSettings("<s>", 1, "the", 6, 0.05, 3, 2, 0)


@pytest.fixture
def parts(tiny_model: Path) -> DiffusionParts:
    """Fresh ones, since the tokenizer learns the token."""
    return load_parts(tiny_model)


def run(
    parts: DiffusionParts, tmp_path: Path, preview: Preview | None = None, **changes: Any
) -> tuple[style.StyleToken, list[float]]:
    fit = fitted(parts, tmp_path, preview, **changes)
    return fit.token, fit.losses


def fitted(
    parts: DiffusionParts,
    tmp_path: Path,
    preview: Preview | None = None,
    words: Sequence[str] = WORDS,
    **changes: Any,
) -> Inversion:
    latents = encode_images(parts.vae, IMAGES)
    return invert_style(
        parts, latents, words, replace(SETTINGS, **changes), tmp_path / "c.safetensors", preview
    )


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


@pytest.mark.slow
def test_the_loss_falls(parts: DiffusionParts, tmp_path: Path) -> None:
    start = parts.text_encoder.get_input_embeddings().weight[inversion._init_id(parts, "the")]
    token, _ = run(parts, tmp_path, steps=40, batch_size=12)
    # By .013 to .023 over five seeds, from .77.
    assert fixed_loss(parts, token.vectors) < fixed_loss(parts, start.detach().numpy()[None]) - 0.005


class Interrupted(Exception):
    pass


def failing_at(count: int) -> Callable[..., torch.Tensor]:
    calls = iter(range(count))

    def loss(*arguments: Any) -> torch.Tensor:
        if next(calls, None) is None:
            raise Interrupted
        return noise_prediction_loss(*arguments)

    return loss


@pytest.mark.slow
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
        ({"init_word": "zebra"}, r"init word 'zebra' is 5 tokens .* learn-style.init_word=WORD"),
        ({"token": "the</w>"}, r"already knows the token .* --token"),
        ({"vectors": 60}, r"longer than the model's 77 tokens; give shorter words .* learn-style.vectors"),
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


def loss_of(values: Sequence[float]) -> Callable[..., torch.Tensor]:
    """A loss whose gradients by the vectors are these numbers, one batch after the other."""
    factors = iter(values)

    def loss(prompts: Any, latents: torch.Tensor, vectors: torch.Tensor, *rest: Any) -> torch.Tensor:
        return vectors.sum() * next(factors)

    return loss


def test_accumulated_batches_make_one_step_of_their_mean_gradient(
    parts: DiffusionParts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = parts.text_encoder.get_input_embeddings().weight[inversion._init_id(parts, "the")].numpy()
    monkeypatch.setattr(torch.optim, "AdamW", torch.optim.SGD)
    monkeypatch.setattr(inversion, "_loss", loss_of([1, 2, 6, 4, 4, 4]))
    token, losses = run(parts, tmp_path, steps=2, accumulate=3, lr=0.5)
    assert np.allclose(start - token.vectors, 0.5 * (3 + 4), atol=1e-5) and len(losses) == 2


def test_a_cosine_schedule_falls_from_the_peak_towards_zero() -> None:
    cosine = replace(SETTINGS, schedule="cosine", steps=4)
    rates = [inversion._learning_rate(cosine, step) / SETTINGS.lr for step in range(5)]
    assert rates == pytest.approx([1, 0.8535534, 0.5, 0.1464466, 0])
    assert [inversion._learning_rate(SETTINGS, step) for step in range(3)] == [SETTINGS.lr] * 3


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{"schedule": "cosine"}, {"accumulate": 2}, {"early_stop": 2}])
def test_an_interrupted_fit_of_every_kind_ends_as_an_uninterrupted_one(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any]
) -> None:
    words = ("one", "one", "two", "two")
    (tmp_path / "whole").mkdir()
    whole = fitted(load_parts(tiny_model), tmp_path / "whole", words=words, **changes)
    with monkeypatch.context() as patch:
        real, calls = inversion._gradient_step, iter(range(3))

        def failing(*arguments: Any) -> None:
            if next(calls, None) is None:
                raise Interrupted
            real(*arguments)

        patch.setattr(inversion, "_gradient_step", failing)
        with pytest.raises(Interrupted):
            fitted(load_parts(tiny_model), tmp_path, words=words, **changes)
    again = fitted(load_parts(tiny_model), tmp_path, words=words, **changes)
    assert np.array_equal(again.token.vectors, whole.token.vectors)
    assert (again.losses, again.held_out) == (whole.losses, whole.held_out)


@pytest.mark.slow
@pytest.mark.parametrize(("mixed", "kind"), [("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_mixed_precision_learns_nearly_the_same(
    parts: DiffusionParts, tiny_model: Path, tmp_path: Path, mixed: str, kind: torch.dtype
) -> None:
    (tmp_path / "half").mkdir()
    whole, _ = run(parts, tmp_path, steps=3)
    kinds: set[torch.dtype] = set()
    halved = load_parts(tiny_model)
    hook = halved.unet.conv_in.register_forward_hook(lambda module, given, answer: kinds.add(answer.dtype))
    half, _ = run(halved, tmp_path / "half", steps=3, mixed_precision=mixed)
    hook.remove()
    assert kinds == {kind} and half.vectors.dtype == np.float32
    moved, difference = (np.abs(whole.vectors - one).mean() for one in (0, half.vectors))
    assert 0 < difference < 0.2 * moved


def test_half_precision_scales_the_loss_and_skips_what_overflows(
    parts: DiffusionParts, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inversion, "_loss", loss_of([1, 1]))
    twice, _ = run(parts, tmp_path, steps=2)
    (tmp_path / "half").mkdir()
    monkeypatch.setattr(inversion, "_loss", loss_of([1, 1e38, 1]))  # 1e38 * 1024 is infinite
    half, _ = run(load_parts(tiny_model), tmp_path / "half", steps=3, mixed_precision="fp16")
    assert np.allclose(half.vectors, twice.vectors, atol=1e-6), "one of three steps was left out"


def held_out_losses(monkeypatch: pytest.MonkeyPatch, values: Sequence[float]) -> None:
    """Let the evaluations of held-out photos give these losses."""
    answers = iter(values)
    monkeypatch.setattr(
        inversion, "_evaluate", lambda prompts, latents, held, state, _: state.record(next(answers))
    )


def test_the_best_vectors_are_kept_and_the_fit_stops_early(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ("one", "one", "two", "two")
    (tmp_path / "short").mkdir()
    held_out_losses(monkeypatch, [5, 4, 3])
    short = fitted(load_parts(tiny_model), tmp_path / "short", words=words, steps=4, early_stop=2)
    held_out_losses(monkeypatch, [5, 4, 3, 3.5, 3.2, 1])
    long = fitted(load_parts(tiny_model), tmp_path, words=words, steps=20, early_stop=2)
    assert long.held_out == {0: 5, 2: 4, 4: 3, 6: 3.5, 8: 3.2}, "two evaluations without a lower loss end it"
    assert len(long.losses) == 8 and np.array_equal(long.token.vectors, short.token.vectors)


@pytest.mark.slow
def test_held_out_photos_are_never_learned_from_and_meet_the_same_noise(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts, words = load_parts(tiny_model), ("one", "one", "two", "two")
    latents = encode_images(parts.vae, IMAGES)
    learned, held = set(), set()
    evaluations: list[tuple[torch.Tensor, ...]] = []

    def watch(parts: Any, batch: torch.Tensor, text: torch.Tensor, generator: Any) -> torch.Tensor:
        numbers = {next(i for i, one in enumerate(latents) if torch.equal(one, row)) for row in batch}
        (learned if torch.is_grad_enabled() else held).update(numbers)
        if not torch.is_grad_enabled():
            evaluations.append((batch, generator.get_state()))
        return noise_prediction_loss(parts, batch, text, generator)

    monkeypatch.setattr(inversion, "noise_prediction_loss", watch)
    fit = fitted(parts, tmp_path, words=words, steps=4, early_stop=9, batch_size=64)
    assert learned | held == {0, 1, 2, 3} and not learned & held and len(held) == 2
    assert len(fit.held_out) == 3 and len(evaluations) == 6
    assert all(torch.equal(*pair) for pair in zip(evaluations[0], evaluations[2], strict=True))
    assert not torch.equal(evaluations[0][1], evaluations[1][1]), "the second batch meets other noise"


def test_nothing_can_be_held_out_of_single_photos(parts: DiffusionParts, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"early_stop holds photos out, but no class has two of the 4"):
        run(parts, tmp_path, early_stop=1)


def test_the_preview_is_shown_before_the_first_step_and_on_time(
    parts: DiffusionParts, tiny_model: Path, tmp_path: Path
) -> None:
    seen: list[tuple[int, torch.Tensor]] = []
    plain, _ = run(parts, tmp_path)
    (tmp_path / "shown").mkdir()
    watch = Preview(4, [2, 0], lambda step, text: seen.append((step, text)))
    shown, _ = run(load_parts(tiny_model), tmp_path / "shown", watch)
    assert [step for step, _ in seen] == [0, 4] and seen[0][1].shape == (2, 77, WIDTH)
    assert not torch.equal(seen[0][1], seen[1][1]) and not seen[0][1].requires_grad
    assert np.array_equal(shown.vectors, plain.vectors), "evaluation changes nothing"


def test_the_control_is_as_long_as_a_word_and_owes_nothing_to_the_photos(
    parts: DiffusionParts, tiny_model: Path
) -> None:
    settings = replace(SETTINGS, vectors=4)
    table = parts.text_encoder.get_input_embeddings().weight.numpy()
    control = untrained_style(parts, WORDS, settings)
    assert control.token.vectors.shape == (4, WIDTH) and (control.losses, control.held_out) == ([], {})
    lengths = np.linalg.norm(control.token.vectors, axis=1)
    usual = np.sqrt((table.mean(0) ** 2 + table.std(0) ** 2).sum())
    assert (np.abs(lengths / usual - 1) < 0.5).all()
    assert len(np.unique(control.token.vectors)) == 4 * WIDTH
    again = untrained_style(load_parts(tiny_model), WORDS[:1], replace(settings, steps=99))
    assert np.array_equal(again.token.vectors, control.token.vectors)
    others = [
        untrained_style(load_parts(tiny_model), WORDS, replace(settings, seed=1)),
        untrained_style(load_parts(tiny_model), WORDS, settings, 1),
    ]
    assert not any(np.allclose(one.token.vectors, control.token.vectors) for one in others)


@pytest.mark.slow
def test_a_second_token_is_learned_beside_the_first(
    parts: DiffusionParts, tiny_model: Path, tmp_path: Path
) -> None:
    run(parts, tmp_path, steps=1)
    (tmp_path / "two").mkdir()
    (tmp_path / "alone").mkdir()
    beside, losses = run(parts, tmp_path / "two", token="<s-2>")
    alone, same = run(load_parts(tiny_model), tmp_path / "alone", token="<s-2>")
    assert np.array_equal(beside.vectors, alone.vectors) and losses == same
