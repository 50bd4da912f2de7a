"""`synthkit train`."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import click

from synthkit.cli import options


@options.command("train")
@options.stage_options
@options.settings_options("train")
@click.option(
    "--synth-dir",
    type=click.Path(path_type=Path),
    help="Synthetic set  [default: WORKSPACE/synthetic, if any]",
)
@click.option("--no-synth", is_flag=True, help="Leave synthetic images out.")
@click.option("--real-dir", type=click.Path(path_type=Path), help="Class folders of the real photos.")
@options.skip_bad
@click.option(
    "-o", "--out", type=click.Path(path_type=Path), help="Folder to write  [default: WORKSPACE/student]"
)
def command(
    workspace: Path,
    synth_dir: Path | None,
    no_synth: bool,
    real_dir: Path | None,
    skip_bad: bool,
    out: Path | None,
    config: Path | None,
    force: bool,
    dry_run: bool,
    **values: Any,
) -> options.Output:
    """Train a student on the synthetic images, then, with a new head, on the real ones.

    --procedure names other ways, which take the same images and, but for vanilla and synthetic, as many
    gradient steps; a recipe for each is in recipes/configs. Losses and learning rates are kept in
    curves.json.

    \b
    Example: synthkit train --real-dir ./few_shots --student resnet18 --epochs 30
    Example: synthkit train --real-dir ./few_shots --procedure joint
    """
    from synthkit.artifacts import stage_state, workspace_lock
    from synthkit.data.images import ImageSet
    from synthkit.learning.gradients import first_process
    from synthkit.recipes.train import Material, train, train_request

    settings = options.gather_settings(config, values, "train")["train"]
    source = None if no_synth else synth_dir or _workspace_set(workspace)
    material = Material(
        ImageSet.scan(source, skip_bad) if source else None,
        ImageSet.scan(real_dir, skip_bad) if real_dir else None,
    )
    target = out or workspace / "student"
    if dry_run:
        state = stage_state(train_request(settings, material, target))
        return options.Output({"stage": "train", "state": state}, f"train: {state}")
    with workspace_lock(workspace) if first_process() else nullcontext():
        result = train(settings, material, target, force)
    metrics = result.manifest.metrics
    text = (
        f"{settings.student} in {target}, {settings.procedure}: "
        f"{metrics['synthetic_steps']} steps on {metrics['n_synthetic']} synthetic, "
        f"{metrics['real_steps']} on {metrics['n_real']} real images"
        + (f", {metrics['mixed_steps']} on both" if "mixed_steps" in metrics else "")
    )
    data = {"out": target, "skipped": result.skipped, **metrics}
    return options.Output(data, f"{text} (unchanged, skipped)" if result.skipped else text)


def _workspace_set(workspace: Path) -> Path | None:
    folder = workspace / "synthetic"
    return folder if folder.is_dir() else None
