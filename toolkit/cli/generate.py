"""`synthkit generate`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from synthkit.artifacts import stage_state, workspace_lock, write_bytes
from synthkit.cli import options
from synthkit.errors import ConfigError


@options.command("generate")
@options.stage_options
@options.settings_options("generate", "filter")
@click.option("--real-dir", type=click.Path(path_type=Path), help="Class folders of the real photos.")
@options.skip_bad
@click.option("--test-dir", type=click.Path(path_type=Path), help="Test photos, for --filter leak.")
@click.option("--classes", help="Class names, comma-separated, instead of --real-dir.")
@click.option(
    "--style", type=click.Path(path_type=Path), help="Style tokens.  [default: the workspace's, if any]"
)
@click.option(
    "--engines", type=click.Path(path_type=Path), help="Engines folder.  [default: WORKSPACE/engines]"
)
@click.option(
    "-o", "--out", type=click.Path(path_type=Path), help="Folder to write.  [default: WORKSPACE/synthetic]"
)
@click.option(
    "--redo",
    type=click.Path(path_type=Path),
    help="Draw this image of a set again and compare the bytes; --out names a file for it.",
)
def command(
    workspace: Path,
    real_dir: Path | None,
    skip_bad: bool,
    test_dir: Path | None,
    classes: str | None,
    style: Path | None,
    engines: Path | None,
    out: Path | None,
    redo: Path | None,
    config: Path | None,
    force: bool,
    dry_run: bool,
    **values: Any,
) -> options.Output:
    """Draw synthetic images of every class through the engines, in the learned style.

    --redo takes the settings that the set's metadata.jsonl has for the image, whatever others are given; name
    the set's own --engines and --style where they are not the workspace's, and --real-dir where it started
    from photos.

    \b
    Example: synthkit generate --real-dir ./few_shots --per-class 500 --guidance 1.5:3.0
    Example: synthkit generate --redo 3/00002.png
    """
    from synthkit.data.images import ImageSet
    from synthkit.models import prompt_synonyms
    from synthkit.recipes.generation.generate import Screening, generate, generate_request

    engines_dir, style_file = engines or workspace / "engines", style or _workspace_style(workspace)
    if redo:
        photos = ImageSet.scan(real_dir, skip_bad, fewest=1) if real_dir else None
        return _redo(redo, workspace / "synthetic", engines_dir, style_file, photos, out)
    settings = options.gather_settings(config, values, "generate", "filter")
    target = out or workspace / "synthetic"
    photos, names, own_words = _class_names(real_dir, skip_bad, classes)
    words = prompt_synonyms(engines_dir, names, own_words)
    test = ImageSet.scan(test_dir, skip_bad, fewest=1) if test_dir else None
    screening = Screening(settings["filter"], test)
    asked = (settings["generate"], engines_dir, words, style_file, target)
    if dry_run:
        request = generate_request(*asked, photos=photos, screening=screening)
        return _planned(request, settings["generate"].per_class * len(words), len(words))
    with workspace_lock(workspace):
        result = generate(*asked, force=force, photos=photos, screening=screening)
    return _output(result)


def _workspace_style(workspace: Path) -> Path | None:
    path = workspace / "style" / "learned_embeds.safetensors"
    return path if path.is_file() else None


def _class_names(
    real_dir: Path | None, skip_bad: bool, classes: str | None
) -> tuple[Any, list[str], dict[str, tuple[str, ...]]]:
    """The photos where there are some, class names, and the user's own words for them."""
    if (real_dir is None) == (classes is None):
        raise ConfigError("name the classes by either --real-dir DIR or --classes a,b,c")
    if real_dir is not None:
        from synthkit.data.images import ImageSet, class_synonyms

        photos = ImageSet.scan(real_dir, skip_bad)
        return photos, list(photos.classes), class_synonyms(real_dir, photos.classes)
    listed = [name.strip() for name in str(classes).split(",") if name.strip()]
    return None, list(dict.fromkeys(listed)), {}


def _planned(request: Any, count: int, classes: int) -> options.Output:
    state = stage_state(request)
    return options.Output(
        {"dry_run": True, "state": state, "config": dict(request.config), "out": request.out},
        f"would draw {count} images of {classes} classes in {request.out} ({state})",
    )


def _redo(
    image: Path, usual: Path, engines: Path, style: Path | None, photos: Any, out: Path | None
) -> options.Output:
    from synthkit.recipes.generation.redo import find_set, redo

    root, name = find_set(image, usual)
    result = redo(root, name, engines, style, photos)
    if out:
        write_bytes(out, result.content)
    verdict = "the same bytes as in the set" if result.same else "other bytes than in the set"
    written = f", written to {out}" if out else ""
    return options.Output(
        {
            "file_name": name,
            "same": result.same,
            "sha256": result.sha256,
            "wanted": result.wanted,
            "out": out,
        },
        f"{name} drawn again: {verdict}{written}",
        ok=result.same,
    )


def _output(result: Any) -> options.Output:
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
