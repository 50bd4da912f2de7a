"""The plan of a synthetic set: every image with its seed and its random choices. Generates nothing itself.

    (run seed, class, index, resample) ──SHA-256──► seed ──SHA-256 with the stream's name──► 0..1 ──► choice

Every choice has a stream of its own: one more phrase to choose from changes no noise and no token, and an
image is the same whatever else is generated.
"""

from __future__ import annotations

import hashlib
import math
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from synthkit.data.images import ImageSet
from synthkit.diffusion.style_token import PROMPT
from synthkit.errors import ConfigError, DataError, nearest
from synthkit.recipes.settings import GenerateSettings

PLAIN = "A {words} photo"
"""The sentence of an image without a style token."""

Words = Mapping[str, str | Sequence[str]]
"""Class name -> the words for it in prompts, or several, of which one is sampled per image."""

_PLACES = ("words", "token", "context")
_Item = TypeVar("_Item")


@dataclass(frozen=True, slots=True)
class Photo:
    """A real photo that images start from: its file, its name below the photos' folder, its SHA-256."""

    path: Path
    name: str
    sha256: str


@dataclass(frozen=True, slots=True)
class PlannedImage:
    """One image to generate.

    Attributes:
        name: class name.
        index: number within the class.
        resample: 0, or how often filters had it resampled.
        seed: of its noise and of its choices.
        prompt: what the text encoder reads.
        token: the style token in the prompt, or None.
        steps: denoising steps.
        guidance: guidance scale.
        start: the photo that it starts from; None: from noise alone.
    """

    name: str
    index: int
    resample: int
    seed: int
    prompt: str
    token: str | None
    steps: int
    guidance: float
    start: Photo | None = None

    @property
    def file_name(self) -> str:
        """Path of the image below the synthetic set."""
        return image_file(self.name, self.index)


@dataclass(frozen=True)
class SetPlan:
    """Makes planned images out of settings.

    Attributes:
        settings: the stage's settings.
        words: class name -> words for prompts.
        tokens: (style token, share of the images), shares adding up to 1; none: plain prompts.
        photos: class name -> photos that its images start from; empty: from noise.
    """

    settings: GenerateSettings
    words: Mapping[str, tuple[str, ...]]
    tokens: tuple[tuple[str, float], ...]
    photos: Mapping[str, tuple[Photo, ...]]

    def images(self) -> list[PlannedImage]:
        """Every image of the set, in order of class and index."""
        return [
            self.image(name, index) for name in sorted(self.words) for index in range(self.settings.per_class)
        ]

    def resampled(self, image: PlannedImage) -> PlannedImage:
        """The next sample of an image: another seed, and every choice anew."""
        return self.image(image.name, image.index, image.resample + 1)

    def image(self, name: str, index: int, resample: int = 0) -> PlannedImage:
        """One image with its choices."""
        seed = image_seed(self.settings.seed, name, index, resample)
        token = self._token(seed)
        return PlannedImage(
            name,
            index,
            resample,
            seed,
            self._prompt(seed, name, token),
            token,
            int(steps_range(self.settings.steps).sample(seed, "steps")),
            guidance_range(self.settings.guidance).sample(seed, "guidance"),
            _pick(self.photos[name], seed, "start") if self.photos else None,
        )

    def _token(self, seed: int) -> str | None:
        if not self.tokens or uniform01(seed, "plain") < self.settings.plain_share:
            return None
        place = uniform01(seed, "token")
        for token, share in self.tokens[:-1]:
            place -= share
            if place < 0:
                return token
        return self.tokens[-1][0]

    def _prompt(self, seed: int, name: str, token: str | None) -> str:
        usual = PROMPT if token else PLAIN
        suitable = [one for one in self.settings.template if ("token" in _places(one)) == bool(token)]
        sentence = _pick(suitable or [usual], seed, "template")
        context = _pick(self.settings.context or [""], seed, "context")
        if context and "context" not in _places(sentence):
            sentence += ", {context}"
        text = sentence.format(words=_pick(self.words[name], seed, "words"), token=token, context=context)
        return " ".join(text.split())


def image_file(name: str, index: int) -> str:
    """Path of an image below the synthetic set."""
    return f"{name}/{index:05d}.png"


def make_plan(
    settings: GenerateSettings, words: Words, tokens: Sequence[tuple[str, float]], photos: ImageSet | None
) -> SetPlan:
    """A plan whose settings have been checked.

    Args:
        settings: the stage's settings.
        words: class name -> words for prompts.
        tokens: (style token, share of the images).
        photos: the real photos; needed to start from them.

    Raises:
        ConfigError: a class name cannot be a folder's name, or a setting cannot be used.
        DataError: a class has no photo to start from.
    """
    _check_names(words)
    _check_numbers(settings)
    _check_templates(settings, bool(tokens))
    lists = {name: (given,) if isinstance(given, str) else tuple(given) for name, given in words.items()}
    empty = [name for name, given in lists.items() if not given or not all(one.strip() for one in given)]
    if empty:
        raise ConfigError(f"class {empty[0]!r} has no words, so its prompt would be empty; give it some")
    starts = _photos_by_class(words, photos) if settings.init == "real" else {}
    return SetPlan(settings, lists, tuple(tokens), starts)


def image_seed(run_seed: int, class_name: str, index: int, resample: int = 0) -> int:
    """Seed of one image, the same whatever else is generated.

    48 bits, so that every reader of metadata.jsonl holds it exactly.
    """
    text = f"{run_seed}\0{class_name}\0{index}" + (f"\0{resample}" if resample else "")
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:6], "big")


