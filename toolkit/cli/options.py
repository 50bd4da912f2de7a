"""What the commands share: `--json`, `--force`, `--dry-run`, and flags made from settings dataclasses."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import os
import sys
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from synthkit.config import override, read_recipe
from synthkit.recipes.settings import SECTIONS

Function = Callable[..., Any]


@dataclass(frozen=True)
class Output:
    """What a command answers.

    Attributes:
        data: the object that `--json` prints.
        text: what a person reads otherwise.
        ok: False when a verdict failed, which ends the command with 1.
    """

    data: Mapping[str, Any]
    text: str
    ok: bool = True


def command(name: str) -> Callable[[Function], click.Command]:
    """Decorator of a function that takes the workspace and its options and returns an `Output`.

    Whatever a library prints goes to stderr, so that stdout holds the answer alone.
    """

    def decorate(function: Function) -> click.Command:
        def run(workspace: Path, /, as_json: bool, **options: Any) -> None:
            with _stdout_for_the_answer_alone():
                output = function(workspace, **options)
            click.echo(json.dumps(output.data, ensure_ascii=False, default=str) if as_json else output.text)
            if not output.ok:
                raise SystemExit(1)

        functools.update_wrapper(run, function)  # takes over the options that other decorators added
        as_json = click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout.")
        made = click.command(name, help=function.__doc__)(as_json(click.pass_obj(run)))
        made.params.sort(key=_place_in_help)
        return made

    return decorate


class SettingOption(click.Option):
    """An option made from a settings dataclass; `--help` lists it after what is the command's own."""


def _place_in_help(parameter: click.Parameter) -> int:
    if isinstance(parameter, SettingOption):
        return 2
    return 1 if parameter.name in ("as_json", "config", "force", "dry_run") else 0


@contextlib.contextmanager
def _stdout_for_the_answer_alone() -> Iterator[None]:
    """Send to stderr what Python, native libraries and child processes write to stdout meanwhile."""
    sys.stdout.flush()
    kept = os.dup(1)
    try:
        os.dup2(2, 1)
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)


skip_bad = click.option(
    "--skip-bad", is_flag=True, help="Leave unreadable files out instead of refusing the folder."
)


def stage_options(function: Function) -> Function:
    """Add the options that every stage has."""
    for option in (
        click.option("--dry-run", is_flag=True, help="Tell what would be done, and do nothing."),
        click.option("--force", is_flag=True, help="Redo the stage even when nothing changed."),
        click.option("--config", type=click.Path(path_type=Path), help="TOML recipe with the settings."),
    ):
        function = option(function)
    return function


def settings_options(*sections: str) -> Callable[[Function], Function]:
    """Add a flag for every setting of the given sections; None stands for "not given".

    A name that several of the sections have gets its section before it (`--style-steps`), but for the seed,
    which is one for all.
    """

    def decorate(function: Function) -> Function:
        made: set[str] = set()
        for section, field in reversed(list(_fields(sections))):
            name = _parameter(sections, section, field)
            if name not in made:
                function = _option(field, typing.get_type_hints(SECTIONS[section])[field.name], name)(
                    function
                )
            made.add(name)
        return function

    return decorate


def _fields(sections: Sequence[str]) -> Iterator[tuple[str, dataclasses.Field[Any]]]:
    for section in sections:
        for field in dataclasses.fields(SECTIONS[section]):
            yield section, field


def _parameter(sections: Sequence[str], section: str, field: dataclasses.Field[Any]) -> str:
    """Name of a setting's option, unique among the sections."""
    owners = [one for one, other in _fields(sections) if other.name == field.name]
    if len(owners) == 1 or field.name == "seed":
        return field.name
    return f"{section.removeprefix('learn-')}_{field.name}"


def _option(field: dataclasses.Field[Any], kind: Any, name: str) -> Callable[[Function], Function]:
    flag = "--" + name.replace("_", "-")
    text, _, chosen = field.metadata["help"].partition("; chosen: ")
    help_text = f"{text}  [default: {_shown(field.default, chosen)}]"
    if kind is bool:
        return click.option(f"{flag}/--no-{flag[2:]}", name, cls=SettingOption, default=None, help=help_text)
    several = typing.get_origin(kind) is tuple
    return click.option(
        flag, name, cls=SettingOption, type=_click_type(kind), default=None, multiple=several, help=help_text
    )


def _shown(default: Any, chosen: str) -> str:
    """A default for `--help`; `chosen` says what takes the place of None, where something does."""
    if default in (None, "", ()):
        return chosen or "none"
    return str(default).lower() if isinstance(default, bool) else str(default)


def _click_type(kind: Any) -> Any:
    if typing.get_origin(kind) is typing.Literal:
        return click.Choice([str(choice) for choice in typing.get_args(kind)])
    members = [one for one in typing.get_args(kind) if one is not type(None)]
    if str in members:  # a number or a range: whoever reads the setting tells them apart
        return str
    return members[0] if members else kind


def gather_settings(config: Path | None, options: Mapping[str, Any], *sections: str) -> dict[str, Any]:
    """Settings of the given sections: defaults, then the recipe file, then the flags.

    Args:
        config: recipe file, or None.
        options: what click parsed.
        sections: the sections that `settings_options` was given.
    """
    settings = read_recipe(config, SECTIONS) if config else {name: SECTIONS[name]() for name in sections}
    for section in sections:
        given = {
            field.name: options.get(_parameter(sections, section, field))
            for field in dataclasses.fields(SECTIONS[section])
        }
        settings[section] = override(
            settings[section], {name: value for name, value in given.items() if value != ()}
        )
    return settings
