"""Features of the photos that a bundle's head was fitted to, replayed so that no old class is forgotten.

    replay_buffer.npz    labels int64 [N], sha256 [N], features_<precision> float16 [N, width]

Features that enter the head, not images: about 2.5 KB per photo and precision, a few photos per class.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np

from synthkit.errors import BundleError

REPLAY_BUFFER = "replay_buffer.npz"

PER_CLASS = 16
_HALF = float(np.finfo(np.float16).max)


@dataclass(frozen=True)
class ReplayBuffer:
    """Features of earlier photos.

    Attributes:
        labels: class indices, int64 [N].
        sha256: of the photos' files [N].
        features: precision -> what enters that model's head, [N, width].
    """

    labels: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))
    sha256: np.ndarray = field(default_factory=lambda: np.empty(0, "<U64"))
    features: Mapping[str, np.ndarray] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.labels)

    def select(self, rows: np.ndarray) -> ReplayBuffer:
        """The photos at the given positions."""
        kept = {name: values[rows] for name, values in self.features.items()}
        return ReplayBuffer(self.labels[rows], self.sha256[rows], kept)

    def without(self, sha256: np.ndarray) -> ReplayBuffer:
        """All photos but those of the given contents."""
        return self.select(np.flatnonzero(~np.isin(self.sha256, sha256)))

    def updated_with(self, newer: ReplayBuffer) -> ReplayBuffer:
        """The newer photos, then these as far as a class still has room."""
        if not len(self):
            return newer._limited()
        older = self.without(newer.sha256)
        features = {
            name: np.concatenate([values, older.features[name]]) for name, values in newer.features.items()
        }
        labels = np.concatenate([newer.labels, older.labels])
        return ReplayBuffer(labels, np.concatenate([newer.sha256, older.sha256]), features)._limited()

    def _limited(self) -> ReplayBuffer:
        rank = [int(np.sum(self.labels[:place] == label)) for place, label in enumerate(self.labels)]
        return self.select(np.flatnonzero(np.array(rank, dtype=int) < PER_CLASS))


def read_replay_buffer(folder: Path, widths: Mapping[str, int]) -> ReplayBuffer:
    """A bundle's replay buffer; an empty one where it has none for every precision.

    Args:
        folder: a bundle whose hashes were checked.
        widths: precision -> width of the features.

    Raises:
        BundleError: the features are of another width.
    """
    if not (folder / REPLAY_BUFFER).is_file():
        return ReplayBuffer(
            features={name: np.empty((0, width), np.float32) for name, width in widths.items()}
        )
    with np.load(folder / REPLAY_BUFFER) as stored:
        features = {name: stored[f"features_{name}"].astype(np.float32) for name in widths}
        buffer = ReplayBuffer(stored["labels"], stored["sha256"], features)
    for name, width in widths.items():
        if (found := features[name].shape[1]) != width:
            raise BundleError(
                f"{folder / REPLAY_BUFFER} holds {found} features a photo for {name}, its model's head takes "
                f"{width}; export the bundle again"
            )
    return buffer


def replay_buffer_failures(
    folder: Path, precisions: Mapping[str, Mapping[str, Any]], classes: int
) -> list[str]:
    """What is wrong with a bundle's replay buffer; empty where it is usable, and where there is none.

    Args:
        folder: a bundle.
        precisions: what bundle.json says of each; those whose head is on record have features.
        classes: of the bundle.
    """
    if not (folder / REPLAY_BUFFER).is_file():
        return []
    try:
        with np.load(folder / REPLAY_BUFFER) as stored:
            labels, sha256 = stored["labels"], stored["sha256"]
            features = [stored[f"features_{name}"] for name, one in precisions.items() if one["head"]]
    except (ValueError, OSError, KeyError, EOFError, BadZipFile):
        return [f"{REPLAY_BUFFER} holds no readable features"]
    sound = labels.dtype.kind == "i" and sha256.shape == labels.shape == (len(labels),)
    sound = sound and bool(np.all((labels >= 0) & (labels < classes)))
    for values in features:
        shaped = values.ndim == 2 and len(values) == len(labels) and values.dtype.kind == "f"
        sound = sound and shaped and bool(np.isfinite(values).all())
    return [] if sound else [f"{REPLAY_BUFFER} does not fit the bundle's {classes} classes and its models"]


def write_replay_buffer(folder: Path, buffer: ReplayBuffer) -> None:
    """Write replay_buffer.npz."""
    features = {
        f"features_{name}": np.clip(values, -_HALF, _HALF).astype(np.float16)
        for name, values in buffer.features.items()
    }
    with (folder / REPLAY_BUFFER).open("wb") as stream:
        np.savez_compressed(stream, labels=buffer.labels, sha256=buffer.sha256, **features)
