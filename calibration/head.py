"""The last layer refitted to a few photos: logistic regression with the present head as its prior.

    minimise  sum_i w_i CE(y_i, W x_i + b)  +  prior_weight / 2 * (s^2 ||W - W0||^2 + ||b - b0||^2)

x are the features that enter the head, s is their root mean square norm, W0 and b0 are the present head, the
weights w (1 in the mean) let every class count as much as another. A large weight of the prior keeps the head
as it is, a small one believes the photos alone; photos that were held out choose. The row of a new class
starts at the mean of its photos (weight imprinting, Qi et al. 2018, arXiv 1712.07136).

The present head has learnt the replayed photos of the old classes, and is surer of them than of any other
photo: beside them a new class would be seen far too often. So its bias is lowered until the class recognises
its own held-out photos no more often than heads from nothing recognise held-out replayed ones.

The difference from the prior lies in the span of the features, so that the problem has as many unknowns per
class as there are photos, whatever the width of the network. NumPy in float64: the same photos in the same
order give the same head. This module knows features and class indices, no image, no file and no network.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from synthkit.calibration.confidence import fit_temperature
from synthkit.metrics.classification import log_loss
from synthkit.standalone import softmax

PRIOR_WEIGHTS = tuple(float(10.0**power) for power in np.arange(1, -2.01, -0.5))
"""From nearly the present head to nearly the photos alone."""

DEFAULT_PRIOR_WEIGHT = 0.1
"""Where no photo can be held out."""

_FOLDS = 5
_LEAVE_ONE_OUT = 16  # up to so many photos each is a fold of its own
_MOST_STEPS = 1000
_TOLERANCE = 1e-3  # change of a logit in a step that ends the search
_SPANNED = 1e-10  # of the largest eigenvalue: smaller ones are directions that the photos do not span


@dataclass(frozen=True)
class LinearHead:
    """A last layer.

    Attributes:
        weight: float [classes, width].
        bias: float [classes].
    """

    weight: np.ndarray
    bias: np.ndarray

    def logits(self, features: np.ndarray) -> np.ndarray:
        """Logits, float64 [N, classes], of features [N, width]."""
        return np.asarray(features.astype(np.float64) @ self.weight.astype(np.float64).T + self.bias)

    def with_temperature(self, temperature: float) -> LinearHead:
        """The head whose logits are those of this one divided by a temperature."""
        return LinearHead(self.weight / temperature, self.bias / temperature)

    def with_logit_offset(self, logit_offset: np.ndarray) -> LinearHead:
        """The head whose logits are lowered by an offset for each class [classes]."""
        return LinearHead(self.weight, self.bias - logit_offset)


@dataclass(frozen=True)
class Examples:
    """What a head is fitted to.

    Attributes:
        features: float [N, width].
        labels: class indices [N].
    """

    features: np.ndarray
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)

    def select(self, rows: np.ndarray) -> Examples:
        """The examples at the given positions."""
        return Examples(self.features[rows], self.labels[rows])

    def concat(self, other: Examples) -> Examples:
        """These examples, then the others."""
        return Examples(
            np.concatenate([self.features, other.features]), np.concatenate([self.labels, other.labels])
        )


@dataclass(frozen=True)
class PriorChoice:
    """What held-out examples say.

    Attributes:
        prior_weight: the one under which they are most likely.
        rows: positions of those that were held out, once each, in the photos followed by the replayed.
        logits: of these, each from a head that has not been fitted to it, float64 [rows, classes].
        folds: how many heads that took; 0: none could be held out and the weight is the default.
        logit_offset: lowers the logit of every class, above 0 for new classes only; the logits above are
            lowered already. Float64 [classes].
    """

    prior_weight: float
    rows: np.ndarray
    logits: np.ndarray
    folds: int
    logit_offset: np.ndarray


def fit_head(
    head: LinearHead, photos: Examples, replayed: Examples, classes: int, prior_weight: float
) -> LinearHead:
    """The head refitted to photos.

    Args:
        head: the present head; its classes come first.
        photos: what to learn; classes without photos are kept.
        replayed: examples of earlier photos, learnt as well.
        classes: classes of the result, at least those of the head; every new one has photos.
        prior_weight: how firmly the present head is held, above 0.
    """
    return next(_fit_all(head, photos.concat(replayed), classes, [prior_weight]))


def choose_prior_weight(head: LinearHead, photos: Examples, replayed: Examples, classes: int) -> PriorChoice:
    """The weight of the prior under which held-out photos are most likely, and what they then get as logits.

    The likelihood is taken at its own best temperature, because the temperature is fitted anyway: what counts
    is how well the classes are told apart. Of the replayed, the classes that the photos lack are held out as
    well, or a new class would be chosen to be seen everywhere; the rest of it is learnt in every fold. Beside
    a new class replayed photos would always vote for the present head, which has learnt them: the weight is
    then the default, and the new class gets a logit offset.

    Args:
        head: the present head.
        photos: ordered by class; each class is dealt evenly over the folds.
        replayed: examples of earlier photos.
        classes: classes of the result.
    """
    known, everything = len(head.bias), photos.concat(replayed)
    rows = _can_be_held_out(photos.labels, everything.labels, known)
    if len(rows) < 2:
        return PriorChoice(DEFAULT_PRIOR_WEIGHT, rows[:0], np.empty((0, classes)), 0, np.zeros(classes))
    partial = classes > known and bool((rows >= len(photos)).any())
    prior_weights = (DEFAULT_PRIOR_WEIGHT,) if partial else PRIOR_WEIGHTS
    found, folds = _held_out(head, everything, rows, classes, prior_weights)
    labels = everything.labels[rows]
    best = int(np.argmin([_loss_at_best_temperature(logits, labels) for logits in found]))  # the strongest
    logit_offset = _logit_offset(found[best], labels, known, replayed) if partial else np.zeros(classes)
    return PriorChoice(prior_weights[best], rows, found[best] - logit_offset, folds, logit_offset)


def _held_out(
    head: LinearHead, examples: Examples, rows: np.ndarray, classes: int, prior_weights: Sequence[float]
) -> tuple[np.ndarray, int]:
    """Logits [prior weights, rows, classes] of heads that were not fitted to the row, and number of folds."""
    folds = len(rows) if len(rows) <= _LEAVE_ONE_OUT else _FOLDS
    found = np.empty((len(prior_weights), len(rows), classes))
    for fold in range(folds):
        validation = np.arange(fold, len(rows), folds)
        learnt = examples.select(np.setdiff1d(np.arange(len(examples)), rows[validation]))
        for place, fitted in enumerate(_fit_all(head, learnt, classes, prior_weights)):
            found[place, validation] = fitted.logits(examples.features[rows[validation]])
    return found, folds


def _logit_offset(logits: np.ndarray, labels: np.ndarray, known: int, replayed: Examples) -> np.ndarray:
    """How far each new class is lowered, so that it is recognised no more often than the old ones [classes].

    Args:
        logits: of held-out examples [N, classes].
        labels: of these.
        known: classes of the present head.
        replayed: examples of the old classes.
    """
    logit_offset = np.zeros(logits.shape[1])
    again = _can_be_held_out(replayed.labels, replayed.labels, 0)
    if len(again) < 2:
        return logit_offset
    nothing = LinearHead(np.zeros((known, replayed.features.shape[1])), np.zeros(known))
    (found,), _ = _held_out(nothing, replayed, again, known, (DEFAULT_PRIOR_WEIGHT,))
    recognised = np.mean(found.argmax(axis=1) == replayed.labels[again])
    for label in np.unique(labels[labels >= known]):
        own = logits[labels == label]
        lead = own[:, label] - np.delete(own, label, axis=1).max(axis=1)
        logit_offset[label] = max(float(np.quantile(lead, 1 - recognised)), 0.0)
    return logit_offset


def _can_be_held_out(photos: np.ndarray, labels: np.ndarray, known: int) -> np.ndarray:
    """Positions of what is held out and remains known without it: to the head, or by another example.

    Args:
        photos: labels of the photos.
        labels: the same, then those of the replayed.
        known: classes of the present head.
    """
    held_out = (np.arange(len(labels)) < len(photos)) | ~np.isin(labels, photos)
    return np.flatnonzero(held_out & ((labels < known) | (np.bincount(labels)[labels] > 1)))


def _loss_at_best_temperature(logits: np.ndarray, labels: np.ndarray) -> float:
    return log_loss(logits / fit_temperature(logits, labels), labels)


def _fit_all(
    head: LinearHead, examples: Examples, classes: int, prior_weights: Sequence[float]
) -> Iterator[LinearHead]:
    """A head for each weight of the prior, each search beginning where the one before has ended."""
    prior = _with_new_classes(head, examples, classes)
    features = examples.features.astype(np.float64)
    scale = max(float(np.sqrt((features**2).sum(axis=1).mean())), 1e-12)
    roots = np.sqrt(_balanced(examples.labels))[:, None]
    sizes, vectors = np.linalg.eigh(roots * (features @ features.T / scale**2 + 1) * roots.T)  # + 1: the bias
    spanned = sizes > _SPANNED * sizes[-1]
    sizes, vectors = sizes[spanned], vectors[:, spanned]
    problem = _Problem(
        vectors * np.sqrt(sizes), sizes, roots, prior.logits(features), np.eye(classes)[examples.labels]
    )
    change = np.zeros((len(sizes), classes))
    for prior_weight in prior_weights:
        change = problem.solve(prior_weight, change)
        # [N, classes]: the share of each example in each class's row
        shares = roots * (vectors / np.sqrt(sizes) @ change)
        yield LinearHead(prior.weight + shares.T @ features / scale**2, prior.bias + shares.sum(axis=0))


def _balanced(labels: np.ndarray) -> np.ndarray:
    """A weight for each example, 1 in the mean, so that every class that is shown has the same in sum [N]."""
    counts = np.bincount(labels)
    return np.asarray(len(labels) / np.count_nonzero(counts) / counts[labels])


@dataclass(frozen=True)
class _Problem:
    """Logistic regression in the coordinates of the examples' span.

    Attributes:
        coordinates: of every example times the root of its weight, [N, rank]; coordinates.T @ coordinates is
            diagonal.
        sizes: that diagonal, [rank].
        roots: of the examples' weights [N, 1].
        base: logits of the prior [N, classes].
        targets: one row of probabilities per example [N, classes].
    """

    coordinates: np.ndarray
    sizes: np.ndarray
    roots: np.ndarray
    base: np.ndarray
    targets: np.ndarray

    def solve(self, prior_weight: float, change: np.ndarray) -> np.ndarray:
        """The change of the prior [rank, classes] that minimises the regularised loss.

        Half the diagonal bounds the curvature of the log loss everywhere (Boehning 1992), so that its inverse
        is a step that never overshoots; momentum with restarts (O'Donoghue and Candes 2015) makes the steps
        few.
        """
        step = 1 / (0.5 * self.sizes + prior_weight)[:, None]
        ahead, momentum = change, 1.0
        for _ in range(_MOST_STEPS):
            error = softmax(self.base + self.coordinates @ ahead / self.roots) - self.targets
            gradient = self.coordinates.T @ (self.roots * error) + prior_weight * ahead
            new = ahead - step * gradient
            if np.vdot(gradient, new - change) > 0:
                momentum = 1.0
            faster = (1 + np.sqrt(1 + 4 * momentum**2)) / 2
            ahead = new + (momentum - 1) / faster * (new - change)
            moved, change, momentum = np.abs(new - change).max(), new, faster
            if moved * np.sqrt(self.sizes[-1]) < _TOLERANCE:
                break
        return change


def _with_new_classes(head: LinearHead, examples: Examples, classes: int) -> LinearHead:
    """The head with a row for every new class: as long as the others' and towards the mean of its examples.

    The bias is such that the new class wins on its own examples by as much as it loses on all others.
    """
    for label in range(len(head.bias), classes):
        own = examples.labels == label
        centre = head.weight.mean(axis=0)
        direction = examples.features[own].mean(axis=0) - examples.features[~own].mean(axis=0)
        length = np.linalg.norm(head.weight - centre, axis=1).mean()
        row = centre + length * direction / max(float(np.linalg.norm(direction)), 1e-12)
        lead = examples.features @ row - head.logits(examples.features).max(axis=1)
        bias = -(lead[own].mean() + lead[~own].mean()) / 2
        head = replace(head, weight=np.vstack([head.weight, row]), bias=np.append(head.bias, bias))
    return head
