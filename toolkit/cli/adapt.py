"""`synthkit adapt`: the main job, from a few photos to a bundle."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from synthkit.cli import options

if TYPE_CHECKING:
    from synthkit.recipes.api import AdaptResult


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
    "adapt.strategy",
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
    from synthkit.artifacts import workspace_lock
    from synthkit.recipes.api import chain_of, run_chain
    from synthkit.recipes.chain import ChainSettings, Workspace

    place = Workspace(workspace)
    student_dir = Path(student) if student and Path(student).is_dir() else None
    if student and student_dir is None:
        recipe["assignments"] = (*recipe["assignments"], f"train.student={student}")
    settings = ChainSettings.from_given(options.given(recipe), place)
    chain = chain_of(
        real_dir,
        place,
        settings,
        synth=not no_synth,
        student_dir=student_dir,
        test_dir=test_dir,
        skip_bad=skip_bad,
    )
    if dry_run:
        plan = chain.plan(force=force)
        text = "\n".join(f"{name:<14} {state}" for name, state in plan.items())
        return options.Output({"plan": plan}, text)
    with workspace_lock(workspace):
        result = run_chain(chain, force=force)
    return options.Output(result.to_json(), "\n".join(_lines(result)))


def _lines(result: AdaptResult) -> Iterator[str]:
    """The stages, the selected strategy with its reason, and the bundle's top-1 on test images, if any."""
    from synthkit.recipes.adaptation.adapt import describe

    for name, state in result.stages.items():
        yield f"{name:<14} {state}"
    if set(result.stages.values()) == {"skipped"}:
        yield "nothing has changed since the bundle was made"
    yield f"strategy: {result.strategy}, {result.reason}"
    if result.cross_validation:
        yield describe(result.cross_validation)
    yield f"bundle: {result.bundle}"
    if result.evaluation:
        yield f"top-1 on {result.evaluation.n_test} test images: {result.evaluation.top1:.3f}"
