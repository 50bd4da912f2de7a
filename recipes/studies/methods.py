"""What `compare` compares: how each method makes a classifier of one draw of photos.

    photos ──chain──► synthetic/ ──► student/synthetic/ ──► student/ ──► adapted/ ──► bundle/
       │              "synthetic"                          "bridged++"              "adapted"
       ├──synthetic/ and photos, other training methods──► methods/<method>/
       ├──student/synthetic/, last units on the photos──► last-<N>/
       └──other prompts──► <variant>/{style,synthetic,student}/

All of them take as many gradient steps as both stages of the bridge together, but for "vanilla", which takes
the real stage's, those of synthetic images alone, which take the synthetic stage's, and the last units, whose
steps are `adapt`'s. Every folder is a stage's, so what was made before is found again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from synthkit.artifacts import StageResult, run_stage
from synthkit.config import override
from synthkit.data.images import ImageSet
from synthkit.engines.bundle.format import FACTS, Bundle
from synthkit.recipes.adaptation.adapt import Adapt
from synthkit.recipes.chain import Chain, ChainSettings, Workspace
from synthkit.recipes.device.evaluate import predict_labels
from synthkit.recipes.learn_style import TOKEN_FILE
from synthkit.recipes.train import METHODS as TRAINING_METHODS
from synthkit.recipes.train import Train

FEW_SHOT, SYNTHETIC_ONLY, BRIDGED, ADAPTED = "few-shot", "synthetic", "bridged++", "adapted"
PLAIN, CONTROL, CLUSTERED, HALF_PLAIN = "plain", "control", "clustered", "half-plain"

_CLUSTERS = 3


@dataclass(frozen=True)
class Draw:
    """One draw of photos and the workspace where the methods meet it.

    Attributes:
        settings: of the chain.
        place: the workspace.
        photos: real few shots.
        force: adapt and export again even when nothing changed.
        test: test images, which the filter "leak" keeps away from synthetic ones.
    """

    settings: ChainSettings
    place: Workspace
    photos: ImageSet
    force: bool = field(default=False)
    test: ImageSet | None = field(default=None)

    @cached_property
    def chain(self) -> Chain:
        """The chain on these photos."""
        return Chain(self.settings, self.place, self.photos, test=self.test)

    @cached_property
    def _running(self) -> Iterator[StageResult]:
        return self.chain.run(force=self.force)

    @cached_property
    def _made(self) -> dict[str, StageResult]:
        return {}

    def stage(self, name: str) -> StageResult:
        """A stage of the chain, made with those before it when it is first asked for."""
        while name not in self._made:
            done = next(self._running)
            self._made[done.manifest.stage] = done
        return self._made[name]

    def stages(self) -> list[StageResult]:
        """The whole chain, in order."""
        self.stage("export")
        return list(self._made.values())

    @property
    def path(self) -> str:
        """What `adapt` chose."""
        return str(self.stage("adapt").manifest.metrics["path"])


@dataclass(frozen=True)
class Variant:
    """Synthetic images of other prompts than the chain's.

    Attributes:
        folder: below the workspace.
        style: settings of `learn-style` to change; None: no style token.
        generate: settings of `generate` to change.
    """

    folder: str
    style: Mapping[str, Any] | None
    generate: Mapping[str, Any] = field(default_factory=dict)


VARIANTS = {
    PLAIN: Variant("plain_prompts", None),
    CONTROL: Variant("control_token", {"control": True}),
    CLUSTERED: Variant("clustered", {"clusters": _CLUSTERS}),
    HALF_PLAIN: Variant("half_plain", {}, {"plain_share": 0.5}),
}


def by_training_method(draw: Draw, method: str, **changes: Any) -> Path:
    """The student that a training method makes of the draw's synthetic images and photos.

    Args:
        draw: the photos.
        method: a key of `synthkit.recipes.train.METHODS`.
        changes: settings of `train` to change.
    """
    settings = override(draw.settings.train, {"method": method, **changes})
    folder = "-".join([method, *(f"{name}={value}" for name, value in changes.items())])
    out = draw.place.root / "methods" / folder
    return run_stage(Train(settings, out, draw.stage("generate").out, draw.photos)).out


def last_units(draw: Draw, count: int) -> Path:
    """The student of the synthetic images after its last units learned the photos."""
    settings = override(draw.settings.adapt, {"path": "auto", "layers": str(count)})
    student, out = draw.stage("train").out, draw.place.root / f"last-{count}"
    return run_stage(Adapt(settings, draw.settings.train, student, draw.photos, out)).out


def synthetic_set(draw: Draw, method: str) -> Path:
    """The synthetic images that a method of synthetic images alone learns from.

    Args:
        draw: the photos.
        method: `SYNTHETIC_ONLY` or a key of `VARIANTS`.
    """
    if method == SYNTHETIC_ONLY:
        return draw.stage("generate").out
    variant = VARIANTS[method]
    draw.stage("build-engines")
    folder, token = draw.place.root / variant.folder, None
    if variant.style is not None:
        style = draw.chain.learn_style
        changed = replace(style.settings, **variant.style)
        token = run_stage(replace(style, settings=changed, out=folder / "style")).out / TOKEN_FILE
    usual = draw.chain.generate
    settings = replace(usual.settings, **variant.generate)
    return run_stage(replace(usual, settings=settings, style=token, out=folder / "synthetic")).out


def synthetic_only(draw: Draw, method: str) -> Path:
    """The student of a method's synthetic images alone."""
    from synthkit.learning.students import SYNTHETIC

    if method == SYNTHETIC_ONLY:
        return draw.stage("train").out / SYNTHETIC
    out = draw.place.root / VARIANTS[method].folder / "student"
    return run_stage(Train(draw.settings.train, out, synthetic_set(draw, method))).out


