"""Everything that `adapt --bundle` knows before a head is fitted: bundle, photos, features, memory."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import numpy as np

from synthkit.calibration.head import Examples, LinearHead
from synthkit.data.images import ImageSet
from synthkit.data.splits import refuse_shared
from synthkit.engines.bundle.format import Bundle
from synthkit.engines.bundle.head import HeadFile
from synthkit.engines.bundle.replay_buffer import Memory, read_memory
from synthkit.errors import DataError, nearest


@dataclass(frozen=True)
class Site:
    """Everything that is known before a head is fitted.

    Attributes:
        bundle: the opened bundle.
        labels: its class names, then the new ones.
        photos: grouped by class and ordered by content, labelled by position in `labels`.
        models: precision -> the model file.
        heads: precision -> its present head.
        features: precision -> features of the photos [N, width].
        golden: precision -> features of the golden inputs.
        golden_inputs: uint8 [N, height, width, 3].
        memory: earlier photos, none of which are among these.
        bodies: precision -> images to features.
    """

    bundle: Bundle
    labels: tuple[str, ...]
    photos: ImageSet
    models: Mapping[str, HeadFile]
    heads: Mapping[str, LinearHead]
    features: Mapping[str, np.ndarray]
    golden: Mapping[str, np.ndarray]
    golden_inputs: np.ndarray
    memory: Memory
    bodies: Mapping[str, Callable[[np.ndarray], np.ndarray]]

    @property
    def precision(self) -> str:
        """The bundle's default."""
        return str(self.bundle.facts["default_precision"])

    @property
    def known(self) -> int:
        """Number of classes of the bundle as it is."""
        return len(self.bundle.labels)

    @property
    def sha256(self) -> np.ndarray:
        """Of the photos' files [N]."""
        return np.array([item.sha256 for item in self.photos.items])

    def examples(self, precision: str) -> tuple[Examples, Examples]:
        """The photos and the memory, as the head of a precision sees them."""
        remembered = Examples(self.memory.features[precision], self.memory.labels)
        return Examples(self.features[precision], self.photos.labels), remembered

    def with_golden_memory(self) -> Site:
        """The site with the golden inputs for a memory, labelled as the present head sees them."""
        labels = self.heads[self.precision].logits(self.golden[self.precision]).argmax(axis=1)
        sha256 = np.array([hashlib.sha256(image.tobytes()).hexdigest() for image in self.golden_inputs])
        return replace(self, memory=Memory(labels, sha256, self.golden))


def look_at_site(bundle: Bundle, labels: tuple[str, ...], photos: ImageSet) -> Site:
    """Run every body over the photos and the golden inputs."""
    precisions = bundle.facts["precisions"]
    models = {name: HeadFile.open(bundle.folder, stated) for name, stated in precisions.items()}
    heads = {name: LinearHead(*model.weight_and_bias()) for name, model in models.items()}
    bodies = {name: model.body() for name, model in models.items()}
    with np.load(bundle.folder / "golden.npz") as golden:
        golden_inputs = golden["inputs"]
    inputs = photos.load(bundle.preprocessing)
    widths = {name: head.weight.shape[1] for name, head in heads.items()}
    sha256 = np.array([item.sha256 for item in photos.items])
    return Site(
        bundle,
        labels,
        photos,
        models,
        heads,
        {name: body(inputs) for name, body in bodies.items()},
        {name: body(golden_inputs) for name, body in bodies.items()},
        golden_inputs,
        read_memory(bundle.folder, widths).without(sha256),
        bodies,
    )


def grown_labels(bundle: Bundle, photos: ImageSet, new: tuple[str, ...]) -> tuple[str, ...]:
    """The bundle's classes, then the new ones, so that no old class changes its place.

    Raises:
        DataError: a folder names no class of either, a new class has no folder, or nothing can be told apart.
    """
    unknown = [name for name in photos.classes if name not in (*bundle.labels, *new)]
    if unknown:
        raise DataError(
            f"{photos.root} shows classes that the bundle does not know: {', '.join(map(repr, unknown))}"
            f"{nearest(unknown[0], bundle.labels)}; known are {', '.join(bundle.labels)}; rename the "
            f"folder, or add the class with --new-class {unknown[0]!r}"
        )
    absent = [name for name in new if name not in photos.classes]
    if absent:
        raise DataError(f"--new-class {absent[0]!r}: {photos.root} has no folder of that name")
    added = tuple(name for name in photos.classes if name not in bundle.labels)
    if not added and len(photos.classes) == 1:
        raise DataError(
            f"{photos.root} shows one class only, {photos.classes[0]!r}, which the bundle knows; add photos "
            "of the classes that it is taken for, or every answer would become that one"
        )
    return (*bundle.labels, *added)


def distinct(photos: ImageSet) -> ImageSet:
    """The photos without copies.

    Raises:
        DataError: one photo lies in two classes.
    """
    first: dict[str, int] = {}
    kept = []
    for place, item in enumerate(photos.items):
        if first.setdefault(item.sha256, item.label) != item.label:
            raise DataError(
                f"{item.path} lies in the class {photos.classes[item.label]!r} and, with the same content, "
                f"in {photos.classes[first[item.sha256]]!r}; remove it from one of them"
            )
        if place == 0 or photos.items[place - 1].sha256 != item.sha256:
            kept.append(place)
    return photos.subset(kept)


def refuse_seen(bundle: Bundle, photos: ImageSet, test: ImageSet) -> None:
    """Refuse test images that the bundle was trained on or is about to be.

    Raises:
        DataError: names some of them.
    """
    known = dict.fromkeys(bundle.facts["lineage"].get("trained_on", []), "trained on")
    refuse_shared(test, known, ("the photos that the bundle was trained on", str(test.root)))
    known = {item.sha256: str(item.path) for item in photos.items}
    refuse_shared(test, known, (str(photos.root), str(test.root)))
