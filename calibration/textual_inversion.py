"""Dataset style inversion: one new word is fitted to the style of a site's real photos.

Li et al. 2024, arXiv 2403.19866, section on DSI: everything but the embedding of the new token is frozen, and

    min_v  E_{(x, class), eps, t} || eps - eps_theta(z_t, t, c) ||^2

    c = the text embedding of "A {class} photo in the style of <token>"

The prompt names each photo's true class, so that the token keeps what the class does not explain. The paper
fits one vector in 20,000 iterations. It gives no learning rate, batch size, schedule or init word; those are
ours (see `synthkit.recipes.settings.StyleSettings`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F

from synthkit.data.splits import stratified_folds
from synthkit.diffusion.parts import DiffusionParts, noise_prediction_loss, token_ids
from synthkit.diffusion.style_token import PROMPT, StyleToken
from synthkit.errors import ConfigError, ModelError
from synthkit.learning.checkpoints import load_checkpoint, save_checkpoint, step_generator
from synthkit.progress import progress

#: Mixed precision -> its type and the constant that keeps its gradients from vanishing (Micikevicius et al.
#: 2018, section 3.2); a constant needs no state in the checkpoint. bf16 has the range of fp32.
_MIXED: dict[str, tuple[torch.dtype, float]] = {
    "no": (torch.float32, 1.0),
    "bf16": (torch.bfloat16, 1.0),
    "fp16": (torch.float16, 1024.0),
}
_HELD_OUT_NOISES = 128  # noised latents of a held-out loss at the least; the same ones every time
_HELD_OUT_FOLDS = 5  # one of them is held out: 20 % of the photos of a class, or one where it has few


@dataclass(frozen=True)
class InversionSettings:
    """How the token is fitted.

    Attributes:
        token: its name.
        vectors: embedding vectors that stand for it.
        init_word: word whose embedding they start from.
        steps: gradient steps.
        lr: AdamW's learning rate; its peak under a cosine schedule.
        batch_size: noised latents per backward pass.
        checkpoint_every: steps between two checkpoints, and between two evaluations of held-out photos.
        seed: of order, noise and timesteps.
        schedule: constant, or a cosine that ends at zero.
        accumulate: backward passes per gradient step.
        mixed_precision: "no", or the type that the networks compute in.
        early_stop: evaluations of held-out photos without a lower loss, after which the fit ends; 0: no
            photos are held out, and the last vectors are kept instead of the best.
    """

    token: str
    vectors: int
    init_word: str
    steps: int
    lr: float
    batch_size: int
    checkpoint_every: int
    seed: int
    schedule: Literal["constant", "cosine"] = field(default="constant")
    accumulate: int = field(default=1)
    mixed_precision: Literal["no", "bf16", "fp16"] = field(default="no")
    early_stop: int = field(default=0)


@dataclass(frozen=True)
class Inversion:
    """What a fit gives.

    Attributes:
        token: the word with its vectors.
        losses: of every gradient step that was made.
        held_out: step -> loss of the held-out photos under the same noise each time; empty without any.
    """

    token: StyleToken
    losses: list[float]
    held_out: dict[int, float]


@dataclass(frozen=True)
class Preview:
    """What is shown while a token is learned.

    Attributes:
        every: steps between two previews; the first is before the first step.
        photos: positions of the photos whose prompts are shown.
        show: is given the steps done and the prompts' text embeddings [n, L, width].
    """

    every: int
    photos: Sequence[int]
    show: Callable[[int, torch.Tensor], None]


class _State(torch.nn.Module):
    """What a checkpoint holds: the trained vectors [n, width], losses, and the best vectors so far."""

    losses: torch.Tensor
    held_out: torch.Tensor
    best: torch.Tensor

    def __init__(self, start: torch.Tensor, settings: InversionSettings) -> None:
        super().__init__()
        evaluations = 1 + math.ceil(settings.steps / settings.checkpoint_every) if settings.early_stop else 0
        self.vectors = torch.nn.Parameter(start.clone())
        self.register_buffer("losses", torch.zeros(settings.steps))
        self.register_buffer("held_out", torch.full((evaluations,), torch.nan))
        self.register_buffer("best", start.clone())

    @property
    def evaluations(self) -> int:
        """Number of evaluations so far."""
        return int(self.held_out.isfinite().sum())

    def record(self, loss: float) -> None:
        """Note a held-out loss, and the vectors where it is the lowest."""
        if self.evaluations == 0 or loss < self.held_out[: self.evaluations].min():
            self.best.copy_(self.vectors.detach())
        self.held_out[self.evaluations] = loss

    def stopped(self, patience: int) -> bool:
        """Whether the held-out loss has not fallen for so many evaluations."""
        known = self.held_out[: self.evaluations]
        return len(known) > 0 and len(known) - 1 - int(known.argmin()) >= patience


@dataclass(frozen=True)
class _Prompts:
    """The photos' prompts for a text encoder that knows the new words.

    Attributes:
        parts: the generator.
        table: embeddings of all words [rows, width].
        rows: where the token's words stand in it [n].
        ids: of each photo's prompt [N, L].
    """

    parts: DiffusionParts
    table: torch.Tensor
    rows: torch.Tensor
    ids: torch.Tensor

    def embed(self, vectors: torch.Tensor, picked: Sequence[int] | torch.Tensor) -> torch.Tensor:
        """Text embeddings [n, L, width] of some photos' prompts."""
        return _embed(self.parts, self.table.index_copy(0, self.rows, vectors), self.ids[picked])


