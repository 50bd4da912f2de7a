"""`synthkit generate`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from synthkit.cli import options


@options.command("generate")
@options.folder("--real-dir", "Class folders of the real photos.")
@click.option("--classes", help="Class names, comma-separated, instead of --real-dir.")
@options.skip_bad
@options.folder("--test-dir", "Test photos, which the filter \"leak\" keeps synthetic images away from.")
@options.folder("--style", "File of style tokens.  [default: the workspace's, if any]")
@options.folder("--engines", "Engines folder.  [default: WORKSPACE/engines]")
@options.folder("--out", "Folder to write.  [default: WORKSPACE/synthetic]")
@options.setting_flags(
    "generate.per_class",
    "generate.steps",
    "generate.guidance",
    "generate.seed",
    "generate.batch_size",
    "generate.ray",
    "filter.filter",
    "filter.classifier",
)
@options.stage_options
def command(
    workspace: Path,
    real_dir: Path | None,
    classes: str | None,
    skip_bad: bool,
    test_dir: Path | None,
    style: Path | None,
    engines: Path | None,
    out: Path | None,
    force: bool,
    dry_run: bool,
    **recipe: Any,
) -> options.Output:
    """Generate synthetic images of every class through the engines, in the learned style.

    Image i of class c always comes from (seed, c, i): batch size, workers and interruptions change nothing.

    \b
    Example: synthkit generate --real-dir ./few_shots --per-class 500 --guidance 1.5:3.0
    Example: synthkit generate --classes 3,7 --set generate.context="on a wet meter"
    """
    from synthkit.artifacts import run_stage, workspace_lock
    from synthkit.recipes.api import GenerateResult, generate_stage
    from synthkit.recipes.chain import Workspace
    from synthkit.recipes.settings import FilterSettings, GenerateSettings

    given = options.given(recipe)
    stage = generate_stage(
        Workspace(workspace),
        real_dir=real_dir,
        classes=_class_names(classes),
        settings=given.over("generate", GenerateSettings()),
        filters=given.over("filter", FilterSettings()),
        test_dir=test_dir,
        style=style,
        engines=engines,
        out=out,
        skip_bad=skip_bad,
    )
    if dry_run:
        plan = options.planned(stage, force)
        count = stage.settings.per_class * len(stage.classes)
        text = f"{plan.text}; {count} images of {len(stage.classes)} classes in {stage.out}"
        return options.Output({**plan.data, "images": count}, text)
    with workspace_lock(workspace):
        result = GenerateResult.of(run_stage(stage, force=force))
    text = f"{result.written} images generated, {result.skipped} already there, in {result.out}"
    if result.images_per_second:
        text += f" ({result.images_per_second:.1f} images/s)"
    if result.rejected:
        dropped = result.metrics["dropped"]
        text += f"\nfilters rejected {result.rejected} samples; {dropped} images were dropped"
    return options.Output(result.to_json(), text)


def _class_names(listed: str | None) -> tuple[str, ...]:
    return tuple(dict.fromkeys(name.strip() for name in (listed or "").split(",") if name.strip()))
