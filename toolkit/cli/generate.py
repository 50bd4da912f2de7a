"""`synthkit generate`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from synthkit.cli import options
from synthkit.errors import ConfigError

if TYPE_CHECKING:
    from synthkit.artifacts import StageResult


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
    from synthkit.artifacts import recorded_inputs, run_stage, workspace_lock
    from synthkit.data.images import ImageSet, class_synonyms
    from synthkit.recipes.generation.generate import Generate
    from synthkit.recipes.settings import FilterSettings, GenerateSettings

    if (real_dir is None) == (classes is None):
        raise ConfigError("name the classes by either --real-dir DIR or --classes a,b,c")
    given = options.given(recipe)
    known = recorded_inputs(workspace)
    photos = ImageSet.scan(real_dir, skip_bad, known=known) if real_dir else None
    test = ImageSet.scan(test_dir, skip_bad, fewest=1, known=known) if test_dir else None
    names = photos.classes if photos else _class_names(str(classes))
    stage = Generate(
        given.over("generate", GenerateSettings()),
        engines or workspace / "engines",
        names,
        out or workspace / "synthetic",
        own_words=class_synonyms(photos.root, names) if photos else {},
        style=style or _workspace_style(workspace),
        photos=photos,
        filters=given.over("filter", FilterSettings()),
        test=test,
    )
    if dry_run:
        plan = options.planned(stage, force)
        count = stage.settings.per_class * len(names)
        text = f"{plan.text}; {count} images of {len(names)} classes in {stage.out}"
        return options.Output({**plan.data, "images": count}, text)
    with workspace_lock(workspace):
        result = run_stage(stage, force=force)
    return _answer(result)


def _workspace_style(workspace: Path) -> Path | None:
    path = workspace / "style" / "learned_embeds.safetensors"
    return path if path.is_file() else None


def _class_names(listed: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(name.strip() for name in listed.split(",") if name.strip()))


def _answer(result: StageResult) -> options.Output:
    metrics = dict(result.manifest.metrics)
    if result.skipped:  # the manifest speaks of the run that drew them
        count = sum(one["kept"] for one in metrics["per_class"].values())
        metrics.update(written=0, skipped=count, images_per_second=0.0)
    text = f"{metrics['written']} images drawn, {metrics['skipped']} already there, in {result.out}"
    if metrics["images_per_second"]:
        text += f" ({metrics['images_per_second']:.1f} images/s)"
    if metrics["rejected"]:
        text += f"\nfilters rejected {metrics['rejected']} and gave {metrics['given_up']} images up"
    return options.Output({**metrics, "out": result.out}, text)
