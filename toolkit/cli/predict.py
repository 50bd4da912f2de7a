"""`synthkit predict`: classify images with a bundle."""

from __future__ import annotations

from pathlib import Path

import click

from synthkit import standalone
from synthkit.cli import options


@options.command("predict")
@click.option("--bundle", type=click.Path(path_type=Path), help="Bundle  [default: WORKSPACE/bundle]")
@click.option("--top", type=click.IntRange(min=1), default=3, show_default=True, help="Labels per image.")
@click.argument("images", nargs=-1, required=True, type=click.Path(path_type=Path), metavar="IMAGE...")
def command(workspace: Path, bundle: Path | None, top: int, images: tuple[Path, ...]) -> options.Output:
    """Classify images with a bundle; torch is not needed.

    Where a threshold was fitted (`synthkit update ... --coverage 0.9`), a less certain answer is
    "unknown".

    \b
    Example: synthkit predict --bundle ./bundle photo.jpg
    """
    from synthkit.engines.bundle.format import Bundle
    from synthkit.engines.bundle.versions import find_again

    folder = bundle or workspace / "bundle"
    find_again(folder)
    predictions = [one.to_json() for one in Bundle.open(folder).predict(images, top)]
    return options.Output({"predictions": predictions}, standalone.as_text(predictions))
