"""`synthkit probe`: where the synthetic-to-real gap sits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from synthkit.cli import options
from synthkit.errors import ConfigError


@options.command("probe")
@options.setting_flags(
    "train.student", "train.weights", "train.pretrained", "train.epochs", "train.seed+adapt.seed"
)
@options.recipe_options
@click.option(
    "--synth-dir", type=click.Path(path_type=Path), help="Synthetic set  [default: WORKSPACE/synthetic]"
)
@click.option(
    "--real-dir", type=click.Path(path_type=Path), required=True, help="Class folders of the real photos."
)
@click.option(
    "--test-dir", type=click.Path(path_type=Path), help="Real photos to measure with  [default: a quarter]"
)
@click.option(
    "--prompts", multiple=True, help="NAME=DIR: another synthetic set, drawn from other prompts, to compare."
)
@click.option(
    "--points", type=click.IntRange(2), default=6, show_default=True, help="Values of k to measure."
)
@click.option(
    "--switches",
    default="statistics,augmentation,inputs",
    show_default=True,
    help="Other causes to try in turn; none: leave them out.",
)
@click.option("--efficiency/--no-efficiency", default=True, help="Try 1/16 to all of the real photos.")
@options.skip_bad
def command(
    workspace: Path,
    synth_dir: Path | None,
    real_dir: Path,
    test_dir: Path | None,
    prompts: tuple[str, ...],
    points: int,
    switches: str,
    efficiency: bool,
    skip_bad: bool,
    **recipe: Any,
) -> options.Output:
    """Find the units in which a student of synthetic images falls behind one of real photos.

    Units 1..k learn one domain and stay as they are, the rest learns the other; the last units learn shares
    of the real photos; other causes are tried in turn (arXiv 2405.03243). What was measured is kept.

    \b
    Example: synthkit probe --synth-dir ./synthetic --real-dir ./photos --test-dir ./test --student resnet10t
    """
    from synthkit.artifacts import workspace_lock, write_bytes, write_json
    from synthkit.data.images import ImageSet
    from synthkit.recipes.diagnostics.probe import (
        Probe,
        ProbeSettings,
        held_out,
        markdown,
        plot,
        run_probe,
    )
    from synthkit.recipes.settings import AdaptSettings, TrainSettings

    given = options.given(recipe)
    training = given.over("train", TrainSettings())
    named = () if switches == "none" else tuple(name.strip() for name in switches.split(","))
    settings = ProbeSettings(points, named, efficiency)
    folders = _pairs(prompts)
    synthetic = ImageSet.scan(synth_dir or workspace / "synthetic", skip_bad)
    test = ImageSet.scan(test_dir, skip_bad) if test_dir else None
    real, test = held_out(ImageSet.scan(real_dir, skip_bad), test, training.seed)
    others = {name: ImageSet.scan(folder, skip_bad) for name, folder in folders.items()}
    with workspace_lock(workspace):
        probe = Probe(synthetic, real, test, training, workspace / "probe")
        result = run_probe(probe, settings, given.over("adapt", AdaptSettings()), others)
        write_json(workspace / "probe.json", result)
        write_bytes(workspace / "probe.md", (text := f"{markdown(result)}\n").encode())
        plot(result, workspace / "probe.png")
    return options.Output(result, f"{text}\nalso in {workspace / 'probe'}.json, .md and .png")


def _pairs(texts: tuple[str, ...]) -> dict[str, Path]:
    pairs = [text.partition("=") for text in texts]
    for name, _, folder in pairs:
        if not (name.isidentifier() and folder):
            raise ConfigError(
                f"--prompts takes NAME=DIR with a plain name, for example captions=./synthetic2, not {name!r}"
            )
    return {name: Path(folder) for name, _, folder in pairs}
