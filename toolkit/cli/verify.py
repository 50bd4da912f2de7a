"""`synthkit verify`: check that a bundle is whole and computes what it should."""

from __future__ import annotations

from pathlib import Path

import click

from synthkit.cli import options


@options.command("verify")
@click.option("--bundle", type=click.Path(path_type=Path), help="Bundle  [default: WORKSPACE/bundle]")
def command(workspace: Path, bundle: Path | None) -> options.Output:
    """Check that a bundle is whole and computes what it should on this machine.

    Ends with 1 when it is not: a file is missing, altered or foreign, or the model's golden outputs differ.

    \b
    Example: synthkit verify --bundle ./bundle
    """
    from synthkit.engines.bundle.format import VerifyResult, verify
    from synthkit.engines.bundle.versions import find_again

    folder = bundle or workspace / "bundle"
    find_again(folder)
    result = VerifyResult(tuple(verify(folder)))
    text = f"{folder}: whole, and its golden outputs come out as they should"
    if not result.ok:
        text = "\n".join(f"{folder}: {failure}" for failure in result.failures)
    return options.Output(result.to_json(), text, ok=result.ok)
