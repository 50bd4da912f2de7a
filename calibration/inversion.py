"""Dataset style inversion: one new word is fitted to the look of all real photos of a site.

Li et al. 2024, arXiv 2403.19866, section on DSI: everything but the embedding of the new token is frozen, and

    min_v  E_{(x, class), eps, t} || eps - eps_theta(z_t, t, c) ||^2

    c = the text embedding of "A {class} photo in the style of <token>"

The prompt names each photo's true class, so that the token keeps what the class does not explain. The paper
gives no learning rate and no batch size; those are ours (see `synthkit.recipes.settings.StyleSettings`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from synthkit.checkpoints import load_checkpoint, save_checkpoint, step_generator
from synthkit.diffusion import DiffusionParts, encode_images, noise_prediction_loss, token_ids
from synthkit.errors import ModelError
from synthkit.style import PROMPT, StyleToken


@dataclass(frozen=True)
class InversionSettings:
    """How the token is fitted.

    Attributes:
        token: its name.
        vectors: embedding vectors that stand for it.
        init_word: word whose embedding they start from.
        steps: gradient steps.
        lr: AdamW's learning rate, constant.
        batch_size: noised latents per step.
        checkpoint_every: steps between two checkpoints.
        seed: of order, noise and timesteps.
    """

    token: str
    vectors: int
    init_word: str
    steps: int
    lr: float
    batch_size: int
    checkpoint_every: int
    seed: int


class _Vectors(torch.nn.Module):
    """The trained vectors [n, width] and each step's loss, as a module so that a checkpoint can hold them."""

    def __init__(self, start: torch.Tensor, steps: int) -> None:
        super().__init__()
        self.vectors = torch.nn.Parameter(start.clone())
        self.losses: torch.Tensor
        self.register_buffer("losses", torch.zeros(steps))


def invert_style(
    parts: DiffusionParts,
    images: np.ndarray,
    words: Sequence[str],
    settings: InversionSettings,
    checkpoint: Path,
) -> tuple[StyleToken, list[float]]:
    """Fit the token; goes on from the checkpoint when there is one.

    Args:
        parts: the frozen generator.
        images: real photos at the generator's size, uint8 [N, H, W, 3].
        words: each photo's class in words.
        settings: how.
        checkpoint: file for the state of the fit.

    Returns:
        The token, and the loss of every step.

    Raises:
        ModelError: the token is already a word of the model, the init word is none, or a prompt is too long.
    """
    style = StyleToken(settings.token, np.zeros((settings.vectors, 1), np.float32))
    table = parts.text_encoder.get_input_embeddings().weight
    start = table[_init_id(parts, settings.init_word)].repeat(settings.vectors, 1)
    rows = _add_words(parts, style)
    ids = _prompt_ids(parts, style, words, rows)
    table = F.pad(table, (0, 0, 0, max(0, int(rows.max()) + 1 - len(table))))
    latents = encode_images(parts.vae, images)
    trained = _Vectors(start, settings.steps)
    optimizer = torch.optim.AdamW(trained.parameters(), lr=settings.lr, weight_decay=0)
    done = load_checkpoint(checkpoint, {"style": trained}, optimizer)
    for step in tqdm(
        range(done, settings.steps), "learn style", initial=done, total=settings.steps, disable=None
    ):
        generator = step_generator(settings.seed, step)
        picked = torch.randint(len(latents), (settings.batch_size,), generator=generator)
        embeddings = _embed(parts, table.index_copy(0, rows, trained.vectors), ids[picked])
        loss = noise_prediction_loss(parts, latents[picked], embeddings, generator)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        trained.losses[step] = loss.detach()
        if (step + 1) % settings.checkpoint_every == 0 or step + 1 == settings.steps:
            save_checkpoint(checkpoint, step + 1, {"style": trained}, optimizer)
    losses = [round(loss, 6) for loss in trained.losses.tolist()]
    return StyleToken(settings.token, trained.vectors.detach().numpy().copy()), losses


def _init_id(parts: DiffusionParts, word: str) -> int:
    ids = parts.tokenizer.encode(word, add_special_tokens=False)
    if len(ids) != 1:
        raise ModelError(
            f"the init word {word!r} is {len(ids)} tokens to this model; give a common word with --init-word"
        )
    return int(ids[0])


def _add_words(parts: DiffusionParts, style: StyleToken) -> torch.Tensor:
    """Rows of the embedding table [n] that the token's words get."""
    if parts.tokenizer.add_tokens(list(style.words)) != len(style.words):
        raise ModelError(
            f"the model already knows the token {style.token!r}; name another with --token '<name>'"
        )
    return torch.tensor(parts.tokenizer.convert_tokens_to_ids(list(style.words)))


def _prompt_ids(
    parts: DiffusionParts, style: StyleToken, words: Sequence[str], rows: torch.Tensor
) -> torch.Tensor:
    """Ids [N, L] of each photo's prompt; one whose end, the token, the model cannot read is refused."""
    prompts = [PROMPT.format(words=one, token=" ".join(style.words)) for one in words]
    ids = token_ids(parts.tokenizer, prompts)
    whole = (ids == rows[-1]).any(dim=1)
    if not whole.all():
        raise ModelError(
            f"the prompt {prompts[int(whole.int().argmin())]!r} is longer than the model's "
            f"{ids.shape[1]} tokens; give shorter words in classes.toml, or fewer --vectors"
        )
    return ids


def _embed(parts: DiffusionParts, table: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Text embeddings [N, L, width] by a table [rows, width] that holds the trained vectors."""
    weights = {"text_model.embeddings.token_embedding.weight": table}
    output = torch.func.functional_call(parts.text_encoder, weights, (ids,))
    embeddings: torch.Tensor = output.last_hidden_state
    return embeddings
