"""`synthkit adapt`: the main job, from a few photos to a bundle."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from synthkit.cli import options

if TYPE_CHECKING:
    from synthkit.artifacts import StageResult
    from synthkit.recipes.chain import Workspace


@options.command("adapt")
@options.folder("--real-dir", "Class folders of the real photos.", required=True)
@options.folder("--test-dir", "Test images: measure the bundle at the end.")
@click.option("--no-synth", is_flag=True, help="Adapt a pretrained student on the photos alone.")
@click.option(
    "--student",
    metavar="NAME_OR_DIR",
    help="timm model name, or the folder of a student that is already trained.  [default: resnet10t]",
)
@options.skip_bad
@options.setting_flags(
    "train.weights",
    "train.pretrained",
    "train.image_size",
    "adapt.path",
    "build-engines.model",
    "generate.per_class",
    "adapt.seed+train.seed+generate.seed+learn-style.seed",
)
@options.stage_options
def command(
    workspace: Path,
    real_dir: Path,
    test_dir: Path | None,
    no_synth: bool,
    student: str | None,
    skip_bad: bool,
    force: bool,
    dry_run: bool,
    **recipe: Any,
) -> options.Output:
    """Turn a few photos per class into a verified bundle, running whatever earlier stage is missing.

    A stage whose inputs have not changed is skipped; --force adapts and exports again. Settings of every
    stage can be given, for example --set learn-style.steps=500.

    \b
    Example: synthkit adapt --real-dir ./few_shots --test-dir ./test
    Example: synthkit adapt --real-dir ./few_shots --no-synth --student mobilenetv2_100 --pretrained
    """
    from synthkit.artifacts import recorded_inputs, workspace_lock
    from synthkit.data.images import ImageSet
    from synthkit.data.splits import check_disjoint
    from synthkit.recipes.chain import Chain, ChainSettings, Workspace

    known = recorded_inputs(workspace)
    photos, test = ImageSet.scan(real_dir, skip_bad, known=known), None
    if test_dir:
        test = ImageSet.scan(test_dir, skip_bad).with_classes(photos.classes)
        check_disjoint(photos, test, (str(real_dir), str(test_dir)))
    place = Workspace(workspace)
    student_dir = Path(student) if student and Path(student).is_dir() else None
    if student and student_dir is None:
        recipe["assignments"] = (*recipe["assignments"], f"train.student={student}")
    settings = ChainSettings.from_given(options.given(recipe), place)
    chain = Chain(settings, place, photos, not no_synth, student_dir, test)
    if dry_run:
        plan = chain.plan(force=force)
        text = "\n".join(f"{name:<14} {state}" for name, state in plan.items())
        return options.Output({"plan": plan}, text)
    with workspace_lock(workspace):
        results = list(chain.run(force=force))
    return _answer(results, place, test_dir, skip_bad)


def _answer(
    results: Sequence[StageResult], place: Workspace, test_dir: Path | None, skip_bad: bool
) -> options.Output:
    """What was done, which path was taken and why, and the bundle's top-1 where there are test images."""
    from synthkit.engines.bundle.format import Bundle
    from synthkit.recipes.adaptation.adapt import describe
    from synthkit.recipes.device.evaluate import evaluate_bundle

    stages = {result.manifest.stage: "skipped" if result.skipped else "done" for result in results}
    seconds = round(sum(result.manifest.seconds for result in results if not result.skipped), 3)
    metrics = next(result.manifest.metrics for result in results if result.manifest.stage == "adapt")
    data = {"bundle": place.bundle, "stages": stages, **metrics, "seconds": seconds}
    lines = [f"{name:<14} {state}" for name, state in stages.items()]
    if all(result.skipped for result in results):
        lines.append("nothing has changed since the bundle was made")
    lines += [f"path: {metrics['path']}, {metrics['reason']}", describe(metrics["cross_validation"])]
    lines.append(f"bundle: {place.bundle}")
    if test_dir:
        measured = evaluate_bundle(Bundle.open(place.bundle), test_dir, skip_bad)
        data |= {**measured, "seconds": seconds}
        lines.append(f"top-1 on {measured['n_test']} test images: {measured['top1']:.3f}")
    return options.Output(data, "\n".join(line for line in lines if line))
