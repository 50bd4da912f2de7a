"""`synthkit compare`: methods x shots x seeds on one data set."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from synthkit.cli import options
from synthkit.errors import nearest


def _numbers(_context: click.Context, _option: click.Parameter, text: str) -> list[int]:
    parts = text.split(",")
    if not all(part.strip().isdecimal() and int(part) > 0 for part in parts):
        raise click.BadParameter(f"{text!r} must be numbers with commas between them, for example 1,2,4")
    return sorted({int(part) for part in parts})


def _method_names(_context: click.Context, _option: click.Parameter, text: str) -> list[str]:
    from synthkit.recipes.studies.methods import METHODS

    names = [name.strip() for name in text.split(",")]
    unknown = [name for name in names if name not in METHODS]
    if unknown:
        raise click.BadParameter(
            f"no method {unknown[0]!r}{nearest(unknown[0], METHODS)}; there are {', '.join(METHODS)}"
        )
    return names


@options.command("compare")
@options.setting_flags(
    "train.student",
    "train.weights",
    "train.pretrained",
    "build-engines.model",
    "generate.per_class",
    "adapt.seed+train.seed+generate.seed+learn-style.seed",
)
@options.recipe_options
@click.option(
    "--methods",
    callback=_method_names,
    default="few-shot,synthetic,bridged++,adapted",
    show_default=True,
    help="What to compare; few-shot is the training method vanilla-matched. Also the methods vanilla, "
    "vanilla-mixup, mixed, mixed-half, joint, mixed-auxbn and bridged, the last units alone (last-1, last-2, "
    "last-4), synthetic images of other prompts: plain, control, clustered, half-plain.",
)
@click.option("--jobs", type=click.IntRange(1), default=1, show_default=True, help="Cells at a time.")
@click.option(
    "--seeds", type=click.IntRange(1), default=3, show_default=True, help="Draws per number of shots."
)
@click.option(
    "--shots", callback=_numbers, default="1,2,4,8,16", show_default=True, help="Photos per class to draw."
)
@click.option("--test-dir", type=click.Path(path_type=Path), required=True, help="Real test images.")
@click.option(
    "--real-dir", type=click.Path(path_type=Path), required=True, help="Real photos to draw few shots from."
)
def command(
    workspace: Path,
    real_dir: Path,
    test_dir: Path,
    shots: list[int],
    seeds: int,
    methods: list[str],
    jobs: int,
    **recipe: Any,
) -> options.Output:
    """Run the chain and the methods it is compared with on several draws of photos, and make a table.

    A draw that was measured before is not measured again; --seed is the first draw's.

    \b
    Example: synthkit compare --real-dir ./pool --test-dir ./test --shots 1,2,4 --seeds 3
    """
    from synthkit.artifacts import workspace_lock, write_bytes, write_json
    from synthkit.data.images import ImageSet
    from synthkit.recipes.chain import ChainSettings, Workspace
    from synthkit.recipes.studies.compare import Cell, compare, plot

    settings = ChainSettings.from_given(options.given(recipe), Workspace(workspace))
    first = settings.adapt.seed
    cells = [Cell(count, seed) for count in shots for seed in range(first, first + seeds)]
    with workspace_lock(workspace):
        pool, test = ImageSet.scan(real_dir), ImageSet.scan(test_dir)
        result = compare(settings, workspace, pool, test, methods, cells, jobs)
        write_json(workspace / "compare.json", result)
        write_bytes(workspace / "compare.md", (text := _text(result)).encode())
        plot(result["rows"], workspace / "compare.png")
    return options.Output(result, f"{text}\nalso in {workspace / 'compare'}.json, .md and .png")


def _text(result: dict[str, Any]) -> str:
    from synthkit.recipes.studies.compare import markdown

    return f"Top-1 on {result['n_test']} real test images\n\n{markdown(result)}\n"
