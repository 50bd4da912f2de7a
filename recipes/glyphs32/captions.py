"""Captions in a small closed vocabulary: what a picture shows, in lower-case words."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

_DIGIT_NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")

#: Words for each class, keyed by the folder name "0".."9", "A".."Z".
CLASS_WORDS: dict[str, str] = {
    **{str(i): f"digit {name}" for i, name in enumerate(_DIGIT_NAMES)},
    **{chr(code): f"capital letter {chr(code).lower()}" for code in range(ord("A"), ord("Z") + 1)},
}

#: The 36 folder names, digits first.
SYMBOLS: tuple[str, ...] = tuple(CLASS_WORDS)

#: Names of the faces that the renderer draws, as captions say them.
FAMILIES: tuple[str, ...] = (
    "printed",
    "handwritten",
    "seven segment display",
    "dot matrix display",
    "roller counter",
    "engraved",
    "stamped",
)

#: Words for ink and paper colours, said as "ink on paper".
COLOUR_WORDS: tuple[str, ...] = (
    "white", "black", "grey", "red", "green", "blue", "yellow", "orange", "cyan", "brown", "purple",
    "dark", "light",
)  # fmt: skip

#: Other things a caption may say.
QUALITIES: tuple[str, ...] = (
    "bold", "thin", "italic", "outlined", "blurred", "noisy", "low contrast", "framed", "small", "large",
    "uneven light", "reflection", "shadow", "scanned",
)  # fmt: skip

# (weight, template without attributes, template with attributes)
_TEMPLATES: tuple[tuple[float, str, str], ...] = (
    (0.45, "a {words} photo", "a {words} photo in the style of {attributes}"),
    (0.15, "a photo of the {words}", "a photo of the {words}, {attributes}"),
    (0.15, "a good photo of the {words}", "a good photo of the {words} in the style of {attributes}"),
    (0.15, "{words}", "{words}, {attributes}"),
    (0.10, "a photo of the {words}", "a photo of the {words} in the style of {attributes}"),
)
_CHANCE_OF_ATTRIBUTES = 0.75
_MOST_ATTRIBUTES = 5
_MOST_WORDS = 23


def caption(words: str, attributes: Sequence[str], rng: np.random.Generator) -> str:
    """Write a caption that names the class and a random part of the attributes.

    Args:
        words: the class in words, such as "digit four".
        attributes: what is true of the picture, the most telling first.
        rng: source of the choices.

    Returns:
        A lower-case sentence of fewer than 24 words.
    """
    template = _TEMPLATES[rng.choice(len(_TEMPLATES), p=[weight for weight, _, _ in _TEMPLATES])]
    if not attributes or rng.random() > _CHANCE_OF_ATTRIBUTES:
        return template[1].format(words=words)
    count = int(rng.integers(1, min(len(attributes), _MOST_ATTRIBUTES) + 1))
    # The family leads the list and is what a style token must later stand for, so it is mostly kept.
    weights = np.array([4.0] + [1.0] * (len(attributes) - 1))
    chosen = sorted(rng.choice(len(attributes), size=count, replace=False, p=weights / weights.sum()))
    text = template[2].format(words=words, attributes=", ".join(attributes[i] for i in chosen))
    while len(text.split()) > _MOST_WORDS:
        chosen = chosen[:-1]
        text = template[2].format(words=words, attributes=", ".join(attributes[i] for i in chosen))
    return text
