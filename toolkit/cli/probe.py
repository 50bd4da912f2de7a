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
@options.folder("--synth-dir", "Synthetic set  [default: WORKSPACE/synthetic]")
@options.folder("--real-dir", "Real photos to learn.", required=True)
@options.folder("--test-dir", "Real photos to test on  [default: a quarter of --real-dir]")
@click.option("--prompts", multiple=True, help="NAME=DIR: a synthetic set of other prompts, to compare.")
@click.option(
    "--points", type=click.IntRange(2), default=6, show_default=True, help="Values of k to measure."
)
@click.option(
    "--ablations",
    default="statistics,augmentation,inputs",
    show_default=True,
    help="Other causes of the gap to try, one at a time; none: leave them out.",
)
@options.skip_bad
def command(
    workspace: Path,
    synth_dir: Path | None,
    real_dir: Path,
    test_dir: Path | None,
    prompts: tuple[str, ...],
    points: int,
    ablations: str,
    skip_bad: bool,
    **recipe: Any,
) -> options.Output:
    """Find the layers in which a student of synthetic images falls behind one of real photos.

    Layer groups 1..k learn one domain and are frozen, the rest learns the other; the last groups learn shares
    of the real photos; other causes are tried one at a time (arXiv 2405.03243). Results are kept and reused.

    \b
    Examples:
      synthkit probe --real-dir ./photos
      synthkit probe --synth-dir ./synthetic --real-dir ./photos --test-dir ./test --student resnet10t
    """
    from synthkit.artifacts import workspace_lock, write_bytes, write_json
    from synthkit.data.images import ImageSet
    from synthkit.recipes.diagnostics.probe import (
        Probe,
        ProbeSettings,
        held_out,
        plot_probe,
        probe_markdown,
        run_probe,
    )
    from synthkit.recipes.settings import AdaptSettings, TrainSettings

    given = options.given(recipe)
    training = given.over("train", TrainSettings())
    names = () if ablations == "none" else tuple(name.strip() for name in ablations.split(","))
    settings = ProbeSettings(points, names)
    folders = _named_folders(prompts)
    synthetic = ImageSet.scan(synth_dir or workspace / "synthetic", skip_bad)
    test = ImageSet.scan(test_dir, skip_bad) if test_dir else None
    real, test = held_out(ImageSet.scan(real_dir, skip_bad), test, training.seed)
    others = {name: ImageSet.scan(folder, skip_bad) for name, folder in folders.items()}
    with workspace_lock(workspace):
        probe = Probe(synthetic, real, test, training, workspace / "probe")
        result = run_probe(probe, settings, given.over("adapt", AdaptSettings()), others)
        text = f"{probe_markdown(result)}\n"
        write_json(workspace / "probe.json", result.to_json())
        write_bytes(workspace / "probe.md", text.encode())
        plot_probe(result, workspace / "probe.png")
    return options.Output(result.to_json(), f"{text}\nalso in {workspace / 'probe'}.json, .md and .png")


def _named_folders(texts: tuple[str, ...]) -> dict[str, Path]:
    pairs = [text.partition("=") for text in texts]
    for name, _, folder in pairs:
        if not (name.isidentifier() and folder):
            raise ConfigError(
                f"--prompts takes NAME=DIR with a plain name, for example captions=./synthetic2, not {name!r}"
            )
    return {name: Path(folder) for name, _, folder in pairs}
