"""Style tokens: learned words for the appearance of one site's photos.

Written as diffusers' `learned_embeds.safetensors`, one key per token, with the share of photos behind each in
the metadata; files of A1111 and kohya are read and written too. Knows the width of a token, not the model
that it goes into.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from synthkit.artifacts import write_bytes
from synthkit.errors import MissingExtra, ModelError

#: The sentence of arXiv 2403.19866, for learning and generating; `{token}` stands for all words of the token.
PROMPT = "A {words} photo in the style of {token}"

_FAMILIES = {768: "Stable Diffusion 1.x", 1024: "Stable Diffusion 2.x", 1280: "SDXL (768 + 1280)"}
_UNNAMED = ("emb_params", "<UNNAMED>")  # keys of files whose name is the token: A1111's and kohya's
_SHARES = "shares"  # metadata: JSON {token: share of the photos}, in the order of the tokens
_WEIGHTS = "base_weights"  # metadata: fingerprint of the generator's weights


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
        save_all([self], path, base_model)

    def save_unnamed(self, folder: Path) -> Path:
        """Write the token as A1111 and kohya do: their word for it is the file's name.

        Args:
            folder: where; the file is the token's name without its brackets.

        Returns:
            The file.
        """
        path = folder / f"{self.token.strip('<>')}.safetensors"
        _write(path, {_UNNAMED[0]: self.vectors}, {"format": "pt"})
        return path


def family(width: int) -> str:
    """The base models whose text encoders have this width."""
    return f"{_FAMILIES.get(width, 'a model')} of text width {width}"


def save_all(
    tokens: Sequence[StyleToken],
    path: Path,
    base_model: str,
    shares: Sequence[float] | None = None,
    base_weights: str | None = None,
) -> None:
    """Write tokens into one file as diffusers does, a key for each.

    Args:
        tokens: at least one, of different names.
        path: the .safetensors file.
        base_model: name of the generator they were learned for; kept as metadata.
        shares: fraction of the photos behind each token; None: not recorded.
        base_weights: fingerprint of that generator's weights; None: not recorded.
    """
    metadata = {"format": "pt", "base_model": base_model}
    if base_weights is not None:
        metadata[_WEIGHTS] = base_weights
    if shares is not None:
        by_name = {one.token: share for one, share in zip(tokens, shares, strict=True)}
        metadata[_SHARES] = json.dumps(by_name)
    _write(path, {one.token: one.vectors for one in tokens}, metadata)


def _write(path: Path, tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    whole = {name: np.ascontiguousarray(one, dtype=np.float32) for name, one in tensors.items()}
    write_bytes(path, _sorted_metadata(_safetensors().numpy.save(whole, dict(metadata))))


def _sorted_metadata(content: bytes) -> bytes:
    """The same safetensors file with its metadata in order: the library's own order is another every time."""
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # data begin at a multiple of 8 bytes
    return len(text).to_bytes(8, "little") + text + content[8 + size :]


def load(path: Path) -> StyleToken:
    """Read the one style token of a file in the format of diffusers, A1111 or kohya.

    Raises:
        ModelError: as `load_all`, or the file holds several tokens.
        MissingExtra: safetensors is not installed.
    """
    tokens = load_all(path)
    if len(tokens) != 1:
        names = ", ".join(one.token for one in tokens[:5])
        raise ModelError(f"{path} must hold one token here, found {len(tokens)}: {names}")
    return tokens[0]


