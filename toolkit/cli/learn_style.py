"""`synthkit learn-style`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from synthkit.cli import options


@options.command("learn-style")
@options.folder("--real-dir", "Class folders of the real photos.", required=True)
@options.skip_bad
@options.folder("--engines", "Engines folder.  [default: WORKSPACE/engines]")
@options.folder("--out", "Folder to write.  [default: WORKSPACE/style]")
@options.setting_flags("learn-style.token", "learn-style.steps", "learn-style.lr", "learn-style.clusters")
@options.stage_options
def command(
    workspace: Path,
    real_dir: Path,
    skip_bad: bool,
    engines: Path | None,
    out: Path | None,
    force: bool,
    dry_run: bool,
    **recipe: Any,
) -> options.Output:
    """Learn a style token from a few real photos; an interrupted run goes on from its last checkpoint.

    With --clusters, photos that look alike share a token, and `generate` uses each style as often as its
    photos are.

    \b
    Example: synthkit learn-style --real-dir ./few_shots --steps 500
    Example: synthkit learn-style --real-dir ./few_shots --set learn-style.preview_every=50
    """
    from synthkit.artifacts import recorded_inputs, run_stage, workspace_lock
    from synthkit.data.images import ImageSet
    from synthkit.engines.diffusion.engines_folder import base_model, existing_engines
    from synthkit.recipes.learn_style import LearnStyle
    from synthkit.recipes.settings import StyleSettings

    settings = options.given(recipe).over("learn-style", StyleSettings())
    photos = ImageSet.scan(real_dir, skip_bad, known=recorded_inputs(workspace))
    model = base_model(existing_engines(engines or workspace / "engines"))
    stage = LearnStyle(settings, model, photos, out or workspace / "style")
    if dry_run:
        return options.planned(stage, force)
    with workspace_lock(workspace):
        result = run_stage(stage, force=force)
    data = {"out": stage.out, "skipped": result.skipped, **result.manifest.metrics}
    lines = [_line(one, stage.out) for one in data["tokens"]]
    return options.Output(data, "\n".join([*lines, "unchanged, skipped"] if result.skipped else lines))


def _line(token: Mapping[str, Any], target: Path) -> str:
    """One token for a person."""
    photos = f"{token['token']} in {target}: {token['photos']} photos"
    if token["loss_first"] is None:
        return f"{photos}, untrained"
    return f"{photos}, loss {token['loss_first']:.3f} -> {token['loss_last']:.3f} in {token['steps']} steps"
