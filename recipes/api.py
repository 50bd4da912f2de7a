"""The public Python API: each function does what the command of its name does, and returns a dataclass.

    import synthkit

    result = synthkit.adapt("few_shots", test_dir="test")
    bundle = synthkit.Bundle.open(result.bundle)

`synthkit/__init__.py` offers these names without importing anything heavy before one is used. Paths may be
texts. A workspace is locked while a function works in it.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from synthkit.artifacts import StageResult, recorded_inputs, run_stage, workspace_lock
from synthkit.config import Given
from synthkit.data.images import ImageSet, class_synonyms
from synthkit.data.splits import check_disjoint
from synthkit.errors import ConfigError
from synthkit.recipes.build_engines import BuildEngines, engine_list
from synthkit.recipes.chain import Chain, ChainSettings, Workspace
from synthkit.recipes.device.bundle import Bundle
from synthkit.recipes.device.evaluate import Evaluation, evaluate_bundle
from synthkit.recipes.exporting.export import Export, Images
from synthkit.recipes.generation.generate import Generate
from synthkit.recipes.learn_style import TOKEN_FILE
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

if TYPE_CHECKING:
    from synthkit.recipes.studies.compare import Comparison

PathLike: TypeAlias = str | os.PathLike[str]

WORKSPACE = "synthkit-work"

#: What `compare` compares when it is not told.
DEFAULT_METHODS = ("vanilla-matched", "synthetic", "bridged++", "adapted")


@dataclass(frozen=True)
class AdaptResult:
    """What `adapt` made.

    Attributes:
        bundle: the bundle's folder, for `Bundle.open`.
        stages: stage -> "done" or "skipped".
        strategy: how the student learned the photos: "unchanged", "last-1", "last-2", "last-4" or "full".
        reason: why, for a person.
        steps: gradient steps of that strategy.
        cross_validation: each strategy's result on held-out photos.
        seconds: working time of the stages that ran.
        evaluation: of the bundle on the test images, where there are some.
    """

    bundle: Path
    stages: Mapping[str, str]
    strategy: str
    reason: str
    steps: int
    cross_validation: Sequence[Mapping[str, Any]]
    seconds: float
    evaluation: Evaluation | None = None

    def to_json(self) -> dict[str, Any]:
        """The JSON object of `synthkit adapt --json`; an evaluation's figures stand beside the others."""
        data = {one.name: getattr(self, one.name) for one in fields(self) if one.name != "evaluation"}
        return {**(self.evaluation.to_json() if self.evaluation else {}), **data, "bundle": str(self.bundle)}


@dataclass(frozen=True)
class EnginesResult:
    """What `build_engines` made.

    Attributes:
        out: the engines folder.
        engines: each component's engine: component, path, backend, precision, max_abs_error, seconds, cached.
        skipped: whether nothing had changed.
    """

    out: Path
    engines: Sequence[Mapping[str, Any]]
    skipped: bool

    @classmethod
    def of(cls, result: StageResult) -> EnginesResult:
        """From the finished stage."""
        return cls(result.out, engine_list(result), result.skipped)

    def to_json(self) -> dict[str, Any]:
        """The JSON object of `synthkit build-engines --json`."""
        return {"engines": list(self.engines), "out": str(self.out), "skipped": self.skipped}


@dataclass(frozen=True)
class GenerateResult:
    """What `generate` made.

    Attributes:
        out: the synthetic set, class folders with metadata.jsonl.
        written: images generated in this run.
        skipped: images that were there.
        rejected: images that filters rejected.
        images_per_second: of this run; 0 where nothing was generated.
        per_class: class name -> what was kept, resampled and dropped.
    """

    out: Path
    written: int
    skipped: int
    rejected: int
    images_per_second: float
    per_class: Mapping[str, Mapping[str, Any]]
    metrics: Mapping[str, Any]

    @classmethod
    def of(cls, result: StageResult) -> GenerateResult:
        """From the finished stage; of a skipped one, the manifest speaks of the run that made the set."""
        metrics = dict(result.manifest.metrics)
        if result.skipped:
            count = sum(one["kept"] for one in metrics["per_class"].values())
            metrics.update(written=0, skipped=count, images_per_second=0.0)
        names = ("written", "skipped", "rejected", "images_per_second", "per_class")
        return cls(out=result.out, metrics=metrics, **{name: metrics[name] for name in names})

    def to_json(self) -> dict[str, Any]:
        """The JSON object of `synthkit generate --json`."""
        return {**self.metrics, "out": str(self.out)}