def load_all(path: Path) -> tuple[StyleToken, ...]:
    """Read the style tokens of a file in the format of diffusers, A1111 or kohya.

    Returns:
        The tokens in the order they were written in; by name where the file does not tell.

    Raises:
        ModelError: the file is absent, pickled, unreadable, or holds something else than tokens of one width.
        MissingExtra: safetensors is not installed.
    """
    tensors, metadata = _read(path)
    if {"clip_l", "clip_g"} & tensors.keys():
        raise ModelError(
            f"{path} belongs to SDXL (widths 768 and 1280), which is not supported; learn a new style"
        )
    if not tensors:
        raise ModelError(f"{path} holds no token; learn the style again")
    tokens = tuple(_token(path, key, tensors[key]) for key in _shares(path, metadata, tensors))
    if len({one.token for one in tokens}) < len(tokens):
        raise ModelError(
            f"{path} holds several tokens without names ({', '.join(tensors)}); give one of them"
        )
    if len({one.vectors.shape[1] for one in tokens}) > 1:
        sizes = ", ".join(f"{one.token} {one.vectors.shape[1]}" for one in tokens[:5])
        raise ModelError(f"{path} is not a file of style tokens: their widths differ ({sizes})")
    return tokens


def shares(path: Path) -> tuple[float, ...]:
    """Read the fraction of photos behind each token of a file, in the order of `load_all`; their sum is 1.

    Equal shares where the file records none.

    Raises:
        ModelError: as `load_all`, or the recorded shares do not fit the tokens.
        MissingExtra: safetensors is not installed.
    """
    tensors, metadata = _read(path)
    return tuple(_shares(path, metadata, tensors).values())


def base_of(path: Path) -> tuple[str, str]:
    """Name of the generator that a file's tokens were learned for, and the fingerprint of its weights.

    Each is empty where the file does not tell, as files of other tools do not.

    Raises:
        ModelError: as `load_all`.
        MissingExtra: safetensors is not installed.
    """
    metadata = _read(path)[1]
    return metadata.get("base_model", ""), metadata.get(_WEIGHTS, "")


def _shares(path: Path, metadata: Mapping[str, str], tensors: Mapping[str, Any]) -> dict[str, float]:
    """Key -> share in the order of writing, which safetensors itself does not keep."""
    if _SHARES not in metadata:
        return dict.fromkeys(sorted(tensors), 1 / max(1, len(tensors)))
    try:
        recorded = {str(key): float(value) for key, value in json.loads(metadata[_SHARES]).items()}
    except (ValueError, TypeError, AttributeError):
        recorded = {}
    total = sum(recorded.values())
    if recorded.keys() != tensors.keys() or min(recorded.values()) < 0 or not 0 < total < float("inf"):
        raise ModelError(f"{path}: the recorded shares do not fit its tokens; learn the style again")
    return {key: value / total for key, value in recorded.items()}


def _token(path: Path, key: str, vectors: np.ndarray) -> StyleToken:
    if vectors.ndim not in (1, 2) or vectors.size == 0:
        raise ModelError(f"{path}: {key!r} has shape {list(vectors.shape)}, a token has [vectors, width]")
    if vectors.dtype.kind != "f":
        raise ModelError(f"{path}: {key!r} holds {vectors.dtype}, a token holds float32 or float16")
    if not np.isfinite(vectors).all():
        raise ModelError(f"{path}: {key!r} holds NaN or infinite values; learn the style again")
    name = f"<{path.stem}>" if key in _UNNAMED else key
    return StyleToken(name, np.atleast_2d(vectors).astype(np.float32))


def _read(path: Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Tensors and metadata of a safetensors file."""
    if not path.is_file():
        raise ModelError(
            f"no style token {path}; learn one with `synthkit learn-style`, or give another --style"
        )
    if path.suffix in (".pt", ".bin", ".pth", ".ckpt"):
        raise ModelError(
            f"{path} is a pickle, which can run code when it is loaded; convert it to .safetensors where you "
            "trust it (safetensors.torch.save_file) and give that file"
        )
    library = _safetensors()
    try:
        with library.safe_open(path, "np") as file:
            return {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except Exception as error:  # SafetensorError of a broken file, others of a type that NumPy lacks
        raise ModelError(
            f"{path} is not a safetensors file of float32 or float16 ({type(error).__name__}: {error})"
        ) from None


def _safetensors() -> Any:
    try:
        import safetensors.numpy
    except ImportError:
        raise MissingExtra("safetensors", "train") from None
    return safetensors
