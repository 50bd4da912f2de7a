"""Settings as frozen dataclasses, filled from a TOML recipe file and from command-line options.

One definition serves both: a field made by `setting` carries its default and its help text, a recipe file's
section names the fields, and `synthkit.cli.options` makes the flags. This module knows no particular setting.
"""

from __future__ import annotations

import dataclasses
import math
import sys
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from synthkit.errors import ConfigError, nearest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

Settings = TypeVar("Settings")


def setting(default: Any, help: str, *, minimum: float | None = None) -> Any:
    """Field of a settings dataclass.

    Args:
        default: value when neither the recipe nor the command line gives one.
        help: one phrase for `--help`, with the unit.
        minimum: smallest value that makes sense.
    """
    return dataclasses.field(default=default, metadata={"help": help, "minimum": minimum})


def read_toml(path: Path) -> dict[str, Any]:
    """Content of a TOML file.

    Raises:
        ConfigError: the file is missing, cannot be read, is not UTF-8 text or is not TOML.
    """
    try:
        content: dict[str, Any] = tomllib.loads(path.read_text(encoding="utf-8"))
        return content
    except FileNotFoundError:
        raise ConfigError(f"no file {path}; give the path of a TOML file") from None
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}; give the path of a TOML file") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid TOML: {error}") from None


def read_recipe(path: Path, sections: Mapping[str, type]) -> dict[str, Any]:
    """Settings of every section of a recipe file; sections that the file leaves out get their defaults.

    Args:
        path: the TOML file.
        sections: section name -> settings dataclass.

    Raises:
        ConfigError: names every unknown section, unknown key and unusable value of the file at once.
    """
    content = read_toml(path)
    problems = [
        f"unknown section [{name}]{nearest(name, sections)}" for name in content if name not in sections
    ]
    for name, kind in sections.items():
        problems += [f"[{name}] {text}" for text in _problems(content.get(name, {}), kind)]
    if problems:
        raise ConfigError(f"{path}: {'; '.join(problems)}")
    return {name: kind(**_converted(content.get(name, {}), kind)) for name, kind in sections.items()}


def override(settings: Settings, values: Mapping[str, Any]) -> Settings:
    """Copy of the settings with the given values; None means "not given".

    Raises:
        ConfigError: a value lies outside its range.
    """
    given = {name: value for name, value in values.items() if value is not None}
    problems = _problems(given, type(settings))
    if problems:
        raise ConfigError("; ".join(problems))
    return typing.cast(Settings, dataclasses.replace(typing.cast(Any, settings), **given))


def _problems(values: Any, kind: type) -> list[str]:
    if not isinstance(values, Mapping):
        return [f"= {values!r}: must be a table of settings"]
    fields = {field.name: field for field in dataclasses.fields(kind)}
    types = typing.get_type_hints(kind)
    problems = []
    for name, value in values.items():
        if name not in fields:
            problems.append(f"unknown key {name!r}{nearest(name, fields)}")
            continue
        problem = _problem(value, types[name], fields[name].metadata.get("minimum"))
        if problem:
            problems.append(f"{name} = {value!r}: {problem}")
    return problems


def _problem(value: Any, kind: Any, minimum: float | None) -> str:
    allowed = typing.get_args(kind)
    if typing.get_origin(kind) is typing.Literal:
        return "" if value in allowed else f"must be one of {', '.join(map(str, allowed))}"
    accepted = tuple(allowed) if allowed and typing.get_origin(kind) is not tuple else (kind,)
    if not any(_is_a(value, one) for one in accepted):
        names = [getattr(one, "__name__", str(one)) for one in accepted if one is not type(None)]
        return f"must be {' or '.join(names)}"
    if isinstance(value, float) and not math.isfinite(value):
        return "must be a finite number"
    if minimum is not None and isinstance(value, (int, float)) and value < minimum:
        return f"must be at least {minimum}"
    return ""


def _is_a(value: Any, kind: Any) -> bool:
    if typing.get_origin(kind) is tuple:
        return isinstance(value, (list, tuple))
    if kind is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, kind)


def _converted(values: Mapping[str, Any], kind: type) -> dict[str, Any]:
    types = typing.get_type_hints(kind)
    return {
        name: tuple(value) if typing.get_origin(types[name]) is tuple else value
        for name, value in values.items()
    }
