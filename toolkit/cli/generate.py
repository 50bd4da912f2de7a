"""`synthkit generate`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from synthkit.artifacts import stage_state, workspace_lock
from synthkit.cli import options
from synthkit.errors import ConfigError


@options.command("generate")
@options.stage_options
@options.settings_options("generate")
@click.option("--real-dir", type=click.Path(path_type=Path), help="Class folders of the real photos.")
@click.option("--skip-bad", is_flag=True, help="Leave unreadable files out instead of refusing the folder.")
@click.option("--classes", help="Class names, comma-separated, instead of --real-dir.")
@click.option(
    "--style", type=click.Path(path_type=Path), help="Style token.  [default: the workspace's, if any]"
)
@click.option(
    "--engines", type=click.Path(path_type=Path), help="Engines folder.  [default: WORKSPACE/engines]"
)
@click.option(
    "-o", "--out", type=click.Path(path_type=Path), help="Folder to write.  [default: WORKSPACE/synthetic]"
)
def command(
    workspace: Path,
    real_dir: Path | None,
    skip_bad: bool,
    classes: str | None,
    style: Path | None,
    engines: Path | None,
    out: Path | None,
    config: Path | None,
    force: bool,
    dry_run: bool,
    **values: Any,
) -> options.Output:
    """Draw synthetic images of every class through the engines, in the learned style."""
    from synthkit.models import prompt_words
    from synthkit.recipes.generate import generate, generate_request

    settings = options.gather_settings(config, values, "generate")["generate"]
    engines_dir, target = engines or workspace / "engines", out or workspace / "synthetic"
    style_file = style or _workspace_style(workspace)
    names, own_words = _class_names(real_dir, skip_bad, classes)
    words = prompt_words(engines_dir, names, own_words)
    if dry_run:
        request = generate_request(settings, engines_dir, words, style_file, target)
        state = stage_state(request)
        count = settings.per_class * len(words)
        return options.Output(
            {"dry_run": True, "state": state, "config": dict(request.config), "out": target},
            f"would draw {count} images of {len(words)} classes in {target} ({state})",
        )
    with workspace_lock(workspace):
        result = generate(settings, engines_dir, words, style_file, target, force)
    return _output(result)


def _workspace_style(workspace: Path) -> Path | None:
    path = workspace / "style" / "learned_embeds.safetensors"
    return path if path.is_file() else None


def _class_names(
    real_dir: Path | None, skip_bad: bool, classes: str | None
) -> tuple[list[str], dict[str, str]]:
    """Class names and the user's own words for them."""
    if (real_dir is None) == (classes is None):
        raise ConfigError("name the classes by either --real-dir DIR or --classes a,b,c")
    if real_dir is not None:
        from synthkit.images import ImageSet, class_words

        names = list(ImageSet.scan(real_dir, skip_bad).classes)
        return names, class_words(real_dir, names)
    listed = [name.strip() for name in str(classes).split(",") if name.strip()]
    return list(dict.fromkeys(listed)), {}


def _output(result: Any) -> options.Output:
    metrics = dict(result.manifest.metrics)
    if result.skipped:  # the manifest speaks of the run that drew them
        count = metrics["written"] + metrics["skipped"]
        metrics.update(written=0, skipped=count, images_per_second=0.0)
    text = f"{metrics['written']} images drawn, {metrics['skipped']} already there, in {result.out}"
    if metrics["images_per_second"]:
        text += f" ({metrics['images_per_second']:.1f} images/s)"
    return options.Output({**metrics, "out": result.out}, text)
