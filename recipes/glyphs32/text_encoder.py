"""The text encoder of glyphs-32, taught to read before the UNet listens to it.

Stable Diffusion's text encoder comes from CLIP and already tells words apart. One that starts from nothing
and learns through the UNet alone reads words of style but not the class: after 1,700 steps the UNet's loss
was the same with the right class as with a wrong one. So it first learns from captions alone that every state
behind the last word, which is where attention finds most of its keys, must tell class and words.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from tqdm import trange
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizerFast

from synthkit.learning.checkpoints import step_generator
from synthkit.recipes.glyphs32.captions import SYMBOLS
from synthkit.recipes.glyphs32.tokenizer import CONTEXT

WIDTH = 96  # of the text embeddings


def new_text_encoder(tokenizer: CLIPTokenizerFast) -> CLIPTextModel:
    """An untrained encoder of two layers, 0.3 M parameters."""
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=WIDTH,
            intermediate_size=4 * WIDTH,
            num_hidden_layers=2,
            num_attention_heads=3,
            max_position_embeddings=CONTEXT,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def teach_to_read(
    encoder: CLIPTextModel,
    ids: torch.Tensor,
    symbols: Sequence[str],
    steps: int = 400,
    lr: float = 2e-3,
    batch_size: int = 64,
) -> None:
    """Train the encoder, in place, to tell class and words in each state behind the last word.

    Args:
        encoder: the text encoder.
        ids: tokens of the captions, int64 [N, L], padded with the end mark.
        symbols: the class of each caption.
        steps: gradient steps.
        lr: learning rate of AdamW.
        batch_size: captions per step.
    """
    end = encoder.config.eos_token_id
    classes = torch.tensor([SYMBOLS.index(symbol) for symbol in symbols])
    # Fixed directions of unit length: the class must take up a good part of a state, not just be separable.
    codes = F.normalize(torch.randn(len(SYMBOLS), WIDTH, generator=torch.Generator().manual_seed(0)), dim=1)
    words = torch.nn.Linear(WIDTH, encoder.config.vocab_size)
    optimizer = torch.optim.AdamW([*encoder.parameters(), *words.parameters()], lr=lr)
    for step in trange(steps, desc="text encoder", mininterval=2):
        picked = torch.randint(len(ids), (batch_size,), generator=step_generator(3, step))
        tokens = ids[picked]
        behind = tokens == end
        states = encoder(tokens).last_hidden_state[behind]
        row = behind.nonzero()[:, 0]
        present = torch.zeros(batch_size, encoder.config.vocab_size).scatter_(1, tokens, 1.0)
        loss = F.cross_entropy(states @ codes.T, classes[picked][row])
        loss = loss + 10 * F.binary_cross_entropy_with_logits(words(states), present[row])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
