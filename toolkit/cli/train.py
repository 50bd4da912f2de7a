"""`synthkit train`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from synthkit.cli import options


@options.command("train")
@options.folder("--synth-dir", "Synthetic set.  [default: WORKSPACE/synthetic, if any]")
@click.option("--no-synth", is_flag=True, help="Leave synthetic images out.")
@options.folder("--real-dir", "Class folders of the real photos.")
@options.skip_bad
@options.folder("--out", "Folder to write.  [default: WORKSPACE/student]")
@options.setting_flags(
    "train.student",
    "train.weights",
    "train.pretrained",
    "train.method",
    "train.epochs",
    "train.image_size",
    "train.seed",
)
@options.stage_options
def command(
    workspace: Path,
    synth_dir: Path | None,
    no_synth: bool,
    real_dir: Path | None,
    skip_bad: bool,
    out: Path | None,
    force: bool,
    dry_run: bool,
    **recipe: Any,
) -> options.Output:
    """Train a student on the synthetic images, then, with a new head, on the real ones.

    --method names other ways, which take the same images and, but for vanilla and synthetic, as many
    gradient steps. Losses and learning rates are kept in curves.json.

    \b
    Example: synthkit train --real-dir ./few_shots --student resnet18 --epochs 30
    Example: synthkit train --real-dir ./few_shots --method joint --set train.real_weight=0.9
    """
    from synthkit.artifacts import recorded_inputs, run_stage, workspace_lock
    from synthkit.data.images import ImageSet
    from synthkit.recipes.settings import TrainSettings
    from synthkit.recipes.train import Train

    settings = options.given(recipe).over("train", TrainSettings())
    photos = ImageSet.scan(real_dir, skip_bad, known=recorded_inputs(workspace)) if real_dir else None
    synthetic = None if no_synth else synth_dir or _workspace_set(workspace)
    stage = Train(settings, out or workspace / "student", synthetic, photos)
    if dry_run:
        return options.planned(stage, force)
    with workspace_lock(workspace):
        result = run_stage(stage, force=force)
    metrics = result.manifest.metrics
    text = (
        f"{settings.student} in {stage.out}, {settings.method}: "
        f"{metrics['synthetic_steps']} steps on {metrics['n_synthetic']} synthetic, "
        f"{metrics['real_steps']} on {metrics['n_real']} real images"
        + (f", {metrics['mixed_steps']} on both" if "mixed_steps" in metrics else "")
    )
    data = {"out": stage.out, "skipped": result.skipped, **metrics}
    return options.Output(data, f"{text} (unchanged, skipped)" if result.skipped else text)


def _workspace_set(workspace: Path) -> Path | None:
    folder = workspace / "synthetic"
    return folder if folder.is_dir() else None
