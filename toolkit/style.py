"""The style token: a learned word for the look of one site's photos.

Written as diffusers' `learned_embeds.safetensors`; files of A1111 and kohya are read too. Knows the width of
a token, not the model that it goes into.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from synthkit.artifacts import write_bytes
from synthkit.errors import MissingExtra, ModelError

#: The sentence of arXiv 2403.19866, for learning and drawing; `{token}` stands for all words of the token.
PROMPT = "A {words} photo in the style of {token}"

_FAMILIES = {768: "Stable Diffusion 1.x", 1024: "Stable Diffusion 2.x", 1280: "SDXL (768 + 1280)"}
_UNNAMED = ("emb_params", "<UNNAMED>")  # keys of files whose name is the token: A1111's and kohya's


@dataclass(frozen=True)
class StyleToken:
    """A new word with its embedding vectors.

    Attributes:
        token: the word, for example "<site-style>".
        vectors: float32 [n, width]; n words in a row stand for the token.
    """

    token: str
    vectors: np.ndarray

    @property
    def words(self) -> tuple[str, ...]:
        """One word per vector, named as diffusers does: "tok", "tok_1", "tok_2"."""
        return (self.token, *(f"{self.token}_{index}" for index in range(1, len(self.vectors))))

    def check_width(self, width: int) -> None:
        """Refuse a token that was learned for another text encoder.

        Raises:
            ModelError: names the base family that the token belongs to.
        """
        own = self.vectors.shape[1]
        if own != width:
            raise ModelError(
                f"the style token {self.token!r} belongs to {family(own)}, this generator is "
                f"{family(width)}; learn a style for this one, or build engines of the token's base model"
            )

    def save(self, path: Path, base_model: str) -> None:
        """Write the token as diffusers does.

        Args:
            path: the .safetensors file.
            base_model: name of the generator it was learned for; kept as metadata.
        """
        vectors = np.ascontiguousarray(self.vectors, dtype=np.float32)
        metadata = {"format": "pt", "base_model": base_model}
        path.parent.mkdir(parents=True, exist_ok=True)
        write_bytes(path, _safetensors().save({self.token: vectors}, metadata))


def family(width: int) -> str:
    """The base models whose text encoders have this width."""
    return f"{_FAMILIES.get(width, 'a model')} of text width {width}"


def load(path: Path) -> StyleToken:
    """Read a style token in the format of diffusers, A1111 or kohya.

    Raises:
        ModelError: the file is absent, pickled, unreadable, or holds something else than one token.
        MissingExtra: safetensors is not installed.
    """
    if not path.is_file():
        raise ModelError(
            f"no style token {path}; learn one with `synthkit learn-style`, or give another --style"
        )
    if path.suffix in (".pt", ".bin", ".pth", ".ckpt"):
        raise ModelError(
            f"{path} is a pickle, which can run code when it is loaded; convert it to .safetensors where you "
            "trust it (safetensors.torch.save_file) and give that file"
        )
    tensors = _tensors(path)
    if {"clip_l", "clip_g"} & tensors.keys():
        raise ModelError(
            f"{path} belongs to SDXL (widths 768 and 1280), which is not supported; learn a new style"
        )
    if len(tensors) != 1:
        raise ModelError(f"{path} must hold one tensor, found {len(tensors)}: {', '.join(list(tensors)[:5])}")
    ((key, vectors),) = tensors.items()
    if vectors.ndim not in (1, 2) or vectors.size == 0:
        raise ModelError(f"{path}: {key!r} has shape {list(vectors.shape)}, a token has [vectors, width]")
    if not np.isfinite(vectors).all():
        raise ModelError(f"{path}: {key!r} holds NaN or infinite values; learn the style again")
    token = f"<{path.stem}>" if key in _UNNAMED else key
    return StyleToken(token, np.atleast_2d(vectors).astype(np.float32))


def _tensors(path: Path) -> dict[str, np.ndarray]:
    library = _safetensors()
    try:
        return dict(library.load(path.read_bytes()))
    except Exception as error:  # SafetensorError of a broken file, KeyError of a type that NumPy lacks
        raise ModelError(
            f"{path} is not a safetensors file of float32 or float16 ({type(error).__name__}: {error})"
        ) from None


def _safetensors() -> Any:
    try:
        import safetensors.numpy
    except ImportError:
        raise MissingExtra("safetensors", "train") from None
    return safetensors.numpy
