"""`synthkit rollback`: go back to a bundle's version before."""

from __future__ import annotations

from pathlib import Path

import click

from synthkit.cli import options


@options.command("rollback")
@click.argument("bundle", type=click.Path(path_type=Path))
def command(workspace: Path, bundle: Path) -> options.Output:
    """Exchange a bundle and the version before its last update; a second time goes forward again.

    \b
    Example: synthkit rollback ./bundle
    """
    from synthkit.engines.bundle.versions import rollback

    before, now = rollback(bundle)
    data = {"outcome": "rolled back", "bundle": str(bundle), "from_version": before, "version": now}
    text = f"{bundle}: from version {before} to {now}; the same command goes forward again"
    return options.Output(data, text)
