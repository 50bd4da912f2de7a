"""What the commands share: `--json`, `--workspace`, `--force`, `--dry-run`, and how settings are given.

A command has flags for the few settings that most users need. Every setting, these too, can be given by
`--config FILE` and by `--set SECTION.NAME=VALUE`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import sys
import typing
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from synthkit.artifacts import Stage, json_bytes, plan_stages
from synthkit.config import Given, gather
from synthkit.recipes.settings import SECTIONS

Function = Callable[..., Any]


@dataclass(frozen=True)
class Output:
    """What a command answers.

    Attributes:
        data: the object that `--json` prints.
        text: what a person reads otherwise.
        ok: False when a check failed, which ends the command with 1.
    """

    data: Mapping[str, Any]
    text: str
    ok: bool = True


def command(name: str) -> Callable[[Function], click.Command]:
    """Decorator of a function that takes the workspace and its options and returns an `Output`.

    Whatever a library prints goes to stderr, so that stdout holds the answer alone.
    """

    def decorate(function: Function) -> click.Command:
        def run(workspace: Path, /, as_json: bool, own_workspace: Path | None, **options: Any) -> None:
            with _stdout_for_the_answer_alone():
                output = function(own_workspace or workspace, **options)
            # In UTF-8 whatever the console's encoding is, for JSON must be; text as far as the console goes.
            click.echo(json_bytes(output.data) if as_json else printable(output.text))
            if not output.ok:
                raise SystemExit(1)

        functools.update_wrapper(run, function)  # takes over the options that other decorators added
        as_json = click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout.")
        own_workspace = click.option(
            "--workspace",
            "own_workspace",
            type=click.Path(path_type=Path, file_okay=False),
            help="Folder where the stages write.  [default: synthkit-work]",
        )
        made = click.command(name, help=function.__doc__)(own_workspace(as_json(click.pass_obj(run))))
        made.params.sort(key=_place_in_help)
        return made

    return decorate


def _place_in_help(parameter: click.Parameter) -> int:
    """A command's own options first, then its settings, then what all commands have."""
    common = ("config", "assignments", "force", "dry_run", "own_workspace", "as_json")
    return 2 + common.index(parameter.name) if parameter.name in common else int(
        isinstance(parameter, SettingOption)
    )


def printable(text: str) -> str:
    """A text that the console can encode, with escapes for what it cannot."""
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    return text.encode(encoding, "backslashreplace").decode(encoding)


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


def folder(flag: str, help: str, **how: Any) -> Callable[[Function], Function]:
    """An option that takes a file or folder."""
    return click.option(flag, type=click.Path(path_type=Path), help=help, **how)


def recipe_options(function: Function) -> Function:
    """Add --config and --set, by which every setting can be reached."""
    for option in (
        click.option(
            "--set",
            "assignments",
            multiple=True,
            metavar="SECTION.NAME=VALUE",
            help="Any other setting; `synthkit settings` lists them. Can be given several times.",
        ),
        folder("--config", "TOML recipe, or a stage's manifest.json, with settings."),
    ):
        function = option(function)
    return function


def stage_options(function: Function) -> Function:
    """Add the options that every stage has."""
    for option in (
        click.option("--dry-run", is_flag=True, help="Tell what would be done, and do nothing."),
        click.option("--force", is_flag=True, help="Redo the stage even when nothing changed."),
        recipe_options,
    ):
        function = option(function)
    return function


class SettingOption(click.Option):
    """An option that fills settings; None stands for "not given", so that zeros and defaults count as given.

    Attributes:
        settings: (section, name) of each setting that it fills.
    """

    settings: tuple[tuple[str, str], ...] = ()


def setting_flags(*names: str) -> Callable[[Function], Function]:
    """Add a flag for each of the settings that most users need; all others are for --set.

    Args:
        names: "section.name" each; the flag is the name. Several with "+" between them share a flag.
    """

    def decorate(function: Function) -> Function:
        for text in reversed(names):
            function = _flag(tuple(tuple(one.split(".")) for one in text.split("+")))(function)
        return function

    return decorate


def _flag(settings: Any) -> Callable[[Function], Function]:
    section, name = settings[0]
    field = next(one for one in dataclasses.fields(SECTIONS[section]) if one.name == name)
    kind = typing.get_type_hints(SECTIONS[section])[name]
    flag = "--" + name.replace("_", "-")
    text, _, chosen = field.metadata["help"].partition("; chosen: ")
    help_text = f"{text[0].upper()}{text[1:]}.  [default: {_shown(field.default, chosen)}]"
    declaration = f"{flag}/--no-{flag[2:]}" if kind is bool else flag
    extra: dict[str, Any] = {} if kind is bool else {"type": _click_type(kind)}

    def add(function: Function) -> Function:
        own = type("Own", (SettingOption,), {"settings": settings})
        return click.option(
            declaration, f"setting_{name}", cls=own, default=None, help=help_text, **extra
        )(function)

    return add


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


def given(values: Mapping[str, Any]) -> Given:
    """What --config, --set and the flags of a command give, the later overruling the earlier.

    Args:
        values: what click parsed of the options that `recipe_options` and `setting_flags` added.

    Raises:
        ConfigError: names every unknown section, unknown key and unusable value at once.
    """
    command = click.get_current_context().command
    flags = {
        setting: values[str(option.name)]
        for option in command.params
        if isinstance(option, SettingOption)
        for setting in option.settings
    }
    return gather(SECTIONS, values["config"], values["assignments"], flags)


def planned(stage: Stage, force: bool) -> Output:
    """The answer of a stage's --dry-run."""
    [(name, state)] = plan_stages([stage], force=[stage.name] if force else []).items()
    return Output({"stage": name, "state": state, "out": stage.out}, f"{name}: {state}")