@dataclass(frozen=True)
class Method:
    """A row of the table.

    Attributes:
        title: what it is.
        make: makes the student's or the bundle's folder.
    """

    title: str
    make: Callable[[Draw], Path]


def _alone(method: str, title: str) -> Method:
    return Method(f"synthetic only, {title}", lambda draw: synthetic_only(draw, method))


def _training_method(name: str) -> Method:
    return Method(TRAINING_METHODS[name].title, lambda draw: by_training_method(draw, name))


def _last(count: int) -> Method:
    title = f"synthetic, then the last {count} unit{'s' * (count > 1)} on photos"
    return Method(title, lambda draw: last_units(draw, count))


#: Name -> method, in the order of the tables.
METHODS = {
    FEW_SHOT: Method(
        "few-shot only, same number of steps", lambda draw: by_training_method(draw, "vanilla-matched")
    ),
    "vanilla": Method(
        "few-shot only, steps of the real stage alone", lambda draw: by_training_method(draw, "vanilla")
    ),
    "vanilla-mixup": _training_method("vanilla-mixup"),
    PLAIN: _alone(PLAIN, "plain prompts"),
    CONTROL: _alone(CONTROL, "untrained token"),
    SYNTHETIC_ONLY: _alone(SYNTHETIC_ONLY, "learned style"),
    CLUSTERED: _alone(CLUSTERED, f"{_CLUSTERS} learned styles"),
    HALF_PLAIN: _alone(HALF_PLAIN, "half learned style, half plain prompts"),
    "mixed": _training_method("mixed"),
    "mixed-half": Method(
        "both, half a batch each", lambda draw: by_training_method(draw, "mixed", real_share=0.5)
    ),
    "joint": _training_method("joint"),
    "mixed-auxbn": _training_method("mixed-auxbn"),
    "bridged": _training_method("bridged"),
    BRIDGED: Method("bridged++", lambda draw: draw.stage("train").out),
    **{f"last-{count}": _last(count) for count in (1, 2, 4)},
    ADAPTED: Method("adapted bundle", lambda draw: draw.stage("export").out),
}


def answers(folder: Path, images: ImageSet) -> np.ndarray:
    """What a student or a bundle says of images: class indices [N] in the order of the images' classes."""
    if (folder / FACTS).is_file():
        return predict_labels(Bundle.open(folder), images)
    from synthkit.learning.students import load_student

    student = load_student(folder)
    pixels = images.with_classes(student.classes).load(student.preprocessing)
    return np.asarray(student.logits(pixels).argmax(1).numpy())