def invert_style(
    parts: DiffusionParts,
    latents: torch.Tensor,
    words: Sequence[str],
    settings: InversionSettings,
    checkpoint: Path,
    preview: Preview | None = None,
) -> Inversion:
    """Fit the token; goes on from the checkpoint when there is one.

    Args:
        parts: the frozen generator; its tokenizer learns the token.
        latents: scaled latents of the photos [N, C, h, w].
        words: each photo's class in words.
        settings: how.
        checkpoint: file for the state of the fit.
        preview: what to show meanwhile.

    Raises:
        ModelError: the token is already a word of the model, the init word is none, or a prompt is too long.
        ConfigError: photos are to be held out, and no class has two.
    """
    prompts, start = _prepare(parts, words, settings)
    used, held = _split(words, settings)
    state = _State(start, settings).to(latents.device)
    optimizer = torch.optim.AdamW([state.vectors], lr=settings.lr, weight_decay=0)
    done = load_checkpoint(checkpoint, {"style": state}, optimizer)
    if done == 0:
        _evaluate(prompts, latents, held, state, settings)
        _show(preview, prompts, state, 0)
    for step in progress(range(done, settings.steps), "learn style", total=settings.steps, done=done):
        if state.stopped(settings.early_stop):
            break
        _gradient_step(prompts, latents, used, state, optimizer, settings, step)
        done = step + 1
        if done % settings.checkpoint_every == 0 or done == settings.steps:
            _evaluate(prompts, latents, held, state, settings)
            save_checkpoint(checkpoint, done, {"style": state}, optimizer)
        _show(preview, prompts, state, done)
    return _result(state, settings, done)


def untrained_style(
    parts: DiffusionParts, words: Sequence[str], settings: InversionSettings, number: int = 0
) -> Inversion:
    """The control: a token of the same sentence that no photo has shaped.

    Its vectors are drawn from a normal distribution with the mean and standard deviation, per dimension, of
    the embeddings of the model's words, so that they are as long as a word's. The init word's own embedding
    would not do: it is a word, and says what it says.

    Args:
        parts: the frozen generator; its tokenizer learns the token.
        words: each photo's class in words.
        settings: the token's name, number of vectors and seed.
        number: of the token, where one seed makes several.

    Raises:
        ModelError: as `invert_style`.
    """
    prompts, start = _prepare(parts, words, settings)
    noise = torch.randn(start.shape, generator=step_generator(settings.seed, number))
    known = prompts.table[: int(prompts.rows.min())].float().cpu()
    return Inversion(StyleToken(settings.token, (known.mean(0) + known.std(0) * noise).numpy()), [], {})


def _prepare(
    parts: DiffusionParts, words: Sequence[str], settings: InversionSettings
) -> tuple[_Prompts, torch.Tensor]:
    """The photos' prompts, and the vectors [n, width] that the fit starts from."""
    style = StyleToken(settings.token, np.zeros((settings.vectors, 1), np.float32))
    table = parts.text_encoder.get_input_embeddings().weight
    start = table[_init_id(parts, settings.init_word)].repeat(settings.vectors, 1)
    rows = _add_words(parts, style)
    ids = _prompt_ids(parts, style, words, rows)
    table = F.pad(table, (0, 0, 0, max(0, int(rows.max()) + 1 - len(table))))
    return _Prompts(parts, table, rows.to(table.device), ids.to(table.device)), start


