"""`synthkit report`."""

from __future__ import annotations

from pathlib import Path

import click

from synthkit.cli import options


@options.command("report")
@click.option(
    "--real-dir", type=click.Path(path_type=Path), help="Real photos to show beside the synthetic images."
)
@options.skip_bad
@click.option(
    "-o", "--out", type=click.Path(path_type=Path), help="File to write.  [default: WORKSPACE/report.html]"
)
def command(workspace: Path, real_dir: Path | None, skip_bad: bool, out: Path | None) -> options.Output:
    """Write one self-contained HTML page of everything in the workspace.

    Nothing is computed: the page shows the gap after `synthkit gap`, tables after `synthkit compare`, and
    images over the steps after `synthkit learn-style --set learn-style.preview_every=50`.

    \b
    Example: synthkit report --real-dir ./few_shots
    """
    from synthkit.data.images import ImageSet
    from synthkit.recipes.diagnostics.report import write_report

    photos = ImageSet.scan(real_dir, skip_bad) if real_dir else None
    target = out or workspace / "report.html"
    sections = write_report(workspace, photos, target)
    shown = [name for name, there in sections.items() if there]
    return options.Output({"out": target, "sections": shown}, f"{target}: {', '.join(shown)}")
