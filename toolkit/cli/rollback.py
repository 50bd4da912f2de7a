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
    from synthkit.recipes.device.bundle import rollback_bundle

    result = rollback_bundle(bundle)
    text = f"{bundle}: from version {result.from_version} to {result.version}"
    return options.Output(result.to_json(), f"{text}; the same command goes forward again")