@dataclass(frozen=True)
class ExportResult:
    """What `export` made.

    Attributes:
        bundle: the bundle's folder.
        precisions: precision -> bytes, latency_ms, parity, accuracy, target.
        default_precision: what runs when none is named.
        refused_default: why a wished default was refused; empty when it was not.
        skipped: whether nothing had changed.
        metrics: all of the stage's metrics.
    """

    bundle: Path
    precisions: Mapping[str, Mapping[str, Any]]
    default_precision: str
    refused_default: str
    skipped: bool
    metrics: Mapping[str, Any]

    @classmethod
    def of(cls, result: StageResult) -> ExportResult:
        """From the finished stage."""
        metrics = result.manifest.metrics
        names = ("precisions", "default_precision", "refused_default")
        own = {name: metrics[name] for name in names}
        return cls(bundle=result.out, skipped=result.skipped, metrics=metrics, **own)

    def to_json(self) -> dict[str, Any]:
        """The JSON object of `synthkit export --json`."""
        return {**self.metrics, "bundle": str(self.bundle), "skipped": self.skipped}


def adapt(
    real_dir: PathLike,
    *,
    test_dir: PathLike | None = None,
    workspace: PathLike = WORKSPACE,
    synth: bool = True,
    student: PathLike | None = None,
    engines: EngineSettings | None = None,
    style: StyleSettings | None = None,
    generate: GenerateSettings | None = None,
    filter: FilterSettings | None = None,
    train: TrainSettings | None = None,
    adapt: AdaptSettings | None = None,
    export: ExportSettings | None = None,
    skip_bad: bool = False,
    force: bool = False,
) -> AdaptResult:
    """Turn a few photos per class into a verified bundle, running whatever earlier stage is missing.

    Args:
        real_dir: one folder of photos per class.
        test_dir: the same for test images, which measure the bundle at the end.
        workspace: folder where the stages write; what has not changed in it is not made again.
        synth: whether synthetic images are made and used.
        student: folder of an already trained student, which replaces all stages before `adapt`.
        engines: settings of `build-engines`; None: those of the workspace's engines, else the defaults.
        style: settings of `learn-style`; this and what follows: None: the defaults.
        generate: settings of `generate`.
        filter: which synthetic images are rejected.
        train: settings of `train`; `student` names the timm model.
        adapt: settings of `adapt`.
        export: settings of `export`.
        skip_bad: leave unreadable files out instead of refusing the folder.
        force: adapt and export again even when nothing changed.

    Raises:
        SynthkitError: the photos, a setting, the model or the machine cannot be used; see `synthkit.errors`.
    """
    own = (engines, style, generate, filter, train, adapt, export)
    given = {name: asdict(one) for name, one in zip(SECTIONS, own, strict=True) if one is not None}
    place = Workspace(Path(workspace))
    chain = chain_of(
        Path(real_dir),
        place,
        ChainSettings.from_given(Given(given), place),
        synth=synth,
        student_dir=None if student is None else Path(student),
        test_dir=None if test_dir is None else Path(test_dir),
        skip_bad=skip_bad,
    )
    with workspace_lock(place.root):
        return run_chain(chain, force=force)


def chain_of(
    real_dir: Path,
    place: Workspace,
    settings: ChainSettings,
    *,
    synth: bool,
    student_dir: Path | None,
    test_dir: Path | None,
    skip_bad: bool,
) -> Chain:
    """The chain on a folder of photos.

    Raises:
        DataError: the photos cannot be used, or the test images share one with them.
    """
    known = recorded_inputs(place.root)
    photos, test = ImageSet.scan(real_dir, skip_bad, known=known), None
    if test_dir:
        test = ImageSet.scan(test_dir, skip_bad, known=known).with_classes(photos.classes)
        check_disjoint(photos, test, (str(real_dir), str(test_dir)))
    return Chain(settings, place, photos, synth, student_dir, test)


