"""Short forms of the stages for tests: each runs a stage and returns its result."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from synthkit.artifacts import Stage, StageResult, digest, run_stage
from synthkit.data.images import ImageSet
from synthkit.recipes.adaptation.adapt import Adapt
from synthkit.recipes.build_engines import BuildEngines
from synthkit.recipes.exporting.export import Export, Images
from synthkit.recipes.generation.generate import Generate
from synthkit.recipes.learn_style import LearnStyle
from synthkit.recipes.settings import (
    AdaptSettings,
    EngineSettings,
    ExportSettings,
    GenerateSettings,
    StyleSettings,
    TrainSettings,
)
from synthkit.recipes.train import Train, TrainingData


def key(stage: Stage) -> str:
    """Digest of what decides a stage's result."""
    stage.check(fetch=False)
    return digest([stage.name, stage.key().values()])


def build_engines(settings: EngineSettings, out: Path, force: bool = False) -> StageResult:
    return run_stage(BuildEngines(settings, out), force=force)


def learn_style(settings: StyleSettings, model: str, photos: ImageSet, out: Path) -> StageResult:
    return run_stage(LearnStyle(settings, model, photos, out))


def generate_stage(
    settings: GenerateSettings,
    engines: Path,
    words: Mapping[str, str | Sequence[str]],
    style: Path | None,
    out: Path,
    **more: Any,
) -> Generate:
    own = {name: (one,) if isinstance(one, str) else tuple(one) for name, one in words.items()}
    return Generate(settings, engines, tuple(words), out, own_names=own, style=style, **more)


def generate(
    settings: GenerateSettings,
    engines: Path,
    words: Mapping[str, str | Sequence[str]],
    style: Path | None,
    out: Path,
    *,
    force: bool = False,
    **more: Any,
) -> StageResult:
    return run_stage(generate_stage(settings, engines, words, style, out, **more), force=force)


def train_stage(settings: TrainSettings, data: TrainingData, out: Path) -> Train:
    return Train(settings, out, data.synthetic, data.photos)


def train(settings: TrainSettings, data: TrainingData, out: Path, force: bool = False) -> StageResult:
    return run_stage(train_stage(settings, data, out), force=force)


def adapt(
    settings: AdaptSettings, training: TrainSettings, student: Path | None, photos: ImageSet, out: Path
) -> StageResult:
    return run_stage(Adapt(settings, training, student, photos, out))


def export(
    student: Path,
    out: Path,
    photos: ImageSet | None = None,
    settings: ExportSettings | None = None,
    **more: Any,
) -> StageResult:
    return run_stage(Export(settings or ExportSettings(), student, out, Images(photos=photos, **more)))


def given(*settings: str) -> list[str]:
    """The words of a command line that give settings: "section.name=value" each."""
    return [word for setting in settings for word in ("--set", setting)]
