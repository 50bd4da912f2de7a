"""Drawing images with engines: prompts to embeddings once, then the sampling loop and the VAE in batches.

    prompts + style ──tokenizer, text encoder──► embeddings ┐
    seeds ──one NumPy generator per image──► latents ───────┴─► scheduler × UNet ──VAE decoder──► uint8

The scheduler is diffusers' own, and the only user of torch here. On the CPU an image depends on its own seed
and embedding alone, bit for bit: ONNX Runtime's kernels do not mix images, and sum in the same order whatever
the batch. On a GPU the kernels may be chosen by batch size, and images then agree to rounding only.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from synthkit.engines.session import OrtSession, Session, open_session
from synthkit.engines.spec import Geometry, read_geometry
from synthkit.engines.vocabulary import with_rows
from synthkit.errors import EngineError, MissingExtra, ModelError
from synthkit.models import INDEX
from synthkit.style import StyleToken


class EnginePipeline:
    """A diffusion pipeline made of engines.

    Args:
        folder: the engines folder.
        provider: "cpu", "cuda" or "auto".

    Attributes:
        folder: the engines folder.
        geometry: the pipeline's sizes.
        provider: what computes: "cpu" or "cuda".
    """

    def __init__(self, folder: Path, provider: str = "auto") -> None:
        self.folder = folder
        self.geometry: Geometry = read_geometry(folder)
        self._unet: Session = self._session("unet", provider)
        self.provider = self._unet.provider  # the other networks go where the UNet went
        self._decoder: Session = self._session("vae_decoder", self.provider)
        self._scheduler_config = _read_scheduler(folder)
        self._tokenizer = _tokenizer(folder)
        self._unconditional: np.ndarray | None = None

    @classmethod
    def open(cls, engines_dir: Path, provider: str = "auto") -> EnginePipeline:
        """Load the engines of a folder.

        Raises:
            EngineError: the folder or one of its engines cannot be used.
            ModelError: the folder holds an unsupported kind of pipeline.
            MissingExtra: a library is not installed.
        """
        if not engines_dir.is_dir():
            raise EngineError(f"no engines folder {engines_dir}; make it with `synthkit build-engines`")
        return cls(engines_dir, provider)

    @property
    def image_size(self) -> int:
        """Side of an image in pixels."""
        return self.geometry.image

    def close(self) -> None:
        """Give the engines' memory back."""
        self._unet.close()
        self._decoder.close()

    def embed(self, prompts: Sequence[str], style: StyleToken | None = None) -> np.ndarray:
        """Text embeddings of prompts; the text encoder is loaded for this call alone.

        Args:
            prompts: texts; the style's token may stand in them.
            style: a token to add to the vocabulary.

        Returns:
            float32 [prompts, tokens, width].

        Raises:
            ModelError: the style has another width, or a prompt is too long.
        """
        tokenizer, encoder = self._tokenizer, None
        if style is not None:
            style.check_width(self.geometry.width)
            tokenizer = _tokenizer(self.folder)  # a fresh one, so that the next style finds no old tokens
            ids = _add_words(tokenizer, style)
            path = self.folder / "text_encoder" / "model.onnx"
            content = with_rows(path, dict(zip(ids, style.vectors, strict=True)))
            encoder = open_session(content, self.provider, data_folder=path.parent)
            prompts = [prompt.replace(style.token, " ".join(style.words)) for prompt in prompts]
        encoder = encoder or self._session("text_encoder", self.provider)
        # One prompt at a time: its embedding then cannot depend on which others are asked for.
        embeddings = [_encode(encoder, self._token_ids(tokenizer, prompt)) for prompt in prompts]
        encoder.close()
        return np.concatenate(embeddings)

    def draw(
        self,
        embeddings: np.ndarray,
        seeds: Sequence[int],
        steps: int,
        guidance: float,
        names: Sequence[str] = (),
    ) -> np.ndarray:
        """One batch of images.

        Args:
            embeddings: float32 [n, tokens, width].
            seeds: n seeds of the initial latents.
            steps: denoising steps.
            guidance: guidance scale; at 1 or less the unconditional half is not computed.
            names: what an error calls the images; by default their seeds.

        Returns:
            uint8 [n, height, width, 3].

        Raises:
            EngineError: names the images that came out as NaN or infinite.
        """
        latents = self.sample(embeddings, self.initial_latents(seeds), steps, guidance, seeds)
        images = self.decode(latents)
        broken = ~np.isfinite(images).all(axis=(1, 2, 3))
        if broken.any():
            labels = names or [f"of seed {seed}" for seed in seeds]
            listed = ", ".join(label for label, bad in zip(labels, broken, strict=True) if bad)
            raise EngineError(
                f"{broken.sum()} of {len(images)} images came out as NaN or infinite: {listed}; "
                "rebuild the engines with --precision fp32"
            )
        return _to_uint8(images)

    def initial_latents(self, seeds: Sequence[int]) -> np.ndarray:
        """Unit noise of every image from its own seed: float32 [n, channels, side, side]."""
        shape = (self.geometry.channels, self.geometry.latent, self.geometry.latent)
        streams = [np.random.default_rng(seed) for seed in seeds]
        return np.stack([stream.standard_normal(shape, dtype=np.float32) for stream in streams])

    def sample(
        self, embeddings: np.ndarray, latents: np.ndarray, steps: int, guidance: float, seeds: Sequence[int]
    ) -> np.ndarray:
        """The sampling loop.

        Args:
            embeddings: float32 [n, tokens, width].
            latents: float32 [n, channels, side, side], unit noise.
            steps: denoising steps.
            guidance: guidance scale; at 1 or less the unconditional half is not computed.
            seeds: n seeds of the noise that some schedulers add in each step.

        Returns:
            float32 [n, channels, side, side], clean latents.
        """
        import torch

        guided = guidance > 1
        scheduler, extra = self._new_scheduler(seeds)
        scheduler.set_timesteps(steps)
        text = np.concatenate([self._unconditional_like(embeddings), embeddings]) if guided else embeddings
        state = torch.from_numpy(latents) * scheduler.init_noise_sigma
        for time in scheduler.timesteps:
            scaled = scheduler.scale_model_input(state, time).numpy()
            output = self._predict(np.concatenate([scaled, scaled]) if guided else scaled, float(time), text)
            if guided:
                without, within = np.split(output, 2)
                output = without + np.float32(guidance) * (within - without)
            state = scheduler.step(torch.from_numpy(output), time, state, **extra).prev_sample
        return np.asarray(state.numpy(), dtype=np.float32)

    def decode(self, latents: np.ndarray) -> np.ndarray:
        """Images of clean latents: float [n, 3, height, width], -1 to 1."""
        scaled = latents / np.float32(self.geometry.scaling) + np.float32(self.geometry.shift)
        return _run(self._decoder, {"latent_sample": scaled}, "sample")

    def vae_encoder(self) -> Session:
        """The VAE encoder, loaded for the caller, who closes it."""
        return self._session("vae_encoder", self.provider)

    def _session(self, component: str, provider: str) -> OrtSession:
        return open_session(self.folder / component / "model.onnx", provider)

    def _predict(self, latents: np.ndarray, time: float, text: np.ndarray) -> np.ndarray:
        feeds = {"sample": latents, "timestep": np.asarray(time), "encoder_hidden_states": text}
        return _run(self._unet, feeds, "out_sample")

    def _unconditional_like(self, embeddings: np.ndarray) -> np.ndarray:
        if self._unconditional is None:
            self._unconditional = self.embed([""])
        return np.broadcast_to(self._unconditional, embeddings.shape)

    def _new_scheduler(self, seeds: Sequence[int]) -> tuple[Any, dict[str, Any]]:
        """A scheduler of its own for a batch, and what its `step` takes beside the usual."""
        import torch

        config = self._scheduler_config
        scheduler = _scheduler_class(config["_class_name"]).from_config(config)
        extra: dict[str, Any] = {}
        if "generator" in inspect.signature(scheduler.step).parameters:
            extra["generator"] = [torch.Generator().manual_seed(seed) for seed in seeds]
        return scheduler, extra

    def _token_ids(self, tokenizer: Any, prompt: str) -> np.ndarray:
        length = min(tokenizer.model_max_length, self.geometry.length)
        ids = tokenizer(prompt).input_ids
        if len(ids) > length:
            raise ModelError(
                f"the prompt {prompt!r} has {len(ids)} tokens, the generator takes {length}; "
                "give shorter words in classes.toml"
            )
        padded = tokenizer(prompt, padding="max_length", max_length=length, return_tensors="np").input_ids
        return np.asarray(padded, dtype=np.int64)