def uniform01(seed: int, stream: str) -> float:
    """A uniform random number in [0, 1): the one of a named stream of an image's seed."""
    digest = hashlib.sha256(f"{seed}\0{stream}".encode()).digest()[:6]
    return int.from_bytes(digest, "big") / 2**48


@dataclass(frozen=True, slots=True)
class Range:
    """A setting that is a number, or a range of which each image has a number of its own.

    Attributes:
        low: smallest value.
        high: largest value, included.
        whole: whether the values are whole numbers.
    """

    low: float
    high: float
    whole: bool

    @classmethod
    def parse(cls, name: str, value: float | str, whole: bool, least: float) -> Range:
        """Read a number, or "LOW:HIGH".

        Args:
            name: of the setting, for the message.
            value: the setting.
            whole: whether whole numbers are asked for.
            least: the smallest value that is allowed.

        Raises:
            ConfigError: it is neither, or smaller than allowed.
        """
        ends, number = str(value).split(":"), int if whole else float
        try:
            low, high = number(ends[0]), number(ends[-1])
        except ValueError:
            low, high = math.nan, math.nan
        if len(ends) > 2 or not least <= low <= high < math.inf:
            kinds = "a whole number" if whole else "a number"
            raise ConfigError(f"{name} = {value!r}: must be {kinds} of {least} or more, or a range LOW:HIGH")
        return cls(low, high, whole)

    def sample(self, seed: int, stream: str) -> float:
        """The value of one image: whole, or rounded to three decimals."""
        if self.low == self.high:
            return self.low
        if self.whole:
            return self.low + math.floor(uniform01(seed, stream) * (self.high - self.low + 1))
        return round(self.low + uniform01(seed, stream) * (self.high - self.low), 3)


def steps_range(value: float | str) -> Range:
    """The setting `steps`.

    Raises:
        ConfigError: see `Range.parse`.
    """
    return Range.parse("steps", value, whole=True, least=1)


def guidance_range(value: float | str) -> Range:
    """The setting `guidance`.

    Raises:
        ConfigError: see `Range.parse`.
    """
    return Range.parse("guidance", value, whole=False, least=0)


def _pick(items: Sequence[_Item], seed: int, stream: str) -> _Item:
    return items[math.floor(uniform01(seed, stream) * len(items))]


def _places(sentence: str) -> set[str]:
    return {place for _, place, _, _ in string.Formatter().parse(sentence) if place is not None}


def _check_names(classes: Words) -> None:
    bad = [name for name in classes if not name.strip() or name[0] == "." or "/" in name or "\0" in name]
    if bad:
        raise ConfigError(f"class names {bad} cannot be folder names; leave out slashes and leading dots")
    if not classes:
        raise ConfigError("no classes were given; name them with --real-dir DIR or --classes a,b,c")


def _check_numbers(settings: GenerateSettings) -> None:
    fewest = steps_range(settings.steps).low
    guidance_range(settings.guidance)
    for name in ("strength", "plain_share"):
        if not 0 <= getattr(settings, name) <= 1:
            raise ConfigError(f"{name} = {getattr(settings, name)}: must lie between 0 and 1")
    if settings.init == "real" and int(fewest * settings.strength) < 1:
        raise ConfigError(
            f"strength = {settings.strength} of {fewest:g} steps is less than one step, so nothing would be "
            "generated; raise generate.strength or --steps"
        )


def _check_templates(settings: GenerateSettings, styled: bool) -> None:
    for name in ("template", "context"):
        if bad := [one for one in getattr(settings, name) if not isinstance(one, str) or not one.strip()]:
            raise ConfigError(f"{name} = {bad[0]!r}: must be a text that is not empty")
    for sentence in settings.template:
        _check_places(sentence)
        if "token" in _places(sentence) and not styled:
            raise ConfigError(
                f"template {sentence!r} has a place for a style token, and there is no style; "
                "learn one with `synthkit learn-style`, give --style FILE, or leave {token} out"
            )
    unused = (
        styled and settings.plain_share < 1 and not any("token" in _places(one) for one in settings.template)
    )
    if settings.template and unused:
        raise ConfigError(
            "no template has a place for the style: write {token} into one, or generate without the style "
            "with plain_share = 1"
        )


def _check_places(sentence: str) -> None:
    try:
        places = _places(sentence)
        for place in places - set(_PLACES):
            raise ConfigError(
                f"template {sentence!r} has the unknown place {{{place}}}{nearest(place, _PLACES)}; "
                "known are {words}, {token}, {context}"
            )
        sentence.format(**dict.fromkeys(_PLACES, ""))
    except ValueError as error:
        raise ConfigError(
            f"template {sentence!r} cannot be read: {error}; double a brace that is text"
        ) from None
    if "words" not in places:
        raise ConfigError(f"template {sentence!r} does not name the class; write {{words}} into it")


def _photos_by_class(classes: Words, photos: ImageSet | None) -> dict[str, tuple[Photo, ...]]:
    if photos is None:
        raise ConfigError("generate.init = real starts from photos; name their folder with --real-dir DIR")
    found: dict[str, list[Photo]] = {name: [] for name in classes}
    for item in photos.items:  # in the order of their content: a file's name changes nothing
        name = photos.classes[item.label]
        if name in found:
            found[name].append(Photo(item.path, item.path.relative_to(photos.root).as_posix(), item.sha256))
    if missing := [name for name, given in found.items() if not given]:
        raise DataError(f"{photos.root} has no photo of class {missing[0]!r} to start from; add one")
    return {name: tuple(given) for name, given in found.items()}
