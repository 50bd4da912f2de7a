"""The UNet and the text encoder of glyphs-32, trained together from nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import DDIMScheduler, DDPMScheduler, UNet2DConditionModel
from timm.utils import ModelEmaV3
from tqdm import trange
from transformers import CLIPTokenizerFast

from synthkit.diffusion.parts import DiffusionParts, noise_prediction_loss, token_ids
from synthkit.learning.checkpoints import load_checkpoint, save_checkpoint, step_generator
from synthkit.learning.fit import one_cycle
from synthkit.recipes.glyphs32.autoencoder import LATENT_CHANNELS
from synthkit.recipes.glyphs32.text_encoder import WIDTH, new_text_encoder, teach_to_read

# Share of images that are trained without a caption, which classifier-free guidance needs.
_NO_CAPTION = 0.1
_CHECKPOINT_EVERY = 200


@dataclass(frozen=True)
class TrainableParts:
    """The networks to train, UNet and text encoder, in one module: one EMA and one checkpoint hold both."""

    networks: torch.nn.ModuleDict
    tokenizer: CLIPTokenizerFast
    scheduler: DDPMScheduler

    def parts(self, networks: torch.nn.ModuleDict | None = None) -> DiffusionParts:
        """The networks, or others of the same shape, as a pipeline's parts without its VAE."""
        chosen = networks or self.networks
        return DiffusionParts(self.tokenizer, chosen["text_encoder"], chosen["unet"], None, self.scheduler)


def new_parts(tokenizer: CLIPTokenizerFast) -> TrainableParts:
    """Untrained networks: a UNet of 2.5 M parameters on 8x8x6 latents and a text encoder of two layers."""
    unet = UNet2DConditionModel(
        sample_size=8,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        block_out_channels=(64, 96),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=WIDTH,
        attention_head_dim=(2, 3),  # heads, as diffusers has it, of 32 channels each
        norm_num_groups=16,
    )
    unet = unet.to(memory_format=torch.channels_last)  # a tenth faster on a CPU
    networks = torch.nn.ModuleDict({"unet": unet, "text_encoder": new_text_encoder(tokenizer)})
    return TrainableParts(networks, tokenizer, DDPMScheduler.from_config(new_scheduler().config))


def new_scheduler() -> DDIMScheduler:
    """SD's noise schedule, rescaled to end in pure noise (Lin et al. 2023, arXiv 2305.08891).

    Paper and ink colours are an image's mean, which SD's own schedule never quite destroys; with it the model
    would draw everything mid-grey. Pure noise tells nothing about noise, hence the velocity as target.
    """
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
        steps_offset=1,
        clip_sample=False,
        set_alpha_to_one=True,
    )


def train_denoiser(
    latents: torch.Tensor,
    captions: Sequence[str],
    symbols: Sequence[str],
    tokenizer: CLIPTokenizerFast,
    folder: Path,
    steps: int,
    lr: float = 1e-3,
    batch_size: int = 64,
) -> DiffusionParts:
    """Train UNet and text encoder on captioned latents; resumes from the folder's checkpoint.

    Args:
        latents: scaled latents [N, 6, 8, 8].
        captions: one sentence per latent.
        symbols: the class of each latent.
        tokenizer: made from such captions.
        folder: where the checkpoint lies.
        steps: gradient steps.
        lr: peak learning rate of a one-cycle schedule.
        batch_size: latents per step.

    Returns:
        The exponential moving average of the networks, without a VAE.
    """
    torch.manual_seed(0)  # of the initial weights
    trained = new_parts(tokenizer)
    ema = ModelEmaV3(trained.networks, decay=0.999, use_warmup=True)
    optimizer = torch.optim.AdamW(trained.networks.parameters(), lr=lr, weight_decay=0.01, betas=(0.9, 0.99))
    checkpoint, modules = folder / "denoiser.safetensors", {"networks": trained.networks, "ema": ema.module}
    start = load_checkpoint(checkpoint, modules, optimizer)
    ids, nothing = _unique_ids(tokenizer, captions), token_ids(tokenizer, [""])[0]
    if not start:
        teach_to_read(trained.networks["text_encoder"], ids, symbols)
        ema.module.load_state_dict(trained.networks.state_dict())
    bar = trange(start, steps, initial=start, total=steps, desc="denoiser", mininterval=2)
    for step in bar:
        generator = step_generator(2, step)
        optimizer.param_groups[0]["lr"] = lr * one_cycle(step / steps)
        picked = torch.randint(len(latents), (batch_size,), generator=generator)
        prompts = ids[picked]
        prompts[torch.rand(batch_size, generator=generator) < _NO_CAPTION] = nothing
        embeddings = trained.networks["text_encoder"](prompts).last_hidden_state
        loss = noise_prediction_loss(trained.parts(), latents[picked], embeddings, generator)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained.networks.parameters(), 1.0)
        optimizer.step()
        ema.update(trained.networks, step=step)
        bar.set_postfix(loss=f"{loss.item():.4f}", refresh=False)
        if (step + 1) % _CHECKPOINT_EVERY == 0 or step + 1 == steps:
            save_checkpoint(checkpoint, step + 1, modules, optimizer)
    return trained.parts(ema.module.eval().requires_grad_(False))


def _unique_ids(tokenizer: CLIPTokenizerFast, captions: Sequence[str]) -> torch.Tensor:
    """Tokens of the captions, each distinct one read once: many captions occur often."""
    distinct = {caption: row for row, caption in enumerate(dict.fromkeys(captions))}
    return token_ids(tokenizer, list(distinct))[[distinct[caption] for caption in captions]]
