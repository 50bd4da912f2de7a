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
    default="vanilla-matched,synthetic,bridged++,adapted",
    show_default=True,
    help="Names of `train --method`; last-1, last-2, last-4: the last layer groups alone; adapted: the "
    "bundle of `adapt`; plain, control, clustered, half-plain: synthetic images of other prompts.",
)
@click.option("--jobs", type=click.IntRange(1), default=1, show_default=True, help="Processes.")
@click.option(
    "--seeds", type=click.IntRange(1), default=3, show_default=True, help="Splits per number of shots."
)
@click.option("--shots", callback=_numbers, default="1,2,4,8,16", show_default=True, help="Photos per class.")
@options.folder("--test-dir", "Real test images.", required=True)
@options.folder("--real-dir", "Real photos to take the few shots from.", required=True)
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
    """Compare methods over several splits of real photos, and write a table.

    Each seed takes other photos per class, and the chain and every method learn the same ones. A split that
    was measured before is not measured again. --seed is the first seed.

    \b
    Examples:
      synthkit compare --real-dir ./pool --test-dir ./test --shots 1,2,4 --seeds 3
      synthkit compare --real-dir ./pool --test-dir ./test --methods vanilla-matched,last-1,adapted --jobs 4
    """
    from synthkit.artifacts import workspace_lock, write_bytes, write_json
    from synthkit.data.images import ImageSet
    from synthkit.recipes.chain import ChainSettings, Workspace
    from synthkit.recipes.studies.compare import Split, compare, comparison_markdown, plot_comparison

    settings = ChainSettings.from_given(options.given(recipe), Workspace(workspace))
    first = settings.adapt.seed
    splits = [Split(count, seed) for count in shots for seed in range(first, first + seeds)]
    with workspace_lock(workspace):
        pool, test = ImageSet.scan(real_dir), ImageSet.scan(test_dir)
        result = compare(settings, workspace, pool, test, methods, splits, jobs)
        table = comparison_markdown(result.rows, result.paired)
        text = f"Top-1 on {result.n_test} real test images\n\n{table}\n"
        write_json(workspace / "compare.json", result.to_json())
        write_bytes(workspace / "compare.md", text.encode())
        plot_comparison(result.rows, workspace / "compare.png")
    return options.Output(result.to_json(), f"{text}\nalso in {workspace / 'compare'}.json, .md and .png")
