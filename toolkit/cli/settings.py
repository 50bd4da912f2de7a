"""`synthkit settings`."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import click

from synthkit.cli import options
from synthkit.config import as_recipe
from synthkit.recipes.settings import SECTIONS


@options.command("settings")
@click.argument("section", required=False, type=click.Choice(list(SECTIONS)))
def command(workspace: Path, section: str | None) -> options.Output:
    """Print every setting with its default, range and meaning, as a recipe for --config.

    \b
    Example: synthkit settings train
    Example: synthkit settings > recipe.toml
    """
    chosen = {section: SECTIONS[section]} if section else SECTIONS
    data = {name: dataclasses.asdict(kind()) for name, kind in chosen.items()}
    return options.Output(data, as_recipe(chosen).rstrip())