def run_chain(chain: Chain, *, force: bool) -> AdaptResult:
    """Run a chain to its end, and measure the bundle where there are test images.

    Args:
        chain: on a workspace that is locked.
        force: adapt and export again even when nothing changed.
    """
    results = list(chain.run(force=force))
    adapted = next(result.manifest.metrics for result in results if result.manifest.stage == "adapt")
    bundle = chain.workspace.bundle
    return AdaptResult(
        bundle,
        {result.manifest.stage: "skipped" if result.skipped else "done" for result in results},
        adapted["strategy"],
        adapted["reason"],
        adapted["steps"],
        adapted["cross_validation"],
        round(sum(result.manifest.seconds for result in results if not result.skipped), 3),
        evaluate_bundle(Bundle.open(bundle), chain.test.root) if chain.test else None,
    )


def build_engines(
    settings: EngineSettings | None = None,
    *,
    workspace: PathLike = WORKSPACE,
    out: PathLike | None = None,
    force: bool = False,
) -> EnginesResult:
    """Turn a diffusion model into engines, once per device.

    Args:
        settings: of the stage; None: the defaults, with the bundled model.
        workspace: folder where the stages write.
        out: folder to write; None: the workspace's.
        force: build even when nothing changed.

    Raises:
        ConfigError, EngineError, ModelError: a setting, the backend or the model cannot be used.
        ParityError: an engine does not compute what its source computes.
    """
    stage = BuildEngines(settings or EngineSettings(), Path(out or Path(workspace) / "engines"))
    with workspace_lock(Path(workspace)):
        return EnginesResult.of(run_stage(stage, force=force))


def generate(
    real_dir: PathLike | None = None,
    *,
    classes: Sequence[str] = (),
    settings: GenerateSettings | None = None,
    filter: FilterSettings | None = None,
    test_dir: PathLike | None = None,
    style: PathLike | None = None,
    engines: PathLike | None = None,
    workspace: PathLike = WORKSPACE,
    out: PathLike | None = None,
    skip_bad: bool = False,
    force: bool = False,
) -> GenerateResult:
    """Generate synthetic images of every class through the engines, in the learned style.

    Args:
        real_dir: one folder of photos per class, which names the classes.
        classes: class names, instead of photos.
        settings: of the stage; None: the defaults.
        filter: which images are rejected; None: none.
        test_dir: test photos, which the filter "leak" keeps images away from.
        style: file of style tokens; None: the workspace's, if any.
        engines: engines folder; None: the workspace's.
        workspace: folder where the stages write.
        out: folder to write; None: the workspace's.
        skip_bad: leave unreadable files out instead of refusing the folder.
        force: generate anew even when nothing changed.

    Raises:
        ConfigError, DataError: the classes, the photos or a setting cannot be used.
        EngineError, ModelError: there are no engines, or the style does not suit them.
    """
    stage = generate_stage(
        Workspace(Path(workspace)),
        real_dir=None if real_dir is None else Path(real_dir),
        classes=classes,
        settings=settings or GenerateSettings(),
        filters=filter or FilterSettings(),
        test_dir=None if test_dir is None else Path(test_dir),
        style=None if style is None else Path(style),
        engines=None if engines is None else Path(engines),
        out=None if out is None else Path(out),
        skip_bad=skip_bad,
    )
    with workspace_lock(Path(workspace)):
        return GenerateResult.of(run_stage(stage, force=force))


