"""A CLIP tokenizer with a small vocabulary of its own: bytes, and the words of the captions."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import CLIPTokenizer, CLIPTokenizerFast
from transformers.models.clip.tokenization_clip import bytes_to_unicode

#: Tokens of a prompt, begin and end marks included.
CONTEXT = 24

_END_OF_WORD = "</w>"


def train_tokenizer(captions: Sequence[str], folder: Path) -> CLIPTokenizerFast:
    """Learn byte-pair merges that make one token of each caption word, and write CLIP's files.

    Args:
        captions: texts that hold every word worth a token.
        folder: where `vocab.json` and `merges.txt` go.

    Returns:
        The tokenizer in its compiled form, which reads a hundred thousand captions in seconds.
    """
    symbols = list(bytes_to_unicode().values())
    learned = Tokenizer(models.BPE(end_of_word_suffix=_END_OF_WORD))
    learned.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer = trainers.BpeTrainer(end_of_word_suffix=_END_OF_WORD, show_progress=False, min_frequency=2)
    learned.train_from_iterator(captions, trainer)
    merges = [_pair(merge) for merge in json.loads(learned.to_str())["model"]["merges"]]
    # CLIP's order of ids: bytes, bytes that end a word, merges, the two marks.
    words = symbols + [symbol + _END_OF_WORD for symbol in symbols] + ["".join(merge) for merge in merges]
    words = [*dict.fromkeys(words), "<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}), "utf-8")
    lines = ["#version: 0.2", *(" ".join(merge) for merge in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", "utf-8")
    tokenizer = CLIPTokenizer(folder / "vocab.json", folder / "merges.txt", model_max_length=CONTEXT)
    tokenizer.save_pretrained(folder)
    return CLIPTokenizerFast.from_pretrained(folder)


def _pair(merge: str | Sequence[str]) -> tuple[str, str]:
    left, right = merge.split(" ") if isinstance(merge, str) else merge
    return left, right
