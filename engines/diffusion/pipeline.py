"""Text-to-image with engines: prompts are embedded once, then the sampling loop and the VAE run in batches.

    prompts + style ──tokenizers, text encoders──► embeddings ┐
    seeds ──one NumPy generator per image──► latents ─────────┴─► scheduler × UNet ──VAE decoder──► uint8

The scheduler is diffusers' own. On the CPU an image depends on its own seed and embedding alone, bit for bit:
ONNX Runtime's kernels do not mix images, and sum in the same order whatever the batch. On a GPU the kernels
may be chosen by batch size, and images then agree to rounding only.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from synthkit.diffusion.style_token import StyleToken
from synthkit.engines.diffusion.denoiser import Denoiser, open_decoder, open_denoiser, run_typed
from synthkit.engines.diffusion.engines_folder import existing_engines
from synthkit.engines.diffusion.text_encoder import (
    TextEmbeddings,
    embed,
    read_embeddings,
    read_tokenizer,
    text_key,
    unconditional,
    write_embeddings,
)
from synthkit.engines.runtime.component_spec import Geometry, read_geometry
from synthkit.engines.runtime.session import (
    Session,
    existing_engine,
    open_session,
    settled_provider,
    usable_threads,
)
from synthkit.engines.tensorrt.session import has_plans, open_plan
from synthkit.errors import EngineError, MissingExtra

_SMALL_UNET = 64 * 2**20
"""Bytes of weights up to which every core samples its own part of a batch. The operators of so small a
network are too short to be shared by cores; larger weights would pass through the cache once per core."""

_PART = 32  # images of such a part at most: activations that a core's cache still holds
_FLAT = 1 / 255  # range of values, 0 to 1, below which an image counts as one colour


@dataclass(frozen=True)
class StartLatents:
    """Images that a sampling loop starts from, as in diffusers' image-to-image pipelines (SDEdit).

    Attributes:
        latents: float32 [n, channels, side, side], from `EnginePipeline.encode`.
        strength: fraction of the steps that run, 0 to 1; 1 leaves nothing of the images.
    """

    latents: np.ndarray
    strength: float

    def take(self, rows: slice) -> StartLatents:
        """Select some of the images."""
        return StartLatents(self.latents[rows], self.strength)


class EnginePipeline:
    """A diffusion pipeline made of engines.

    Args:
        folder: the engines folder.
        provider: "cpu", "cuda", "tensorrt" (ONNX Runtime's), "plan" (TensorRT's own) or "auto", which takes
            the folder's plans where it has any.

    Attributes:
        folder: the engines folder.
        geometry: the pipeline's sizes.
        provider: of all networks.
        workers: parts of a batch that are sampled at the same time.
    """

    def __init__(self, folder: Path, provider: str = "auto") -> None:
        self.folder = folder
        self.geometry: Geometry = read_geometry(folder)
        self._unet = existing_engine(folder / "unet" / "model.onnx")
        decoder = existing_engine(folder / "vae_decoder" / "model.onnx")
        self._plans = provider == "plan" or (provider == "auto" and has_plans(folder))
        # Every network goes where the decoder can go.
        self.provider = "plan" if self._plans else settled_provider(decoder, provider)
        self._text_provider = "auto" if self._plans else self.provider  # text encoders get no plan
        self.workers = self._worker_count()
        self._threads = 1 if self.workers > 1 else None
        self._decoder: Session = (
            open_plan(folder, "vae_decoder")
            if self._plans
            else open_decoder(decoder, self.provider, self._threads)
        )
        self._denoiser: Denoiser | None = None
        self._scheduler_config = _read_scheduler(folder)
        for text in self.geometry.texts:
            read_tokenizer(folder, text.tokenizer)
        self._unconditional: TextEmbeddings | None = None

    @classmethod
    def open(cls, engines_dir: Path, provider: str = "auto") -> EnginePipeline:
        """Load the engines of a folder.

        Raises:
            EngineError: the folder or one of its engines cannot be used.
            ModelError: the folder holds an unsupported kind of pipeline.
            MissingExtra: a library is not installed.
        """
        return cls(existing_engines(engines_dir), provider)

    @property
    def image_size(self) -> int:
        """Side of an image in pixels."""
        return self.geometry.image

    def close(self) -> None:
        """Free the engines' memory."""
        if self._denoiser:
            self._denoiser.close()
        self._decoder.close()

    def embed(
        self, prompts: Sequence[str], *styles: StyleToken, negative: str = "", cache: Path | None = None
    ) -> TextEmbeddings:
        """Embed prompts, and the negative prompt for later calls; text encoders are loaded for this call.

        Args:
            prompts: texts; the styles' tokens may stand in them.
            *styles: tokens to add to the vocabulary.
            negative: prompt that guidance leads away from; empty: no prompt.
            cache: file that keeps the embeddings; where it holds them already, no text encoder runs.

        Raises:
            ModelError: a style has another width, or a prompt is too long.
        """
        provider = self._text_provider
        key = text_key(self.folder, self.geometry, prompts, negative, styles, provider) if cache else ""
        embedded = read_embeddings(cache, key) if cache else None
        if embedded is None:
            embedded = (
                embed(self.folder, self.geometry, prompts, styles, provider),
                embed(self.folder, self.geometry, [negative], styles, provider)
                if negative
                else unconditional(self.folder, self.geometry, provider),
            )
            if cache:
                write_embeddings(cache, key, *embedded)
        self._unconditional = embedded[1]
        return embedded[0]

    def unconditional(self) -> TextEmbeddings:
        """Embedding that guidance leads away from, one row. That of no prompt is computed once."""
        if self._unconditional is None:
            self._unconditional = unconditional(self.folder, self.geometry, self._text_provider)
        return self._unconditional

    def set_unconditional(self, texts: TextEmbeddings) -> None:
        """Set the embedding, one row, that guidance leads away from."""
        self._unconditional = texts

    def generate(
        self,
        embeddings: TextEmbeddings,
        seeds: Sequence[int],
        steps: int,
        guidance: float | Sequence[float],
        names: Sequence[str] = (),
        start: StartLatents | None = None,
        allow_blank: bool = False,
    ) -> np.ndarray:
        """Generate one batch of images.

        Args:
            embeddings: of n prompts.
            seeds: n seeds of the initial latents.
            steps: denoising steps.
            guidance: guidance scale, one or n; at 1 or less the unconditional half is not computed.
            names: of the images, for error messages; by default their seeds.
            start: n images to start from; None: noise alone.
            allow_blank: accept images of one colour; those with NaN become black.

        Returns:
            uint8 [n, height, width, 3].

        Raises:
            EngineError: names the images that came out as NaN or infinite, or of one colour.
        """
        scales = np.broadcast_to(np.asarray(guidance, np.float32), (len(seeds),))
        self.prepare(float(scales.max()))

        def part(rows: slice) -> np.ndarray:
            noise, begin = self.initial_latents(seeds[rows]), start.take(rows) if start else None
            texts = embeddings.take(rows)
            return self.decode(self.sample(texts, noise, steps, scales[rows], seeds[rows], begin))

        with ThreadPoolExecutor(self.workers) as pool:
            images = np.concatenate(list(pool.map(part, self._parts(len(seeds)))))
        if allow_blank:
            images[~np.isfinite(images).all(axis=(1, 2, 3))] = -1  # NaN: black all over, so blank
        _check_images(images, names or [f"of seed {seed}" for seed in seeds], allow_blank)
        return _to_uint8(images)

    def prepare(self, guidance: float) -> Denoiser:
        """Load the UNet for loops with this guidance unless it is; `generate` and `sample` call this."""
        guided = guidance > 1
        if guided:
            self.unconditional()
        if self._denoiser and self._denoiser.guided != guided:
            self._denoiser.close()
            self._denoiser = None
        if self._denoiser is None:
            self._denoiser = (
                Denoiser(open_plan(self.folder, "unet"), guided)
                if self._plans
                else open_denoiser(self._unet, self.provider, guided, self._threads)
            )
        return self._denoiser

    def initial_latents(self, seeds: Sequence[int]) -> np.ndarray:
        """Draw unit noise for every image from its own seed: float32 [n, channels, side, side]."""
        shape = (self.geometry.channels, self.geometry.latent, self.geometry.latent)
        streams = [np.random.default_rng(seed) for seed in seeds]
        return np.stack([stream.standard_normal(shape, dtype=np.float32) for stream in streams])

    def sample(
        self,
        embeddings: TextEmbeddings,
        latents: np.ndarray,
        steps: int,
        guidance: float | np.ndarray,
        seeds: Sequence[int],
        start: StartLatents | None = None,
    ) -> np.ndarray:
        """Run the sampling loop.

        Args:
            embeddings: of n prompts.
            latents: float32 [n, channels, side, side], unit noise.
            steps: denoising steps.
            guidance: guidance scale, one or n, all above 1 or none; where none is, the unconditional half is
                not computed.
            seeds: n seeds of the noise that some schedulers add in each step.
            start: n images to start from, instead of from noise alone.

        Returns:
            float32 [n, channels, side, side], clean latents.
        """
        import torch

        denoiser = self.prepare(float(np.max(guidance)))
        scales = torch.tensor(guidance, dtype=torch.float32, device=denoiser.device).reshape(-1, 1, 1, 1)
        predict = denoiser.bind(self._texts(embeddings, denoiser.guided), latents.shape, scales)
        scheduler, extra = self._new_scheduler(seeds)
        scheduler.set_timesteps(steps)
        noise = torch.from_numpy(latents).to(denoiser.device)
        if start is None:
            times, state = scheduler.timesteps, noise * scheduler.init_noise_sigma
        else:
            times = _times_from(scheduler, steps, start.strength)
            clean = torch.from_numpy(start.latents).to(denoiser.device)
            state = scheduler.add_noise(clean, noise, times[:1].repeat(len(clean)))
        for time in times:
            output = predict(scheduler.scale_model_input(state, time), float(time))
            state = scheduler.step(output, time, state, **extra, return_dict=False)[0]
        return np.asarray(state.cpu().numpy(), dtype=np.float32)

    def decode(self, latents: np.ndarray) -> np.ndarray:
        """Decode clean latents to images: float [n, 3, height, width], -1 to 1."""
        scaled = latents / np.float32(self.geometry.scaling) + np.float32(self.geometry.shift)
        return run_typed(self._decoder, {"latent_sample": scaled})["sample"].astype(np.float32, copy=False)

    def encode(self, pixels: np.ndarray) -> np.ndarray:
        """Encode images to latents: the mean of the VAE encoder's posterior, no random sample of it.

        Args:
            pixels: uint8 [n, height, width, 3].

        Returns:
            float32 [n, channels, side, side].
        """
        encoder = self.vae_encoder()
        try:
            # One image at a time: its latents then cannot depend on which others are encoded.
            means = [self._mean_latents(encoder, one) for one in pixels]
        finally:
            encoder.close()
        shift, scaling = np.float32(self.geometry.shift), np.float32(self.geometry.scaling)
        return np.asarray((np.stack(means) - shift) * scaling, dtype=np.float32)

    def _mean_latents(self, encoder: Session, pixels: np.ndarray) -> np.ndarray:
        sample = pixels.transpose(2, 0, 1)[None].astype(np.float32) / np.float32(127.5) - np.float32(1)
        parameters = run_typed(encoder, {"sample": sample})["latent_parameters"][0]
        return np.asarray(parameters[: self.geometry.channels], dtype=np.float32)

    def vae_encoder(self) -> Session:
        """Load the VAE encoder; the caller closes it."""
        if self._plans:
            return open_plan(self.folder, "vae_encoder")
        return open_session(self.folder / "vae_encoder" / "model.onnx", self.provider)

    def _worker_count(self) -> int:
        weights = sum(path.stat().st_size for path in self._unet.parent.glob("model.onnx*"))
        return usable_threads() if self.provider == "cpu" and weights <= _SMALL_UNET else 1

    def _parts(self, count: int) -> Iterator[slice]:
        """Cut a batch into even parts, the same number for each worker."""
        rounds = -(-count // (self.workers * _PART)) if self.workers > 1 else 1
        size = -(-count // (self.workers * rounds))
        return (slice(start, start + size) for start in range(0, count, size))

    def _texts(self, embeddings: TextEmbeddings, guided: bool) -> dict[str, np.ndarray]:
        """Inputs of the UNet beside sample and timestep; under guidance the unconditional half is first."""
        count, pixels = len(embeddings), self.geometry.image
        parts = [embeddings]
        if guided:
            parts.insert(0, self.unconditional().take([0] * count))
        hidden = np.concatenate([part.hidden for part in parts])
        if not self.geometry.pooled:
            return {"encoder_hidden_states": hidden}
        # Original size, crop corner, target size: neither scaled nor cropped.
        whole = np.array([pixels, pixels, 0, 0, pixels, pixels], np.float32)
        return {
            "encoder_hidden_states": hidden,
            "text_embeds": np.concatenate([part.pooled for part in parts]),
            "time_ids": np.tile(whole, (len(hidden), 1)),
        }

    def _new_scheduler(self, seeds: Sequence[int]) -> tuple[Any, dict[str, Any]]:
        """Create the scheduler of one batch, and the further arguments of its `step`."""
        import torch

        config = self._scheduler_config
        scheduler = _scheduler_class(config["_class_name"]).from_config(config)
        extra: dict[str, Any] = {}
        if "generator" in inspect.signature(scheduler.step).parameters:
            extra["generator"] = [torch.Generator().manual_seed(seed) for seed in seeds]
        return scheduler, extra


def _times_from(scheduler: Any, steps: int, strength: float) -> Any:
    """Timesteps that remain at this strength, as `StableDiffusionImg2ImgPipeline.get_timesteps` has them."""
    skipped = (steps - min(int(steps * strength), steps)) * scheduler.order
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(skipped)
    return scheduler.timesteps[skipped:]


def _check_images(images: np.ndarray, names: Sequence[str], allow_blank: bool) -> None:
    """Refuse images of a network whose numbers overflowed.

    Args:
        images: float [n, 3, height, width], -1 to 1.
        names: of the images, for error messages.
        allow_blank: accept images of one colour.
    """
    flat = images.reshape(len(images), -1)
    broken = ~np.isfinite(flat).all(axis=1)
    shown = np.clip(np.nan_to_num(flat) / 2 + 0.5, 0, 1)
    uniform = ~broken & (np.ptp(shown, axis=1) < _FLAT) & (not allow_blank)
    for bad, what in ((broken, "as NaN or infinite"), (uniform, "black or of one colour")):
        if bad.any():
            listed = ", ".join(name for name, one in zip(names, bad, strict=True) if one)
            raise EngineError(
                f"{bad.sum()} of {len(images)} images came out {what}: {listed}; "
                "rebuild the engines with --precision fp32, or have them replaced with --filter blank"
            )


def _to_uint8(images: np.ndarray) -> np.ndarray:
    unit = np.clip(images / 2 + 0.5, 0, 1).transpose(0, 2, 3, 1)
    return np.asarray(np.round(unit * 255), dtype=np.uint8)


def _read_scheduler(folder: Path) -> dict[str, Any]:
    path = folder / "scheduler" / "scheduler_config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        _scheduler_class(config["_class_name"])
    except (OSError, ValueError, KeyError, TypeError):
        raise EngineError(f"cannot read {path}; make it with `synthkit build-engines --force`") from None
    return dict(config)


def _scheduler_class(name: str) -> Any:
    try:
        import diffusers
    except ImportError:
        raise MissingExtra("diffusers", "train") from None
    scheduler = getattr(diffusers, name, None)
    if not name.endswith("Scheduler") or scheduler is None:
        raise EngineError(
            f"diffusers has no scheduler {name!r}; name another in scheduler/scheduler_config.json"
        )
    return scheduler