def generate_stage(
    place: Workspace,
    *,
    real_dir: Path | None,
    classes: Sequence[str],
    settings: GenerateSettings,
    filters: FilterSettings,
    test_dir: Path | None,
    style: Path | None,
    engines: Path | None,
    out: Path | None,
    skip_bad: bool,
) -> Generate:
    """The stage `generate` of a workspace; see `generate` for what is given.

    Raises:
        ConfigError: the classes are named both ways, or not at all.
    """
    if (real_dir is None) == (not classes):
        raise ConfigError("name the classes by either --real-dir DIR or --classes a,b,c")
    known = recorded_inputs(place.root)
    photos = ImageSet.scan(real_dir, skip_bad, known=known) if real_dir else None
    names = photos.classes if photos else tuple(classes)
    learned = place.style / TOKEN_FILE
    return Generate(
        settings,
        engines or place.engines,
        names,
        out or place.synthetic,
        own_names=class_synonyms(photos.root, names) if photos else {},
        style=style or (learned if learned.is_file() else None),
        photos=photos,
        filters=filters,
        test=ImageSet.scan(test_dir, skip_bad, fewest=1, known=known) if test_dir else None,
    )


def export(
    student: PathLike | None = None,
    *,
    real_dir: PathLike | None = None,
    synth_dir: PathLike | None = None,
    test_dir: PathLike | None = None,
    settings: ExportSettings | None = None,
    workspace: PathLike = WORKSPACE,
    out: PathLike | None = None,
    force: bool = False,
) -> ExportResult:
    """Write a trained student as a verified bundle.

    Args:
        student: timm folder; None: the workspace's adapted student.
        real_dir: photos that it was trained on, for the parity check.
        synth_dir: synthetic images, which give int8 its ranges too.
        test_dir: test images, which measure every precision.
        settings: precisions and target; None: fp32 alone.
        workspace: folder where the stages write.
        out: bundle to write; None: the workspace's.
        force: export even when nothing changed.

    Raises:
        ConfigError, DataError, ModelError: a setting, the images or the student cannot be used.
        ParityError: an exported model does not compute what the student computes.
    """
    place = Workspace(Path(workspace))
    known = recorded_inputs(place.root)
    folders = (real_dir, synth_dir, test_dir)
    sets = (ImageSet.scan(Path(one), known=known) if one is not None else None for one in folders)
    stage = Export(
        settings or ExportSettings(),
        Path(student) if student is not None else place.adapted,
        Path(out) if out is not None else place.bundle,
        Images(*sets),
    )
    with workspace_lock(place.root):
        return ExportResult.of(run_stage(stage, force=force))


def evaluate(bundle: PathLike, test_dir: PathLike, *, skip_bad: bool = False) -> Evaluation:
    """Measure a bundle on test images.

    Args:
        bundle: the bundle's folder.
        test_dir: one folder of test images per class of the bundle; classes may be absent.
        skip_bad: leave unreadable files out instead of refusing the folder.

    Raises:
        BundleError: the bundle cannot be used.
        DataError: a class is unknown, or an image was trained on.
    """
    return evaluate_bundle(Bundle.open(Path(bundle)), Path(test_dir), skip_bad)


def compare(
    real_dir: PathLike,
    test_dir: PathLike,
    *,
    methods: Sequence[str] = DEFAULT_METHODS,
    shots: Sequence[int] = (1, 2, 4, 8, 16),
    seeds: int = 3,
    settings: ChainSettings | None = None,
    workspace: PathLike = WORKSPACE,
    jobs: int = 1,
) -> Comparison:
    """Compare methods over several splits of real photos; what was measured before is not measured again.

    Args:
        real_dir: one folder of photos per class, to take the few shots from.
        test_dir: the same for test images, which only measure.
        methods: what to compare; see `synthkit compare --help`.
        shots: photos per class.
        seeds: splits per number of shots; the first seed is that of `settings.adapt`.
        settings: of all stages; None: the defaults, on the workspace's engines.
        workspace: folder where the stages write.
        jobs: processes.

    Raises:
        DataError: the test folder shares an image with the photos, or a class has too few of them.
    """
    from synthkit.recipes.studies.compare import Split
    from synthkit.recipes.studies.compare import compare as measure

    place = Workspace(Path(workspace))
    settings = settings or ChainSettings.from_given(Given(), place)
    first = settings.adapt.seed
    splits = [Split(count, seed) for count in shots for seed in range(first, first + seeds)]
    with workspace_lock(place.root):
        pool, test = ImageSet.scan(Path(real_dir)), ImageSet.scan(Path(test_dir))
        return measure(settings, place.root, pool, test, list(methods), splits, jobs)
