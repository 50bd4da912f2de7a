"""The whole chain in a workspace: `synthkit adapt` runs whichever stage is missing, then exports.

    engines/ ─► style/ ─► synthetic/ ─► student/ ─► adapted/ ─► bundle/

Each stage decides for itself whether its inputs have changed (see `synthkit.artifacts`).
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from synthkit.artifacts import Request, StageResult, read_manifest, stage_state
from synthkit.calibration.filters.screening import filter_inputs
from synthkit.config import override
from synthkit.data.images import ImageSet, class_synonyms
from synthkit.engines.diffusion.engines_folder import base_model
from synthkit.errors import ConfigError
from synthkit.models import prompt_synonyms, refuse_two_encoders, resolve_model
from synthkit.recipes.adaptation.adapt import adapt, adapt_request
from synthkit.recipes.adaptation.strategies import candidates
from synthkit.recipes.build_engines import build_engines, build_engines_request
from synthkit.recipes.exporting.export import export_request, run_export
from synthkit.recipes.exporting.precisions import chosen_precisions
from synthkit.recipes.generation.generate import Screening, generate, generate_request
from synthkit.recipes.generation.plan import make_plan
from synthkit.recipes.learn_style import TOKEN_FILE, learn_style, learn_style_request
from synthkit.recipes.settings import (
    AdaptSettings,
    EngineSettings,
    ExportSettings,
    FilterSettings,
    GenerateSettings,
    StyleSettings,
    TrainSettings,
)
from synthkit.recipes.train import Material, check_settings, train, train_request, weights_fingerprint

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Workspace:
    """Where each stage writes.

    Attributes:
        root: the folder given with `--workspace`.
        shared_engines: engines of another workspace, to be used instead of its own.
    """

    root: Path
    shared_engines: Path | None = None

    @property
    def engines(self) -> Path:
        """Of `build-engines`."""
        return self.shared_engines or self.root / "engines"

    @property
    def style(self) -> Path:
        """Of `learn-style`."""
        return self.root / "style"

    @property
    def synthetic(self) -> Path:
        """Of `generate`."""
        return self.root / "synthetic"

    @property
    def student(self) -> Path:
        """Of `train`."""
        return self.root / "student"

    @property
    def adapted(self) -> Path:
        """Of `adapt`."""
        return self.root / "adapted"

    @property
    def bundle(self) -> Path:
        """Of `export`."""
        return self.root / "bundle"


@dataclass(frozen=True)
class ChainSettings:
    """The settings of every stage of the chain."""

    engines: EngineSettings = field(default_factory=EngineSettings)
    style: StyleSettings = field(default_factory=StyleSettings)
    generate: GenerateSettings = field(default_factory=GenerateSettings)
    filter: FilterSettings = field(default_factory=FilterSettings)
    train: TrainSettings = field(default_factory=TrainSettings)
    adapt: AdaptSettings = field(default_factory=AdaptSettings)
    export: ExportSettings = field(default_factory=ExportSettings)


def remembered_model(
    settings: EngineSettings, workspace: Workspace, flags: Mapping[str, Any]
) -> EngineSettings:
    """The settings of the workspace's engines where no model was asked for, so that they are not rebuilt.

    Args:
        settings: defaults, recipe and flags.
        workspace: may hold engines.
        flags: engine setting -> what the command line gave, or None.
    """
    manifest, usual = read_manifest(workspace.engines), EngineSettings()
    if manifest is None or flags.get("model") or settings.model != usual.model:
        return settings
    made = EngineSettings(
        model=base_model(workspace.engines),
        backend=manifest.config["backend"],
        precision=manifest.config["precision"],
        vae_precision=manifest.config.get("vae_precision", usual.vae_precision),
        batch=manifest.metrics["batch"],
        size=manifest.config["size"],
        opset=manifest.config["opset"],
        **manifest.config.get("tensorrt", {}),
    )
    asked_for = {name: value for name, value in asdict(settings).items() if value != getattr(usual, name)}
    return override(made, asked_for | {name: value for name, value in flags.items() if value is not None})


def chain_stages(
    settings: ChainSettings,
    workspace: Workspace,
    photos: ImageSet,
    *,
    synth: bool = True,
    student_dir: Path | None = None,
    test: ImageSet | None = None,
    force: bool = False,
) -> Iterator[StageResult]:
    """Make everything from engines to bundle that is not made yet, each stage when it is asked for.

    Args:
        settings: of all stages.
        workspace: where they write.
        photos: the real few shots.
        synth: whether synthetic images are made and used.
        student_dir: an already trained student, which replaces all stages before `adapt`.
        test: test images, which the filter "leak" keeps away from synthetic ones.
        force: adapt and export again even when nothing changed.
    """
    _check_settings(settings, knows_classes=synth or student_dir is not None)
    if synth and student_dir is None:
        yield from _synthetic_stages(settings, workspace, photos, Screening(settings.filter, test))
        student_dir = workspace.student
    yield adapt(settings.adapt, settings.train, student_dir, photos, workspace.adapted, force)
    yield run_export(workspace.adapted, workspace.bundle, photos, force, settings.export)


def _synthetic_stages(
    settings: ChainSettings, workspace: Workspace, photos: ImageSet, screening: Screening
) -> Iterator[StageResult]:
    from synthkit.learning.students import check_architecture

    check_architecture(settings.train.student)
    several = _words_to_draw(settings, workspace, photos, screening, download=True)
    yield build_engines(settings.engines, workspace.engines)
    model = base_model(workspace.engines)
    yield learn_style(settings.style, model, photos, _first(several), workspace.style)
    asked = (settings.generate, workspace.engines, several, workspace.style / TOKEN_FILE, workspace.synthetic)
    yield generate(*asked, photos=photos, screening=screening)
    material = Material(ImageSet.scan(workspace.synthetic), photos)
    yield train(settings.train, material, workspace.student)


def _check_settings(settings: ChainSettings, knows_classes: bool) -> None:
    """Refuse what a later stage would refuse, before the minutes and hours of the stages before it."""
    candidates(settings.adapt, knows_classes)
    chosen_precisions(settings.export.precision)
    check_settings(settings.train)
    if settings.train.weights:
        weights_fingerprint(Path(settings.train.weights))


def _words_to_draw(
    settings: ChainSettings, workspace: Workspace, photos: ImageSet, screening: Screening, download: bool
) -> dict[str, tuple[str, ...]]:
    """Class name -> all words for prompts, once the settings of synthetic images are found to be usable."""
    refuse_two_encoders(resolve_model(settings.engines.model, download=download))
    words = synonyms_for_prompts(settings.engines, photos, download=download)
    make_plan(settings.generate, words, [(settings.style.token, 1.0)], photos)
    filter_inputs(screening.choices, photos, screening.test)
    judge = Path(settings.filter.classifier or "/").resolve()
    if any(judge.is_relative_to(made.resolve()) for made in (workspace.student, workspace.adapted)):
        raise ConfigError(
            f"--classifier {settings.filter.classifier} is made by this very run from the set that it would "
            "judge; give a student of another workspace, or CLIP"
        )
    return words


def _first(several: Mapping[str, Sequence[str]]) -> dict[str, str]:
    return {name: words[0] for name, words in several.items()}


def words_for_prompts(settings: EngineSettings, photos: ImageSet) -> dict[str, str]:
    """Class name -> words that the generator understands.

    Args:
        settings: name the generator.
        photos: their folder may hold the user's own words.

    Raises:
        ModelError: the generator is known not to draw a class.
    """
    return _first(synonyms_for_prompts(settings, photos))


def synonyms_for_prompts(
    settings: EngineSettings, photos: ImageSet, *, download: bool = True
) -> dict[str, tuple[str, ...]]:
    """Class name -> all words for it that the generator understands; see `words_for_prompts`.

    A hub model is fetched to look at it where `download` allows that.
    """
    own = class_synonyms(photos.root, photos.classes)
    return prompt_synonyms(resolve_model(settings.model, download=download), photos.classes, own)


def plan_chain(
    settings: ChainSettings,
    workspace: Workspace,
    photos: ImageSet,
    *,
    synth: bool = True,
    student_dir: Path | None = None,
    test: ImageSet | None = None,
) -> dict[str, str]:
    """Stage -> its state, without doing anything; what follows a stage that must run is to run as well."""
    plan: dict[str, str] = {}
    _check_settings(settings, knows_classes=synth or student_dir is not None)
    screening, drawn = Screening(settings.filter, test), synth and student_dir is None
    for stage in _requests(settings, workspace, photos, drawn, student_dir, screening):
        plan[stage.stage] = stage_state(stage)
        if plan[stage.stage] != "unchanged":
            break
    order = ["build-engines", "learn-style", "generate", "train"] if drawn else []
    for name in [*order, "adapt", "export"]:
        plan.setdefault(name, "follows")
    return plan


def _requests(
    settings: ChainSettings,
    workspace: Workspace,
    photos: ImageSet,
    synth: bool,
    student_dir: Path | None,
    screening: Screening,
) -> Iterator[Request]:
    """Each stage's request, made only once the stages before it are known to be there."""
    if synth:
        several = _words_to_draw(settings, workspace, photos, screening, download=False)
        yield build_engines_request(settings.engines, workspace.engines)
        model = base_model(workspace.engines)
        yield learn_style_request(settings.style, model, photos, _first(several), workspace.style)
        token, out = workspace.style / TOKEN_FILE, workspace.synthetic
        asked = (settings.generate, workspace.engines, several, token, out)
        yield generate_request(*asked, photos=photos, screening=screening)
        material = Material(ImageSet.scan(workspace.synthetic), photos)
        yield train_request(settings.train, material, workspace.student)
        student_dir = workspace.student
    yield adapt_request(settings.adapt, settings.train, student_dir, photos, workspace.adapted)
    yield export_request(workspace.adapted, workspace.bundle, photos, settings.export)
