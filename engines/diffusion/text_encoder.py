"""Prompts to embeddings: tokenizers, text encoders, style tokens. An encoder is loaded for one call.

A style token becomes rows of the embedding table in the text encoder's ONNX graph; nothing is rebuilt.
"""

from __future__ import annotations

import contextlib
import io
import json
import re
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from synthkit.artifacts import digest, file_sha256, fingerprint, write_bytes
from synthkit.diffusion.style_token import StyleToken
from synthkit.engines.diffusion.denoiser import run_typed
from synthkit.engines.runtime.component_spec import Geometry, TextSpec
from synthkit.engines.runtime.session import OrtSession, open_session
from synthkit.errors import EngineError, MissingExtra, ModelError
from synthkit.models.generator import INDEX

_KINDS = ("hidden", "pooled")
_PASSING = {"Reshape", "Cast", "Identity", "Unsqueeze", "Squeeze", "Flatten"}  # leave token ids as they are


@dataclass(frozen=True)
class TextEmbeddings:
    """Embeddings of some prompts, as a UNet takes them.

    Attributes:
        hidden: float32 [prompts, tokens, width].
        pooled: float32 [prompts, pooled width]; of width 0 where the UNet takes none.
    """

    hidden: np.ndarray
    pooled: np.ndarray

    def __len__(self) -> int:
        return len(self.hidden)

    def take(self, rows: Sequence[int] | slice | np.ndarray) -> TextEmbeddings:
        """Some of the prompts, in this order."""
        return TextEmbeddings(self.hidden[rows], self.pooled[rows])


def embed(
    folder: Path,
    geometry: Geometry,
    prompts: Sequence[str],
    styles: Sequence[StyleToken] = (),
    provider: str = "cpu",
) -> TextEmbeddings:
    """Compute text embeddings of prompts.

    Args:
        folder: the engines folder.
        geometry: the pipeline's sizes.
        prompts: texts; the styles' tokens may stand in them.
        styles: tokens to add to the vocabulary.
        provider: of the text encoders.

    Raises:
        EngineError: a tokenizer or a text encoder cannot be used.
        ModelError: a style has another width, or a prompt is too long.
    """
    for style in styles:
        _check_style(style, geometry)
    hidden, pooled = [], [np.zeros((len(prompts), 0), np.float32)]
    for text in geometry.texts:
        answers = _encode(folder, text, geometry.max_tokens, prompts, styles, provider)
        hidden.append(answers[text.hidden])
        if text.pooled:
            pooled.append(answers["text_embeds"])
    return TextEmbeddings(np.concatenate(hidden, 2), np.concatenate(pooled, 1))


def text_key(
    folder: Path,
    geometry: Geometry,
    prompts: Sequence[str],
    negative: str,
    styles: Sequence[StyleToken],
    provider: str,
) -> str:
    """Digest of everything that the embeddings of some prompts and of the negative prompt depend on."""
    parts = [folder / name for text in geometry.texts for name in (text.component, text.tokenizer)]
    return digest(
        {
            "files": {one.name: fingerprint(one) for one in parts} | {INDEX: file_sha256(folder / INDEX)},
            "prompts": list(prompts),
            "negative": negative,
            "styles": [[style.token, style.vectors.tolist()] for style in styles],
            "provider": provider,
        }
    )


def read_embeddings(path: Path, key: str) -> tuple[TextEmbeddings, TextEmbeddings] | None:
    """Read embeddings that `write_embeddings` wrote; None unless they have this key."""
    try:
        with path.open("rb") as stream, np.load(stream, allow_pickle=False) as kept:
            if str(kept["key"]) != key:
                return None
            prompts, none = ([kept[f"{name}_{kind}"] for kind in _KINDS] for name in ("prompts", "none"))
    except (OSError, ValueError, KeyError, zipfile.BadZipFile):  # absent or torn: computed again
        return None
    return TextEmbeddings(*prompts), TextEmbeddings(*none)


def write_embeddings(path: Path, key: str, prompts: TextEmbeddings, none: TextEmbeddings) -> None:
    """Keep embeddings of prompts and of the negative one; where the folder cannot be written, nothing."""
    arrays = {
        f"{name}_{kind}": getattr(texts, kind)
        for name, texts in (("prompts", prompts), ("none", none))
        for kind in _KINDS
    }
    buffer = io.BytesIO()
    np.savez(buffer, key=np.array(key), **arrays)
    with contextlib.suppress(OSError):
        write_bytes(path, buffer.getvalue())


def unconditional(folder: Path, geometry: Geometry, provider: str = "cpu") -> TextEmbeddings:
    """Embedding of no prompt, one row: of the empty text, or zeros where the pipeline says so."""
    if _read_index(folder).get("force_zeros_for_empty_prompt"):
        hidden = np.zeros((1, geometry.max_tokens, geometry.width), np.float32)
        return TextEmbeddings(hidden, np.zeros((1, geometry.pooled), np.float32))
    return embed(folder, geometry, [""], provider=provider)


def _check_style(style: StyleToken, geometry: Geometry) -> None:
    if len(geometry.texts) > 1:
        raise ModelError(
            f"the style token {style.token!r} is for one text encoder, this generator (SDXL) has two; "
            "generate without --style, or build engines of the token's base model"
        )
    style.check_width(geometry.width)