def _run(session: Session, feeds: dict[str, np.ndarray], output: str) -> np.ndarray:
    """One output as float32, with the inputs in the types that the graph takes."""
    typed = {
        spec.name: feeds[spec.name].astype(spec.dtype, copy=False)
        for spec in session.inputs
        if spec.name in feeds
    }
    return session.run(typed)[output].astype(np.float32, copy=False)


def _encode(encoder: Session, token_ids: np.ndarray) -> np.ndarray:
    return _run(encoder, {"input_ids": token_ids}, "last_hidden_state")


def _to_uint8(images: np.ndarray) -> np.ndarray:
    unit = np.clip(images / 2 + 0.5, 0, 1).transpose(0, 2, 3, 1)
    return np.asarray(np.round(unit * 255), dtype=np.uint8)


def _add_words(tokenizer: Any, style: StyleToken) -> list[int]:
    added = tokenizer.add_tokens(list(style.words))
    if added != len(style.words):
        raise ModelError(
            f"the style token {style.token!r} is already a word of this generator; "
            "learn it under another --token"
        )
    return [int(index) for index in tokenizer.convert_tokens_to_ids(list(style.words))]


def _tokenizer(folder: Path) -> Any:
    """The tokenizer in the class that the pipeline names, since the fast one cuts some texts otherwise."""
    try:
        import transformers
    except ImportError:
        raise MissingExtra("transformers", "train") from None
    try:
        name = json.loads((folder / INDEX).read_text(encoding="utf-8"))["tokenizer"][1]
        kind = {
            "CLIPTokenizer": transformers.CLIPTokenizer,
            "CLIPTokenizerFast": transformers.CLIPTokenizerFast,
        }
        return kind[name].from_pretrained(str(folder / "tokenizer"), local_files_only=True)
    except (OSError, ValueError, TypeError, LookupError):
        raise EngineError(
            f"cannot read the tokenizer in {folder}; make it with `synthkit build-engines --force`"
        ) from None


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
    found = getattr(diffusers, name, None)
    if not name.endswith("Scheduler") or found is None:
        raise EngineError(
            f"diffusers has no scheduler {name!r}; name another in scheduler/scheduler_config.json"
        )
    return found
