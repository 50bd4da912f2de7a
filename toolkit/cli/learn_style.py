"""`synthkit learn-style`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from synthkit.cli import options


@options.command("learn-style")
@options.stage_options
@options.settings_options("learn-style")
@click.option(
    "--real-dir", type=click.Path(path_type=Path), required=True, help="Class folders of the real photos."
)
@options.skip_bad
@click.option(
    "--engines", type=click.Path(path_type=Path), help="Engines folder  [default: WORKSPACE/engines]"
)
@click.option(
    "-o", "--out", type=click.Path(path_type=Path), help="Folder to write  [default: WORKSPACE/style]"
)
def command(
    workspace: Path,
    real_dir: Path,
    skip_bad: bool,
    engines: Path | None,
    out: Path | None,
    config: Path | None,
    force: bool,
    dry_run: bool,
    **values: Any,
) -> options.Output:
    """Learn a style token from a few real photos; an interrupted run goes on from its last checkpoint.

    With --clusters, photos that look alike share a token, and `generate` draws in each style as often as its
    photos are.

    \b
    Example: synthkit learn-style --real-dir ./few_shots --steps 500
    Example: synthkit learn-style --real-dir ./few_shots --clusters 3 --preview-every 50
    """
    from synthkit.artifacts import stage_state, workspace_lock
    from synthkit.data.images import ImageSet, class_words
    from synthkit.engines.diffusion.engines_folder import base_model, existing_engines
    from synthkit.models import prompt_words, resolve_model
    from synthkit.recipes.learn_style import learn_style, learn_style_request

    settings = options.gather_settings(config, values, "learn-style")["learn-style"]
    photos = ImageSet.scan(real_dir, skip_bad)
    model = base_model(existing_engines(engines or workspace / "engines"))
    words = prompt_words(resolve_model(model), photos.classes, class_words(real_dir, photos.classes))
    target = out or workspace / "style"
    if dry_run:
        state = stage_state(learn_style_request(settings, model, photos, words, target))
        return options.Output({"stage": "learn-style", "state": state}, f"learn-style: {state}")
    with workspace_lock(workspace):
        result = learn_style(settings, model, photos, words, target, force)
    data = {"out": target, "skipped": result.skipped, **result.manifest.metrics}
    lines = [_line(one, target) for one in data["tokens"]]
    return options.Output(data, "\n".join([*lines, "unchanged, skipped"] if result.skipped else lines))


def _line(token: dict[str, Any], target: Path) -> str:
    """What is said of one token."""
    photos = f"{token['token']} in {target}: {token['photos']} photos"
    if token["loss_first"] is None:
        return f"{photos}, untrained"
    return f"{photos}, loss {token['loss_first']:.3f} -> {token['loss_last']:.3f} in {token['steps']} steps"
