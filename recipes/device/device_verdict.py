"""What photos and test images say of a refitted head beside the present one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from synthkit.calibration.head import Choice, LinearHead, choose_strength
from synthkit.data.images import ImageSet
from synthkit.metrics import classification as metrics
from synthkit.recipes.device.device_site import Site

_CHUNK = 256  # images decoded at once


@dataclass(frozen=True)
class Compared:
    """Both heads on the same photos.

    Attributes:
        photos: their number.
        before: share that the present head gets right; None where there are none.
        after: the same of the new head.
    """

    photos: int
    before: float | None
    after: float | None

    @classmethod
    def of(cls, before: np.ndarray, after: np.ndarray) -> Compared:
        """From which photos are right, bool [N]."""
        return cls(len(before), *(float(right.mean()) if len(right) else None for right in (before, after)))


@dataclass(frozen=True)
class Verdict:
    """What photos say of both heads that neither has seen.

    Attributes:
        choice: strength, and the new head's logits of held-out examples. labels: of these examples. fresh:
        which of them are photos that the present head was not trained on either, bool. overall: both heads on
        the fresh ones. old: both heads on those of them whose class the bundle knows already. remembered:
        both on remembered photos of the classes that the photos lack; the present head was trained
            on these.
    """

    choice: Choice
    labels: np.ndarray
    fresh: np.ndarray
    overall: Compared
    old: Compared
    remembered: Compared

    @property
    def worse(self) -> bool:
        """Whether the new head gets fewer of them right."""
        before, after = self.overall.before, self.overall.after
        return before is not None and after is not None and after < before


def judge(site: Site) -> Verdict:
    """Choose the strength, and compare both heads on photos that neither has seen."""
    photos, memory = site.examples(site.precision)
    head = site.heads[site.precision]
    choice = choose_strength(head, photos, memory, len(site.labels))
    held_out = photos.and_also(memory).at(choice.rows)
    trained_on = site.bundle.facts["lineage"].get("trained_on", [])
    known = np.concatenate([np.isin(site.sha256, trained_on), np.ones(len(memory), bool)])
    fresh = ~known[choice.rows]
    before = head.logits(held_out.features).argmax(axis=1) == held_out.labels
    after = choice.logits.argmax(axis=1) == held_out.labels
    groups = fresh, fresh & (held_out.labels < site.known), choice.rows >= len(photos)
    compared = (Compared.of(before[group], after[group]) for group in groups)
    return Verdict(choice, held_out.labels, fresh, *compared)


def evidence(site: Site, verdict: Verdict) -> dict[str, Any]:
    """The verdict as data, for the answer and the manifest."""
    return {
        "held_out": {**asdict(verdict.overall), "folds": verdict.choice.folds},
        "old_classes": asdict(verdict.old),
        "remembered": asdict(verdict.remembered),
        "strength": verdict.choice.strength,
        "photos": site.photos.counts(),
        "new_classes": list(site.labels[site.known :]),
    }


def same_answers(site: Site, head: LinearHead) -> dict[str, int]:
    """On how many of the golden inputs, photos of the old classes, both heads answer the same."""
    features = site.golden[site.precision]
    before, after = (one.logits(features).argmax(axis=1) for one in (site.heads[site.precision], head))
    return {"inputs": len(features), "same_answer": int(np.sum(before == after))}


def measure_heads(site: Site, heads: Mapping[str, LinearHead], test: ImageSet) -> dict[str, dict[str, Any]]:
    """Precision -> top-1 on the test images before and after, per class and of the old classes alone."""
    found: dict[str, list[np.ndarray]] = {name: [] for name in heads}
    for start in range(0, len(test), _CHUNK):
        inputs = test.subset(range(start, min(start + _CHUNK, len(test)))).load(site.bundle.preprocessing)
        for name, body in site.bodies.items():
            features = body(inputs)
            both = (head.logits(features).argmax(axis=1) for head in (site.heads[name], heads[name]))
            found[name].append(np.stack(list(both)))
    return {name: _measured(test, np.concatenate(parts, axis=1), site.known) for name, parts in found.items()}


def _measured(test: ImageSet, predicted: np.ndarray, known: int) -> dict[str, Any]:
    """Figures of the new head, and of both where they are compared; predicted: before and after [2, N]."""
    labels = test.labels
    before, after = predicted == labels
    old = labels < known
    return {
        "top1": float(after.mean()),
        "n_test": len(labels),
        "interval": list(metrics.wilson_interval(int(after.sum()), len(labels))),
        "per_class": metrics.per_class(predicted[1], labels, test.classes),
        "top1_before": float(before.mean()),
        "old_classes": asdict(Compared.of(before[old], after[old])),
    }