def _split(words: Sequence[str], settings: InversionSettings) -> tuple[torch.Tensor, torch.Tensor]:
    """Positions of the photos that are learned from, and of those that are held out."""
    if not settings.early_stop:
        return torch.arange(len(words)), torch.arange(0)
    folds = stratified_folds(np.unique(words, return_inverse=True)[1], _HELD_OUT_FOLDS, settings.seed)
    if not folds:
        raise ConfigError(
            f"learn-style.early_stop holds photos out, but no class has two of the {len(words)} photos; "
            "give more photos or leave it out"
        )
    used, held = folds[0]
    return torch.from_numpy(used), torch.from_numpy(held)


def _gradient_step(
    prompts: _Prompts,
    latents: torch.Tensor,
    used: torch.Tensor,
    state: _State,
    optimizer: torch.optim.Optimizer,
    settings: InversionSettings,
    step: int,
) -> None:
    generator = step_generator(settings.seed, step)
    scale = _MIXED[settings.mixed_precision][1]
    optimizer.zero_grad()
    total = 0.0
    for _ in range(settings.accumulate):
        picked = used[torch.randint(len(used), (settings.batch_size,), generator=generator)]
        loss = _loss(prompts, latents, state.vectors, picked, generator, settings) / settings.accumulate
        (loss * scale).backward()
        total += loss.item()
    state.losses[step] = total
    gradient = state.vectors.grad
    assert gradient is not None
    if scale != 1:
        gradient /= scale
        if not gradient.isfinite().all():  # half precision overflowed; the next noise is another
            return
    for group in optimizer.param_groups:
        group["lr"] = _learning_rate(settings, step)
    optimizer.step()


def _learning_rate(settings: InversionSettings, step: int) -> float:
    if settings.schedule == "constant":
        return settings.lr
    return settings.lr * (1 + math.cos(math.pi * step / settings.steps)) / 2


def _loss(
    prompts: _Prompts,
    latents: torch.Tensor,
    vectors: torch.Tensor,
    picked: torch.Tensor,
    generator: torch.Generator,
    settings: InversionSettings,
) -> torch.Tensor:
    kind, mixed = _MIXED[settings.mixed_precision][0], settings.mixed_precision != "no"
    with torch.autocast(latents.device.type, dtype=kind if mixed else None, enabled=mixed):
        embeddings = prompts.embed(vectors, picked)
        return noise_prediction_loss(prompts.parts, latents[picked], embeddings, generator)


@torch.no_grad()
def _evaluate(
    prompts: _Prompts,
    latents: torch.Tensor,
    held: torch.Tensor,
    state: _State,
    settings: InversionSettings,
) -> None:
    """Record the loss of the held-out photos; noise and timesteps are the same at every evaluation."""
    if not len(held):
        return
    repeated = held.repeat(math.ceil(_HELD_OUT_NOISES / len(held)))
    generator = step_generator(settings.seed, settings.steps)  # the step after the last: seen by none
    losses = [
        _loss(prompts, latents, state.vectors, picked, generator, settings) * len(picked)
        for picked in repeated.split(settings.batch_size)
    ]
    state.record(float(torch.stack(losses).sum()) / len(repeated))


@torch.no_grad()
def _show(preview: Preview | None, prompts: _Prompts, state: _State, done: int) -> None:
    if preview and done % preview.every == 0:
        preview.show(done, prompts.embed(state.vectors, preview.photos))


def _result(state: _State, settings: InversionSettings, done: int) -> Inversion:
    vectors = state.best if settings.early_stop else state.vectors.detach()
    evaluations = [
        min(index * settings.checkpoint_every, settings.steps) for index in range(state.evaluations)
    ]
    return Inversion(
        StyleToken(settings.token, vectors.cpu().numpy().copy()),
        [round(loss, 6) for loss in state.losses[:done].tolist()],
        {
            step: round(float(loss), 6)
            for step, loss in zip(evaluations, state.held_out.tolist(), strict=False)
        },
    )


def _init_id(parts: DiffusionParts, word: str) -> int:
    ids = parts.tokenizer.encode(word, add_special_tokens=False)
    if len(ids) != 1:
        raise ModelError(
            f"the init word {word!r} is {len(ids)} tokens to this model; give a common word with "
            "--set learn-style.init_word=WORD"
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
            f"{ids.shape[1]} tokens; give shorter words in classes.toml, or a smaller learn-style.vectors"
        )
    return ids


def _embed(parts: DiffusionParts, table: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Text embeddings [N, L, width] by a table [rows, width] that holds the trained vectors."""
    weights = {"text_model.embeddings.token_embedding.weight": table}
    output = torch.func.functional_call(parts.text_encoder, weights, (ids,))
    embeddings: torch.Tensor = output.last_hidden_state
    return embeddings
