"""The whole chain in a workspace: `synthkit adapt` runs whichever stage is missing, then exports.

    engines/ ─► style/ ─► synthetic/ ─► student/ ─► adapted/ ─► bundle/

Each stage decides for itself whether its inputs have changed (see `synthkit.artifacts`).
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from synthkit import standalone
from synthkit.artifacts import Stage, StageResult, plan_stages, read_manifest, run_stages
from synthkit.config import Given
from synthkit.data.images import ImageSet, class_synonyms
from synthkit.engines.diffusion.engines_folder import base_model
from synthkit.errors import ConfigError, WorkspaceError, abridged
from synthkit.recipes.adaptation.adapt import Adapt
from synthkit.recipes.build_engines import BuildEngines
from synthkit.recipes.exporting.export import Export, Images
from synthkit.recipes.generation.generate import Generate
from synthkit.recipes.learn_style import TOKEN_FILE, LearnStyle
from synthkit.recipes.settings import (
    SECTIONS,
    AdaptSettings,
    EngineSettings,
    ExportSettings,
    FilterSettings,
    GenerateSettings,
    StyleSettings,
    TrainSettings,
)
from synthkit.recipes.train import Train

# What `--force` redoes of a chain: the hours before do not depend on what a user may want anew.
_FORCED = ("adapt", "export")


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

    def sections(self) -> dict[str, Any]:
        """Recipe section -> its settings."""
        own = (getattr(self, entry.name) for entry in fields(self))
        return dict(zip(SECTIONS, own, strict=True))

    @classmethod
    def from_given(cls, given: Given, workspace: Workspace) -> ChainSettings:
        """What was given, over what the workspace's engines were made with, over the defaults.

        Args:
            given: by a recipe, `--set` and flags.
            workspace: may hold engines, which are not rebuilt where no model was asked for, and a bundle,
                whose precisions and target are kept where no others were.
        """
        return cls(
            given.over("build-engines", _engine_settings(given, workspace)),
            given.over("learn-style", StyleSettings()),
            given.over("generate", GenerateSettings()),
            given.over("filter", FilterSettings()),
            given.over("train", TrainSettings()),
            given.over("adapt", AdaptSettings()),
            given.over("export", _export_settings(workspace)),
        )


def _engine_settings(given: Given, workspace: Workspace) -> EngineSettings:
    """What `given` overrules: the settings of the workspace's engines where no model was named."""
    manifest = read_manifest(workspace.engines)
    if manifest is None or given.has("build-engines", "model"):
        return EngineSettings()
    made = EngineSettings(**manifest.settings["build-engines"])
    return replace(made, model=base_model(workspace.engines))


def _export_settings(workspace: Workspace) -> ExportSettings:
    """The settings that the workspace's bundle was exported with."""
    manifest = read_manifest(workspace.bundle)
    return ExportSettings(**manifest.settings.get("export", {})) if manifest else ExportSettings()


@dataclass(frozen=True)
class Chain:
    """The stages from engines to bundle, or from a trained student to the bundle.

    Attributes:
        settings: of all stages.
        workspace: where they write.
        photos: the real few shots.
        synth: whether synthetic images are made and used.
        student_dir: an already trained student, which replaces all stages before `adapt`.
        test: test images, which the filter "leak" keeps away from synthetic ones.
    """

    settings: ChainSettings
    workspace: Workspace
    photos: ImageSet
    synth: bool = True
    student_dir: Path | None = None
    test: ImageSet | None = None

    @cached_property
    def stages(self) -> list[Stage]:
        """In order; running, planning and the Python API walk this list."""
        settings, workspace = self.settings, self.workspace
        if not self.synth or self.student_dir:
            return [self._adapt(self.student_dir), self._export()]
        self._check_reference_classifier()
        return [
            BuildEngines(settings.engines, workspace.engines),
            self.learn_style,
            self.generate,
            Train(settings.train, workspace.student, workspace.synthetic, self.photos),
            self._adapt(workspace.student),
            self._export(),
        ]

    @property
    def learn_style(self) -> LearnStyle:
        """The stage of the style, also to make variants of by `dataclasses.replace`."""
        return LearnStyle(
            self.settings.style, self.settings.engines.model, self.photos, self.workspace.style
        )

    @property
    def generate(self) -> Generate:
        """The stage of the synthetic images, also to make variants of."""
        return Generate(
            self.settings.generate,
            self.workspace.engines,
            self.photos.classes,
            self.workspace.synthetic,
            own_names=class_synonyms(self.photos.root, self.photos.classes),
            model=self.settings.engines.model,
            style=self.workspace.style / TOKEN_FILE,
            photos=self.photos,
            filters=self.settings.filter,
            test=self.test,
        )

    def _adapt(self, student_dir: Path | None) -> Adapt:
        settings = self.settings
        return Adapt(settings.adapt, settings.train, student_dir, self.photos, self.workspace.adapted)

    def _export(self) -> Export:
        images = Images(photos=self.photos)
        return Export(self.settings.export, self.workspace.adapted, self.workspace.bundle, images)

    def _check_reference_classifier(self) -> None:
        classifier = Path(self.settings.filter.classifier or "/").resolve()
        made = (self.workspace.student, self.workspace.adapted)
        if any(classifier.is_relative_to(folder.resolve()) for folder in made):
            raise ConfigError(
                f"[filter] classifier = {self.settings.filter.classifier!r} is made by this very run "
                "from the set that it would classify; give a student of another workspace, or CLIP"
            )

    def _other_site(self, force: bool) -> bool:
        """Whether the workspace holds a bundle of other classes; refused unless forced."""
        folder = self.workspace.bundle
        try:
            labels = standalone.read_labels(folder)
        except (OSError, ValueError):  # there is no bundle, or none that anybody could use
            return False
        if labels == list(self.photos.classes):
            return False
        if not force:
            raise WorkspaceError(
                f"{folder} knows {abridged(labels, 6, ', ')}, and these photos show "
                f"{abridged(self.photos.classes, 6, ', ')}; name another with --workspace, or replace "
                "it with --force (it is kept as bundle.previous)"
            )
        return True

    def run(self, *, force: bool = False) -> Iterator[StageResult]:
        """Make everything that is not made yet, each stage when it is asked for.

        Args:
            force: adapt and export again even when nothing changed; a bundle of other classes is kept beside
                the new one, as `bundle.previous`.

        Raises:
            WorkspaceError: the workspace holds a bundle of other classes.
        """
        if self._other_site(force):
            previous = self.workspace.bundle.with_name("bundle.previous")
            shutil.rmtree(previous, ignore_errors=True)
            shutil.copytree(self.workspace.bundle, previous)
        return run_stages(self.stages, force=_FORCED if force else ())

    def plan(self, *, force: bool = False) -> dict[str, str]:
        """Stage -> its state, without doing anything; "follows" after a stage that is to run.

        Args:
            force: as of `run`.

        Raises:
            WorkspaceError: as `run`.
        """
        self._other_site(force)
        return plan_stages(self.stages, force=_FORCED if force else ())
