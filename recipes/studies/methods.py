"""The methods that `compare` compares: how each makes a classifier of a few photos.

    photos ──chain──► synthetic/ ──► student/synthetic/ ──► student/ ──► adapted/ ──► bundle/
       │              "synthetic"                          "bridged++"              "adapted"
       ├──synthetic/ and photos, other training methods──► methods/<method>/
       ├──student/synthetic/, last layer groups on the photos──► last-<N>/
       └──other prompts──► <variant>/{style,synthetic,student}/

Each takes as many gradient steps as both stages of bridged transfer together, with three exceptions:
"vanilla" takes those of the real stage, synthetic images alone take those of the synthetic stage, and the
last layer groups take those of `adapt`. Every folder is a stage's, so that nothing is made twice.
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

FEW_SHOT, SYNTHETIC_ONLY, BRIDGED, ADAPTED = "vanilla-matched", "synthetic", "bridged++", "adapted"
PLAIN, CONTROL, CLUSTERED, HALF_PLAIN = "plain", "control", "clustered", "half-plain"

_CLUSTERS = 3


@dataclass(frozen=True)
class Run:
    """The chain on one split of photos, of which each method runs as many stages as it needs.

    Attributes:
        settings: of the chain.
        workspace: where the chain and the methods write.
        photos: real few shots.
        force: adapt and export again even when nothing changed.
        test: test images, which the filter "leak" keeps away from synthetic ones.
    """

    settings: ChainSettings
    workspace: Workspace
    photos: ImageSet
    force: bool = field(default=False)
    test: ImageSet | None = field(default=None)

    @cached_property
    def chain(self) -> Chain:
        """The chain on these photos."""
        return Chain(self.settings, self.workspace, self.photos, test=self.test)

    @cached_property
    def _remaining(self) -> Iterator[StageResult]:
        return self.chain.run(force=self.force)

    @cached_property
    def _finished(self) -> dict[str, StageResult]:
        return {}

    def run_until(self, name: str) -> StageResult:
        """Run the chain up to a stage, which happens once; returns that stage's result."""
        while name not in self._finished:
            result = next(self._remaining)
            self._finished[result.manifest.stage] = result
        return self._finished[name]

    def run_all(self) -> list[StageResult]:
        """Run the whole chain; returns the results in order."""
        self.run_until("export")
        return list(self._finished.values())

    def strategy(self) -> str:
        """Run the chain until `adapt`; returns the fine-tuning strategy that it chose."""
        return str(self.run_until("adapt").manifest.metrics["strategy"])


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


def train_by(run: Run, method: str, **changes: Any) -> Path:
    """Train a student on the run's synthetic images and photos by a training method; returns its folder.

    Args:
        run: the photos.
        method: a key of `synthkit.recipes.train.METHODS`.
        changes: settings of `train` to change.
    """
    settings = override(run.settings.train, {"method": method, **changes})
    folder = "-".join([method, *(f"{name}={value}" for name, value in changes.items())])
    out = run.workspace.root / "methods" / folder
    return run_stage(Train(settings, out, run.run_until("generate").out, run.photos)).out


def adapt_last(run: Run, count: int) -> Path:
    """Fine-tune the last layer groups of the synthetic student on the photos; returns the folder."""
    settings = override(run.settings.adapt, {"strategy": f"last-{count}"})
    student, out = run.run_until("train").out, run.workspace.root / f"last-{count}"
    return run_stage(Adapt(settings, run.settings.train, student, run.photos, out)).out


def synthetic_set(run: Run, method: str) -> Path:
    """The synthetic images that a method of synthetic images alone learns from.

    Args:
        run: the photos.
        method: `SYNTHETIC_ONLY` or a key of `VARIANTS`.
    """
    if method == SYNTHETIC_ONLY:
        return run.run_until("generate").out
    variant = VARIANTS[method]
    run.run_until("build-engines")
    folder, token = run.workspace.root / variant.folder, None
    if variant.style is not None:
        style = run.chain.learn_style
        changed = replace(style.settings, **variant.style)
        token = run_stage(replace(style, settings=changed, out=folder / "style")).out / TOKEN_FILE
    usual = run.chain.generate
    settings = replace(usual.settings, **variant.generate)
    return run_stage(replace(usual, settings=settings, style=token, out=folder / "synthetic")).out


def synthetic_only(run: Run, method: str) -> Path:
    """The student of a method's synthetic images alone."""
    from synthkit.learning.students import SYNTHETIC

    if method == SYNTHETIC_ONLY:
        return run.run_until("train").out / SYNTHETIC
    out = run.workspace.root / VARIANTS[method].folder / "student"
    return run_stage(Train(run.settings.train, out, synthetic_set(run, method))).out


@dataclass(frozen=True)
class Method:
    """A row of the table.

    Attributes:
        title: what it is.
        make: makes the student's or the bundle's folder.
    """

    title: str
    make: Callable[[Run], Path]


def _alone(method: str, title: str) -> Method:
    return Method(f"synthetic only, {title}", lambda run: synthetic_only(run, method))


def _training_method(name: str) -> Method:
    return Method(TRAINING_METHODS[name].title, lambda run: train_by(run, name))


def _last(count: int) -> Method:
    title = f"synthetic, then the last {count} layer group{'s' * (count > 1)} on photos"
    return Method(title, lambda run: adapt_last(run, count))


#: Name -> method, in the order of the tables.
METHODS = {
    FEW_SHOT: Method("few-shot only, same number of steps", lambda run: train_by(run, "vanilla-matched")),
    "vanilla": Method("few-shot only, steps of the real stage alone", lambda run: train_by(run, "vanilla")),
    "vanilla-mixup": _training_method("vanilla-mixup"),
    PLAIN: _alone(PLAIN, "plain prompts"),
    CONTROL: _alone(CONTROL, "untrained token"),
    SYNTHETIC_ONLY: _alone(SYNTHETIC_ONLY, "learned style"),
    CLUSTERED: _alone(CLUSTERED, f"{_CLUSTERS} learned styles"),
    HALF_PLAIN: _alone(HALF_PLAIN, "half learned style, half plain prompts"),
    "mixed": _training_method("mixed"),
    "mixed-half": Method("both, half a batch each", lambda run: train_by(run, "mixed", real_share=0.5)),
    "joint": _training_method("joint"),
    "mixed-auxbn": _training_method("mixed-auxbn"),
    "bridged": _training_method("bridged"),
    BRIDGED: Method("bridged++", lambda run: run.run_until("train").out),
    **{f"last-{count}": _last(count) for count in (1, 2, 4)},
    ADAPTED: Method("adapted bundle", lambda run: run.run_until("export").out),
}


def predict(folder: Path, images: ImageSet) -> np.ndarray:
    """Class indices [N], in the order of the images' classes, that a student or a bundle predicts."""
    if (folder / FACTS).is_file():
        return predict_labels(Bundle.open(folder), images)
    from synthkit.learning.students import load_student

    student = load_student(folder)
    pixels = images.with_classes(student.classes).load(student.preprocessing)
    return np.asarray(student.logits(pixels).argmax(1).numpy())
