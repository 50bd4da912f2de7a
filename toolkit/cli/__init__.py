"""The command line: one file per command, imported only when that command runs or shows its help."""

from __future__ import annotations

import importlib
import logging
import os
import sys
import warnings
from pathlib import Path
from typing import Any

import click

import synthkit
from synthkit.errors import ConfigError, nearest
from synthkit.one_line import OneLineErrors, one_line

COMMANDS = {
    "build-engines": "Turn a diffusion model into engines (once per device).",
    "learn-style": "Learn a style token from a few real photos.",
    "generate": "Generate synthetic images of every class in the learned style.",
    "train": "Train a student on synthetic, then on real images (bridged transfer++).",
    "adapt": "Few photos in, a classifier bundle out: runs whatever is missing.",
    "export": "Write a trained student as a verified bundle.",
    "update": "Refit a bundle to new photos, on the device.",
    "rollback": "Go back to the version before an update.",
    "predict": "Classify images with a bundle.",
    "evaluate": "Measure a bundle's top-1 on a test folder.",
    "verify": "Check that a bundle is whole and computes what it should.",
    "bench": "Measure a bundle's speed and memory.",
    "serve": "Answer HTTP requests with a bundle.",
    "compare": "Table of methods, shots and seeds on one data set.",
    "probe": "Where the synthetic-to-real gap sits, layer group by layer group.",
    "gap": "Tell how synthetic images differ from real photos.",
    "report": "Write everything of a workspace as one HTML page.",
    "doctor": "Tell what this machine can really run.",
    "settings": "Print every setting as a recipe.",
    "demo": "Run the whole chain on embedded real data.",
}


class LazyGroup(OneLineErrors, click.Group):
    """A group that knows its commands by name and imports the file of the one that is asked for."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """The names, in the order of a user's work."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The command, imported now."""
        if cmd_name not in COMMANDS:
            return None
        module = importlib.import_module(f"synthkit.cli.{cmd_name.replace('-', '_')}")
        command = module.command
        assert isinstance(command, click.Command)
        return command

    def resolve_command(self, ctx: click.Context, args: list[str]) -> Any:
        """The command of the arguments; an unknown one is refused with the nearest names."""
        if args and args[0] not in COMMANDS:
            raise click.UsageError(f"no command {args[0]!r}{nearest(args[0], COMMANDS)}", ctx)
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The table of the commands, so that --help imports none of them."""
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


@click.group(
    cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110}
)
@click.version_option(synthkit.__version__, prog_name="synthkit")
@click.option("-v", "--verbose", is_flag=True, help="Tell more on stderr.")
@click.option("-q", "--quiet", is_flag=True, help="Tell errors only.")
@click.option(
    "--workspace",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path("synthkit-work"),
    show_default=True,
    help="Folder where the stages write when they are not told another.",
)
@click.pass_context
def main(ctx: click.Context, verbose: bool, quiet: bool, workspace: Path) -> None:
    """A handful of photos becomes an image classifier that runs on an edge device.

    \b
    synthkit build-engines                    once per device
    synthkit adapt --real-dir ./few_shots     once per site
    """
    if verbose and quiet:
        raise ConfigError("--verbose and --quiet exclude each other; give one of them")
    _set_up_messages(verbose, quiet)
    ctx.obj = workspace


class _OneLine(logging.Formatter):
    """A message is a line, whatever characters the names in it hold; a traceback is left as it is."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        return one_line(super().formatMessage(record))


def _set_up_messages(verbose: bool, quiet: bool) -> None:
    level = logging.DEBUG if verbose else logging.ERROR if quiet else logging.INFO
    logging.basicConfig(stream=sys.stderr, level=logging.WARNING, force=True)
    for handler in logging.getLogger().handlers:
        handler.setFormatter(_OneLine("%(message)s"))
    logging.getLogger("synthkit").setLevel(level)
    if not verbose:  # other libraries' chatter is for --verbose
        logging.getLogger().setLevel(logging.ERROR)
        warnings.simplefilter("ignore")
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
        os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    if quiet:
        os.environ["TQDM_DISABLE"] = "1"
