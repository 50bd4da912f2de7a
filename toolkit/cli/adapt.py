"""`synthkit adapt`: the main job, from a few photos to a bundle."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from synthkit.cli import options

if TYPE_CHECKING:
    from synthkit.artifacts import StageResult
    from synthkit.recipes.chain import ChainSettings, Workspace

_SECTIONS = ("adapt", "train", "generate", "learn-style", "build-engines")


@options.command("adapt")
@options.stage_options
@options.settings_options(*_SECTIONS)
@click.option("--no-synth", is_flag=True, help="Adapt a pretrained student on the photos alone.")
@click.option("--skip-bad", is_flag=True, help="Leave unreadable files out instead of refusing the folder.")
@click.option(
    "--test-dir", type=click.Path(path_type=Path), help="Test images: measure the bundle at the end."
)
@click.option(
    "--real-dir", type=click.Path(path_type=Path), required=True, help="Class folders of the real photos."
)
def command(
    workspace: Path,
    real_dir: Path,
    test_dir: Path | None,
    skip_bad: bool,
    no_synth: bool,
    config: Path | None,
    force: bool,
    dry_run: bool,
    **values: Any,
) -> options.Output:
    """Turn a few photos per class into a verified bundle, running whatever earlier stage is missing.

    A stage whose inputs have not changed is skipped; --force adapts and exports again. --student takes a timm
    model name, or the folder of a student that is already trained.

    \b
    Example: synthkit adapt --real-dir ./few_shots --test-dir ./test
    """
    from synthkit.artifacts import workspace_lock
    from synthkit.images import ImageSet, check_disjoint
    from synthkit.recipes.chain import Workspace, plan_chain, run_chain

    photos = ImageSet.scan(real_dir, skip_bad)
    if test_dir:
        test = ImageSet.scan(test_dir, skip_bad).with_classes(photos.classes)
        check_disjoint(photos, test, (str(real_dir), str(test_dir)))
    place = Workspace(workspace)
    settings, student_dir = _settings(place, config, values)
    how: dict[str, Any] = {"synth": not no_synth, "student_dir": student_dir}
    if dry_run:
        plan = plan_chain(settings, place, photos, **how)
        return options.Output(
            {"plan": plan}, "\n".join(f"{name:<14} {state}" for name, state in plan.items())
        )
    with workspace_lock(workspace):
        results = run_chain(settings, place, photos, **how, force=force)
    return _answer(results, place, test_dir, skip_bad)


def _settings(
    place: Workspace, config: Path | None, values: dict[str, Any]
) -> tuple[ChainSettings, Path | None]:
    """The settings of all stages, and the folder of a trained student where `--student` names one."""
    from synthkit.recipes.chain import ChainSettings, remembered_model
    from synthkit.recipes.settings import EngineSettings

    student_dir = Path(values["student"]) if values["student"] and Path(values["student"]).is_dir() else None
    if student_dir:
        values = {**values, "student": None}
    settings = options.gather_settings(config, values, *_SECTIONS)
    flags = {field.name: values[field.name] for field in dataclasses.fields(EngineSettings)}
    chain = ChainSettings(
        remembered_model(settings["build-engines"], place, flags),
        settings["learn-style"],
        settings["generate"],
        settings["train"],
        settings["adapt"],
    )
    return chain, student_dir


def _answer(
    results: Sequence[StageResult], place: Workspace, test_dir: Path | None, skip_bad: bool
) -> options.Output:
    """What was done, which path was taken and why, and the bundle's top-1 where there are test images."""
    from synthkit.engines.bundle import Bundle
    from synthkit.recipes.adapt import describe
    from synthkit.recipes.evaluate import evaluate_bundle

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
