"""What the measures of `gap` suggest, with the limit that was passed and what it rests on.

The limits are ours, from the arithmetic given beside each; no paper gives them. They say where to look first,
not what a student will gain.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from synthkit.metrics.classification import wilson_interval

_OFFSET = 0.8  # Cohen's (1988) large effect: 79 % of one set lie beyond the other's mean
_ERRORS = 2.0  # standard errors that an offset must pass, so that few photos raise no alarm
_SPREAD = 0.5  # two deviations of the synthetic set then reach one of the photos: 68 % of them
_DECIBEL = 3.0  # half or twice the power
_COVERAGE = 0.7  # of the coverage that images of the photos' own distribution would have
_DIVERSITY = 0.8  # of the photos' mean distance
_MOST = 3


@dataclass(frozen=True)
class _Finding:
    """One thing that is wrong.

    Attributes:
        gap: "appearance", "content" or "labels".
        excess: how far past its limit; 1 is at it.
        action: what to do.
        why: the value seen, the limit, and what the limit rests on.
    """

    gap: str
    excess: float
    action: str
    why: str


#: The order of the gaps where photos are trained on too: wrong labels stay wrong; images are worth what they
#: add to what the photos show themselves; how photos look is what the last layers learn from them.
_WITH_REAL = ("labels", "content", "appearance")


def advise(gap: Mapping[str, Any]) -> dict[str, list[dict[str, str]]]:
    """Two or three things to do, for both ways of use.

    Args:
        gap: what `measure_gap` found.

    Returns:
        `synthetic_only`: the farthest past their limit first; `added_to_real`: wrong labels, then content,
        then appearance. Each is a list of `gap`, `action` and `why`, empty where no limit is passed.
    """
    found = [*_labels(gap), *_coverage(gap), *_diversity(gap), *_offsets(gap), *_spread(gap), *_spectrum(gap)]
    alone = sorted(found, key=lambda one: -one.excess)
    beside = sorted(alone, key=lambda one: _WITH_REAL.index(one.gap))
    return {"synthetic_only": _told(alone), "added_to_real": _told(beside)}


def _told(findings: list[_Finding]) -> list[dict[str, str]]:
    return [{"gap": one.gap, "action": one.action, "why": one.why} for one in findings[:_MOST]]


def _labels(gap: Mapping[str, Any]) -> Iterator[_Finding]:
    """Classes whose images a head of photos takes for another class, more often than chance explains."""
    content = gap["content"]
    trusted, held_out = content["head_top1_on_photos"], content["head_photos_held_out"]
    if trusted is None:
        return
    low = wilson_interval(round(trusted * held_out), held_out)[0]
    worst = [
        (low / max(one["seen_right"], 0.01), name, one)
        for name, one in gap["per_class"].items()
        if wilson_interval(round(one["seen_right"] * one["n_synthetic"]), one["n_synthetic"])[1] < low
    ]
    for excess, name, one in sorted(worst, key=lambda item: -item[0])[:1]:
        others = f" (and of {len(worst) - 1} more classes)" if len(worst) > 1 else ""
        yield _Finding(
            "labels",
            excess,
            f"give {name!r}{others} other words in classes.toml, or lean on your photos instead of its words "
            "with generate --init real; generate --filter class rejects such images",
            f"a head trained on the photos takes {one['seen_right']:.0%} of its images for it, most others "
            f"for {one['most_seen_as']!r}; of held-out photos it gets {trusted:.0%} right, at least "
            f"{low:.0%}: the 95 % intervals do not meet",
        )


def _coverage(gap: Mapping[str, Any]) -> Iterator[_Finding]:
    content = gap["content"]
    if content["coverage"] is None:
        return
    share = content["coverage"] / max(content["expected_coverage"], 1e-9)
    if share >= _COVERAGE:
        return
    narrow = (content["diversity"] or 1) < 1
    action = (
        "lower generate --guidance and give several prompt templates: the images crowd together"
        if narrow
        else "draw from your photos with generate --init real --strength 0.75: the images vary elsewhere"
    )
    worst = min(
        (one["coverage"], name) for name, one in gap["per_class"].items() if one["coverage"] is not None
    )
    yield _Finding(
        "content",
        _COVERAGE / max(share, 0.01),
        action,
        f"{content['coverage']:.0%} of the photos have a synthetic image near them, where images of their "
        f"own distribution would reach {content['expected_coverage']:.0%}; least {worst[1]!r} with "
        f"{worst[0]:.0%} (limit: {_COVERAGE:.0%} of what is expected)",
    )


def _diversity(gap: Mapping[str, Any]) -> Iterator[_Finding]:
    diversity = gap["content"]["diversity"]
    if diversity is not None and diversity < _DIVERSITY:
        yield _Finding(
            "content",
            _DIVERSITY / max(diversity, 0.01),
            "lower generate --guidance, which trades variety for likeness to the prompt (Ho & Salimans 2022)",
            f"two synthetic images of a class are {diversity:.2f} times as far apart as two photos "
            f"(limit {_DIVERSITY})",
        )


def _offsets(gap: Mapping[str, Any]) -> Iterator[_Finding]:
    appearance = gap["appearance"]
    name, offset = max(appearance["offset"].items(), key=lambda item: abs(item[1]))
    limit = max(_OFFSET, _ERRORS * appearance["offset_error"])
    if abs(offset) > limit:
        yield _Finding(
            "appearance",
            abs(offset) / limit,
            "learn the style with more --vectors or --steps; images drawn from your photos (generate --init "
            "real) keep more of their look",
            f"{name} is {offset:+.1f} standard deviations of the photos off (limit {limit:.1f}: a large "
            "effect, beyond two standard errors)",
        )


def _spread(gap: Mapping[str, Any]) -> Iterator[_Finding]:
    spread = gap["appearance"]["spread"]
    middle = sorted(spread.values())[len(spread) // 2]
    if middle < _SPREAD:
        yield _Finding(
            "appearance",
            _SPREAD / max(middle, 0.01),
            "learn a token per look: learn-style --clusters 3",
            f"colour, contrast and sharpness vary {middle:.2f} times as much as among the photos (limit "
            f"{_SPREAD}: then a third of the photos look like no synthetic image)",
        )


def _spectrum(gap: Mapping[str, Any]) -> Iterator[_Finding]:
    high = gap["appearance"]["high_frequencies_db"]
    if high < -_DECIBEL:
        yield _Finding(
            "appearance",
            -high / _DECIBEL,
            "draw with more generate --steps, or from your photos with --init real: the images are soft",
            f"fine detail has {high:+.1f} dB against the photos (limit {-_DECIBEL:.0f} dB, half the power)",
        )
    elif high > _DECIBEL:
        yield _Finding(
            "appearance",
            high / _DECIBEL,
            "lower generate --guidance or draw with more --steps: the images are harder or noisier",
            f"fine detail has {high:+.1f} dB against the photos (limit {_DECIBEL:.0f} dB, twice the power)",
        )