def _encode(
    folder: Path,
    text: TextSpec,
    length: int,
    prompts: Sequence[str],
    styles: Sequence[StyleToken],
    provider: str,
) -> dict[str, np.ndarray]:
    tokenizer, encoder = read_tokenizer(folder, text.tokenizer), None
    path = folder / text.component / "model.onnx"
    rows = {
        index: row
        for style in styles
        for index, row in zip(_add_words(tokenizer, style), style.vectors, strict=True)
    }
    # Too long a prompt is refused before the text encoder is loaded.
    ids = [_token_ids(tokenizer, length, _spelled_out(prompt, styles), prompt) for prompt in prompts]
    if rows:
        encoder = open_session(with_rows(path, rows), provider, data_folder=path.parent)
    encoder = encoder or open_session(path, provider)
    try:
        # One prompt at a time: its embedding then cannot depend on which others are asked for.
        answers = [_answers(encoder, text, one) for one in ids]
    finally:
        encoder.close()
    return {name: np.concatenate([one[name] for one in answers]) for name in answers[0]}


def _answers(encoder: OrtSession, text: TextSpec, token_ids: np.ndarray) -> dict[str, np.ndarray]:
    wanted = [text.hidden, "text_embeds"] if text.pooled else [text.hidden]
    answers = run_typed(encoder, {"input_ids": token_ids})
    return {name: answers[name].astype(np.float32) for name in wanted}


def _spelled_out(prompt: str, styles: Sequence[StyleToken]) -> str:
    """Replace each style token in a prompt by one word per vector."""
    words = {style.token: " ".join(style.words) for style in styles}
    if not words:
        return prompt
    longest_first = sorted(words, key=len, reverse=True)  # a token's name may begin with another's
    return re.sub("|".join(map(re.escape, longest_first)), lambda found: words[found.group()], prompt)


def _token_ids(tokenizer: Any, length: int, prompt: str, shown: str) -> np.ndarray:
    length = min(tokenizer.model_max_length, length)
    count = len(tokenizer(prompt).input_ids)
    if count > length:
        words = prompt.split()
        fitting = (
            n for n in range(len(words)) if len(tokenizer(" ".join(words[: -n or None])).input_ids) <= length
        )
        raise ModelError(
            f"the prompt {shown!r} has {count} tokens, the generator takes {length}: it is "
            f"{next(fitting, len(words))} word(s) too long; give shorter words in classes.toml, or a shorter "
            "template or context"
        )
    padded = tokenizer(prompt, padding="max_length", max_length=length, return_tensors="np").input_ids
    return np.asarray(padded, dtype=np.int64)


def _add_words(tokenizer: Any, style: StyleToken) -> list[int]:
    added = tokenizer.add_tokens(list(style.words))
    if added != len(style.words):
        raise ModelError(
            f"the style token {style.token!r} is already a word of this generator; "
            "learn it under another --token"
        )
    return [int(index) for index in tokenizer.convert_tokens_to_ids(list(style.words))]


def read_tokenizer(folder: Path, name: str) -> Any:
    """A tokenizer in the class that the pipeline names, since the fast one cuts some texts otherwise.

    Args:
        folder: the engines folder.
        name: "tokenizer" or "tokenizer_2".

    Raises:
        EngineError: it cannot be read.
    """
    try:
        import transformers
    except ImportError:
        raise MissingExtra("transformers", "train") from None
    try:
        kind = {
            "CLIPTokenizer": transformers.CLIPTokenizer,
            "CLIPTokenizerFast": transformers.CLIPTokenizerFast,
        }[_read_index(folder)[name][1]]
        return kind.from_pretrained(str(folder / name), local_files_only=True)
    except (OSError, ValueError, TypeError, LookupError):
        raise EngineError(
            f"cannot read the {name} in {folder}; make it with `synthkit build-engines --force`"
        ) from None


def _read_index(folder: Path) -> dict[str, Any]:
    try:
        index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise EngineError(
            f"cannot read {folder / INDEX}; make it with `synthkit build-engines --force`"
        ) from None
    return index if isinstance(index, dict) else {}


def with_rows(model_path: Path, rows: Mapping[int, np.ndarray]) -> bytes:
    """Set rows of an ONNX text encoder's token-embedding table, which grows as needed; return the model.

    Weights that lie in external files stay there, but for the table itself.

    Args:
        model_path: the text encoder.
        rows: token id -> float [width].

    Raises:
        EngineError: the file is broken, or has no table that the token ids look up.
        MissingExtra: the onnx package is not installed.
    """
    onnx = _onnx()
    try:
        model = onnx.load(model_path, load_external_data=False)
    except Exception as error:  # protobuf's DecodeError and OSError share no base class
        raise EngineError(
            f"cannot read {model_path} ({type(error).__name__}); rebuild it with --force"
        ) from None
    table = _table(model.graph, model_path)
    values = onnx.numpy_helper.to_array(table, base_dir=str(model_path.parent))
    table.CopyFrom(onnx.numpy_helper.from_array(_grown(values, rows), table.name))
    return bytes(model.SerializeToString())


def _grown(values: np.ndarray, rows: Mapping[int, np.ndarray]) -> np.ndarray:
    grown = np.zeros((max(len(values), max(rows) + 1), values.shape[1]), values.dtype)
    grown[: len(values)] = values
    for index, row in rows.items():
        grown[index] = row
    return grown


def _table(graph: Any, model_path: Path) -> Any:
    """Initializer that `input_ids` look up, possibly through nodes that only reshape them."""
    initializers = {tensor.name: tensor for tensor in graph.initializer}
    ids = {"input_ids"}
    for node in graph.node:  # in topological order, as ONNX demands
        if node.op_type in _PASSING and node.input[0] in ids:
            ids.add(node.output[0])
        if node.op_type == "Gather" and node.input[1] in ids and node.input[0] in initializers:
            return initializers[node.input[0]]
    raise EngineError(
        f"{model_path} has no embedding table that input_ids look up; a style token cannot be added"
    )


def _onnx() -> Any:
    try:
        import onnx
        import onnx.numpy_helper
    except ImportError:
        raise MissingExtra("onnx", "train") from None
    return onnx
